"""The walk through a head's towers, block by block, for detectors and adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from kdtoolkit.contract import State
from kdtoolkit.winograd import over_maps

Layer = Callable[[Tensor], Tensor]
Tower = Sequence[Layer]
"""The blocks of a tower, each without the activation that stands between it and the next one."""


def walk_towers(
    state: State, towers: Mapping[str, Sequence[Tower]], stage: int = 0, activation: Layer | None = None
) -> Iterator[State]:
    """Yield the states of a head from `stage`, whose state is given, to the end.

    A state is taken before the activation. The next block applies the activation first; only the first block, at stage
    0, takes its state as it is.

    Args:
        state: at `stage`: for each branch, one tensor per level.
        towers: for each branch, one tower per level. All have the same number of blocks.
        stage: how many blocks have run.
        activation: stands between two blocks; None for nothing.
    """
    yield state
    depth = len(next(iter(towers.values()))[0])
    for i in range(stage, depth):
        before = activation if i else None
        state = {
            branch: _apply([tower[i] for tower in levels], [x if before is None else before(x) for x in state[branch]])
            for branch, levels in towers.items()
        }
        yield state


def _apply(blocks: Sequence[Layer], maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Each level's block of its map."""
    if all(block == blocks[0] for block in blocks):
        return tuple(over_maps(blocks[0], maps))
    return tuple(block(x) for block, x in zip(blocks, maps, strict=True))


def flatten(maps: Sequence[Tensor], columns: int) -> Tensor:
    """Turn maps (N, priors per cell * columns, H, W), one per level, into one (N, A, columns) in float32."""
    cells = torch.cat([level.flatten(2) for level in maps], -1).transpose(1, 2)
    return cells.reshape(cells.shape[0], -1, columns).float()
