"""Counts the operations that make the host wait for a GPU (they read a tensor's values). It works without a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_aten: Any = torch.ops.aten
# The host must know a tensor's values to run these: they return a number, or a tensor whose size depends on values.
_READS = {
    _aten._local_scalar_dense,
    _aten.equal,
    _aten.masked_select,
    _aten.nonzero,
    _aten.repeat_interleave,
    _aten._unique2,
    _aten.unique_dim,
    _aten.bincount,
}
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_}
_COPIES = {Tensor.tolist, Tensor.numpy, Tensor.cpu}


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet in _READS or (packet in _INDEXING and _by_mask(args)):
            self.found[packet.__name__] += 1
        return func(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    """Counts copies to the host. On a CPU such a copy is no operation of torch, so only the call can be seen."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _COPIES:
            self.found[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def _by_mask(args: Any) -> bool:
    """Whether it indexes by a mask of bools. To write one number to all places of a mask does not count: no wait."""
    masks = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return masks and not (len(args) > 2 and args[2].numel() == 1)


@contextmanager
def count_syncs() -> Iterator[Counter[str]]:
    """Count, by name, the operations in the block at which the host would wait for a GPU.

    It counts them for all tensors, as if each was on a GPU. Copies from the host to a GPU are not counted.
    """
    found: Counter[str] = Counter()
    with _Copies(found), _Operations(found):
        yield found
