"""Which precision suits a machine. bfloat16 is faster only where the hardware computes in it."""

from __future__ import annotations

import os
from typing import Literal

import torch

from kdtoolkit.errors import KDError

Precision = Literal["float32", "bfloat16", "float16"]

# Values of oneDNN's environment variable that keep its kernels from bfloat16 instructions which the CPU may have.
_ISA_WITHOUT_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}


def has_bfloat16(device: str | torch.device = "cpu") -> bool:
    """Whether the device multiplies bfloat16 in hardware.

    A CPU needs AVX512-BF16 or AMX instructions for it, which the environment variable `ONEDNN_MAX_CPU_ISA` can hide. A
    CUDA device needs a compute capability of at least 8. All other devices count as having none.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu":
        return False
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    if isa.upper() in _ISA_WITHOUT_BFLOAT16:
        return False
    # Private names of torch.cpu, seen in torch 2.6 to 2.14; what replaces them in public is not in 2.6.
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolve_precision(precision: Literal["auto"] | Precision, device: str | torch.device = "cpu") -> Precision:
    """The precision to compute in on a device. `auto` is bfloat16 where the hardware has it, else float32.

    Raises KDError if there is no precision of that name.
    """
    if precision not in ("auto", "float32", "bfloat16", "float16"):
        raise KDError(f"precision is 'auto', 'float32', 'bfloat16' or 'float16', not {precision!r}")
    if precision != "auto":
        return precision
    return "bfloat16" if has_bfloat16(device) else "float32"


def autocast_type(precision: Precision) -> torch.dtype:
    """The type that autocast computes in; float32 stands for no autocast."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
