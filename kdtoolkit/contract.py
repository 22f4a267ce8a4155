"""The contract between detectors and methods: read this first.

A detector is a short pipeline with named joints, and a method is a function of what crosses them:

    images -> features (pyramid levels) -> head: stage 0 -> stage 1 -> ... -> predictions -> detections

Shapes, here and everywhere: N images, C channels, H x W cells, L levels, A priors (all levels concatenated,
level by level, row by row, all priors of a cell together), K classes, B bins, G ground-truth boxes.
Boxes are xyxy in pixels of the batch's canvas; labels are int64 in [0, K).

An adapter's author writes `DetectorAdapter`; a method's author writes `Method`. Neither knows the other.
"""

from __future__ import annotations

import copy
import enum
import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal, Self, TypedDict

import torch
from torch import Tensor, nn

from kdtoolkit.errors import IncompatibleError, KDError, UnknownDetectorError
from kdtoolkit.options import bound_options, check_options


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


def keep_states(states: Iterable[State], stages: Collection[int] | None) -> tuple[tuple[State, ...], State]:
    """The states of a head, of which those of other `stages` are empty (None keeps all), and the last one.

    Given a generator, it lets go of what nobody asked for while the head runs.
    """
    kept: list[State] = []
    last: State = {}
    for i, last in enumerate(states):
        kept.append(last if stages is None or i in stages else {})
    return tuple(kept), last


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


def check_precision(model: nn.Module) -> None:
    """Raise KDError for a model whose parameters are in another precision than float32."""
    dtypes = {str(p.dtype) for p in model.parameters() if p.is_floating_point()}
    if other := sorted(dtypes - {"torch.float32"}):
        raise KDError(
            f"{type(model).__name__} has parameters of {', '.join(other)}: call model.float() (from_pretrained of "
            "transformers takes dtype=torch.float32). To compute in half precision, train under torch.autocast"
        )


class DetectorAdapter(ABC):
    """Shows one detector as a pipeline with joints. Holds the model, adds nothing to it and patches nothing.

    Every method works under autocast and returns predictions in float32. Raises KDError for a model whose parameters
    are in another precision.
    """

    def __init__(self, model: nn.Module) -> None:
        check_precision(model)
        self.model = model

    @property
    @abstractmethod
    def spec(self) -> DetectorSpec:
        """The detector's facts; the same at every call."""

    @property
    def assigner(self) -> object:
        """Detectors whose assigners compare equal assign alike on the same priors, so that one of them will do."""
        return self

    @property
    def first_stage(self) -> DetectorAdapter | None:
        """What proposes, as a detector of one class that takes the same batch and features; None in one-stage kinds."""
        return None

    @classmethod
    def examples(cls) -> Mapping[str, Callable[[int], nn.Module]]:
        """Tiny detectors with random weights, by family: each is built for a number of classes, without a network.

        What `kd adapters --matrix` and the conformance kit (kdtoolkit/testing) run on; any image of 64 px will do.
        """
        return {}

    @classmethod
    @abstractmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether this adapter is for `model`, by its class."""

    @abstractmethod
    def prepare(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None, like: Batch | None = None
    ) -> Batch:
        """Do what the detector does to images (3, H, W) in [0, 1] before its backbone: resize, normalise, pad.

        `like` is what a student made of the same images. Then images get the sizes that they have there and lie on a
        canvas of that size; it is padded further, at the right and bottom, where the detector cannot run otherwise. A
        detector built for one size scales that canvas as a whole. `kdtoolkit.canvas` has the code for both.
        """

    @abstractmethod
    def features(self, batch: Batch) -> tuple[Tensor, ...]:
        """Run backbone and neck: one (N, C, H, W) a level, finest first; of DETR kin what the decoder takes."""

    @abstractmethod
    def head(
        self,
        features: tuple[Tensor, ...],
        batch: Batch,
        priors: Priors | None = None,
        stages: Collection[int] | None = None,
    ) -> HeadTrace:
        """Run the head on its own features, whole as `features` gave them.

        With `priors`, of an equal `prior_form`, it runs for those instead of its own; grids ignore it. `stages`: of
        which states are kept (`keep_states`); all of them if None.
        """

    def resume(self, state: State, stage: int, trace: HeadTrace) -> Predictions:
        """Run the head from `state` at `stage` to its end, for the priors and context of `trace`.

        With the state that `trace` has at that stage it gives the predictions of `trace` bit for bit.
        """
        raise NotImplementedError(f"{self.spec.name} declares no stages")

    @abstractmethod
    def task_losses(self, trace: HeadTrace, batch: Batch) -> tuple[dict[str, Tensor], Assignment | None]:
        """The detector's own loss terms, weighted, as its training forward sums them; and the assignment they used.

        The assignment is None where the library does not hand it out.
        """

    def assign(self, trace: HeadTrace, batch: Batch) -> Assignment:
        """Assign the batch's ground truth to the priors of `trace`."""
        raise NotImplementedError(f"{self.spec.name} declares no assignment")

    @abstractmethod
    def detections(self, trace: HeadTrace, batch: Batch) -> list[Detections]:
        """Score filter, NMS and all, in pixels of the original images."""


class View:
    """What one detector shows in a step. Its head runs when it is first asked for, and then once.

    `maps` is the pyramid as the detector made it, which its head takes. `features` is what methods compare: the maps of
    some levels, or cut to the part of the canvas that the other detector has too.

    Args:
        adapter: of the detector.
        batch: what it was shown.
        maps: its pyramid.
        trace: its head's own pass, if that has been run already.
        assignment: the one that its losses used, if they told.
        spec: the adapter's, for which it is not asked again.
        stages: of which hidden states are kept; all of them if None.
        frozen: run the head without gradient, as a teacher's.
    """

    def __init__(
        self,
        adapter: DetectorAdapter,
        batch: Batch,
        maps: tuple[Tensor, ...],
        trace: HeadTrace | None = None,
        assignment: Assignment | None = None,
        *,
        spec: DetectorSpec | None = None,
        stages: frozenset[int] | None = None,
        frozen: bool = False,
    ) -> None:
        self.adapter = adapter
        self.batch = batch
        self.maps = maps
        self.features = maps
        self.assignment = assignment
        self.spec = adapter.spec if spec is None else spec
        self.shown: tuple[int, int] | None = None
        self.frozen = frozen
        self._stages = stages
        self._own = [] if trace is None else [trace]  # parts of a view share it: the first to ask runs the head

    @property
    def trace(self) -> HeadTrace | None:
        """The head's own pass; None while nobody has asked for it."""
        return self._own[0] if self._own else None

    @property
    def head(self) -> HeadTrace:
        """The head's own pass."""
        if not self._own:
            self._own.append(self.run_head())
        return self._own[0]

    def run_head(self, priors: Priors | None = None) -> HeadTrace:
        """A new pass of the head, on the priors given instead of its own."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.adapter.head(self.maps, self.batch, priors, self._stages)

    def at_strides(self, strides: tuple[int, ...]) -> View:
        """The view of some levels' features alone; of all of them where none is named."""
        if not strides:
            return self
        part = copy.copy(self)
        levels = zip(self.spec.strides, self.features, strict=True)
        part.features = tuple(x for stride, x in levels if stride in strides)
        part.spec = self.spec.at_strides(strides)
        return part

    def beside(self, batch: Batch) -> View:
        """The view, with features of the part of its canvas alone that another detector's `batch` has as well.

        That part is `shown`, (height, width) in pixels of its own canvas; None if it is all of it.
        """
        if self.batch is batch:
            return self
        canvases = self.batch.images.shape[-2:], batch.images.shape[-2:]
        # Of all images together, for the size of each is rounded.
        contents = (map(sum, zip(*each.sizes, strict=True)) for each in (self.batch, batch))
        sides = zip(*canvases, *contents, strict=True)
        height, width = (min(own, round(other * size / seen)) for own, other, size, seen in sides)
        if (height, width) == canvases[0]:
            return self
        part = copy.copy(self)
        part.shown = height, width
        part.features = tuple(part.cut(x, i) for i, x in enumerate(self.features))
        return part

    def cut(self, x: Tensor, level: int) -> Tensor:
        """A map (N, C, H, W) of a level, cut to what is `shown`."""
        height, width = self.shown_cells(level, (x.shape[2], x.shape[3]))
        return x[:, :, :height, :width]

    def shown_cells(self, level: int, size: tuple[int, int]) -> tuple[int, int]:
        """How many of the (H, W) cells of a level lie in what is `shown`: all that begin there."""
        if self.shown is None:
            return size
        stride = self.spec.strides[level]
        height, width = (min(cells, -(-side // stride)) for cells, side in zip(size, self.shown, strict=True))
        return height, width


Whose = Literal["student", "teacher"]


class Matched:
    """Both heads on the same priors: states and predictions of `student` and `teacher` correspond one to one.

    On grids, where the teacher pads further than the student, its states and predictions are those of the student's
    cells alone. Boxes of each are on its own detector's canvas; `teacher_boxes` are the teacher's on the student's.
    """

    def __init__(self, student: View, teacher: View, passes: tuple[HeadTrace, HeadTrace]) -> None:
        self._views = student, teacher
        self._passes = passes
        self._rows = _shown_rows(passes[1].predictions.priors, teacher)
        self.student = passes[0]
        self.teacher = _cut_trace(passes[1], self._rows, teacher)

    @cached_property
    def student_assignment(self) -> Assignment:
        """Ground truth assigned to these priors by the student's own rule."""
        student, trace = self._views[0], self._passes[0]
        if student.assignment is not None and trace is student.trace:
            return student.assignment
        with torch.no_grad():
            return student.adapter.assign(trace, student.batch)

    @cached_property
    def teacher_assignment(self) -> Assignment:
        """Ground truth assigned to these priors by the rule of whose layout they are: what cross-head losses go by.

        That is the teacher's on a grid, and for its own proposals or queries; for the student's it is the student's.
        """
        student, teacher = self._views
        ours, theirs = (trace.predictions.priors for trace in self._passes)
        if not theirs.grid and self._passes[1] is not teacher.trace:
            return self.student_assignment
        alike = student.adapter.assigner == teacher.adapter.assigner and student.batch.sizes == teacher.batch.sizes
        # Kept anchors are the same tensor; to ask whether two are equal makes a GPU's host wait.
        if alike and ours.grid == theirs.grid and (ours.boxes is theirs.boxes or torch.equal(ours.boxes, theirs.boxes)):
            return self.student_assignment
        with torch.no_grad():
            found = teacher.adapter.assign(self._passes[1], teacher.batch)
        return found if self._rows is None else found.at_rows(self._rows)

    @property
    def teacher_boxes(self) -> Tensor:
        """The teacher's decoded boxes (N, A, 4), in pixels of the student's canvas."""
        student, teacher = self._views
        boxes = self.teacher.predictions.boxes
        if student.batch.sizes == teacher.batch.sizes:
            return boxes
        return boxes * _scale(student.batch, teacher.batch, boxes)

    def finish_with_teacher(self, state: State, stage: int) -> Predictions:
        """Cross-head predictions: the teacher's head, resumed from a student's `state` at the teacher's `stage`.

        Gradient flows through the teacher's frozen layers into `state` and nowhere else. Where the teacher has padded
        further than the student, its own state stays.
        """
        teacher, trace = self._views[1], self._passes[1]
        if self._rows is not None:
            own = trace.states[stage]
            state = {branch: tuple(map(_laid_over, own[branch], maps)) for branch, maps in state.items()}
        return _at_rows(teacher.adapter.resume(state, stage, trace), self._rows, teacher)


class Exchange:
    """What a method sees of one training step: both detectors' views, and what can be derived from them."""

    def __init__(self, student: View, teacher: View) -> None:
        self.student = student
        self.teacher = teacher.beside(student.batch)
        self._matched: dict[Whose, Matched] = {}

    def matched(self, whose: Whose = "student") -> Matched:
        """Both heads on the same priors: on a grid each head's own pass, else with the priors of one of the two.

        With the student's proposals or queries each head runs once: the student's on its own, the teacher's on these
        alone. The teacher's need a second pass of the student's head, with gradient, run at the first call. Raises
        IncompatibleError for pairs whose priors do not correspond: those on a grid do, and those of equal `prior_form`.
        """
        student, teacher = self.student, self.teacher
        ours, theirs = student.spec, teacher.spec
        on_grids = ours.priors.on_grid and theirs.priors.on_grid
        if not on_grids and (ours.priors, ours.prior_form) != (theirs.priors, theirs.prior_form):
            raise IncompatibleError(
                f"{ours.priors} of {ours.name} (student) and {theirs.priors} of {theirs.name} (teacher) do not "
                "correspond: a method that compares them must refuse such pairs (`why_priors_differ` of "
                "kdtoolkit.compatibility)"
            )
        if on_grids:
            whose = "student"
        if whose not in self._matched:
            if on_grids:
                passes = student.head, teacher.head
            elif whose == "student":
                passes = student.head, teacher.run_head(_priors_for(teacher, student))
            else:
                passes = student.run_head(_priors_for(student, teacher)), teacher.head
            self._matched[whose] = Matched(student, teacher, passes)
        return self._matched[whose]

    def at_strides(self, strides: tuple[int, ...]) -> Exchange:
        """The exchange of some levels' features alone; itself where none is named."""
        if not strides:
            return self
        part = copy.copy(self)
        part.student, part.teacher = self.student.at_strides(strides), self.teacher.at_strides(strides)
        return part

    @cached_property
    def first_stage(self) -> Exchange | None:
        """The same step as seen by both detectors' first stages; None unless both have one."""
        student, teacher = _first_stage(self.student), _first_stage(self.teacher)
        return None if student is None or teacher is None else Exchange(student, teacher)


def _first_stage(view: View) -> View | None:
    """A detector's first stage, which its head's own pass has run already."""
    adapter, trace = view.adapter.first_stage, view.trace
    if adapter is None:
        return None
    return View(adapter, view.batch, view.maps, None if trace is None else trace.first, frozen=view.frozen)


def _priors_for(view: View, other: View) -> Priors:
    """The priors of the other view's own pass, brought to the scale of this one's images."""
    priors = other.head.predictions.priors
    if view.batch.sizes == other.batch.sizes:
        return priors
    return replace(priors, boxes=priors.boxes * _scale(view.batch, other.batch, priors.boxes))


def _scale(batch: Batch, other: Batch, like: Tensor) -> Tensor:
    """Factors (N, 1, 4) from boxes on the canvas of `other` to those on that of `batch`."""
    pairs = zip(batch.sizes, other.sizes, strict=True)
    return like.new_tensor([(w / v, h / u) * 2 for (h, w), (u, v) in pairs])[:, None]


def _shown_rows(priors: Priors, view: View) -> Tensor | None:
    """Indices (A',) of the priors on a grid that lie in cells which the view shows; None where these are all."""
    if view.shown is None or not priors.grid:
        return None
    rows, start = [], 0
    for i, (size, count) in enumerate(zip(priors.grid, priors.per_level, strict=True)):
        cells = torch.arange(start, start + count, device=priors.boxes.device).view(1, *size, -1)
        rows.append(view.cut(cells.permute(0, 3, 1, 2), i).permute(0, 2, 3, 1).flatten())
        start += count
    found = torch.cat(rows)
    return None if len(found) == start else found


def _at_rows(predictions: Predictions, rows: Tensor | None, view: View) -> Predictions:
    """The predictions at some priors on a grid, those of the cells that the view shows."""
    if rows is None:
        return predictions
    priors, quality = predictions.priors, predictions.quality
    kept = replace(
        priors,
        boxes=priors.boxes[..., rows, :],
        strides=priors.strides[rows],
        grid=tuple(view.shown_cells(i, size) for i, size in enumerate(priors.grid)),
    )
    return replace(
        predictions,
        logits=predictions.logits[:, rows],
        regression=predictions.regression[:, rows],
        quality=None if quality is None else quality[:, rows],
        priors=kept,
    )


def _cut_trace(trace: HeadTrace, rows: Tensor | None, view: View) -> HeadTrace:
    if rows is None:
        return trace
    states = tuple(
        {branch: tuple(view.cut(x, i) for i, x in enumerate(maps)) for branch, maps in state.items()}
        for state in trace.states
    )
    return replace(trace, states=states, predictions=_at_rows(trace.predictions, rows, view))


def _laid_over(own: Tensor, x: Tensor) -> Tensor:
    """The map `own` (N, C, H, W) with `x` (N, C, h, w) over its top left part."""
    height, width = x.shape[-2:]
    return torch.cat([torch.cat([x, own[:, :, :height, width:]], 3), own[:, :, height:]], 2)


@dataclass(frozen=True)
class Schedule:
    """The factor of a method's weights over training, by the number of steps done before.

    It rises linearly from 0 over the first `warmup` steps; is 1; falls linearly to 0 over the last `decay` steps before
    `stop`; and is 0 from `stop` on, where there is one: then the method is not run any more.

    Raises KDError for numbers of steps that are negative or not whole, a `stop` of 0, a `decay` without `stop`, or a
    `stop` before warm-up and decay are over.
    """

    warmup: int = 0
    decay: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        check_options("scheduled", Schedule, vars(self))
        if self.stop == 0:
            raise KDError("stop is the step at which the method ends: with stop=0 it never runs. Leave the method out")
        if min(self.warmup, self.decay) < 0:
            raise KDError("warmup and decay are numbers of steps, from 0")
        if self.stop is None and self.decay:
            raise KDError("decay needs stop: the step at which it has come down to 0")
        if self.stop is not None and self.stop < self.warmup + self.decay:
            raise KDError(f"stop ({self.stop}) comes before warmup ({self.warmup}) and decay ({self.decay}) are over")

    def factor(self, step: int) -> float:
        """The factor at a step, counted from 0."""
        if self.stop is not None and step >= self.stop:
            return 0.0
        rise = min(1.0, (step + 1) / (self.warmup + 1))
        return min(rise, (self.stop - step) / (self.decay + 1)) if self.stop is not None else rise


class Method(nn.Module, ABC):
    """A distillation method. What it must learn is its own parameters: trained with it, then thrown away.

    `needs`: what both detectors must show; settings of an instance may ask for other things. `terms`: the names of its
    loss terms; `vanishing`: those of them that are zero where the student shows what the teacher shows. `paper`: where
    it comes from. `compares_classes`: whether, needing more than features, it needs detectors of the same classes.
    `stages`: the student's and the teacher's stage whose states it takes, once `setup` knows them; while it is None
    all are kept, and those of first stages, which costs memory.

    Arguments of `__init__` are checked by their type hints before it runs: see `kdtoolkit.options.check_options`.
    `in_use`: whether a Distiller has set it up; each wants one of its own.
    """

    needs: frozenset[Capability]
    terms: ClassVar[tuple[str, ...]]
    vanishing: tuple[str, ...] = ()
    paper: ClassVar[str]
    compares_classes: bool = True
    schedule: Schedule = Schedule()
    strides: tuple[int, ...] = ()
    stages: tuple[int, int] | None = None
    in_use: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _checking_options(cls.__init__)  # type: ignore[method-assign]

    def scheduled(self, *, warmup: int = 0, decay: int = 0, stop: int | None = None) -> Self:
        """Let the weights follow a `Schedule`; returns the method itself: `PKD().scheduled(stop=9000)`."""
        self.schedule = Schedule(warmup, decay, stop)
        return self

    def at_strides(self, *strides: int) -> Self:
        """Apply the method to the pyramid levels of these strides alone; returns the method itself.

        Raises KDError for methods that need more than features: they compare whole heads.
        """
        if self.needs != frozenset({Capability.FEATURES}):
            raise KDError(f"{type(self).__name__} compares heads: levels can be chosen for methods of features alone")
        if not all(isinstance(stride, int) for stride in strides):
            raise KDError(f"at_strides{strides}: strides are whole numbers of pixels, as in at_strides(8, 16)")
        self.strides = strides
        return self

    def refuses(self, student: DetectorSpec, teacher: DetectorSpec) -> str | None:
        """Why this pair cannot be distilled by this method, beyond `needs`; None if it can. Checked once."""
        return None

    def setup(self, student: DetectorSpec, teacher: DetectorSpec) -> None:
        """Build what must be learned for this pair (projections, context blocks). Called once, after `refuses`."""

    @abstractmethod
    def forward(self, exchange: Exchange) -> dict[str, Tensor]:
        """The weighted loss terms of one step, float32 scalars, by names of `terms`, of which some may be missing."""


def _checking_options(init: Callable[..., None]) -> Callable[..., None]:
    @wraps(init)
    def checked(self: Method, *args: Any, **kwargs: Any) -> None:
        own = {name: value for name, value in bound_options(init, (self, *args), kwargs).items() if value is not self}
        check_options(type(self).__name__, init, own)
        try:
            init(self, *args, **kwargs)
        except AttributeError:  # torch's, of parameters and modules that are assigned too early
            if "_modules" in vars(self):
                raise
        if "_modules" not in vars(self):
            raise TypeError(f"{type(self).__name__}.__init__ must call super().__init__() before anything else")

    return checked


ENTRY_POINTS = "kdtoolkit.adapters"
# Library -> the adapter modules that know its detectors. They are imported only once the library is, which it is as
# soon as such a model is handed in.
_MODULES: Mapping[str, tuple[str, ...]] = {
    "kdtoolkit.detectors": ("kdtoolkit.adapters.native",),
    "torchvision.models.detection": ("kdtoolkit.adapters.torchvision",),
    "transformers": ("kdtoolkit.adapters.transformers",),
    "ultralytics": ("kdtoolkit.adapters.ultralytics",),
}


def adapter_classes(*, load: bool = False) -> list[type[DetectorAdapter]]:
    """All adapter classes whose library is loaded, and those that other packages announce as entry points.

    With `load` the libraries that are installed are loaded first. Raises KDError where an announced one cannot be.
    """
    if load:
        for library in _MODULES:
            with suppress(ImportError):
                importlib.import_module(library)
    return _own_classes() + announced(ENTRY_POINTS)


def _own_classes(libraries: Iterable[str] = tuple(_MODULES)) -> list[type[DetectorAdapter]]:
    """The adapter classes of those of `libraries` that are loaded. Raises KDError for a version that will not do."""
    found: list[type[DetectorAdapter]] = []
    for library in libraries:
        if library not in sys.modules:
            continue
        for module in _MODULES[library]:
            try:
                found += importlib.import_module(module).ADAPTERS
            except ImportError as error:
                package = library.partition(".")[0]
                raise KDError(
                    f"kdtoolkit cannot work with this version of {package} (importing {module} failed: {error}): pip "
                    f"install -U 'kdtoolkit[{package}]'"
                ) from error
    return found


def _libraries_of(model: nn.Module) -> list[str]:
    """The libraries, of those that have adapters, that the class of a model or one of its bases is from."""
    modules = [f"{cls.__module__}." for cls in type(model).__mro__]
    return [library for library in _MODULES if any(module.startswith(f"{library}.") for module in modules)]


def announced(group: str) -> list[Any]:
    """What other packages announce under a group of entry points. Raises KDError where one cannot be loaded."""
    found = []
    for entry in entry_points(group=group):
        try:
            found.append(entry.load())
        except Exception as error:  # whatever somebody else's module does when it is imported
            package = "an installed package" if entry.dist is None else f"the installed package {entry.dist.name}"
            raise KDError(
                f"{package} announces {entry.value} ({group}), which cannot be loaded: {type(error).__name__}: "
                f"{error}. Mend it or uninstall it"
            ) from error
    return found


def adapt(model: nn.Module | DetectorAdapter) -> DetectorAdapter:
    """Wrap a detector in the adapter for its class; an adapter is returned as it is.

    Raises UnknownDetectorError where no adapter knows the class, and KDError where the one that does refuses the model.
    """
    if isinstance(model, DetectorAdapter):
        return model
    # Other packages' adapters are loaded only where none of our own will do, and none of another library's: what is
    # installed of it may be too old.
    for classes in (lambda: _own_classes(_libraries_of(model)), lambda: announced(ENTRY_POINTS)):
        for cls in classes():
            if cls.matches(model):
                adapter: DetectorAdapter = cls(model)
                return adapter
    if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        raise KDError(
            f"this {type(inner).__qualname__} is compiled: hand in the model as it was before torch.compile. What can "
            "be compiled is the whole step: torch.compile(distiller)"
        )
    if isinstance(inner := getattr(model, "module", None), nn.Module):
        wrapper = type(model).__qualname__
        raise KDError(
            f"this is a {wrapper} around {type(inner).__qualname__}: hand in the model itself, model.module, and wrap "
            "the whole step instead, as in DistributedDataParallel(distiller)"
        )
    known = ", ".join([*_MODULES, *(cls.__name__ for cls in announced(ENTRY_POINTS))])
    raise UnknownDetectorError(
        f"no adapter for {type(model).__module__}.{type(model).__qualname__}: there are some for detectors of {known} "
        "(docs/detectors.md). Write one: CONTRIBUTING.md, 'Add a detector library'."
    )
