"""Where autocast must not reach: parts of detectors that need float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Where operations on the device of `x` run in the precision of their inputs. The device may be `meta`."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def without_narrow_bfloat16(images: Tensor, stride: int) -> AbstractContextManager[Any]:
    """Where a backbone of somebody else's library can be trained on narrow images under bfloat16 autocast on a CPU.

    A level of `stride` that a convolution of stride 2 computes has an input one cell wide where images (N, 3, H, W) are
    at most stride / 2 px wide. On some CPUs the bfloat16 gradient of that convolution's weight is uninitialised memory
    then (torch 2.14, oneDNN): up to 1e36, infinite or NaN. So autocast is off for such images. Elsewhere, and where no
    gradient is recorded, nothing changes.
    """
    faulty = (
        images.device.type == "cpu"
        and torch.is_grad_enabled()
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and images.shape[-1] <= stride // 2
    )
    return without_autocast(images) if faulty else nullcontext()
