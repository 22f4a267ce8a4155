"""What is known of a detector before it runs: its capabilities, priors, stages and levels."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor


class Capability(enum.StrEnum):
    """What a detector can show to a method."""

    FEATURES = "features"  # pyramid levels, with strides and channels
    PREDICTIONS = "predictions"  # class logits and boxes at priors
    STAGES = "stages"  # hidden states of the head, from each of which the head can be resumed
    DISTRIBUTIONS = "distributions"  # each box side is a distribution over bins
    ASSIGNMENT = "assignment"  # which prior answers for which ground-truth box


class PriorKind(enum.StrEnum):
    """What predictions are relative to."""

    POINTS = "points"  # one per cell
    ANCHORS = "anchors"  # one or more per cell
    PROPOSALS = "proposals"  # found by a first stage, other ones in each detector
    QUERIES = "queries"  # learned or selected, other ones in each detector

    @property
    def on_grid(self) -> bool:
        """Whether equal strides alone make two detectors' priors correspond."""
        return self in (PriorKind.POINTS, PriorKind.ANCHORS)


@dataclass(frozen=True)
class Stage:
    """One joint of the head: the `channels` (dim 1) of each branch's hidden state, one entry a tensor of it.

    Heads are compared branch by branch, so kin name them alike: `cls` and `reg` (dense), `box` (two-stage), `decoder`.
    Tensors are maps (N, C, H, W), one a level, where `spatial`; else one of vectors: (M, C), of M proposals of the
    batch, or (N, C, Q), of Q queries an image. `activation` stands between the joint and the next layer. States are
    taken *before* it and `resume` applies it, so it must be idempotent (ReLU). With another (SiLU) they are taken after
    it, and `activation` is None.
    """

    name: str
    channels: Mapping[str, tuple[int, ...]]
    spatial: bool = True
    activation: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class DetectorSpec:
    """The facts about a detector that methods are checked against before the first step.

    `channels`, `strides` (rounded pixels) and, where priors lie on a grid, `priors_per_cell` have one entry a level.
    `stages[0]` is the head's input, `stages[-1]` what its predictors take. `activation` is that of class scores, a
    softmax having one more for background. `bins`: where each box side is a distribution, the values its bins stand
    for, in strides on a grid. Priors that lie on no grid can be handed to detectors of equal `prior_form`, which says
    what they are made of. `first_stage`: of what proposes (a region proposal network), a detector of one class.
    """

    name: str
    num_classes: int
    strides: tuple[int, ...]
    channels: tuple[int, ...]
    priors: PriorKind
    priors_per_cell: tuple[int, ...] = ()
    stages: tuple[Stage, ...] = ()
    activation: Literal["sigmoid", "softmax"] = "sigmoid"
    bins: tuple[float, ...] = ()
    prior_form: str = ""
    capabilities: frozenset[Capability] = frozenset()
    first_stage: DetectorSpec | None = None

    def at_strides(self, strides: tuple[int, ...]) -> DetectorSpec:
        """The facts about the levels of some strides; about all of them where none is named."""
        if not strides:
            return self
        kept = [i for i, stride in enumerate(self.strides) if stride in strides]
        return replace(
            self, strides=tuple(self.strides[i] for i in kept), channels=tuple(self.channels[i] for i in kept)
        )
