"""The conformance kit: whether an adapter or a method, wherever it was written, keeps what the contract promises.

One line of pytest each, for a detector with random weights and images of 64 px:

    def test_my_adapter():
        check_adapter(my_tiny_detector())

    def test_my_method():
        check_method(MyMethod, student=my_tiny_detector(), teacher=another_tiny_detector())

Each promise is one small function below, whose name is the check's. Checks work on copies of what is handed in. A
failure that has to be lived with is listed with its reason: `known={"bfloat16": "the library's NMS has no bfloat16"}`.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdtoolkit.contract import (
    Batch,
    Capability,
    Detections,
    DetectorAdapter,
    Exchange,
    HeadTrace,
    Method,
    Predictions,
    Target,
    View,
    adapt,
)
from kdtoolkit.distiller import Distiller, refusal
from kdtoolkit.errors import IncompatibleError, KDError

Own = Callable[[Any, Sequence[Tensor]], list[Detections]]
"""The library's own inference: of a model in eval mode and images; labels in [0, K), pixels of the original images."""

OwnLosses = Callable[[Any, Sequence[Tensor], Sequence[Target]], Mapping[str, Tensor] | Tensor]
"""The library's own training losses: of a model in train mode, images and targets; by name, or their sum."""

MethodFactory = Callable[[], Method]

SEED = 0
PIXELS = 1e-2  # boxes that went to relative coordinates and back
ZERO = 1e-4  # a vanishing term, relative to that of another student: what float32 leaves of it after a head
ROUNDING = 1e-7  # the same where that of another student is hardly more
BFLOAT16 = 0.3  # relative: terms are differences of detectors that are much alike, and rounded to 8 bits
SIZES = (8, 16, 32, 64, 128)  # images tried for the smallest that a pair takes


class ConformanceError(AssertionError):
    """A promise of the contract is broken; the message names the checks, the subject and the numbers."""


class _LeftOut(Exception):
    """The check does not apply; the message says why."""


@dataclass(frozen=True)
class Result:
    """What came of one check, and why, unless it passed."""

    outcome: Literal["passed", "known failure", "left out", "refused"]
    reason: str = ""


@dataclass(frozen=True)
class ConformanceReport:
    """The results of all checks of one subject, by the checks' names; printable."""

    subject: str
    results: Mapping[str, Result]

    @property
    def refused(self) -> str | None:
        """Why the method refuses the pair, if it does."""
        return next((r.reason for r in self.results.values() if r.outcome == "refused"), None)

    def __str__(self) -> str:
        """One line a check."""
        lines = (
            f"  {name}: {result.outcome}" + (f" ({result.reason})" if result.reason else "")
            for name, result in self.results.items()
        )
        return "\n".join((self.subject, *lines))


def check_adapter(
    adapter_or_model: DetectorAdapter | nn.Module,
    *,
    known: Mapping[str, str] | None = None,
    own: Own | None = None,
    own_losses: OwnLosses | None = None,
    images: Sequence[Tensor] | None = None,
    targets: Sequence[Target] | None = None,
) -> ConformanceReport:
    """Check every promise of an adapter on one detector: one line of a test.

        def test_adapter():
            check_adapter(tiny_detector(), own=lambda model, images: model(images))

    Args:
        adapter_or_model: a small detector with random weights, or its adapter. It is copied, not changed.
        known: checks that fail, with the reason; one that passes after all is an error, and so is an unknown name.
        own: the library's own inference, which `detections` must equal. None leaves that check out.
        own_losses: the library's own training losses, which `task_losses` must equal. None leaves that check out.
        images: two or more (3, H, W) in [0, 1]; two of unequal sizes about 64 px by default.
        targets: their ground truth; handed in with `images`.

    Raises:
        ConformanceError: promises are broken; lists them all.
        KDError: no adapter knows the model, or `known` names no check.
    """
    adapter = adapt(adapter_or_model)
    device = next(adapter.model.parameters()).device
    if images is None or targets is None:
        images, targets = example_batch(adapter.spec.num_classes, device)
    case = _AdapterCase(adapter, tuple(images), tuple(targets), own, own_losses)
    return _run(f"adapter of {adapter.spec.name}", ADAPTER_CHECKS, case, known or {})


def check_method(
    method_factory: MethodFactory,
    student: DetectorAdapter | nn.Module,
    teacher: DetectorAdapter | nn.Module,
    *,
    known: Mapping[str, str] | None = None,
    images: Sequence[Tensor] | None = None,
    targets: Sequence[Target] | None = None,
) -> ConformanceReport:
    """Check every promise of a method on one pair of detectors: one line of a test.

        def test_method():
            check_method(lambda: MyMethod(weight=2.0), tiny_detector(), another_tiny_detector())

    A pair that the method refuses is no error: the report says so, with the reason.

    Args:
        method_factory: makes the method afresh: its class, or a function without arguments.
        student: a small detector with random weights, or its adapter. It is copied, not changed.
        teacher: likewise, of as many classes.
        known: checks that fail, with the reason; one that passes after all is an error, and so is an unknown name.
        images: two or more (3, H, W) in [0, 1]; two of unequal sizes about 64 px by default.
        targets: their ground truth; handed in with `images`.

    Raises:
        ConformanceError: promises are broken; lists them all.
        KDError: no adapter knows a model, or `known` names no check.
    """
    pair = adapt(student), adapt(teacher)
    device = next(pair[0].model.parameters()).device
    if images is None or targets is None:
        images, targets = example_batch(pair[0].spec.num_classes, device)
    case = _MethodCase(method_factory, *pair, tuple(images), tuple(targets))
    method = method_factory()
    subject = f"{type(method).__name__} from {pair[1].spec.name} to {pair[0].spec.name}"
    if reason := case.refusal():
        return ConformanceReport(subject, {"refuses": Result("refused", reason)})
    return _run(subject, METHOD_CHECKS, case, known or {})


def example_batch(
    num_classes: int,
    device: torch.device | str = "cpu",
    sizes: tuple[tuple[int, int], tuple[int, int]] = ((64, 64), (50, 60)),
) -> tuple[list[Tensor], list[Target]]:
    """Two random images of (height, width) about 64 px, with small and large boxes in both."""
    generator = torch.Generator().manual_seed(SEED)
    images = [torch.rand(3, *size, generator=generator).to(device) for size in sizes]
    boxes = [
        [[4.0, 6.0, 30.0, 40.0], [20.0, 20.0, 60.0, 60.0], [40.0, 2.0, 56.0, 18.0]],
        [[10.0, 10.0, 40.0, 45.0], [2.0, 3.0, 58.0, 48.0]],
    ]
    targets: list[Target] = [
        {
            "boxes": torch.tensor(each, device=device),
            "labels": torch.arange(len(each), device=device).add(i) % num_classes,
        }
        for i, each in enumerate(boxes)
    ]
    return images, targets


# Running checks.


def _run(
    subject: str, checks: Mapping[str, Callable[[Any], None]], case: object, known: Mapping[str, str]
) -> ConformanceReport:
    if unknown := sorted(known.keys() - checks.keys()):
        raise KDError(f"known: there is no check {', '.join(unknown)}; the checks are {', '.join(checks)}")
    results: dict[str, Result] = {}
    failures: dict[str, str] = {}
    cause: Exception | None = None
    for name, check in checks.items():
        outcome, error = _outcome(check, case)
        if name in known:
            if outcome.outcome == "passed" and error is None:
                failures[name] = f"passes, so it is no known failure: remove the reason ({known[name]})"
            elif error is None:
                failures[name] = f"is left out ({outcome.reason}), so it is no known failure: remove the reason"
            results[name] = Result("known failure", known[name])
        elif error is not None:
            failures[name] = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            cause = cause or error
        else:
            results[name] = outcome
    if failures:
        lines = "".join(f"\n  {name}: {message}" for name, message in failures.items())
        raise ConformanceError(f"{subject}: {len(failures)} of {len(checks)} checks failed{lines}") from cause
    return ConformanceReport(subject, results)


def _outcome(check: Callable[[Any], None], case: object) -> tuple[Result, Exception | None]:
    passed = Result("passed")
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        try:
            check(case)
        except _LeftOut as left_out:
            return Result("left out", str(left_out)), None
        except Exception as error:  # whatever a foreign detector raises is a failure of this check alone
            return passed, error
    return passed, None


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _by_name(*checks: Callable[[Any], None]) -> dict[str, Callable[[Any], None]]:
    return {check.__name__.strip("_"): check for check in checks}


# What checks look at.


@dataclass(frozen=True)
class _AdapterCase:
    adapter: DetectorAdapter
    images: tuple[Tensor, ...]
    targets: tuple[Target, ...]
    own: Own | None = None
    own_losses: OwnLosses | None = None
    proposes: bool = False  # a first stage: one class, whatever the ground truth says

    def fresh(self, *, train: bool = False) -> DetectorAdapter:
        adapter = copy.deepcopy(self.adapter)
        adapter.model.train(train)
        return adapter

    def show(self, adapter: DetectorAdapter, targets: Sequence[Target] | None = None) -> _Pass:
        batch = adapter.prepare(self.images, self.targets if targets is None else targets)
        features = adapter.features(batch)
        return _Pass(batch, features, adapter.head(features, batch))

    def losses(self, adapter: DetectorAdapter, targets: Sequence[Target] | None = None) -> dict[str, Tensor]:
        shown = self.show(adapter, targets)
        return adapter.task_losses(shown.trace, shown.batch)[0]


@dataclass(frozen=True)
class _Pass:
    batch: Batch
    features: tuple[Tensor, ...]
    trace: HeadTrace

    @property
    def predictions(self) -> Predictions:
        return self.trace.predictions


def _outputs(predictions: Predictions) -> dict[str, Tensor]:
    outputs = {"logits": predictions.logits, "regression": predictions.regression, "boxes": predictions.boxes}
    return outputs if predictions.quality is None else outputs | {"quality": predictions.quality}


def _expect_same(again: Mapping[str, Tensor], once: Mapping[str, Tensor], what: str) -> None:
    _expect(again.keys() == once.keys(), f"{what}: {sorted(again)} instead of {sorted(once)}")
    for name, expected in once.items():
        actual = again[name]
        _expect(actual.shape == expected.shape, f"{what}: {name} is {tuple(actual.shape)}, not {tuple(expected.shape)}")
        if not torch.equal(actual, expected):
            distance = (actual.double() - expected.double()).abs().max().item()
            raise AssertionError(f"{what}: {name} is off by up to {distance:g}; it must be equal to the bit")


def _expect_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    for name, tensor in tensors.items():
        bad = int((~torch.isfinite(tensor)).sum())
        _expect(bad == 0, f"{what}: {name} has {bad} of {tensor.numel()} values that are not finite")


def _expect_losses(losses: Mapping[str, Tensor], what: str) -> None:
    _expect(len(losses) > 0, f"{what}: no loss at all")
    for name, loss in losses.items():
        _expect(loss.shape == (), f"{what}: {name} has the shape {tuple(loss.shape)}, not ()")
        _expect(loss.dtype == torch.float32, f"{what}: {name} is {loss.dtype}, not torch.float32")
    _expect_finite(losses, what)


def _total(losses: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([*losses.values()]).sum()


def _backward(losses: Mapping[str, Tensor]) -> None:
    _total(losses).backward()  # type: ignore[no-untyped-call]


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _expect_gradients(model: nn.Module, what: str) -> None:
    gradients = _gradients(model)
    _expect_finite(gradients, f"{what}: gradients")
    _expect(any(bool(g.any()) for g in gradients.values()), f"{what}: no gradient reaches the model")


@dataclass(frozen=True)
class _Snapshot:
    """All that nobody may change in a model."""

    values: Mapping[str, Tensor]
    keys: tuple[str, ...]
    modules: Mapping[str, Mapping[str, object]]
    flags: Mapping[str, tuple[bool, bool]]

    @classmethod
    def of(cls, model: nn.Module) -> _Snapshot:
        values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return cls(
            {name: value.detach().clone() for name, value in values.items()},
            tuple(model.state_dict()),
            {name: _facts(module) for name, module in model.named_modules()},
            {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()},
        )

    def expect_of(self, model: nn.Module, when: str, *, values: bool = True) -> None:
        now = _Snapshot.of(model)
        _expect(now.keys == self.keys, f"{when} the state dict has other keys: {set(now.keys) ^ set(self.keys)}")
        _expect(now.modules.keys() == self.modules.keys(), f"{when} the model has other submodules")
        for name, facts in self.modules.items():
            changed = sorted(k for k in facts.keys() | now.modules[name].keys() if _unlike(facts, now.modules[name], k))
            where = name or "the model itself"
            _expect(not changed, f"{when} something is changed, added or left behind in {where}: {', '.join(changed)}")
        for name, flags in self.flags.items():
            _expect(now.flags[name] == flags, f"{when} requires_grad or grad of {name} is changed")
        for name, value in self.values.items():
            same = not values or torch.equal(now.values[name], value)
            _expect(same, f"{when} the values of {name} are changed")


def _facts(module: nn.Module) -> dict[str, object]:
    """Attributes with their values where these are plain, hooks, and the class's forward."""
    facts: dict[str, object] = {"forward of its class": type(module).forward}
    for name, value in vars(module).items():
        if "hooks" in name and isinstance(value, dict):
            facts[name] = tuple(value)
        else:
            facts[name] = value if isinstance(value, (bool, int, float, str, type(None))) else ...
    return facts


def _unlike(before: Mapping[str, object], now: Mapping[str, object], key: str) -> bool:
    missing = object()
    return before.get(key, missing) != now.get(key, missing)


class _Interruption(Exception):
    """What the kit raises inside a model."""


@contextmanager
def _interrupted(model: nn.Module, call: int) -> Iterator[list[int]]:
    """Let the model raise at the given call of one of its layers; counts calls. Only for copies: it hooks them."""
    calls = [0]

    def hook(module: nn.Module, args: object) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise _Interruption

    handles = [m.register_forward_pre_hook(hook) for m in model.modules() if not any(True for _ in m.children())]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _expect_untouched_by_errors(model: nn.Module, step: Callable[[], object], before: _Snapshot, values: bool) -> None:
    """Interrupt `step` in the first, a middle and the last layer of the model that it calls."""
    with _interrupted(model, 0) as calls:
        step()
    for call in sorted({1, calls[0] // 2, calls[0]} - {0}):
        with _interrupted(model, call):
            try:
                step()
            except _Interruption:
                pass
            else:
                raise AssertionError("an error raised inside the model is swallowed")
        before.expect_of(model, "after an error inside the model", values=values)


# Checks of an adapter: each is one promise.


def _matches(case: _AdapterCase) -> None:
    """The adapter knows its model by its class, and no other."""
    if case.proposes:
        raise _LeftOut("a first stage is reached through its detector")
    _expect(type(case.adapter).matches(case.adapter.model), "matches(model) is False for the adapter's own model")
    _expect(not type(case.adapter).matches(nn.Identity()), "matches(nn.Identity()) is True")
    _expect(case.adapter.spec == case.adapter.spec, "spec differs from call to call")


def _batch(case: _AdapterCase) -> None:
    """`prepare` says where each image and each box went."""
    batch = case.fresh().prepare(case.images, case.targets)
    count, colours, *canvas = batch.images.shape
    _expect((count, colours) == (len(case.images), 3), f"images are {tuple(batch.images.shape)}")
    originals = tuple((image.shape[-2], image.shape[-1]) for image in case.images)
    _expect(batch.original_sizes == originals, f"original_sizes {batch.original_sizes} of images {originals}")
    for size, padded in zip(batch.sizes, batch.padded_sizes, strict=True):
        fits = all(0 < s <= p <= c for s, p, c in zip(size, padded, canvas, strict=True))
        _expect(fits, f"size {size}, padded {padded} and canvas {canvas} do not contain each other")
    _expect(len(batch.boxes) == len(batch.labels) == count, "boxes and labels are not one tensor an image")
    for i, target in enumerate(case.targets):
        (height, width), (original_height, original_width) = batch.sizes[i], originals[i]
        scale = target["boxes"].new_tensor([width / original_width, height / original_height] * 2)
        expected = target["boxes"] * scale
        distance = (batch.boxes[i] - expected).abs().max().item() if len(expected) else 0.0
        _expect(batch.boxes[i].shape == expected.shape, f"image {i} has boxes {tuple(batch.boxes[i].shape)}")
        _expect(distance <= max(PIXELS, 1e-4 * max(canvas)), f"boxes of image {i} are off by {distance:g} pixels")
        _expect(torch.equal(batch.labels[i], target["labels"]), f"labels of image {i} are {batch.labels[i].tolist()}")
    without = case.fresh().prepare(case.images)
    _expect(without.boxes == () and without.labels == (), "without targets boxes and labels must be empty tuples")


@torch.no_grad()
def _levels(case: _AdapterCase) -> None:
    """Channels and strides of the spec are those of the pyramid."""
    adapter, spec = case.fresh(), case.adapter.spec
    shown = case.show(adapter)
    channels = tuple(level.shape[1] for level in shown.features)
    _expect(channels == spec.channels, f"levels have {channels} channels, the spec says {spec.channels}")
    _expect(len(spec.strides) == len(channels), f"{len(spec.strides)} strides, {len(channels)} levels")
    for stride, level in zip(spec.strides, shown.features, strict=True):
        for cells, pixels in zip(level.shape[-2:], shown.batch.images.shape[-2:], strict=True):
            # Levels may be rounded up or down on their way; a wrong stride is off by a factor.
            fits = (cells - 1) * stride <= pixels <= (cells + 1) * stride
            _expect(fits, f"{pixels} pixels give {cells} cells of a stride said to be {stride}")


@torch.no_grad()
def _predictions(case: _AdapterCase) -> None:
    """Predictions have the shapes, kinds and dtypes that the spec declares."""
    adapter, spec = case.fresh(), case.adapter.spec
    shown = case.show(adapter)
    predictions, count = shown.predictions, len(case.images)
    total = predictions.priors.boxes.shape[-2]
    classes = spec.num_classes + (spec.activation == "softmax")
    expected = {
        "logits": (count, total, classes),
        "regression": (count, total, 4, len(spec.bins)) if spec.bins else (count, total, 4),
        "boxes": (count, total, 4),
        "quality": (count, total),
    }
    for name, tensor in _outputs(predictions).items():
        shape = tuple(tensor.shape)
        _expect(shape == expected[name], f"{name} is {shape}; the spec makes it {expected[name]}")
        _expect(tensor.dtype == torch.float32, f"{name} is {tensor.dtype}, not torch.float32")
    _expect_finite(_outputs(predictions), "predictions")
    _expect(
        predictions.activation == spec.activation,
        f"activation is {predictions.activation} in predictions, {spec.activation} in the spec",
    )


@torch.no_grad()
def _priors(case: _AdapterCase) -> None:
    """Priors lie on the declared grid, with the declared strides; or on none, and then their form is said."""
    adapter, spec = case.fresh(), case.adapter.spec
    shown = case.show(adapter)
    priors = shown.predictions.priors
    _expect_finite({"boxes": priors.boxes}, "priors")
    if not spec.priors.on_grid:
        _expect(spec.prior_form != "", f"{spec.priors} lie on no grid, so the spec must have a prior_form")
        _expect(spec.priors_per_cell == (), "priors_per_cell is for priors on a grid")
        grid_free = priors.grid == () and priors.per_cell == () and priors.strides.numel() == 0
        _expect(grid_free, f"{spec.priors} lie on no grid, but Priors has a grid, strides or per_cell")
        return
    _expect(spec.prior_form == "", f"{spec.priors} lie on a grid, so prior_form must be empty")
    _expect(priors.boxes.ndim == 2, f"priors on a grid are (A, 4), here {tuple(priors.boxes.shape)}")
    cells = tuple((level.shape[-2], level.shape[-1]) for level in shown.features)
    _expect(priors.grid == cells, f"Priors.grid is {priors.grid}, levels are {cells}")
    total = len(priors.boxes)
    counts = tuple(h * w * each for (h, w), each in zip(priors.grid, spec.priors_per_cell, strict=True))
    _expect(counts == priors.per_level, f"the spec makes {counts} priors a level, Priors.per_level {priors.per_level}")
    _expect(sum(counts) == total == len(priors.strides), f"{sum(counts)} priors on the levels, {total} in all")
    centres = (priors.boxes[:, :2] + priors.boxes[:, 2:]).double() / 2
    start = 0
    for stride, grid, count in zip(spec.strides, priors.grid, counts, strict=True):
        own = priors.strides[start : start + count]
        # Strides of the spec are whole numbers; those of priors may be what the canvas divided by the cells gives.
        distance = (own - stride).abs().max().item()
        _expect(distance <= 0.5, f"priors of the level of stride {stride} have strides off by {distance:g}")
        _expect(bool((own == own[0]).all()), f"priors of the level of stride {stride} have unequal strides")
        level = centres[start : start + count].view(*grid, -1, 2)
        for axis, moved in ((0, (0.0, stride)), (1, (stride, 0.0))):
            steps = level.diff(dim=axis).reshape(-1, 2)
            off = (steps - steps.new_tensor(moved)).abs().max().item() if len(steps) else 0.0
            _expect(off <= 0.5, f"priors of the level of stride {stride} are not {stride} apart: off by {off:g}")
        start += count


@torch.no_grad()
def _stages(case: _AdapterCase) -> None:
    """States have the branches, channels and shapes of the declared stages."""
    adapter, spec = case.fresh(), case.adapter.spec
    _expect(bool(spec.stages) == (Capability.STAGES in spec.capabilities), "stages are declared without the capability")
    if not spec.stages:
        raise _LeftOut("declares no stages")
    states = case.show(adapter).trace.states
    names = [stage.name for stage in spec.stages]
    _expect(len(set(names)) == len(names), f"stages share a name: {names}")
    _expect(len(states) == len(names), f"{len(states)} states for {len(names)} stages")
    for stage, state in zip(spec.stages, states, strict=True):
        channels = {branch: tuple(tensor.shape[1] for tensor in tensors) for branch, tensors in state.items()}
        declared = dict(stage.channels)
        _expect(channels == declared, f"{stage.name} has channels {channels}, the spec says {declared}")
        for tensor in (tensor for tensors in state.values() for tensor in tensors):
            fits = tensor.ndim == 4 if stage.spatial else tensor.ndim in (2, 3)
            _expect(fits, f"{stage.name} is {tuple(tensor.shape)}, but spatial is {stage.spatial}")
            if stage.activation is not None:
                once = stage.activation(tensor)
                _expect(torch.equal(stage.activation(once), once), f"activation of {stage.name} is not idempotent")


def _capabilities(case: _AdapterCase) -> None:
    """What is declared can be called, and what is not says so."""
    adapter, spec = case.fresh(), case.adapter.spec
    with torch.no_grad():
        shown = case.show(adapter)
        regression = shown.predictions.regression
        has = spec.capabilities.__contains__
        _expect(has(Capability.FEATURES) and has(Capability.PREDICTIONS), "every detector shows features, predictions")
        _expect(
            has(Capability.DISTRIBUTIONS) == bool(spec.bins) == (regression.ndim == 4),
            f"distributions: {has(Capability.DISTRIBUTIONS)}, {len(spec.bins)} bins, regression {regression.ndim}-d",
        )
        try:
            adapter.assign(shown.trace, shown.batch)
        except NotImplementedError:
            _expect(not has(Capability.ASSIGNMENT), "assignment is declared and not implemented")
        else:
            _expect(has(Capability.ASSIGNMENT), "assign works, but assignment is not declared")
        if not has(Capability.STAGES):
            try:
                adapter.resume({}, 0, shown.trace)
            except NotImplementedError:
                return
            raise AssertionError("resume works, but stages are not declared")


@torch.no_grad()
def _resume(case: _AdapterCase) -> None:
    """Resumed from its own state, the head repeats the pass to the bit, whatever stands in the rest of the trace."""
    adapter = case.fresh()
    if not adapter.spec.stages:
        raise _LeftOut("declares no stages")
    trace = case.show(adapter).trace
    once = _outputs(trace.predictions)
    for i, (stage, state) in enumerate(zip(adapter.spec.stages, trace.states, strict=True)):
        _expect_same(_outputs(adapter.resume(state, i, trace)), once, f"resumed from stage {i} ({stage.name})")
        act = stage.activation
        if act is not None:
            activated = {branch: tuple(map(act, tensors)) for branch, tensors in state.items()}
            what = f"resumed from stage {i} ({stage.name}) after its activation"
            _expect_same(_outputs(adapter.resume(activated, i, trace)), once, what)
        other = {branch: tuple(-tensor - 1 for tensor in tensors) for branch, tensors in state.items()}
        again = _outputs(adapter.resume(other, i, trace))
        moved = any(not torch.equal(again[name], once[name]) for name in ("logits", "regression"))
        _expect(moved, f"resumed from another state at stage {i} ({stage.name}) the head still repeats its own pass")


@torch.no_grad()
def _given_priors(case: _AdapterCase) -> None:
    """Proposals or queries handed back to the head repeat the pass."""
    adapter = case.fresh()
    if adapter.spec.priors.on_grid:
        raise _LeftOut("priors on a grid are not handed over")
    shown = case.show(adapter)
    again = adapter.head(shown.features, shown.batch, shown.predictions.priors)
    _expect_same(_outputs(again.predictions), _outputs(shown.predictions), "with its own priors handed back")
    for i in range(len(adapter.spec.stages)):
        resumed = adapter.resume(again.states[i], i, again)
        _expect_same(_outputs(resumed), _outputs(shown.predictions), f"with given priors, resumed from stage {i}")


@torch.no_grad()
def _detections(case: _AdapterCase) -> None:
    """Detections are well formed, in pixels of the original images."""
    adapter, spec = case.fresh(), case.adapter.spec
    batch = adapter.prepare(case.images)
    found = adapter.detections(adapter.head(adapter.features(batch), batch), batch)
    _expect(len(found) == len(case.images), f"{len(found)} lists of detections for {len(case.images)} images")
    for image, each in zip(case.images, found, strict=True):
        boxes, scores, labels = each["boxes"], each["scores"], each["labels"]
        count = len(scores)
        shapes = tuple(boxes.shape), tuple(scores.shape), tuple(labels.shape)
        _expect(shapes == ((count, 4), (count,), (count,)), f"boxes, scores, labels are {shapes}")
        _expect(labels.dtype == torch.int64, f"labels are {labels.dtype}, not torch.int64")
        if not count:
            continue
        _expect(
            all(0 <= label < spec.num_classes for label in labels.tolist()),
            f"labels {int(labels.min())} to {int(labels.max())} of {spec.num_classes} classes",
        )
        _expect(all(a >= b for a, b in pairwise(scores.tolist())), "scores do not fall")
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        limits = boxes.new_tensor([image.shape[-1], image.shape[-2]]) + 1
        inside = bool(((centres >= -1) & (centres <= limits)).all())
        _expect(inside, f"detections lie outside of their image of {tuple(image.shape[-2:])} pixels")


@torch.no_grad()
def _own_detections(case: _AdapterCase) -> None:
    """Detections are those of the library's own inference."""
    if case.own is None:
        raise _LeftOut("no `own` was handed in")
    adapter = case.fresh()
    expected = case.own(adapter.model, case.images)
    batch = adapter.prepare(case.images)
    found = adapter.detections(adapter.head(adapter.features(batch), batch), batch)
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        _expect(len(ours["scores"]) == len(theirs["scores"]), f"image {i}: {len(ours['scores'])} detections, "
                f"{len(theirs['scores'])} of the library's own")  # fmt: skip
        _expect(torch.equal(ours["labels"], theirs["labels"]), f"image {i}: labels are not the library's own")
        for name, actual, own in (
            ("boxes", ours["boxes"], theirs["boxes"]),
            ("scores", ours["scores"], theirs["scores"]),
        ):
            distance = ((actual - own).abs() / own.abs().clamp(min=1)).max().item() if len(own) else 0.0
            _expect(distance <= 1e-5, f"image {i}: {name} are off by {distance:g} from the library's own")
    if not any(len(each["scores"]) for each in expected):
        raise _LeftOut("the model detects nothing: hand in one with a lower score threshold")


def _own_task_losses(case: _AdapterCase) -> None:
    """Task losses are those of the library's own training forward."""
    if case.own_losses is None:
        raise _LeftOut("no `own_losses` was handed in")
    torch.manual_seed(SEED)
    expected = case.own_losses(case.fresh(train=True).model, case.images, case.targets)
    torch.manual_seed(SEED)
    losses = case.losses(case.fresh(train=True))
    if isinstance(expected, Mapping):
        _expect_same(losses, expected, "task losses")
        return
    total, own = _total(losses).item(), expected.sum().item()
    _expect(abs(total - own) <= 1e-6 * abs(own), f"the sum of task losses is {total:.9g}, the library's own {own:.9g}")


def _task_losses(case: _AdapterCase) -> None:
    """Task losses are finite float32 scalars, and their gradient reaches the detector."""
    adapter = case.fresh(train=True)
    losses = case.losses(adapter)
    _expect_losses(losses, "task losses")
    _backward(losses)
    _expect_gradients(adapter.model, "task losses")


def _without_objects(targets: Sequence[Target], images: Sequence[int]) -> list[Target]:
    return [
        {"boxes": target["boxes"][:0], "labels": target["labels"][:0]} if i in images else target
        for i, target in enumerate(targets)
    ]


def _expect_finite_step(case: _AdapterCase, targets: Sequence[Target], what: str) -> None:
    adapter = case.fresh(train=True)
    losses = case.losses(adapter, targets)
    _expect_losses(losses, what)
    _backward(losses)
    # Without objects there may be nothing to learn (SSD takes as many negatives as there are positives): zero will do.
    _expect_finite(_gradients(adapter.model), f"{what}: gradients")
    if Capability.ASSIGNMENT in adapter.spec.capabilities:
        adapter.model.eval()
        with torch.no_grad():
            _expect_assignment(case, adapter, targets, what)


def _empty_targets(case: _AdapterCase) -> None:
    """Images without any object give finite losses and gradients."""
    _expect_finite_step(case, _without_objects(case.targets, range(len(case.targets))), "no object at all")


def _one_empty_image(case: _AdapterCase) -> None:
    """One image without objects among others gives finite losses and gradients."""
    for i in (0, len(case.targets) - 1):
        _expect_finite_step(case, _without_objects(case.targets, [i]), f"no object in image {i}")


@torch.no_grad()
def _assignment(case: _AdapterCase) -> None:
    """Assigned labels, boxes, weights and normaliser mean what the contract says, in eval as in train mode."""
    if Capability.ASSIGNMENT not in case.adapter.spec.capabilities:
        raise _LeftOut("declares no assignment")
    for train in (False, True):
        _expect_assignment(case, case.fresh(train=train), case.targets, f"{'train' if train else 'eval'} mode")


def _expect_assignment(case: _AdapterCase, adapter: DetectorAdapter, targets: Sequence[Target], what: str) -> None:
    shown = case.show(adapter, targets)
    found = adapter.assign(shown.trace, shown.batch)
    classes, size = adapter.spec.num_classes, tuple(shown.predictions.logits.shape[:2])
    for name, tensor in (("labels", found.labels), ("weights", found.weights), ("boxes", found.boxes[..., 0])):
        _expect(tuple(tensor.shape) == size, f"{what}: {name} are of {tuple(tensor.shape)} priors, not {size}")
    _expect(found.labels.dtype == torch.int64, f"{what}: labels are {found.labels.dtype}, not torch.int64")
    low, high = int(found.labels.min()), int(found.labels.max())
    _expect(0 <= low <= high <= classes, f"{what}: labels {low} to {high} of {classes} classes and background")
    _expect(bool((found.weights >= 0).all()), f"{what}: weights below 0, or not a number")
    normaliser = float(found.normaliser)
    _expect(found.normaliser.shape == () and 0 < normaliser < float("inf"), f"{what}: normaliser {normaliser}")
    for i, (boxes, labels) in enumerate(zip(shown.batch.boxes, shown.batch.labels, strict=True)):
        positive = found.positive(classes)[i]
        if not len(boxes):
            _expect(not positive.any(), f"{what}: {int(positive.sum())} positives in image {i}, which has no object")
            continue
        distances = (found.boxes[i][positive][:, None] - boxes).abs().amax(-1)
        allowed = max(PIXELS, 1e-4 * max(shown.batch.images.shape[-2:]))
        if not case.proposes:
            distances = distances.where(found.labels[i][positive][:, None] == labels, float("inf"))
        off = distances.amin(-1).amax().item() if len(distances) else 0.0
        _expect(
            off <= allowed,
            f"{what}: a positive of image {i} has a box, or a label, of no object in it (nearest one with its label: "
            f"{off:g} pixels)",
        )


@contextmanager
def _without_onednn() -> Iterator[None]:
    """For bfloat16 on small images, whose coarse levels are single cells.

    oneDNN's bfloat16 gradient of a convolution's weight holds uninitialised memory where stride, padding and a single
    cell leave part of the kernel unused (torch 2.14 with AVX-512). Neither adapters nor methods have a part in it.
    """
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


@_without_onednn()
def _bfloat16(case: _AdapterCase) -> None:
    """Under bfloat16 autocast predictions and losses are finite and in float32."""
    adapter = case.fresh(train=True)
    device = case.images[0].device.type
    with torch.autocast(device, torch.bfloat16):
        shown = case.show(adapter)
        losses, _ = adapter.task_losses(shown.trace, shown.batch)
    _expect_losses(losses, "task losses")
    _backward(losses)
    _expect_gradients(adapter.model, "task losses")
    adapter.model.eval()
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        shown = case.show(adapter)
        passes = {"head": shown.predictions}
        for i, state in enumerate(shown.trace.states):
            passes[f"resumed from stage {i}"] = adapter.resume(state, i, shown.trace)
        for name, predictions in passes.items():
            outputs = _outputs(predictions)
            _expect_finite(outputs, name)
            for output, tensor in outputs.items():
                _expect(tensor.dtype == torch.float32, f"{name}: {output} is {tensor.dtype}, not torch.float32")
        adapter.detections(shown.trace, shown.batch)


def _deterministic(case: _AdapterCase) -> None:
    """Two runs under one seed are equal to the bit, in train and eval mode."""
    for train in (True, False):
        runs = []
        for _ in range(2):
            adapter = case.fresh(train=train)
            torch.manual_seed(SEED)
            with torch.set_grad_enabled(train):
                shown = case.show(adapter)
                outputs = _outputs(shown.predictions)
                if train:
                    outputs |= adapter.task_losses(shown.trace, shown.batch)[0]
            runs.append(outputs)
        _expect_same(runs[1], runs[0], f"the second run in {'train' if train else 'eval'} mode")


def _stateless(case: _AdapterCase) -> None:
    """Adapters hold nothing between steps: another batch in between changes nothing."""
    adapter = case.fresh()
    with torch.no_grad():
        first = case.show(adapter)
        once = _outputs(first.predictions)
        adapter.detections(case.show(adapter, _without_objects(case.targets, [0])).trace, first.batch)
        flipped = adapter.prepare([image.flip(-1) for image in case.images[:1]])
        adapter.head(adapter.features(flipped), flipped)
        for i, state in enumerate(first.trace.states):
            _expect_same(
                _outputs(adapter.resume(state, i, first.trace)), once, f"stage {i} resumed after another batch"
            )
        _expect_same(_outputs(case.show(adapter).predictions), once, "the same batch after another one")


def _untouched(case: _AdapterCase) -> None:
    """Nothing of the model is changed, added or left behind, also where an error ends the pass."""
    for train in (False, True):
        adapter = case.fresh(train=train)
        # What the library's own forward caches is no fault of the adapter's.
        if case.own is not None and not train:
            case.own(adapter.model, case.images)
        if case.own_losses is not None and train:
            case.own_losses(adapter.model, case.images, case.targets)
        before = _Snapshot.of(adapter.model)
        when = f"in {'train' if train else 'eval'} mode, after a pass,"

        def step(adapter: DetectorAdapter = adapter, train: bool = train) -> None:
            with torch.set_grad_enabled(train):
                shown = case.show(adapter)
                for i, state in enumerate(shown.trace.states):
                    adapter.resume(state, i, shown.trace)
                if Capability.ASSIGNMENT in adapter.spec.capabilities:
                    adapter.assign(shown.trace, shown.batch)
                if train:
                    adapter.task_losses(shown.trace, shown.batch)
                else:
                    adapter.detections(shown.trace, shown.batch)

        step()
        before.expect_of(adapter.model, when, values=not train)  # batch norm learns its statistics
        _expect_untouched_by_errors(adapter.model, step, before, values=not train)


class _Probe(Method):
    """Uses all that a detector shows, as any method might."""

    terms = ("probe",)
    paper = ""

    def __init__(self, needs: frozenset[Capability]) -> None:
        super().__init__()
        self.needs = needs  # type: ignore[misc]

    def forward(self, exchange: Exchange) -> dict[str, Tensor]:
        student, teacher = exchange.student, exchange.teacher
        total = _total({str(i): level.float().mean() for i, level in enumerate(student.features)})
        if Capability.STAGES not in self.needs:
            return {"probe": total}
        pair = exchange.matched()
        for i in range(len(teacher.spec.stages)):
            crossed = pair.finish_with_teacher(pair.student.states[i], i)
            total = total + (crossed.logits - pair.teacher.predictions.logits).square().mean()
        return {"probe": total}


def _teacher(case: _AdapterCase) -> None:
    """As a teacher it is frozen, learns nothing from a step, and passes gradient to the student's states."""
    if case.proposes:
        raise _LeftOut("a first stage teaches within its detector")
    teacher, student = case.fresh(train=True), case.fresh(train=True)
    probe = _Probe(case.adapter.spec.capabilities)
    distiller = Distiller(teacher, student, [probe])
    before, keys = _Snapshot.of(teacher.model), tuple(case.adapter.model.state_dict())
    distiller.train()
    losses = distiller(case.images, case.targets)
    losses.total.backward()
    before.expect_of(teacher.model, "after a step as a teacher")
    _expect_gradients(student.model, "through the teacher's head")
    saved = student.model.state_dict()
    _expect(tuple(saved) == keys, f"the student's state dict has other keys: {set(saved) ^ set(keys)}")
    case.fresh().model.load_state_dict(saved)


def _first_stage(case: _AdapterCase) -> None:
    """What proposes is a detector of one class that keeps the same promises."""
    stage, spec = case.adapter.first_stage, case.adapter.spec.first_stage
    _expect((stage is None) == (spec is None), "first_stage is said in one of adapter and spec, and not in the other")
    if stage is None:
        raise _LeftOut("has no first stage")
    _expect(stage.spec == spec, "the spec of first_stage is not the first_stage of the spec")
    _expect(stage.spec.num_classes == 1, f"a first stage has one class, here {stage.spec.num_classes}")
    proposing = _AdapterCase(stage, case.images, case.targets, proposes=True)
    _run(f"first stage of {case.adapter.spec.name}", FIRST_STAGE_CHECKS, proposing, {})


_BOTH = (_levels, _predictions, _priors, _stages, _capabilities, _resume, _given_priors)
ADAPTER_CHECKS = _by_name(
    _matches, _batch, *_BOTH, _detections, _own_detections, _task_losses, _own_task_losses, _empty_targets,
    _one_empty_image, _assignment, _bfloat16, _deterministic, _stateless, _untouched, _teacher, _first_stage,
)  # fmt: skip
FIRST_STAGE_CHECKS = _by_name(*_BOTH, _assignment)
"""Those that make sense of what proposes: its losses and detections are parts of its detector's."""


# Checks of a method on a pair of detectors: each is one promise.


def observe(adapter: DetectorAdapter, images: Sequence[Tensor], targets: Sequence[Target]) -> View:
    """What a detector shows of a batch, head and all, in the mode it is in; without an assignment."""
    batch = adapter.prepare(images, targets)
    features = adapter.features(batch)
    return View(adapter, batch, features, adapter.head(features, batch))


@dataclass(frozen=True)
class _MethodCase:
    factory: MethodFactory
    student: DetectorAdapter
    teacher: DetectorAdapter
    images: tuple[Tensor, ...]
    targets: tuple[Target, ...]

    @cached_property
    def _copies(self) -> tuple[DetectorAdapter, DetectorAdapter, dict[str, Tensor]]:
        """Student, teacher, and the student's buffers, which are all that a step may change."""
        student, teacher = copy.deepcopy(self.student), copy.deepcopy(self.teacher)
        return student, teacher, {name: value.clone() for name, value in student.model.named_buffers()}

    def fresh(self, seed: int = SEED) -> Distiller:
        """A distiller with a method set up anew, and models as they were."""
        student, teacher, _ = self._copies
        for model in (student.model, teacher.model):
            model.zero_grad(set_to_none=True)
        self._restore()
        torch.manual_seed(seed)
        return Distiller(teacher, student, [self.factory()]).train()

    def _restore(self) -> None:
        student, _, buffers = self._copies
        for name, value in student.model.named_buffers():
            if name in buffers:
                value.copy_(buffers[name])

    def terms(
        self,
        distiller: Distiller,
        images: Sequence[Tensor] | None = None,
        targets: Sequence[Target] | None = None,
    ) -> dict[str, Tensor]:
        """The method's terms of one step, under one seed."""
        self._restore()
        torch.manual_seed(SEED)
        losses = distiller(images or self.images, self.targets if targets is None else targets)
        return {name.split("/", 1)[1]: loss for name, loss in losses.items() if not name.startswith("task/")}

    def refusal(self) -> str | None:
        if reason := refusal(self.factory(), self.student.spec, self.teacher.spec):
            return reason
        try:
            self.terms(self.fresh())
        except IncompatibleError as error:
            return f"at the first step: {error}"
        except Exception:  # the checks will say what is wrong
            return None
        return None


def _method_of(distiller: Distiller) -> Method:
    (method,) = distiller.methods
    assert isinstance(method, Method)
    return method


def _terms(case: _MethodCase) -> None:
    """Terms are finite float32 scalars, of declared names."""
    distiller = case.fresh()
    terms, declared = case.terms(distiller), _method_of(distiller).terms
    unknown = sorted(terms.keys() - set(declared))
    _expect(not unknown, f"returns {', '.join(unknown)}; `terms` declares {', '.join(declared)}")
    unknown = sorted(set(_method_of(distiller).vanishing) - set(declared))
    _expect(not unknown, f"`vanishing` names {', '.join(unknown)}; `terms` declares {', '.join(declared)}")
    _expect_losses(terms, "terms")


def _student_gradient(case: _MethodCase) -> None:
    """Gradient reaches the student."""
    distiller = case.fresh()
    _backward(case.terms(distiller))
    _expect_gradients(distiller.student, "terms")


def _own_parameters(case: _MethodCase) -> None:
    """Gradient reaches each of the method's own parameters, and is finite."""
    distiller = case.fresh()
    method = _method_of(distiller)
    names = [name for name, p in method.named_parameters() if p.requires_grad]
    if not names:
        raise _LeftOut("learns nothing of its own")
    _backward(case.terms(distiller))
    gradients = _gradients(method)
    _expect_finite(gradients, "gradients of the method's own parameters")
    missing = [name for name in names if name not in gradients]
    _expect(not missing, f"no gradient reaches the method's own {', '.join(missing)}")


def _frozen_teacher(case: _MethodCase) -> None:
    """The teacher gets no gradient, and neither its values nor its buffers change."""
    distiller = case.fresh()
    assert distiller.teacher_adapter is not None
    teacher = distiller.teacher_adapter.model
    before = _Snapshot.of(teacher)
    for _ in range(2):
        _backward(case.terms(distiller))
    before.expect_of(teacher, "after two steps, in the teacher,")


def _vanishing(case: _MethodCase) -> None:
    """Terms said to vanish are zero, and a minimum, where the student is the teacher; the gradient there is finite.

    It need not be zero: at a kink (GIoU, |a - b|) rounding alone decides on a side.
    """
    teacher = copy.deepcopy(case.teacher)
    teacher.model.eval().requires_grad_(False)
    method = case.factory()
    if not method.vanishing:
        raise _LeftOut("declares no vanishing terms")
    if reason := refusal(method, teacher.spec, teacher.spec):
        raise _LeftOut(f"refuses a student that is the teacher: {reason}")
    method.setup(teacher.spec, teacher.spec)
    method.to(case.images[0].device).eval()
    with torch.no_grad():
        theirs = observe(teacher, case.images, case.targets)

    def terms(distance: float) -> dict[str, float]:
        """Vanishing terms of a student whose weights are this far from the teacher's, relative to their size."""
        student = copy.deepcopy(teacher)
        torch.manual_seed(SEED)
        with torch.no_grad():
            for p in student.model.parameters():
                p.add_(torch.randn_like(p) * (p.abs().mean() + 1e-2) * distance)
        student.model.requires_grad_(not distance)
        torch.manual_seed(SEED)
        exchange = Exchange(observe(student, case.images, case.targets), theirs)
        found = method(exchange.at_strides(method.strides))
        found = {name: value for name, value in found.items() if name in method.vanishing}
        if not distance:
            _backward(found)
            _expect_finite(_gradients(student.model), "gradients where the student is the teacher")
        return {name: value.item() for name, value in found.items()}

    there, near, elsewhere = terms(0.0), terms(0.1), terms(0.3)
    for name, value in there.items():
        limit = max(ZERO * abs(elsewhere[name]), ROUNDING)
        _expect(
            abs(value) <= limit,
            f"{name} is {value:g} where the student is the teacher, and {elsewhere[name]:g} where it is not",
        )
        lowest = min(near[name], elsewhere[name])
        _expect(lowest >= -limit, f"{name} falls to {lowest:g} near the teacher, so its zero is no minimum")


def _finite_step(
    case: _MethodCase, what: str, images: Sequence[Tensor] | None = None, targets: Sequence[Target] | None = None
) -> None:
    distiller = case.fresh()
    terms = case.terms(distiller, images, targets)
    _expect_losses(terms, what)
    _backward(terms)
    _expect_finite(_gradients(distiller), f"{what}: gradients")


def _no_objects(case: _MethodCase) -> None:
    """Images without any object give finite terms and gradients."""
    _finite_step(case, "no object at all", targets=_without_objects(case.targets, range(len(case.targets))))


def _one_image_without(case: _MethodCase) -> None:
    """One image without objects among others gives finite terms and gradients."""
    for i in (0, len(case.targets) - 1):
        _finite_step(case, f"no object in image {i}", targets=_without_objects(case.targets, [i]))


def _constant_images(case: _MethodCase) -> None:
    """Images of one colour, whose features hardly vary, give finite terms and gradients."""
    _finite_step(case, "black images", [torch.zeros_like(image) for image in case.images])


def _small_images(case: _MethodCase) -> None:
    """The smallest images that the pair takes, whose levels have few cells, give finite terms and gradients."""
    for size in SIZES:
        images = [image.new_full((3, size, size), 0.5) for image in case.images]
        for image in images:
            image[:, : size // 2] = 0.0
        targets: list[Target] = [
            {"boxes": target["boxes"].new_tensor([[1.0, 1.0, size - 1.0, size - 1.0]]), "labels": target["labels"][:1]}
            for target in case.targets
        ]
        try:
            plain = Distiller(copy.deepcopy(case.teacher), copy.deepcopy(case.student), [_Probe(frozenset())])
            plain.train()(images, targets)
        except Exception:  # too small for the detectors themselves, who say so in their own ways
            continue
        _finite_step(case, f"images of {size} px", images, targets)
        return
    raise _LeftOut(f"the detectors take no square images of {', '.join(map(str, SIZES))} px")


@_without_onednn()
def _mixed_precision(case: _MethodCase) -> None:
    """Under bfloat16 autocast terms are finite, in float32, and near those of float32."""
    exact = case.terms(case.fresh())
    distiller = case.fresh()
    with torch.autocast(case.images[0].device.type, torch.bfloat16):
        terms = case.terms(distiller)
    _expect_losses(terms, "terms")
    _backward(terms)
    _expect_finite(_gradients(distiller), "gradients")
    for name, value in terms.items():
        near = abs(value - exact[name]) <= BFLOAT16 * abs(exact[name]) + 1e-3 * _total(exact).abs() + 1e-6
        _expect(bool(near), f"{name} is {value.item():g} in bfloat16, {exact[name].item():g} in float32")


def _repeatable(case: _MethodCase) -> None:
    """Two runs under one seed are equal to the bit."""
    _expect_same(case.terms(case.fresh()), case.terms(case.fresh()), "the second run")


def _student_untouched(case: _MethodCase) -> None:
    """The student comes out of a step as it does of one without the method, also where an error ends it."""
    distiller, plain = case.fresh(), Distiller(None, copy.deepcopy(case.student)).train()
    before = _Snapshot.of(distiller.student)
    torch.manual_seed(SEED)
    plain(case.images, case.targets)
    case.terms(distiller)
    before.expect_of(distiller.student, "after a step, in the student,", values=False)
    _Snapshot.of(plain.student).expect_of(distiller.student, "after a step, unlike one without the method,")
    adapter = copy.deepcopy(case.student)
    adapter.model.load_state_dict(distiller.student.state_dict())
    runs = []
    for detector in (adapter, distiller.student_adapter):
        detector.model.eval()
        with torch.no_grad():
            runs.append(_outputs(observe(detector, case.images, case.targets).head.predictions))
    _expect_same(runs[1], runs[0], "the student after a step, next to a plain model of its state dict")
    distiller = case.fresh()
    assert distiller.teacher_adapter is not None
    before = _Snapshot.of(distiller.student)
    teacher, method = distiller.teacher_adapter.model, _method_of(distiller)
    teacher_before = _Snapshot.of(teacher)
    for model in (teacher, method):
        _expect_stopped(model, lambda: case.terms(distiller))
        before.expect_of(distiller.student, "after an error, in the student,", values=False)
        teacher_before.expect_of(teacher, "after an error, in the teacher,")


def _expect_stopped(model: nn.Module, step: Callable[[], object]) -> None:
    """Let the last layer of the model that `step` calls, if it calls one, raise."""
    with _interrupted(model, 0) as calls:
        step()
    if not calls[0]:
        return
    with _interrupted(model, calls[0]):
        try:
            step()
        except _Interruption:
            return
        raise AssertionError("an error raised inside the model is swallowed")


def _round_trip(case: _MethodCase) -> None:
    """The method's state dict, loaded into one set up afresh, gives equal terms."""
    distiller, other = case.fresh(), case.fresh(seed=SEED + 1)
    _method_of(other).load_state_dict(_method_of(distiller).state_dict())
    _expect_same(case.terms(other), case.terms(distiller), "with the state dict of another one")


def _copies(case: _MethodCase) -> None:
    """Deep copies and pickles of the method give equal terms."""
    expected = case.terms(case.fresh())
    for what, again in (("a deep copy", copy.deepcopy), ("a pickle", _pickled)):
        distiller = case.fresh()
        distiller.methods[0] = again(_method_of(distiller))
        _expect_same(case.terms(distiller), expected, what)


def _pickled(method: Method) -> Method:
    again: Method = pickle.loads(pickle.dumps(method))
    return again


METHOD_CHECKS = _by_name(
    _terms, _student_gradient, _own_parameters, _frozen_teacher, _vanishing, _no_objects, _one_image_without,
    _constant_images, _small_images, _mixed_precision, _repeatable, _student_untouched, _round_trip, _copies,
)  # fmt: skip
