"""Parts of detectors that need float32 under autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Context in which operations on the device of `x` run in the precision of their inputs.

    The device may be `meta`.
    """
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def without_narrow_bfloat16(images: Tensor, stride: int) -> AbstractContextManager[Any]:
    """Context for the backbone and neck of another library's detector: no bfloat16 autocast for narrow images on a CPU.

    A convolution of stride 2 computes the level of `stride`. If images (N, 3, H, W) are at most stride / 2 px wide, the
    input of that convolution is one cell wide. On some CPUs the bfloat16 gradient of its weight is then uninitialised
    memory (torch 2.14, oneDNN): up to 1e36, infinite or NaN. For such images autocast is off in this context.
    Otherwise, and if no gradient is recorded, nothing changes.
    """
    faulty = (
        images.device.type == "cpu"
        and torch.is_grad_enabled()
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and images.shape[-1] <= stride // 2
    )
    return without_autocast(images) if faulty else nullcontext()
