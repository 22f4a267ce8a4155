"""What passes between detectors and methods in a step: batches, predictions, hidden states, assignments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, NotRequired, Self, TypedDict

from torch import Tensor


class Recorded(TypedDict):
    """What a teacher found on an image at an earlier time, as a file of detections holds it.

    `boxes`: (D, 4) float32 xyxy in pixels. `probabilities`: (D, K) float32 in [0, 1], one for each class of the
    teacher.
    """

    boxes: Tensor
    probabilities: Tensor


class Target(TypedDict):
    """Ground truth of one image: `boxes` (G, 4) float32 xyxy in pixels, `labels` (G,) int64 in [0, K).

    `recorded`: what a teacher found on the image, if the teacher is a file of detections. It has gone through the same
    changes of the image as the boxes.
    """

    boxes: Tensor
    labels: Tensor
    recorded: NotRequired[Recorded]


class RecordedAlone(TypedDict):
    """What a teacher found on an image that has no labels."""

    recorded: Recorded


class Detections(TypedDict):
    """Detections of one image, best first: `boxes` (D, 4) xyxy in pixels, `scores` (D,), `labels` (D,) int64."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Batch:
    """Images as one detector needs them, and their ground truth.

    All sizes are (height, width) in pixels, one per image.

    Attributes:
        images: (N, 3, H, W), normalised. Each image lies at the top left of the canvas, which is padded at the right
            and bottom.
        sizes: size of each image on the canvas, without padding.
        padded_sizes: size of each image with the padding that it would have alone. Cells beyond it belong to no image.
        original_sizes: sizes before `prepare`. Detections are in pixels of these.
        boxes: one tensor (G, 4) per image, in pixels of the canvas; empty if the batch has no ground truth.
        labels: one tensor (G,) per image; empty if the batch has no ground truth.
        recorded: what a teacher found on each image, with boxes in pixels of the canvas; empty if the detector is no
            file of detections.
    """

    images: Tensor
    sizes: tuple[tuple[int, int], ...]
    padded_sizes: tuple[tuple[int, int], ...]
    original_sizes: tuple[tuple[int, int], ...]
    boxes: tuple[Tensor, ...] = ()
    labels: tuple[Tensor, ...] = ()
    recorded: tuple[Recorded, ...] = ()

    def at_images(self, indices: Sequence[int]) -> Self:
        """The batch of some of the images, on the same canvas."""
        if [*indices] == [*range(len(self.sizes))]:
            return self
        kept = ("sizes", "padded_sizes", "original_sizes", "boxes", "labels", "recorded")
        of_each = {name: getattr(self, name) for name in kept}
        chosen = {name: tuple(each[i] for i in indices) for name, each in of_each.items() if each}
        return replace(self, images=self.images[list(indices)], **chosen)

    def geometry_scaled_by(self, scale: float) -> Batch:
        """A batch with scaled sizes and canvas, for `DetectorAdapter.prepare(like=...)`; its pixels mean nothing."""
        if scale == 1:
            return self

        def scaled(size: tuple[int, int]) -> tuple[int, int]:
            height, width = (max(1, round(side * scale)) for side in size)
            return height, width

        height, width = (math.ceil(side * scale) for side in self.images.shape[-2:])
        return replace(
            self,
            images=self.images[..., :height, :width],
            sizes=tuple(map(scaled, self.sizes)),
            padded_sizes=tuple(map(scaled, self.padded_sizes)),
            boxes=(),
            labels=(),
        )


@dataclass(frozen=True)
class Priors:
    """What predictions are relative to.

    Proposals may be fewer in some images of a batch. The gaps are filled with boxes of the whole image. These predict
    background with certainty, assignments give them weight 0, and states have no rows for them.

    Attributes:
        boxes: (A, 4), or (N, A, 4) if each image has its own. A point is (x, y, x, y).
        strides: (A,) in pixels if the priors lie on a grid, else empty.
        grid: (H, W) of each level if the priors lie on a grid, else empty.
        context: what a detector of the same `prior_form` needs besides the boxes, such as query embeddings. It is a
            tensor or a dataclass of tensors, or has no tensors in it: see `detached`.
        per_cell: number of priors in a cell of each level. Empty if all levels have the same number, or no grid.
    """

    boxes: Tensor
    strides: Tensor
    grid: tuple[tuple[int, int], ...] = ()
    context: object = None
    per_cell: tuple[int, ...] = ()

    @property
    def per_level(self) -> tuple[int, ...]:
        """Number of priors on each level; the numbers sum to A."""
        total = self.boxes.shape[-2]
        if not self.grid:
            return (total,)
        cells = [height * width for height, width in self.grid]
        per_cell = self.per_cell or (total // sum(cells),) * len(cells)
        return tuple(count * each for count, each in zip(cells, per_cell, strict=True))

    def detached(self) -> Priors:
        """The same priors without gradient: neither boxes nor the tensors of the context have any."""
        return replace(self, boxes=self.boxes.detach(), context=_detached(self.context))


def _detached(x: Any) -> Any:
    """A tensor, or a dataclass with all its tensors, without gradient. Everything else stays as it is."""
    if isinstance(x, Tensor):
        return x.detach()
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{field.name: _detached(getattr(x, field.name)) for field in fields(x) if field.init})
    return x


@dataclass(frozen=True)
class Predictions:
    """What the head predicts at each prior, before any post-processing, in float32.

    Attributes:
        logits: (N, A, K) class logits; (N, A, K + 1) with background last if `activation` is "softmax".
        regression: (N, A, 4), or (N, A, 4, B) with logits over bins.
        priors: what the predictions are relative to.
        decode: turns `regression` and `priors` into boxes (N, A, 4).
        quality: (N, A) logits of centerness, or of another measure of how good a box is; None if there are none.
        activation: how class logits become scores, as in the spec.
    """

    logits: Tensor
    regression: Tensor
    priors: Priors
    decode: Callable[[Tensor, Priors], Tensor]
    quality: Tensor | None = None
    activation: Literal["sigmoid", "softmax"] = "sigmoid"

    @property
    def boxes(self) -> Tensor:
        """Decoded boxes (N, A, 4), not clipped and not filtered."""
        return self.decode(self.regression, self.priors)

    @property
    def probabilities(self) -> Tensor:
        """Class probabilities (N, A, K), without background."""
        return self.logits.sigmoid() if self.activation == "sigmoid" else self.logits.softmax(-1)[..., :-1]

    @property
    def scores(self) -> Tensor:
        """The largest class probability of each prior (N, A)."""
        # A sigmoid keeps the order of the classes, so it is enough to apply it to the largest logit.
        return self.logits.amax(-1).sigmoid() if self.activation == "sigmoid" else self.probabilities.amax(-1)


State = Mapping[str, tuple[Tensor, ...]]
"""A hidden state of the head: for each branch one tensor per level, channels in dim 1."""


@dataclass(frozen=True)
class HeadTrace:
    """One pass through a head.

    Attributes:
        states: the state at each stage. States that were not asked for are empty.
        predictions: the predictions at the end of the pass.
        context: what else the adapter needs to resume the head (the encoder's memory), or to compute the library's own
            losses and detections (raw outputs).
        first: the pass of the first stage, if the head ran one.
    """

    states: Sequence[State]
    predictions: Predictions
    context: object = None
    first: HeadTrace | None = None


@dataclass(frozen=True)
class HeadOutputs:
    """What a cache keeps of a pass of a head on a grid. `DetectorAdapter.rebuild` makes the `HeadTrace` from it.

    Attributes:
        logits: as in `Predictions`.
        regression: as in `Predictions`.
        quality: as in `Predictions`.
        grid: (H, W) of each level, as in `Priors`.
        states: the hidden state at each stage. A state is looked up or computed when it is first asked for.
        features: what `DetectorAdapter.features` returned. A map is looked up or computed when it is first asked for.
    """

    logits: Tensor
    regression: Tensor
    quality: Tensor | None
    grid: tuple[tuple[int, int], ...]
    states: Sequence[State]
    features: Sequence[Tensor]


@dataclass(frozen=True)
class Assignment:
    """Which prior answers for which object, by the rule of the detector's own loss.

    Attributes:
        positive: (N, A) bool, whether the prior answers for an object.
        labels: (N, A) int64, the object's class where `positive`; K elsewhere, for background.
        boxes: (N, A, 4), the object's box where `positive`; without meaning elsewhere.
        weights: (N, A) float, 0 if the detector's classification loss ignores the prior (padding, ambiguous anchors).
        normaliser: the float32 scalar above 0 by which the detector divides sums over priors; in most detectors the
            number of positives. It is `kdtoolkit.processes.share` of what this process's images count, so that several
            processes divide by the count of all their images.
    """

    positive: Tensor
    labels: Tensor
    boxes: Tensor
    weights: Tensor
    normaliser: Tensor

    def at_rows(self, rows: Tensor) -> Assignment:
        """The assignment of the priors with these indices (A',). The normaliser stays that of all priors."""
        return Assignment(
            self.positive[:, rows], self.labels[:, rows], self.boxes[:, rows], self.weights[:, rows], self.normaliser
        )
