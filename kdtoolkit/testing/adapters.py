"""Checks of an adapter: each private function is one promise, and its name is the check's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtoolkit.contract import (
    Assignment,
    Batch,
    Capability,
    Detections,
    DetectorAdapter,
    DetectorSpec,
    Predictions,
    PriorKind,
    Target,
    View,
)
from kdtoolkit.distiller import Distiller
from kdtoolkit.errors import KDError
from kdtoolkit.libraries import adapt
from kdtoolkit.testing._common import (
    Probe,
    Snapshot,
    count_calls,
    example_batch,
    expect,
    expect_backward,
    expect_finite,
    expect_float32,
    expect_losses,
    expect_same,
    interrupt,
    observe,
    outputs,
    total,
    without_objects,
    without_onednn,
)
from kdtoolkit.testing.ranks import side_by_side
from kdtoolkit.testing.report import SEED, ConformanceError, ConformanceReport, LeftOut, by_name, run

Own = Callable[[Any, Sequence[Tensor]], list[Detections]]
"""The library's own inference: of a model in eval mode and images; labels in [0, K), pixels of the original images."""

OwnLosses = Callable[[Any, Sequence[Tensor], Sequence[Target]], Mapping[str, Tensor] | Tensor]
"""The library's own training losses: of a model in train mode, images and targets; by name, or their sum."""

PIXELS = 1e-2  # boxes that went to relative coordinates and back
SCORE = 1e-3  # scores computed in another order
ORDER = 30.0  # a plain classification loss, next to the detector's own losses: from a tenth to eight times in ours
LOOKED_AT = 20  # detections of an image that are traced back to predictions


def check_adapter(
    adapter_or_model: DetectorAdapter | nn.Module,
    *,
    own: Own | str,
    own_losses: OwnLosses | str,
    known: Mapping[str, str] | None = None,
    only: Collection[str] = (),
    images: Sequence[Tensor] | None = None,
    targets: Sequence[Target] | None = None,
) -> ConformanceReport:
    """Check every promise of an adapter on one detector: `check_adapter(tiny_detector(), own=..., own_losses=...)`.

    Nothing but the library itself shows that losses are weighted as it weights them, or images normalised as it does.

    Args:
        adapter_or_model: a small detector with random weights, or its adapter. It is copied, not changed.
        own: the library's own inference, which `detections` must equal; or the reason why there is none to compare.
        own_losses: the library's own training losses, which `task_losses` must equal; or a reason likewise.
        known: reasons of failures, by check; `known` must name checks that do fail.
        only: names of the checks to run; all by default.
        images: two or more (3, H, W) in [0, 1]; two of unequal sizes about 64 px by default.
        targets: their ground truth; handed in with `images`.

    Raises:
        ConformanceError: promises are broken; lists them all.
        KDError: no adapter knows the model, `known` or `only` names no check, or a reason is empty.
    """
    for name, value in (("own", own), ("own_losses", own_losses)):
        if not callable(value) and not (isinstance(value, str) and value.strip()):
            raise KDError(f"{name} must be a function, or the reason why there is nothing to compare with")
    adapter = adapt(adapter_or_model)
    if getattr(adapter, "model", None) is None:
        raise ConformanceError(f"{type(adapter).__name__}.__init__ must call super().__init__(model)")
    if images is None or targets is None:
        images, targets = example_batch(adapter.spec.num_classes, next(adapter.model.parameters()).device)
    case = _Case(adapter, tuple(images), tuple(targets), own, own_losses)
    return run(f"adapter of {adapter.spec.name}", ADAPTER_CHECKS, case, known or {}, only)


@dataclass(frozen=True)
class _Case:
    adapter: DetectorAdapter
    images: tuple[Tensor, ...]
    targets: tuple[Target, ...]
    own: Own | str = ""
    own_losses: OwnLosses | str = ""
    proposes: bool = False  # a first stage: one class, whatever the ground truth says

    @property
    def spec(self) -> DetectorSpec:
        return self.adapter.spec

    def fresh(self, *, train: bool = False) -> DetectorAdapter:
        adapter = copy.deepcopy(self.adapter)
        adapter.model.train(train)
        return adapter

    def show(self, adapter: DetectorAdapter | None = None, targets: Sequence[Target] | None = None) -> View:
        """What the adapter, by default a fresh one in eval mode, shows of the batch."""
        return observe(adapter or self.fresh(), self.images, self.targets if targets is None else targets)

    def losses(self, adapter: DetectorAdapter, targets: Sequence[Target] | None = None) -> dict[str, Tensor]:
        view = self.show(adapter, targets)
        return adapter.task_losses(view.head, view.batch)[0]

    def detections(self, adapter: DetectorAdapter) -> list[Detections]:
        view = observe(adapter, self.images)
        return adapter.detections(view.head, view.batch)


def _mode(train: bool) -> str:
    return f"{'train' if train else 'eval'} mode"


def _matches(case: _Case) -> None:
    """The adapter knows its model by its class, and no other."""
    expect(case.adapter.matches(case.adapter.model), "matches(model) is False for the adapter's own model")
    expect(not case.adapter.matches(nn.Identity()), "matches(nn.Identity()) is True")
    expect(case.adapter.spec == case.adapter.spec, "spec differs from call to call")


def _batch(case: _Case) -> None:
    """`prepare` says where each image and each box went."""
    adapter = case.fresh()

    def given() -> list[Tensor]:
        truth = [tensor for target in case.targets for tensor in (target["boxes"], target["labels"])]
        return [*case.images, *truth]

    before = [(x, x._version) for x in given()]
    batch = adapter.prepare(case.images, case.targets)
    kept = all(x is now and x._version == version for (x, version), now in zip(before, given(), strict=True))
    expect(kept, "prepare writes to the images or targets that it is given")
    count, colours, *canvas = batch.images.shape
    expect((count, colours) == (len(case.images), 3), f"images are {tuple(batch.images.shape)}")
    originals = tuple((image.shape[-2], image.shape[-1]) for image in case.images)
    expect(batch.original_sizes == originals, f"original_sizes {batch.original_sizes} of images {originals}")
    for size, padded in zip(batch.sizes, batch.padded_sizes, strict=True):
        fits = all(0 < s <= p <= c for s, p, c in zip(size, padded, canvas, strict=True))
        expect(fits, f"size {size}, padded {padded} and canvas {canvas} do not contain each other")
    expect(len(batch.boxes) == len(batch.labels) == count, "boxes and labels are not one tensor an image")
    for i, target in enumerate(case.targets):
        height, width = (size / original for size, original in zip(batch.sizes[i], originals[i], strict=True))
        expected = target["boxes"] * target["boxes"].new_tensor([width, height] * 2)
        expect(batch.boxes[i].shape == expected.shape, f"image {i} has boxes {tuple(batch.boxes[i].shape)}")
        distance = (batch.boxes[i] - expected).abs().max().item() if len(expected) else 0.0
        expect(distance <= max(PIXELS, 1e-4 * max(canvas)), f"boxes of image {i} are off by {distance:g} pixels")
        expect(torch.equal(batch.labels[i], target["labels"]), f"labels of image {i} are {batch.labels[i].tolist()}")
    # One more, small enough to be padded up to a larger one by what pads to the batch's largest.
    height, width = originals[-1]
    images = [*case.images, case.images[-1][:, : height // 2, : width // 2]]
    without = adapter.prepare(images)
    expect(without.boxes == () and without.labels == (), "without targets boxes and labels must be empty tuples")
    for i, (image, padded) in enumerate(zip(images, without.padded_sizes, strict=True)):
        alone = tuple(adapter.prepare([image]).images.shape[-2:])
        what = f"padded_sizes of image {i} is {padded}, and alone it is brought to a canvas of {alone}"
        expect(padded == alone, f"{what}: its content with its own padding, not that of the batch")


@torch.no_grad()
def _beside(case: _Case) -> None:
    """Prepared like a student's batch, images lie as they do there: of the same shares, on a canvas that has it all."""
    originals = tuple((image.shape[-2], image.shape[-1]) for image in case.images)
    sizes = tuple((height + 9, 2 * width) for height, width in originals)
    padded = tuple(max(sides) + 23 for sides in zip(*sizes, strict=True))
    boxes = tuple(
        target["boxes"] * _factors(size, original, target["boxes"])
        for target, size, original in zip(case.targets, sizes, originals, strict=True)
    )
    like = Batch(case.images[0].new_zeros(len(sizes), 3, *padded), sizes, sizes, originals, boxes)
    adapter = case.fresh()
    batch = adapter.prepare(case.images, case.targets, like=like)
    scale = [sum(size[i] for size in batch.sizes) / sum(size[i] for size in sizes) for i in range(2)]
    for ours, theirs in zip(batch.sizes, sizes, strict=True):
        off = max(abs(a - b * factor) for a, b, factor in zip(ours, theirs, scale, strict=True))
        expect(off <= 1, f"images of sizes {sizes} in the student's batch have {batch.sizes}, which are other shares")
    canvas = tuple(batch.images.shape[-2:])
    missing = [side for side, other, factor in zip(canvas, padded, scale, strict=True) if side < other * factor - 1]
    expect(not missing, f"a canvas of {canvas}, scaled by {scale}, does not hold the student's of {padded}")
    for i, (own, seen) in enumerate(zip(batch.boxes, like.boxes, strict=True)):
        distance = (own - seen * _factors(batch.sizes[i], sizes[i], seen)).abs()
        off = distance.max().item() if len(own) else 0.0
        expect(off <= PIXELS * max(canvas), f"boxes of image {i} are off by {off:g} pixels from where the image lies")
    predictions = adapter.head(adapter.features(batch), batch).predictions
    expect_finite(outputs(predictions), "beside a student's batch")


def _factors(size: tuple[int, int], original: tuple[int, int], like: Tensor) -> Tensor:
    """(4,): from boxes on an image of one (height, width) to those on another."""
    return like.new_tensor([size[1] / original[1], size[0] / original[0]]).repeat(2)


@torch.no_grad()
def _levels(case: _Case) -> None:
    """Channels and strides of the spec are those of the pyramid."""
    view, spec = case.show(), case.spec
    channels = tuple(level.shape[1] for level in view.features)
    expect(channels == spec.channels, f"levels have {channels} channels, the spec says {spec.channels}")
    expect(len(spec.strides) == len(channels), f"{len(spec.strides)} strides, {len(channels)} levels")
    for stride, level in zip(spec.strides, view.features, strict=True):
        for cells, pixels in zip(level.shape[-2:], view.batch.images.shape[-2:], strict=True):
            # Levels may be rounded up or down on their way; a wrong stride is off by a factor.
            fits = (cells - 1) * stride <= pixels <= (cells + 1) * stride
            expect(fits, f"{pixels} pixels give {cells} cells of a stride said to be {stride}")


@torch.no_grad()
def _predictions(case: _Case) -> None:
    """Predictions have the shapes, kinds and dtypes that the spec declares."""
    predictions, spec = case.show().head.predictions, case.spec
    size = len(case.images), predictions.priors.boxes.shape[-2]
    expected = {
        "logits": (*size, spec.num_classes + (spec.activation == "softmax")),
        "regression": (*size, 4, len(spec.bins)) if spec.bins else (*size, 4),
        "boxes": (*size, 4),
        "quality": size,
    }
    for name, tensor in outputs(predictions).items():
        shape = tuple(tensor.shape)
        expect(shape == expected[name], f"{name} is {shape}; the spec makes it {expected[name]}")
    expect_float32(outputs(predictions), "head")
    for name in ("logits", "quality"):
        values = outputs(predictions).get(name, predictions.logits)
        low, high = values.min().item(), values.max().item()
        problem = f"{name} lie between {low:g} and {high:g}, as probabilities do; predictions are logits"
        expect(low == high or low < 0 or high > 1, problem)
    kinds = predictions.activation, spec.activation
    expect(kinds[0] == kinds[1], f"activation is {kinds[0]} in predictions, {kinds[1]} in the spec")


@torch.no_grad()
def _priors(case: _Case) -> None:
    """Priors lie on the declared grid, with the declared strides; or on none, and then their form is said."""
    view, spec = case.show(), case.spec
    priors = view.head.predictions.priors
    expect_finite({"boxes": priors.boxes}, "priors")
    if not spec.priors.on_grid:
        expect(spec.prior_form != "", f"{spec.priors} lie on no grid, so the spec must have a prior_form")
        expect(spec.priors_per_cell == (), "priors_per_cell is for priors on a grid")
        grid_free = priors.grid == () and priors.per_cell == () and priors.strides.numel() == 0
        expect(grid_free, f"{spec.priors} lie on no grid, but Priors has a grid, strides or per_cell")
        return
    expect(spec.prior_form == "", f"{spec.priors} lie on a grid, so prior_form must be empty")
    expect(priors.boxes.ndim == 2, f"priors on a grid are (A, 4), here {tuple(priors.boxes.shape)}")
    cells = tuple((level.shape[-2], level.shape[-1]) for level in view.features)
    expect(priors.grid == cells, f"Priors.grid is {priors.grid}, levels are {cells}")
    counts = tuple(h * w * each for (h, w), each in zip(priors.grid, spec.priors_per_cell, strict=True))
    expect(counts == priors.per_level, f"the spec makes {counts} priors a level, Priors.per_level {priors.per_level}")
    found = len(priors.boxes)
    expect(sum(counts) == found == len(priors.strides), f"{sum(counts)} priors on the levels, {found} in all")
    centres = (priors.boxes[:, :2] + priors.boxes[:, 2:]).double() / 2
    levels = zip(torch.split(priors.strides, [*counts]), torch.split(centres, [*counts]), strict=True)
    for stride, grid, (strides, points) in zip(spec.strides, priors.grid, levels, strict=True):
        where = f"priors of the level of stride {stride}"
        # Strides of the spec are whole numbers; those of priors may be what the canvas divided by the cells gives.
        off = (strides - stride).abs().max().item()
        expect(off <= 0.5, f"{where} have strides off by {off:g}")
        expect(bool((strides == strides[0]).all()), f"{where} have unequal strides")
        for axis, moved in ((0, (0.0, stride)), (1, (stride, 0.0))):
            steps = points.view(*grid, -1, 2).diff(dim=axis).reshape(-1, 2)
            off = (steps - steps.new_tensor(moved)).abs().max().item() if len(steps) else 0.0
            expect(off <= 0.5, f"{where} are not {stride} apart: off by {off:g}")


@torch.no_grad()
def _stages(case: _Case) -> None:
    """States have the branches, channels and shapes of the declared stages."""
    spec = case.spec
    expect(bool(spec.stages) == (Capability.STAGES in spec.capabilities), "stages are declared without the capability")
    if not spec.stages:
        raise LeftOut("declares no stages")
    states = case.show().head.states
    names = [stage.name for stage in spec.stages]
    expect(len(set(names)) == len(names), f"stages share a name: {names}")
    expect(len(states) == len(names), f"{len(states)} states for {len(names)} stages")
    for stage, state in zip(spec.stages, states, strict=True):
        channels = {branch: tuple(tensor.shape[1] for tensor in tensors) for branch, tensors in state.items()}
        declared = dict(stage.channels)
        expect(channels == declared, f"{stage.name} has channels {channels}, the spec says {declared}")
        for tensor in (tensor for tensors in state.values() for tensor in tensors):
            fits = tensor.ndim == 4 if stage.spatial else tensor.ndim in (2, 3)
            expect(fits, f"{stage.name} is {tuple(tensor.shape)}, but spatial is {stage.spatial}")
            if stage.activation is not None:
                once = stage.activation(tensor)
                expect(torch.equal(stage.activation(once), once), f"activation of {stage.name} is not idempotent")


@torch.no_grad()
def _capabilities(case: _Case) -> None:
    """What is declared can be called, and what is not says so."""
    adapter, spec = case.fresh(), case.spec
    view = case.show(adapter)
    declared, bins, ndim = spec.capabilities, len(spec.bins), view.head.predictions.regression.ndim
    expect(declared >= {Capability.FEATURES, Capability.PREDICTIONS}, "every detector shows features, predictions")
    distributions, assignment = Capability.DISTRIBUTIONS in declared, Capability.ASSIGNMENT in declared
    agree = distributions == bool(bins) == (ndim == 4)
    expect(agree, f"distributions: {distributions}, {bins} bins, regression {ndim}-d")
    assigns = _implemented(lambda: adapter.assign(view.head, view.batch))
    expect(assigns or not assignment, "assignment is declared and not implemented")
    expect(assignment or not assigns, "assign works, but assignment is not declared")
    resumes = Capability.STAGES not in declared and _implemented(lambda: adapter.resume({}, 0, view.head))
    expect(not resumes, "resume works, but stages are not declared")


def _implemented(call: Callable[[], object]) -> bool:
    try:
        call()
    except NotImplementedError:
        return False
    return True


@torch.no_grad()
def _resume(case: _Case) -> None:
    """Resumed from its own state, the head repeats the pass to the bit, whatever stands in the rest of the trace."""
    if not case.spec.stages:
        raise LeftOut("declares no stages")
    adapter = case.fresh()
    trace = case.show(adapter).head
    once = outputs(trace.predictions)
    for i, (stage, state) in enumerate(zip(case.spec.stages, trace.states, strict=True)):
        what = f"resumed from stage {i} ({stage.name})"
        expect_same(outputs(adapter.resume(state, i, trace)), once, what)
        if stage.activation is not None:
            activated = {branch: tuple(map(stage.activation, tensors)) for branch, tensors in state.items()}
            expect_same(outputs(adapter.resume(activated, i, trace)), once, f"{what} after its activation")
        elif any(bool((x < 0).any()) for tensors in state.values() for x in tensors):
            cut = {branch: tuple(x.clamp(min=0) for x in tensors) for branch, tensors in state.items()}
            problem = "negative values change nothing, so the head takes the state through an activation (ReLU)"
            expect(_moved(adapter.resume(cut, i, trace), once), f"{what}: {problem}, and the stage declares none")
        for branch, tensors in state.items():
            other = {**state, branch: tuple(-tensor - 1 for tensor in tensors)}
            moved = _moved(adapter.resume(other, i, trace), once)
            expect(moved, f"{what}, from another state of branch {branch}, the head still repeats its own pass")


def _moved(predictions: Predictions, once: Mapping[str, Tensor]) -> bool:
    again = outputs(predictions)
    return any(not torch.equal(again[name], value) for name, value in once.items())


@torch.no_grad()
def _given_priors(case: _Case) -> None:
    """Proposals or queries handed back to the head repeat the pass."""
    if case.spec.priors.on_grid:
        raise LeftOut("priors on a grid are not handed over")
    adapter = case.fresh()
    view = case.show(adapter)
    once = outputs(view.head.predictions)
    again = adapter.head(view.features, view.batch, view.head.predictions.priors)
    expect_same(outputs(again.predictions), once, "with its own priors handed back")
    for i, _ in enumerate(case.spec.stages):
        resumed = adapter.resume(again.states[i], i, again)
        expect_same(outputs(resumed), once, f"with given priors, resumed from stage {i}")


@torch.no_grad()
def _detections(case: _Case) -> None:
    """Detections are well formed, in pixels of the original images."""
    found, classes = case.detections(case.fresh()), case.spec.num_classes
    expect(len(found) == len(case.images), f"{len(found)} lists of detections for {len(case.images)} images")
    for image, each in zip(case.images, found, strict=True):
        boxes, scores, labels = each["boxes"], each["scores"], each["labels"]
        count = len(scores)
        shapes = tuple(boxes.shape), tuple(scores.shape), tuple(labels.shape)
        expect(shapes == ((count, 4), (count,), (count,)), f"boxes, scores, labels are {shapes}")
        expect(labels.dtype == torch.int64, f"labels are {labels.dtype}, not torch.int64")
        if not count:
            continue
        low, high = int(labels.min()), int(labels.max())
        expect(0 <= low <= high < classes, f"labels {low} to {high} of {classes} classes")
        expect(all(a >= b for a, b in pairwise(scores.tolist())), "scores do not fall")
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        limits = boxes.new_tensor([image.shape[-1], image.shape[-2]]) + 1
        inside = bool(((centres >= -1) & (centres <= limits)).all())
        expect(inside, f"detections lie outside of their image of {tuple(image.shape[-2:])} pixels")


@torch.no_grad()
def _sources(case: _Case) -> None:
    """Each detection is a prediction: of its class, its score and, but for proposals, its box."""
    adapter = case.fresh()
    view = observe(adapter, case.images)
    found, predictions = adapter.detections(view.head, view.batch), view.head.predictions
    if not any(len(each["scores"]) for each in found):
        raise LeftOut("the model detects nothing: hand in one with a lower score threshold")
    probabilities, boxes = predictions.probabilities, predictions.boxes
    quality = None if predictions.quality is None else predictions.quality.sigmoid()
    for i, each in enumerate(found):
        count = min(len(each["scores"]), LOOKED_AT)
        scores = probabilities[i][:, each["labels"][:count]].T
        # Where a quality counts, a score is some mean of both, or their product.
        low, high = (scores, scores) if quality is None else (scores * quality[i], scores.maximum(quality[i]))
        scored = each["scores"][:count, None]
        fits = (scored >= low - SCORE) & (scored <= high + SCORE)
        if predictions.priors.boxes.numel() and case.spec.priors != PriorKind.PROPOSALS:
            (height, width), (content_height, content_width) = view.batch.original_sizes[i], view.batch.sizes[i]
            limits = boxes.new_tensor([width, height] * 2)
            scaled = boxes[i] * limits / boxes.new_tensor([content_width, content_height] * 2)
            ours, theirs = (x.clamp(min=0).minimum(limits) for x in (each["boxes"][:count, None], scaled))
            fits &= (ours - theirs).abs().amax(-1) <= 10 * PIXELS + 1e-4 * limits.max()
        if not bool(fits.any(1).all()):
            at = int((~fits.any(1)).nonzero()[0])
            what = f"box {[round(x, 1) for x in each['boxes'][at].tolist()]}, label {int(each['labels'][at])}"
            raise AssertionError(
                f"detection {at} of image {i} ({what}, score {each['scores'][at]:.3f}) is nowhere in the predictions: "
                "no prior has that box, in pixels of the original image, with that probability of that class"
            )


@torch.no_grad()
def _own_detections(case: _Case) -> None:
    """Detections are those of the library's own inference."""
    if isinstance(case.own, str):
        raise LeftOut(case.own)
    adapter = case.fresh()
    expected = case.own(adapter.model, case.images)
    for i, (ours, theirs) in enumerate(zip(case.detections(adapter), expected, strict=True)):
        counts = len(ours["scores"]), len(theirs["scores"])
        expect(counts[0] == counts[1], f"image {i}: {counts[0]} detections, {counts[1]} of the library's own")
        expect(torch.equal(ours["labels"], theirs["labels"]), f"image {i}: labels are not the library's own")
        pairs = {"boxes": (ours["boxes"], theirs["boxes"]), "scores": (ours["scores"], theirs["scores"])}
        for name, (actual, own) in pairs.items():
            distance = ((actual - own).abs() / own.abs().clamp(min=1)).max().item() if len(own) else 0.0
            expect(distance <= 1e-5, f"image {i}: {name} are off by {distance:g} from the library's own")
    if not any(len(each["scores"]) for each in expected):
        raise LeftOut("the model detects nothing: hand in one with a lower score threshold")


def _shown(case: _Case) -> None:
    """What methods are shown hangs together by gradient, and is not written to afterwards."""
    adapter = case.fresh(train=True)
    batch = adapter.prepare(case.images, case.targets)
    features = adapter.features(batch)
    seen = [(f"level {i}", x, x._version) for i, x in enumerate(features)]
    trace = adapter.head(features, batch)
    states = [
        (f"state {i} ({stage.name}), branch {branch}", x)
        for i, (stage, state) in enumerate(zip(case.spec.stages, trace.states, strict=True))
        # The first state of queries may be a constant.
        if i or case.spec.priors.on_grid
        for branch, tensors in state.items()
        for x in tensors
    ]
    shown = [*((f"level {i}", x) for i, x in enumerate(features)), *outputs(trace.predictions).items(), *states]
    for name, x in shown:
        expect(x.requires_grad, f"no gradient flows from {name} to the detector: it is detached from it")
    seen += [(name, x, x._version) for name, x in shown]
    if Capability.ASSIGNMENT in case.spec.capabilities:
        adapter.assign(trace, batch)
    adapter.task_losses(trace, batch)
    _expect_unwritten(seen)
    for what, said in (("predictions", [*outputs(trace.predictions).values()]), ("states", [x for _, x in states])):
        reached = not said or _reached(said, features)
        expect(reached, f"no gradient flows from {what} to the pyramid: the head detaches what it takes")
    adapter.model.requires_grad_(False)
    for i, (stage, state) in enumerate(zip(case.spec.stages, trace.states, strict=True)):
        leaves = {branch: tuple(x.detach().requires_grad_() for x in tensors) for branch, tensors in state.items()}
        predictions = adapter.resume(leaves, i, trace)
        for branch, tensors in leaves.items():
            reached = _reached([*outputs(predictions).values()], tensors)
            expect(reached, f"resumed from stage {i} ({stage.name}), no gradient flows back to branch {branch}")
    _expect_unwritten(seen)


def _expect_unwritten(seen: Sequence[tuple[str, Tensor, int]]) -> None:
    written = sorted({name for name, x, version in seen if x._version != version})
    expect(not written, f"{', '.join(written)} is written to after it was shown, and methods see the changed values")


def _reached(said: Sequence[Tensor], wrt: Sequence[Tensor]) -> bool:
    """Whether gradient flows from what is said, all in all, to any of these."""
    value = torch.stack([x.square().sum() for x in said]).sum()
    if not value.requires_grad:
        return False
    gradients = torch.autograd.grad(value, wrt, retain_graph=True, allow_unused=True)
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)


def _task_losses(case: _Case) -> None:
    """Task losses are finite float32 scalars, their gradient reaches the detector, and assignments fit them."""
    adapter = case.fresh(train=True)
    view = case.show(adapter)
    losses, used = adapter.task_losses(view.head, view.batch)
    expect_losses(losses, "task losses")
    if Capability.ASSIGNMENT in case.spec.capabilities:
        with torch.no_grad():
            _expect_fitting(case, adapter, view, losses, used)
    expect_backward(losses, adapter.model, "task losses", reaches=True)


def _expect_fitting(
    case: _Case, adapter: DetectorAdapter, view: View, losses: Mapping[str, Tensor], used: Assignment | None
) -> None:
    """Expect that `assign` gives what the losses went by, in any mode, and a normaliser of their order."""
    found = adapter.assign(view.head, view.batch)
    adapter.model.eval()
    others = {"assign in eval mode": adapter.assign(view.head, view.batch)}
    adapter.model.train()
    if used is not None:
        others["the assignment that the losses used"] = used
    for what, other in others.items():
        alike = torch.equal(other.labels, found.labels) and torch.equal(other.weights, found.weights)
        expect(alike, f"{what} has other labels or weights than assign in train mode, of one pass")
        normalisers = float(other.normaliser), float(found.normaliser)
        near = abs(normalisers[0] - normalisers[1]) <= 1e-5 * abs(normalisers[1])
        expect(near, f"{what} has the normaliser {normalisers[0]:g}, assign in train mode {normalisers[1]:g}")
    logits, labels = view.head.predictions.logits, found.labels
    if case.spec.activation == "softmax":
        plain = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    else:
        scores = F.one_hot(labels, case.spec.num_classes + 1)[..., :-1].float()
        plain = F.binary_cross_entropy_with_logits(logits, scores, reduction="none").sum(-1)
    value, own = float((plain * found.weights).sum() / found.normaliser), float(total(losses))
    ratio = value / own
    expect(
        1 / ORDER <= ratio <= ORDER,
        f"a plain classification loss, summed over priors and divided by the normaliser ({float(found.normaliser):g}), "
        f"is {value:.3g}, and the detector's own losses are {own:.3g} in all: that is not what it divides by",
    )


def _own_task_losses(case: _Case) -> None:
    """Task losses are those of the library's own training forward."""
    if isinstance(case.own_losses, str):
        raise LeftOut(case.own_losses)
    torch.manual_seed(SEED)
    expected = case.own_losses(case.fresh(train=True).model, case.images, case.targets)
    torch.manual_seed(SEED)
    losses = case.losses(case.fresh(train=True))
    if isinstance(expected, Mapping):
        expect_same(losses, expected, "task losses")
        return
    ours, own = total(losses).item(), expected.sum().item()
    expect(abs(ours - own) <= 1e-6 * abs(own), f"the sum of task losses is {ours:.9g}, the library's own {own:.9g}")


def _empty_targets(case: _Case) -> None:
    """Images without any object give finite losses and gradients."""
    _expect_finite_step(case, without_objects(case.targets, range(len(case.targets))), "no object at all")


def _one_empty_image(case: _Case) -> None:
    """One image without objects among others gives finite losses and gradients."""
    for i in (0, len(case.targets) - 1):
        _expect_finite_step(case, without_objects(case.targets, [i]), f"no object in image {i}")


def _expect_finite_step(case: _Case, targets: Sequence[Target], what: str) -> None:
    adapter = case.fresh(train=True)
    losses = case.losses(adapter, targets)
    expect_losses(losses, what)
    # Without objects there may be nothing to learn (SSD takes as many negatives as there are positives): zero will do.
    expect_backward(losses, adapter.model, what)
    if Capability.ASSIGNMENT in case.spec.capabilities:
        adapter.model.eval()
        with torch.no_grad():
            _expect_assignment(case, adapter, targets, what)


@torch.no_grad()
def _assignment(case: _Case) -> None:
    """Assigned labels, boxes, weights and normaliser mean what the contract says, in eval as in train mode."""
    if Capability.ASSIGNMENT not in case.spec.capabilities:
        raise LeftOut("declares no assignment")
    for train in (False, True):
        _expect_assignment(case, case.fresh(train=train), case.targets, _mode(train))


def _expect_assignment(case: _Case, adapter: DetectorAdapter, targets: Sequence[Target], what: str) -> None:
    view = case.show(adapter, targets)
    found = adapter.assign(view.head, view.batch)
    classes, size = case.spec.num_classes, tuple(view.head.predictions.logits.shape[:2])
    for name, tensor in (("labels", found.labels), ("weights", found.weights), ("boxes", found.boxes[..., 0])):
        expect(tuple(tensor.shape) == size, f"{what}: {name} are of {tuple(tensor.shape)} priors, not {size}")
    expect(found.labels.dtype == torch.int64, f"{what}: labels are {found.labels.dtype}, not torch.int64")
    low, high = int(found.labels.min()), int(found.labels.max())
    expect(0 <= low <= high <= classes, f"{what}: labels {low} to {high} of {classes} classes and background")
    expect(bool((found.weights >= 0).all()), f"{what}: weights below 0, or not a number")
    normaliser = float(found.normaliser)
    expect(found.normaliser.shape == () and 0 < normaliser < float("inf"), f"{what}: normaliser {normaliser}")
    counted = int((found.weights > 0).sum())
    if sum(map(len, view.batch.labels)):
        expect(counted > 0, f"{what}: all weights are 0, so that no prior counts")
        most = counted * classes  # a mean over all priors that count and all classes
        expect(normaliser <= most, f"{what}: normaliser {normaliser:g}, of {counted} priors that count")
    allowed = max(PIXELS, 1e-4 * max(view.batch.images.shape[-2:]))
    for i, (boxes, labels) in enumerate(zip(view.batch.boxes, view.batch.labels, strict=True)):
        positive = found.positive(classes)[i]
        if not len(boxes):
            expect(not positive.any(), f"{what}: {int(positive.sum())} positives in image {i}, which has no object")
            continue
        some = case.spec.priors == PriorKind.PROPOSALS or bool(positive.any())
        expect(some, f"{what}: no prior answers for any of the {len(boxes)} objects of image {i}")
        counts = bool((found.weights[i][positive] > 0).all())
        expect(counts, f"{what}: priors that answer for objects of image {i} have weight 0")
        distances = (found.boxes[i][positive][:, None] - boxes).abs().amax(-1)
        if not case.proposes:
            distances = distances.where(found.labels[i][positive][:, None] == labels, float("inf"))
        off = distances.amin(-1).amax().item() if len(distances) else 0.0
        problem = f"a positive of image {i} has a box, or a label, of no object in it"
        expect(off <= allowed, f"{what}: {problem} (nearest one with its label: {off:g} pixels)")


@without_onednn()
def _two_processes(case: _Case) -> None:
    """The normaliser is that of all processes: one without objects has the same as one that has them all."""
    if Capability.ASSIGNMENT not in case.spec.capabilities:
        raise LeftOut("declares no assignment")

    def normaliser(targets: Sequence[Target]) -> float:
        adapter = case.fresh()
        view = case.show(adapter, targets)
        return float(adapter.assign(view.head, view.batch).normaliser)

    nothing = without_objects(case.targets, range(len(case.targets)))
    first, second = side_by_side([partial(normaliser, targets) for targets in (case.targets, nothing)])
    expect(
        first == second,
        f"the normaliser is {first:g} in a process with all objects and {second:g} in one without: make it "
        "kdtoolkit.processes.share(...) of what is counted",
    )


def _bfloat16(case: _Case) -> None:
    """Under bfloat16 autocast predictions and losses are finite and in float32."""
    adapter = case.fresh(train=True)
    autocast = partial(torch.autocast, case.images[0].device.type, torch.bfloat16)
    with autocast():
        losses = case.losses(adapter)
    expect_losses(losses, "task losses")
    expect_backward(losses, adapter.model, "task losses", reaches=True)
    adapter.model.eval()
    with torch.no_grad(), autocast():
        view = case.show(adapter)
        expect_float32(outputs(view.head.predictions), "head")
        for i, state in enumerate(view.head.states):
            expect_float32(outputs(adapter.resume(state, i, view.head)), f"resumed from stage {i}")
        adapter.detections(view.head, view.batch)


def _deterministic(case: _Case) -> None:
    """Two runs under one seed are equal to the bit, in train and eval mode."""
    for train in (True, False):
        runs = []
        for adapter in (case.fresh(train=train), case.fresh(train=train)):
            torch.manual_seed(SEED)
            with torch.set_grad_enabled(train):
                view = case.show(adapter)
                losses = adapter.task_losses(view.head, view.batch)[0] if train else {}
                runs.append(outputs(view.head.predictions) | losses)
        expect_same(runs[1], runs[0], f"the second run in {_mode(train)}")


@torch.no_grad()
def _stateless(case: _Case) -> None:
    """Adapters hold nothing between steps: another batch in between changes nothing."""
    adapter = case.fresh()
    first = case.show(adapter)
    once = outputs(first.head.predictions)
    adapter.detections(case.show(adapter, without_objects(case.targets, [0])).head, first.batch)
    observe(adapter, [case.images[0].flip(-1)])
    for i, state in enumerate(first.head.states):
        resumed = adapter.resume(state, i, first.head)
        expect_same(outputs(resumed), once, f"stage {i} resumed after another batch")
    expect_same(outputs(case.show(adapter).head.predictions), once, "the same batch after another one")


def _untouched(case: _Case) -> None:
    """Nothing of the model is changed, added or left behind, also where an error ends the pass."""
    for train in (False, True):
        adapter = case.fresh(train=train)
        # What the library's own forward caches is no fault of the adapter's.
        if not isinstance(case.own, str) and not train:
            case.own(adapter.model, case.images)
        if not isinstance(case.own_losses, str) and train:
            case.own_losses(adapter.model, case.images, case.targets)
        before = Snapshot.of(adapter.model)
        step = partial(_call_everything, case, adapter, train)
        step()
        # In train mode batch norm learns its statistics.
        before.expect_of(adapter.model, f"in {_mode(train)}, after a pass,", values=not train)
        count = count_calls(adapter.model, step)
        for call in sorted({1, count // 2, count} - {0}):
            interrupt(adapter.model, step, call)
            before.expect_of(adapter.model, "after an error inside the model", values=not train)


def _call_everything(case: _Case, adapter: DetectorAdapter, train: bool) -> None:
    with torch.set_grad_enabled(train):
        view = case.show(adapter)
        for i, state in enumerate(view.head.states):
            adapter.resume(state, i, view.head)
        if Capability.ASSIGNMENT in case.spec.capabilities:
            adapter.assign(view.head, view.batch)
        if train:
            adapter.task_losses(view.head, view.batch)
        else:
            adapter.detections(view.head, view.batch)


def _teacher(case: _Case) -> None:
    """As a teacher it is frozen, learns nothing from a step, and passes gradient to the student's states."""
    teacher, student = case.fresh(train=True), case.fresh(train=True)
    distiller = Distiller(teacher, student, [Probe(case.spec.capabilities)])
    before, keys = Snapshot.of(teacher.model), tuple(case.adapter.model.state_dict())
    losses = distiller.train()(case.images, case.targets)
    expect_backward(losses, student.model, "through the teacher's head", reaches=True)
    before.expect_of(teacher.model, "after a step as a teacher")
    saved = student.model.state_dict()
    expect(tuple(saved) == keys, f"the student's state dict has other keys: {set(saved) ^ set(keys)}")
    case.fresh().model.load_state_dict(saved)


def _first_stage(case: _Case) -> None:
    """What proposes is a detector of one class that keeps the same promises."""
    stage, spec = case.adapter.first_stage, case.spec.first_stage
    expect((stage is None) == (spec is None), "first_stage is said in one of adapter and spec, and not in the other")
    if stage is None:
        raise LeftOut("has no first stage")
    expect(stage.spec == spec, "the spec of first_stage is not the first_stage of the spec")
    expect(stage.spec.num_classes == 1, f"a first stage has one class, here {stage.spec.num_classes}")
    proposing = _Case(stage, case.images, case.targets, proposes=True)
    run(f"first stage of {case.spec.name}", FIRST_STAGE_CHECKS, proposing, {})


_BOTH = (_levels, _predictions, _priors, _stages, _capabilities, _resume, _given_priors)
ADAPTER_CHECKS = by_name(
    _matches, _batch, _beside, *_BOTH, _detections, _sources, _own_detections, _shown, _task_losses, _own_task_losses,
    _empty_targets, _one_empty_image, _assignment, _two_processes, _bfloat16, _deterministic, _stateless,
    _untouched, _teacher,
    _first_stage,
)  # fmt: skip
FIRST_STAGE_CHECKS = by_name(*_BOTH, _assignment, _two_processes)
"""Those that make sense of what proposes: its losses and detections are parts of its detector's."""
