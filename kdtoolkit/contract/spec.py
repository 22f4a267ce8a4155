"""What is known of a detector before it runs: its levels, priors, head stages, and what it can show."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor


class Capability(enum.StrEnum):
    """What a detector can show to a method."""

    FEATURES = "features"  # pyramid levels, with strides and channels
    PREDICTIONS = "predictions"  # class logits and boxes at priors
    STAGES = "stages"  # hidden states of the head, and the head can be resumed from each of them
    DISTRIBUTIONS = "distributions"  # each box side is a distribution over bins
    ASSIGNMENT = "assignment"  # which prior answers for which ground-truth box
    PLACED_QUERIES = "placed queries"  # queries can be made at given boxes


class PriorKind(enum.StrEnum):
    """What a detector's predictions are relative to."""

    POINTS = "points"  # one per cell
    ANCHORS = "anchors"  # one or more per cell
    PROPOSALS = "proposals"  # boxes found by a first stage; each detector has its own
    QUERIES = "queries"  # learned, or selected from the image; each detector has its own
    DETECTIONS = "detections"  # the final boxes themselves, as in a file of detections
    NONE = "none"  # the detector shows no predictions, as a backbone without a head

    @property
    def on_grid(self) -> bool:
        """Whether priors of two detectors correspond as soon as their strides are equal."""
        return self in (PriorKind.POINTS, PriorKind.ANCHORS)


@dataclass(frozen=True)
class Stage:
    """One joint of the head, at which its hidden state can be taken out and put in.

    Attributes:
        name: the joint's name, unique in the head.
        channels: for each branch of the head, the channels (dim 1) of the branch's tensors, one entry per tensor. Heads
            are compared branch by branch, so similar heads must use the same names: `cls` and `reg` in dense heads,
            `box` in two-stage heads, `decoder` in DETR's relatives.
        spatial: True if each tensor is a map (N, C, H, W), one per level. False if there is one tensor of vectors:
            (M, C) for the M proposals of the batch, without those that fill gaps (`Priors`), or (N, C, Q) for the Q
            queries of each image.
        activation: the function between this joint and the next layer. The state is taken before it, and `resume`
            applies it. So it must be idempotent, as ReLU is. For any other function (SiLU), take the state after it and
            leave `activation` None.
    """

    name: str
    channels: Mapping[str, tuple[int, ...]]
    spatial: bool = True
    activation: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        """Make tuples of lists, so that stages compare as equal."""
        channels = {branch: tuple(counts) for branch, counts in self.channels.items()}
        object.__setattr__(self, "channels", channels)


@dataclass(frozen=True)
class ClassRows:
    """How the first dimension of a layer's weights counts classes.

    For each class there are `inner` rows, one after the other (Faster R-CNN's boxes have 4). `before` and `after` are
    what stands for background: numbers of further classes before the first one and after the last one. The whole may
    be repeated, as for the anchors of a cell.
    """

    before: int = 0
    after: int = 0
    inner: int = 1


@dataclass(frozen=True)
class DetectorSpec:
    """The facts about a detector against which methods are checked before the first step.

    Attributes:
        name: what to call the detector in messages.
        num_classes: number of classes, without background.
        strides: stride of each level in pixels, rounded to whole numbers, finest level first. Empty if the detector
            shows no features.
        channels: channels of each level.
        priors: what predictions are relative to. NONE if the detector shows no predictions.
        priors_per_cell: number of priors in a cell of each level; empty if the priors do not lie on a grid.
        stages: joints of the head. The first is the head's input, the last is what its predictors take.
        activation: how class logits become scores. With "softmax" the last logit is background.
        bins: the values of the bins if each box side is a distribution, else empty. On a grid they are in strides.
        prior_form: what a proposal or a query is made of. A detector accepts another detector's proposals or queries
            if their forms are equal. Empty if the priors lie on a grid.
        masks_padding: whether the detector masks what lies beyond an image. Then the head reads no cells that begin
            there, and their values mean nothing. A detector without a mask takes padding for a part of the image.
        assigns: whether the adapter has `assign`. `DetectorAdapter.spec` fills it in.
        places_queries: whether the adapter has `queries_at`. `DetectorAdapter.spec` fills it in.
        rebuilds: whether the adapter has `rebuild`. `DetectorAdapter.spec` fills it in.
        first_stage: the spec of the adapter's `first_stage`. `DetectorAdapter.spec` fills it in.
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
    masks_padding: bool = False
    assigns: bool = True
    places_queries: bool = False
    rebuilds: bool = False
    first_stage: DetectorSpec | None = None

    def __post_init__(self) -> None:
        """Make tuples of lists, so that specs compare as equal."""
        for name in ("strides", "channels", "priors_per_cell", "stages", "bins"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What the detector can show to a method."""
        shown = {
            Capability.FEATURES: bool(self.strides),
            Capability.PREDICTIONS: self.priors is not PriorKind.NONE,
            Capability.STAGES: bool(self.stages),
            Capability.DISTRIBUTIONS: bool(self.bins),
            Capability.ASSIGNMENT: self.assigns,
            Capability.PLACED_QUERIES: self.places_queries,
        }
        return frozenset(capability for capability, is_shown in shown.items() if is_shown)

    def at_strides(self, strides: tuple[int, ...]) -> DetectorSpec:
        """The facts about the levels with these strides; about all levels if `strides` is empty."""
        if not strides:
            return self
        return self.at_levels([i for i, stride in enumerate(self.strides) if stride in strides])

    def at_levels(self, levels: Sequence[int]) -> DetectorSpec:
        """The facts about the levels with these indices."""
        return replace(
            self, strides=tuple(self.strides[i] for i in levels), channels=tuple(self.channels[i] for i in levels)
        )

    def on_images_scaled_by(self, scale: float) -> DetectorSpec:
        """The facts in pixels of images that the detector sees scaled by `scale`: its strides are larger there."""
        first = None if self.first_stage is None else self.first_stage.on_images_scaled_by(scale)
        return replace(self, strides=tuple(round(stride / scale) for stride in self.strides), first_stage=first)
