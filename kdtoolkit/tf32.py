"""TF32: whether a GPU computes float32 products with 10 bits of mantissa. Torch has switches for it of two kinds.

`allow_tf32` is the older kind, `fp32_precision` came with torch 2.9. A program may write to both. But torch refuses to
read `allow_tf32` once `fp32_precision` says something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch


def in_tf32() -> tuple[bool, bool]:
    """Whether matrix products, and whether convolutions, of float32 are computed in TF32 on a GPU."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision == "tf32", cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return matmul.allow_tf32, cudnn.allow_tf32


@contextmanager
def tensor_float32(choice: Literal["auto"] | bool) -> Iterator[None]:
    """Context in which float32 products on a GPU are computed in TF32 or not; "auto" leaves it to torch's settings."""
    if choice == "auto":
        yield
        return
    before = _switches()
    # This kind sets the other one too, so that either can be read in the context.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = choice
    try:
        yield
    finally:
        for switch, name, value in before:
            setattr(switch, name, value)


def _switches() -> list[tuple[Any, str, Any]]:
    """The switches that this torch has and can read, with their values. Those come first that set others too."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    found: list[tuple[Any, str, Any]] = []
    for switch in (matmul, cudnn):
        with suppress(RuntimeError):
            found.append((switch, "allow_tf32", switch.allow_tf32))
    if hasattr(matmul, "fp32_precision"):
        newer: tuple[Any, ...] = (matmul, cudnn.conv, cudnn.rnn)  # type: ignore[attr-defined]
        found += [(switch, "fp32_precision", switch.fp32_precision) for switch in newer]
    return found
