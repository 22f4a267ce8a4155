"""What passes between detectors and methods in a step: batches, predictions, hidden states, assignments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypedDict

from torch import Tensor


class Target(TypedDict):
    """Ground truth of one image: `boxes` (G, 4) float32 xyxy in pixels, `labels` (G,) int64 in [0, K)."""

    boxes: Tensor
    labels: Tensor


class Detections(TypedDict):
    """Detections of one image by falling score: `boxes` (D, 4) xyxy pixels, `scores` (D,), `labels` (D,) int64."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Batch:
    """Images as one detector wants them: `images` (N, 3, H, W), normalised, padded at the right and bottom.

    `sizes` are (height, width) of each image's content, `padded_sizes` of its content with its own padding: cells
    beyond them belong to no image. `original_sizes` are those that detections refer to. Boxes and labels are on the
    canvas, one tensor an image, and empty lists where there is no ground truth.
    """

    images: Tensor
    sizes: tuple[tuple[int, int], ...]
    padded_sizes: tuple[tuple[int, int], ...]
    original_sizes: tuple[tuple[int, int], ...]
    boxes: tuple[Tensor, ...] = ()
    labels: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Priors:
    """What predictions are relative to: `boxes` (A, 4), or (N, A, 4) where images differ; a point is (x, y, x, y).

    On a grid `strides` (A,) is in pixels, `grid` the (H, W) of each level and `per_cell` how many priors a cell of it
    has (empty: as many on each level); elsewhere all three are empty. `context` holds what else identifies priors to
    detectors of one `prior_form` (query embeddings). Images with fewer proposals than others are filled up with
    boxes of the whole image, to which assignments give weight 0.
    """

    boxes: Tensor
    strides: Tensor
    grid: tuple[tuple[int, int], ...] = ()
    context: object = None
    per_cell: tuple[int, ...] = ()

    @property
    def per_level(self) -> tuple[int, ...]:
        """Number of priors on each level; their sum is A."""
        total = self.boxes.shape[-2]
        if not self.grid:
            return (total,)
        cells = [height * width for height, width in self.grid]
        per_cell = self.per_cell or (total // sum(cells),) * len(cells)
        return tuple(count * each for count, each in zip(cells, per_cell, strict=True))


@dataclass(frozen=True)
class Predictions:
    """What the head says of each prior, raw, in float32.

    `logits` (N, A, K) where `activation` is sigmoid; (N, A, K + 1), background last, where it is softmax.
    `regression` (N, A, 4), or (N, A, 4, B) logits over bins; `decode` turns it into boxes (N, A, 4).
    `quality` (N, A): logits of centerness or the like.
    """

    logits: Tensor
    regression: Tensor
    priors: Priors
    decode: Callable[[Tensor, Priors], Tensor]
    quality: Tensor | None = None
    activation: Literal["sigmoid", "softmax"] = "sigmoid"

    @property
    def boxes(self) -> Tensor:
        """Decoded boxes (N, A, 4), neither clipped nor filtered."""
        return self.decode(self.regression, self.priors)

    @property
    def probabilities(self) -> Tensor:
        """Class probabilities (N, A, K), without background."""
        return self.logits.sigmoid() if self.activation == "sigmoid" else self.logits.softmax(-1)[..., :-1]

    @property
    def scores(self) -> Tensor:
        """The largest class probability of each prior (N, A)."""
        # A sigmoid keeps the order of classes, so that one value of each prior needs it.
        return self.logits.amax(-1).sigmoid() if self.activation == "sigmoid" else self.probabilities.amax(-1)


State = Mapping[str, tuple[Tensor, ...]]
"""A hidden state of the head: for each branch one tensor a level, channels in dim 1."""


@dataclass(frozen=True)
class HeadTrace:
    """One pass through a head: the state at each stage, and the predictions they led to.

    States that nobody asked for are empty. `context` is what the adapter needs besides, to resume (the encoder's
    memory) or for the library's own losses and post-processing (raw outputs). `first` is the pass of the first stage,
    where the head ran one.
    """

    states: tuple[State, ...]
    predictions: Predictions
    context: object = None
    first: HeadTrace | None = None


@dataclass(frozen=True)
class Assignment:
    """Which prior answers for what, as the detector's own loss has it.

    `labels` (N, A) int64, K for background; `boxes` (N, A, 4), of use where a label is a class; `weights` (N, A)
    float, 0 where the detector's classification loss leaves a prior out (padding, ambiguous anchors).
    `normaliser`: the scalar by which the detector divides sums over its priors, of this process's images; see
    kdtoolkit/processes.py.
    """

    labels: Tensor
    boxes: Tensor
    weights: Tensor
    normaliser: Tensor

    def positive(self, num_classes: int) -> Tensor:
        """(N, A) bool: priors that answer for an object."""
        return self.labels < num_classes

    def at_rows(self, rows: Tensor) -> Assignment:
        """The assignment of some priors, by their indices (A',); the normaliser stays that of all."""
        return replace(self, labels=self.labels[:, rows], boxes=self.boxes[:, rows], weights=self.weights[:, rows])
