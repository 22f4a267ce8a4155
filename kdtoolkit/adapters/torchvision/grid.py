"""What the adapters of heads on a grid share: towers that run on the levels, each with its predictor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import permute_and_flatten

from kdtoolkit import processes
from kdtoolkit.adapters.torchvision.base import TorchvisionAdapter, assignment_of, match_by_iou
from kdtoolkit.adapters.torchvision.towers import Block
from kdtoolkit.contract import (
    Assignment,
    Batch,
    DetectorSpec,
    HeadOutputs,
    HeadTrace,
    Predictions,
    PriorKind,
    Priors,
    Stage,
    State,
    keep_states,
)
from kdtoolkit.detectors.towers import walk_towers


class GridAdapter(TorchvisionAdapter):
    """Base of the adapters of heads on a grid: towers that run on the levels, each with its predictor."""

    kind = PriorKind.ANCHORS
    activation: Callable[[Tensor], Tensor] = staticmethod(F.relu)

    @property
    def _generator(self) -> nn.Module:
        """The anchor generator."""
        return cast(nn.Module, self.model.anchor_generator)

    @property
    def _strides(self) -> tuple[int, ...]:
        return self._levels.strides

    def _towers(self) -> Mapping[str, Sequence[Sequence[Block]]]:
        """Each branch's tower on each level."""
        raise NotImplementedError

    def _predict(self, maps: Mapping[str, Sequence[Tensor]]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run the predictors on their inputs: logits, regression and quality, as `Predictions` has them."""
        raise NotImplementedError

    @property
    def _decode(self) -> Callable[[Tensor, Priors], Tensor]:
        """What turns the regression into boxes."""
        return partial(decode_offsets, self.model.box_coder)

    def _predictions(self, logits: Tensor, regression: Tensor, quality: Tensor | None, priors: Priors) -> Predictions:
        return Predictions(logits, regression, priors, self._decode, quality, self.spec.activation)

    def describe(self) -> DetectorSpec:
        """Describe the detector."""
        return DetectorSpec(
            name=f"torchvision {type(self.model).__name__}",
            num_classes=self._num_classes,
            strides=self._strides,
            channels=self._levels.channels,
            priors=self.kind,
            priors_per_cell=tuple(cast(Any, self._generator).num_anchors_per_location()),
            stages=_stages(self._towers(), self._levels.channels, self.activation),
            activation="softmax" if self.background else "sigmoid",
        )

    def head(
        self,
        features: tuple[Tensor, ...],
        batch: Batch,
        priors: Priors | None = None,
        stages: Collection[int] | None = None,
    ) -> HeadTrace:
        """Run towers and predictors. The priors are always the head's own."""
        towers = self._towers()
        states, last = keep_states(
            walk_towers(dict.fromkeys(towers, features), towers, activation=self.activation), stages
        )
        grid = tuple((x.shape[-2], x.shape[-1]) for x in features)
        return HeadTrace(states, self._finish(last, self._priors(grid, batch)))

    def resume(self, state: State, stage: int, trace: HeadTrace) -> Predictions:
        """Run the rest of the towers, then the predictors."""
        towers = {
            branch: [[block.still() for block in blocks] for blocks in levels]
            for branch, levels in self._towers().items()
        }
        _, last = keep_states(walk_towers(state, towers, stage, self.activation), ())
        return self._finish(last, trace.predictions.priors)

    def rebuild(self, outputs: HeadOutputs, batch: Batch) -> HeadTrace:
        """Make a pass again from its predictions."""
        priors = self._priors(outputs.grid, batch)
        return HeadTrace(outputs.states, self._predictions(outputs.logits, outputs.regression, outputs.quality, priors))

    def assign(self, trace: HeadTrace, batch: Batch) -> Assignment:
        """Assign by the library's own rule."""
        return self._assigned(self._matches(trace.predictions.priors, batch), batch)

    def _matches(self, priors: Priors, batch: Batch) -> Tensor:
        """(N, A): the index of the image's box that each prior answers for, by IoU. Negative numbers mean no box."""
        return match_by_iou(self.model.proposal_matcher, priors, batch)

    def _assigned(self, matches: Tensor, batch: Batch) -> Assignment:
        """The assignment that the library's losses make of matches (N, A)."""
        normaliser = processes.share(self._normaliser(matches >= 0), at_least=1)
        return assignment_of(matches, batch, self._num_classes, normaliser)

    def _normaliser(self, positive: Tensor) -> Tensor:
        """What the library divides its losses by: a count of the priors (N, A) that answer for an object."""
        return positive.sum()

    def _finish(self, state: State, priors: Priors) -> Predictions:
        towers = self._towers()
        activated = {
            branch: [self.activation(x) if blocks else x for x, blocks in zip(maps, towers[branch], strict=True)]
            for branch, maps in state.items()
        }
        return self._predictions(*self._predict(activated), priors)

    def _priors(self, grid: tuple[tuple[int, int], ...], batch: Batch) -> Priors:
        """The anchors of one image. All images share them."""
        # The library takes the type of anchors from the maps: bfloat16 maps, as under autocast, would round them.
        maps = [torch.zeros((), device=batch.images.device).expand(1, 1, *size) for size in grid]
        boxes = self._generator(ImageList(batch.images, [batch.sizes[0]]), maps)[0]
        per_cell = tuple(cast(Any, self._generator).num_anchors_per_location())
        counts = [height * width * each for (height, width), each in zip(grid, per_cell, strict=True)]
        strides = torch.cat(
            [boxes.new_full((count,), stride) for count, stride in zip(counts, self._strides, strict=True)]
        )
        return Priors(boxes, strides, grid, per_cell=per_cell)


def _stages(
    towers: Mapping[str, Sequence[Sequence[Block]]], channels: tuple[int, ...], activation: Callable[[Tensor], Tensor]
) -> tuple[Stage, ...]:
    depth = len(next(iter(towers.values()))[0])
    return (
        Stage("pyramid", dict.fromkeys(towers, channels)),
        *(
            Stage(
                f"block {i + 1}",
                {branch: tuple(blocks[i].channels for blocks in levels) for branch, levels in towers.items()},
                activation=activation,
            )
            for i in range(depth)
        ),
    )


def flatten(maps: Sequence[Tensor], columns: int) -> Tensor:
    """Turn maps (N, priors per cell * columns, H, W) into one (N, A, columns) in float32."""
    flat = [permute_and_flatten(x, x.shape[0], x.shape[1] // columns, columns, x.shape[2], x.shape[3]) for x in maps]
    return torch.cat(flat, 1).float()


def decode_offsets(coder: Any, regression: Tensor, priors: Priors) -> Tensor:
    """Decode offsets (..., A, 4) into boxes (..., A, 4)."""
    boxes = priors.boxes.expand_as(regression).reshape(-1, 4)
    decoded: Tensor = coder.decode_single(regression.reshape(-1, 4), boxes)
    return decoded.view_as(regression)
