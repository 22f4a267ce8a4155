"""The walk through a head's towers, for detectors and adapters that run their blocks one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from kdtoolkit.contract import State

Layer = Callable[[Tensor], Tensor]
Tower = Sequence[Layer]
"""The blocks of a tower, each without the activation that stands between it and the next one."""


def walk_towers(
    state: State, towers: Mapping[str, Sequence[Tower]], stage: int = 0, activation: Layer | None = None
) -> Iterator[State]:
    """Yield the states of a head from `stage`, whose state is given, to the end.

    States are taken before the activation, which is applied on entry to the next block. The first block, at stage 0,
    takes its state as it is.

    Args:
        state: at `stage`: for each branch, one tensor a level.
        towers: for each branch, one tower a level. All have the same number of blocks.
        stage: how many blocks have run.
        activation: stands between two blocks; None for nothing.
    """
    yield state
    depth = len(next(iter(towers.values()))[0])
    for i in range(stage, depth):
        before = activation if i else None
        state = {
            branch: tuple(
                tower[i](x if before is None else before(x)) for tower, x in zip(levels, state[branch], strict=True)
            )
            for branch, levels in towers.items()
        }
        yield state


def flatten(maps: Sequence[Tensor], columns: int) -> Tensor:
    """One (N, A, columns) in float32 of maps (N, priors per cell * columns, H, W), one map a level."""
    cells = torch.cat([level.flatten(2) for level in maps], -1).transpose(1, 2)
    return cells.reshape(cells.shape[0], -1, columns).float()
