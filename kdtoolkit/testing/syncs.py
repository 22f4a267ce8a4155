"""Count what makes a GPU's host wait, on any machine: operations that read a tensor's values on the host."""

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
# Operations whose result depends on values that the host must know: a number, or a tensor's shape.
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
    """To the host: on a CPU they reach no operation, so that only the calls show."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _COPIES:
            self.found[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def _by_mask(args: Any) -> bool:
    """Whether it is by a mask of bools, unless one value is written for all of it: that is a fill."""
    masks = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return masks and not (len(args) > 2 and args[2].numel() == 1)


@contextmanager
def count_syncs() -> Iterator[Counter[str]]:
    """Count, by name, the operations in the block for which a GPU's host would wait.

    On tensors of any device, also of those that are on the host in truth: hand in images and targets as a GPU would
    have them. Copies from the host to a GPU are not counted.
    """
    found: Counter[str] = Counter()
    with _Copies(found), _Operations(found):
        yield found
