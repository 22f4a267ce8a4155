"""The towers of a head, as any library builds them: their blocks of layers, and the walk through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain

import torch.nn.functional as F
from torch import Tensor, nn

from kdtoolkit.contract import State

Layer = Callable[[Tensor], Tensor]
Blocks = Sequence[Sequence[Layer]]
"""A tower: the layers of each of its blocks, without the activation between blocks."""


def blocks_of(tower: nn.Module) -> list[list[Layer]]:
    """A tower's layers, block by block, without the activation that ends each; last what follows the last of them."""
    children = list(tower) if isinstance(tower, nn.Sequential) else [tower]
    blocks: list[list[Layer]] = [[]]
    for layer in chain.from_iterable(child if isinstance(child, nn.Sequential) else [child] for child in children):
        if isinstance(layer, nn.ReLU | nn.ReLU6):
            blocks.append([])
        else:
            blocks[-1].append(layer)
    return blocks


def still(blocks: Blocks) -> Blocks:
    """The same layers, without what they learn by running: batch norm's statistics are of the detector's own pass."""
    return [
        [
            partial(
                F.batch_norm,
                running_mean=None,
                running_var=None,
                weight=layer.weight,
                bias=layer.bias,
                training=True,
                eps=layer.eps,
            )
            if isinstance(layer, nn.BatchNorm2d) and layer.training
            else layer
            for layer in block
        ]
        for block in blocks
    ]


def width_of(block: Sequence[Layer]) -> int:
    """Channels that a block gives."""
    return next(
        layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
        for layer in block
        if isinstance(layer, nn.Conv2d | nn.Linear)
    )


def walk(x: Tensor, blocks: Blocks, stage: int, activation: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """States of one tensor from `stage`, whose state is `x`, to the tower's end, each before the activation."""
    yield x
    for i in range(stage, len(blocks)):
        x = activation(x) if i else x
        for layer in blocks[i]:
            x = layer(x)
        yield x


def walk_towers(
    state: State,
    stage: int,
    towers: Mapping[str, Sequence[Blocks]],
    activation: Callable[[Tensor], Tensor],
) -> Iterator[State]:
    """States of all branches and levels from `stage`, whose state is given, to the end, one by one."""
    walks = {
        branch: [walk(x, blocks, stage, activation) for x, blocks in zip(maps, towers[branch], strict=True)]
        for branch, maps in state.items()
    }
    depth = max(len(blocks) for levels in towers.values() for blocks in levels)
    for _ in range(stage, depth + 1):
        yield {branch: tuple(map(next, levels)) for branch, levels in walks.items()}
