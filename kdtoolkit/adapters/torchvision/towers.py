"""The blocks of torchvision's heads: which layers of a tower run between two activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch.nn.functional as F
from torch import Tensor, nn

from kdtoolkit.detectors.towers import Layer


@dataclass(frozen=True)
class Block:
    """Layers that run one after the other. The activation that follows them is left out."""

    layers: tuple[Layer, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Run the layers."""
        for layer in self.layers:
            x = layer(x)
        return x

    def __iter__(self) -> Iterator[Layer]:
        """The layers, from the first."""
        return iter(self.layers)

    @property
    def channels(self) -> int:
        """The number of channels of its output."""
        return next(
            layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
            for layer in self.layers
            if isinstance(layer, nn.Conv2d | nn.Linear)
        )

    @property
    def is_spatial(self) -> bool:
        """Whether its output is a map."""
        return any(isinstance(layer, nn.Conv2d) for layer in self.layers)

    def still(self) -> Block:
        """The same block, for a second pass of the head: the statistics of its batch norms stay as they are."""
        return Block(tuple(map(_still, self.layers)))


def blocks_of(tower: nn.Module) -> list[Block]:
    """The blocks of a tower, cut at its activations. What follows the last activation is left out."""
    children = list(tower) if isinstance(tower, nn.Sequential) else [tower]
    blocks: list[Block] = []
    layers: list[Layer] = []
    for layer in chain.from_iterable(child if isinstance(child, nn.Sequential) else [child] for child in children):
        if isinstance(layer, nn.ReLU | nn.ReLU6):
            blocks.append(Block(tuple(layers)))
            layers = []
        else:
            layers.append(layer)
    return blocks


def _still(layer: Layer) -> Layer:
    if not isinstance(layer, nn.BatchNorm2d) or not layer.training:
        return layer
    return partial(
        F.batch_norm,
        running_mean=None,
        running_var=None,
        weight=layer.weight,
        bias=layer.bias,
        training=True,
        eps=layer.eps,
    )
