"""Checks of a method on a pair of detectors: each private function is one promise, and its name is the check's."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import get_type_hints

import torch
from torch import Tensor, nn

from kdtoolkit.compatibility import why_refused
from kdtoolkit.contract import Capability, DetectorAdapter, Exchange, Method, Predictions, Target
from kdtoolkit.distiller import Distiller
from kdtoolkit.errors import IncompatibleError, KDError
from kdtoolkit.libraries import adapt
from kdtoolkit.testing._common import (
    Probe,
    Snapshot,
    count_calls,
    example_batch,
    expect,
    expect_backward,
    expect_finite,
    expect_losses,
    expect_same,
    interrupt,
    observe,
    outputs,
    total,
    transformed,
    without_objects,
    without_onednn,
)
from kdtoolkit.testing.ranks import side_by_side
from kdtoolkit.testing.report import SEED, ConformanceReport, LeftOut, Result, by_name, run

MethodFactory = Callable[[], Method]

ZERO = 1e-3  # a vanishing term, relative to that of another student: what float32 leaves of it after a head
ROUNDING = 1e-7  # the same where that of another student is hardly more
PADDING = 64  # pixels
LAYOUT = 1e-3  # relative to the terms: sums in another order
PROCESSES = 5e-3  # relative: sums in another order, through heads of random weights
BFLOAT16 = 0.3  # relative: terms are differences of detectors that are much alike, and rounded to 8 bits
SIZES = (8, 16, 32, 64, 128)  # images tried for the smallest that a pair takes
# What terms may be in sum, where levels have the spread 1 and logits 2; ours are 0.03 to 300 where they compare heads,
# and from 0.002 up where they compare features, for maps of four cells.
LEAST_OF_HEADS, LEAST_OF_FEATURES, MOST = 0.01, 5e-4, 1e4


def check_method(
    method_factory: MethodFactory,
    student: DetectorAdapter | nn.Module,
    teacher: DetectorAdapter | nn.Module,
    *,
    known: Mapping[str, str] | None = None,
    only: Collection[str] = (),
    images: Sequence[Tensor] | None = None,
    targets: Sequence[Target] | None = None,
) -> ConformanceReport:
    """Check every promise of a method on one pair of detectors: `check_method(MyMethod, tiny(), another_tiny())`.

    A pair that the method refuses is no error: the report says so, with the reason. Terms that `Method.vanishing` names
    must be about zero where the student is the teacher, with a finite gradient there, which need not be zero, for GIoU
    and absolute differences have kinks. At initialisation detectors with batch norm may have nearly constant states:
    give them some spread before (perturbed weights, a few forwards in train mode).

    Args:
        method_factory: makes the method afresh: its class, or a function without arguments.
        student: a small detector with random weights, or its adapter. It is copied, not changed.
        teacher: likewise, of as many classes.
        known: reasons of failures, by check; `known` must name checks that do fail.
        only: names of the checks to run; all by default.
        images: two or more (3, H, W) in [0, 1]; two of unequal sizes about 64 px by default.
        targets: their ground truth; handed in with `images`.

    Raises:
        ConformanceError: promises are broken; lists them all.
        KDError: no adapter knows a model, or `known` or `only` names no check.
    """
    pair = adapt(student), adapt(teacher)
    subject = f"{type(method_factory()).__name__} from {pair[1].spec.name} to {pair[0].spec.name}"
    if images is None or targets is None:
        images, targets = example_batch(pair[0].spec.num_classes, next(pair[0].model.parameters()).device)
    case = _Case(method_factory, *pair, tuple(images), tuple(targets))
    try:
        reason = case.why_refused()
    except Exception:  # no step can be made: one check says why, and the others would only repeat it
        return run(subject, METHOD_CHECKS, case, known or {}, ["terms"])
    if reason is not None:
        return ConformanceReport(subject, {"refuses": Result("refused", reason)})
    return run(subject, METHOD_CHECKS, case, known or {}, only)


Change = Callable[[DetectorAdapter], DetectorAdapter]


@dataclass(frozen=True)
class _Case:
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

    def fresh(
        self,
        seed: int = SEED,
        *,
        factory: MethodFactory | None = None,
        student: Change = lambda adapter: adapter,
        teacher: Change = lambda adapter: adapter,
    ) -> Distiller:
        """A distiller with a method set up anew, and models without gradients, of which one may show other things."""
        ours, theirs, _ = self._copies
        for model in (ours.model, theirs.model):
            model.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        return Distiller(teacher(theirs), student(ours), [(factory or self.factory)()]).train()

    @cached_property
    def usual(self) -> dict[str, Tensor]:
        """The terms of one step, without gradient."""
        return {name: value.detach() for name, value in self.terms(self.fresh()).items()}

    def terms(
        self, distiller: Distiller, images: Sequence[Tensor] | None = None, targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor]:
        """The method's terms of one step, with the student's first buffers and under one seed."""
        student, _, buffers = self._copies
        for name, value in student.model.named_buffers():
            if name in buffers:
                value.copy_(buffers[name])
        torch.manual_seed(SEED)
        losses = distiller(images or self.images, self.targets if targets is None else targets)
        return {name.split("/", 1)[1]: loss for name, loss in losses.items() if not name.startswith("task/")}

    def why_refused(self) -> str | None:
        if reason := why_refused(self.factory(), self.student.spec, self.teacher.spec):
            return reason
        try:
            self.terms(self.fresh())
        except IncompatibleError as error:
            return f"at the first step: {error}"
        return None


class _Recorder(Method):
    """Keeps what both detectors show in a step, and how often each tensor of it has been written to."""

    terms = ()
    paper = ""

    def __init__(self, needs: frozenset[Capability]) -> None:
        super().__init__()
        self.needs = needs
        self.seen: list[tuple[str, Tensor, int]] = []

    def forward(self, exchange: Exchange) -> dict[str, Tensor]:
        views = {"student": exchange.student, "teacher": exchange.teacher}
        shown = [(role, "features", x) for role, view in views.items() for x in view.features]
        shown += [(role, "boxes", x) for role, view in views.items() for x in view.batch.boxes]
        shown += [(role, "labels", x) for role, view in views.items() for x in view.batch.labels]
        if self.needs != {Capability.FEATURES}:
            pair = exchange.matched()
            for role, trace in (("student", pair.student), ("teacher", pair.teacher)):
                shown += [(role, name, x) for name, x in outputs(trace.predictions).items()]
                shown += [(role, "states", x) for state in trace.states for each in state.values() for x in each]
        self.seen += [(f"the {role}'s {name}", x, x._version) for role, name, x in shown]
        return {}


def _method_of(distiller: Distiller) -> Method:
    (method,) = distiller.methods
    assert isinstance(method, Method)
    return method


def _teacher_of(distiller: Distiller) -> nn.Module:
    assert distiller.teacher_adapter is not None
    return distiller.teacher_adapter.model


def _terms(case: _Case) -> None:
    """Terms are finite float32 scalars, of declared names."""
    distiller = case.fresh()
    method, terms = _method_of(distiller), case.terms(distiller)
    for what, names in (("returns", terms), ("`vanishing` names", method.vanishing)):
        unknown = ", ".join(sorted(set(names) - set(method.terms)))
        expect(not unknown, f"{what} {unknown}; `terms` declares {', '.join(method.terms)}")
    expect_losses(terms, "terms")


def _student_gradient(case: _Case) -> None:
    """Each term has a gradient, and it reaches the student."""
    distiller = case.fresh()
    terms = case.terms(distiller)
    for name, value in terms.items():
        expect(value.requires_grad, f"{name} depends on nothing that is trained: no gradient flows from it")
    expect_backward(terms, distiller.student, "terms", reaches=True)


def _own_parameters(case: _Case) -> None:
    """Gradient reaches each of the method's own parameters, and is finite."""
    distiller = case.fresh()
    learned = {name: p for name, p in _method_of(distiller).named_parameters() if p.requires_grad}
    if not learned:
        raise LeftOut("learns nothing of its own")
    expect_backward(case.terms(distiller), _method_of(distiller), "the method's own parameters")
    missing = [name for name, p in learned.items() if p.grad is None]
    expect(not missing, f"no gradient reaches the method's own {', '.join(missing)}")


def _frozen_teacher(case: _Case) -> None:
    """The teacher gets no gradient, and neither its values nor its buffers change."""
    distiller = case.fresh()
    before = Snapshot.of(_teacher_of(distiller))
    for _ in range(2):
        torch.autograd.backward(total(case.terms(distiller)))
    before.expect_of(_teacher_of(distiller), "after two steps, in the teacher,")


def _shown_untouched(case: _Case) -> None:
    """What both detectors show is not written to: other methods of the step see it too."""
    student, teacher, _ = case._copies
    method = case.factory()
    recorder = _Recorder(method.needs)
    torch.manual_seed(SEED)
    case.terms(Distiller(teacher, student, [recorder, method]).train())
    changed = sorted({name for name, x, version in recorder.seen if x._version != version})
    expect(not changed, f"writes in place to {', '.join(changed)}, which other methods see too")


def _vanishing(case: _Case) -> None:
    """Terms said to vanish are zero, and a minimum, where the student is the teacher; the gradient there is finite.

    It need not be zero: at a kink (GIoU, |a - b|) rounding alone decides on a side.
    """
    teacher = copy.deepcopy(case.teacher)
    teacher.model.eval().requires_grad_(False)
    method = case.factory()
    if not method.vanishing:
        raise LeftOut("declares no vanishing terms")
    if reason := why_refused(method, teacher.spec, teacher.spec):
        raise LeftOut(f"refuses a student that is the teacher: {reason}")
    spec = teacher.spec.at_strides(method.strides)
    method.setup(spec, spec)
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
            expect_backward(found, student.model, "where the student is the teacher")
        return {name: value.item() for name, value in found.items()}

    there, near, elsewhere = terms(0.0), terms(0.1), terms(0.3)
    for name, value in there.items():
        other = elsewhere[name]
        limit = max(ZERO * abs(other), ROUNDING)
        found = f"{name} is {value:g} where the student is the teacher, and {other:g} where it is not"
        expect(abs(value) <= limit, found)
        lowest = min(near[name], other)
        expect(lowest >= -limit, f"{name} falls to {lowest:g} near the teacher, so its zero is no minimum")


def _finite_step(
    case: _Case, what: str, images: Sequence[Tensor] | None = None, targets: Sequence[Target] | None = None
) -> None:
    distiller = case.fresh()
    terms = case.terms(distiller, images, targets)
    expect_losses(terms, what)
    expect_backward(terms, distiller, what)


def _no_objects(case: _Case) -> None:
    """Images without any object give finite terms and gradients."""
    _finite_step(case, "no object at all", targets=without_objects(case.targets, range(len(case.targets))))


def _one_image_without(case: _Case) -> None:
    """One image without objects among others gives finite terms and gradients."""
    for i in (0, len(case.targets) - 1):
        _finite_step(case, f"no object in image {i}", targets=without_objects(case.targets, [i]))


def _constant_images(case: _Case) -> None:
    """Images of one colour, whose features hardly vary, give finite terms and gradients."""
    _finite_step(case, "black images", [torch.zeros_like(image) for image in case.images])


def _no_signal(case: _Case) -> None:
    """Features that are 0 everywhere, in the student or the teacher, give finite terms and gradients."""
    dead = partial(transformed, levels=lambda level: level * 0)
    for role, distiller in (("student", case.fresh(student=dead)), ("teacher", case.fresh(teacher=dead))):
        terms = case.terms(distiller)
        what = f"features of the {role} that are all 0"
        expect_losses(terms, what)
        expect_backward(terms, distiller, what)


def _passes(case: _Case) -> None:
    """Each detector is run once a step, and the teacher's head once at most."""
    calls: Counter[str] = Counter()

    def counted(role: str, adapter: DetectorAdapter) -> DetectorAdapter:
        return transformed(adapter, note=lambda what: calls.update([f"{what} of the {role}"]))

    with torch.no_grad():
        case.terms(case.fresh(student=partial(counted, "student"), teacher=partial(counted, "teacher")))
    # On the teacher's queries or proposals the student's head runs a second time.
    most = {
        "features of the student": 1,
        "features of the teacher": 1,
        "head of the student": 2,
        "head of the teacher": 1,
    }
    for what, count in calls.items():
        expect(count <= most[what], f"{what}: run {count} times a step; take what `exchange` and `matched` have")


def _unequal_padding(case: _Case) -> None:
    """A teacher that pads further than the student gives finite terms and gradients."""
    distiller = case.fresh(teacher=partial(transformed, padding=PADDING))
    try:
        terms = case.terms(distiller)
    except IncompatibleError as error:  # a teacher of one size has other cells then
        raise LeftOut(f"refuses it: {error}") from error
    what = f"{PADDING} pixels more padding in the teacher"
    expect_losses(terms, what)
    expect_backward(terms, distiller, what)


def _magnitude(case: _Case) -> None:
    """Between detectors with the spread of trained ones, terms are neither too small to count nor too large.

    Random detectors hardly differ in what they predict. So levels are brought to a spread of 1, logits to one of 2, and
    distributions of box sides to one of 1.
    """
    loud = partial(transformed, levels=_with_spread, predictions=_with_contrast)
    with torch.no_grad():
        found = float(total(case.terms(case.fresh(student=loud, teacher=loud))))
    least = LEAST_OF_FEATURES if case.factory().needs == {Capability.FEATURES} else LEAST_OF_HEADS
    problem = (
        f"terms are {found:.2g} in sum where levels have a spread of 1 and logits of 2 (from {least:g} to {MOST:g})"
    )
    expect(least <= found <= MOST, f"{problem}: look at what sums are divided by, and at weights")


def _with_spread(x: Tensor) -> Tensor:
    return x / (x.detach().std() + 1e-6) if x.numel() > 1 else x


def _with_contrast(predictions: Predictions) -> Predictions:
    centred = predictions.logits - predictions.logits.detach().mean()
    regression = predictions.regression
    if regression.ndim == 4:
        regression = _with_spread(regression - regression.detach().mean())
    return replace(predictions, logits=2 * _with_spread(centred), regression=regression)


def _one_image(case: _Case) -> None:
    """A batch of a single image gives finite terms and gradients."""
    for i in range(len(case.images)):
        images, targets = case.images[i : i + 1], case.targets[i : i + 1]
        try:
            Distiller(None, copy.deepcopy(case.student)).train()(images, targets)
        except Exception:  # too little for the detector's own batch norms
            continue
        try:
            _finite_step(case, "a single image", images, targets)
        except IncompatibleError as error:  # which is said in a sentence
            raise LeftOut(f"refuses it: {error}") from error
        return
    raise LeftOut("the student takes no batch of a single image")


def _two_processes(case: _Case) -> None:
    """Two processes with half of the batch each get the terms and gradients of one process with all of it, on average.

    What a term is divided by (positives, sums of weights, statistics) must be summed over processes for that. The
    student is in eval mode, since its batch norms see the images of one process and its dropout is random.
    """
    distiller = case.fresh()
    distiller.student.eval()
    image, target = case.images[0], case.targets[0]
    # Equal sizes, so that each half lies on the canvas of the whole; unequal objects, so that the halves count apart.
    images = [image, image.flip(-1) * 0.5]
    targets = [target, {"boxes": target["boxes"][:1], "labels": target["labels"][:1]}]

    def step(part: slice, seed: int = SEED) -> dict[str, Tensor]:
        """The terms, and the gradients of the student's levels and of what the method learns."""
        own, levels = copy.deepcopy(distiller), []

        def keep(level: Tensor) -> Tensor:
            level.retain_grad()
            levels.append(level)
            return level

        own.student_adapter = transformed(own.student_adapter, levels=keep)
        torch.manual_seed(seed)
        terms = {k: loss for k, loss in own(images[part], targets[part]).items() if not k.startswith("task/")}
        torch.autograd.backward(total(terms))
        learned = {f"the gradient of {name}": p.grad for name, p in _method_of(own).named_parameters()}
        shown = {f"the gradient of level {i}": level.grad for i, level in enumerate(levels)}
        return {k: x.detach() for k, x in (terms | learned | shown).items() if x is not None}

    try:
        whole, again = step(slice(None)), step(slice(None), SEED + 1)
    except KDError as error:
        raise LeftOut(f"the student takes no step in eval mode: {error}") from error
    if not all(torch.equal(whole[name], again[name]) for name in whole):
        raise LeftOut("it draws at random, so that no two runs are alike")
    try:
        halves = side_by_side([partial(step, slice(i, i + 1)) for i in range(2)])
    except IncompatibleError as error:
        raise LeftOut(f"refuses a single image: {error}") from error
    largest = max(value.norm() for value in whole.values())
    for name, value in whole.items():
        parts = [half.get(name, torch.zeros_like(value)) for half in halves]
        mean = (torch.cat(parts) if "level" in name else torch.stack(parts).sum(0)) / len(halves)
        problem = (
            f"{name} is {mean.norm():g} in size on average of two processes, and {value.norm():g} in one process with "
            "all images: divide by kdtoolkit.processes.share(...) of what is counted, and take statistics by total(...)"
        )
        expect(bool((mean - value).norm() <= PROCESSES * (value.norm() + 0.1 * largest)), problem)


def _channels_last(case: _Case) -> None:
    """Maps whose channels lie last in memory give the same terms."""
    turned = partial(transformed, levels=lambda x: x.contiguous(memory_format=torch.channels_last))
    terms = case.terms(case.fresh(student=turned, teacher=turned))
    for name, value in case.usual.items():
        near = abs(terms[name] - value) <= LAYOUT * (abs(value) + total(case.usual).abs()) + ROUNDING
        expect(
            bool(near), f"{name} is {terms[name].item():g} where channels lie last, {value.item():g} where they do not"
        )


def _options(case: _Case) -> None:
    """Options have type hints, by which wrong ones are refused, and weights are not below 0."""
    cls = type(case.factory())
    if cls.__init__ is nn.Module.__init__:
        raise LeftOut("has no options")
    hints = get_type_hints(cls.__init__)
    for name, parameter in inspect.signature(cls).parameters.items():
        gathers = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        expect(not gathers, f"{cls.__name__} takes any options as {name}, those that are misspelt too")
        expect(name in hints, f"the option {name} has no type hint, by which wrong values would be refused")
        if name.endswith("weight"):
            try:
                cls(**{name: -1.0})
            except KDError:
                continue
            raise AssertionError(f"{cls.__name__}({name}=-1.0) is accepted")


def _weights_of_zero(case: _Case) -> None:
    """With weights of 0 a method runs and adds nothing."""
    cls = case.factory
    if not isinstance(cls, type):
        raise LeftOut("the method is made by a function")
    weights = [name for name in inspect.signature(cls).parameters if name.endswith("weight")]
    if not weights:
        raise LeftOut("has no weights")
    distiller = case.fresh(factory=partial(cls, **dict.fromkeys(weights, 0.0)))
    terms, what = case.terms(distiller), f"with {', '.join(weights)} = 0"
    expect_finite(terms, what)
    left = [name for name, value in terms.items() if bool(value)]
    expect(not left, f"{what} there still is {', '.join(left)}")
    if any(value.requires_grad for value in terms.values()):
        expect_backward(terms, distiller, what)


def _small_images(case: _Case) -> None:
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
            plain = Distiller(copy.deepcopy(case.teacher), copy.deepcopy(case.student), [Probe(frozenset())])
            plain.train()(images, targets)
        except Exception:  # too small for the detectors themselves, who say so in their own ways
            continue
        try:
            _finite_step(case, f"images of {size} px", images, targets)
        except IncompatibleError:  # the pair pads them otherwise
            continue
        return
    raise LeftOut(f"the detectors take no square images of {', '.join(map(str, SIZES))} px")


@without_onednn()
def _mixed_precision(case: _Case) -> None:
    """Under bfloat16 autocast terms are finite, in float32, and near those of float32."""
    exact, distiller = case.usual, case.fresh()
    with torch.autocast(case.images[0].device.type, torch.bfloat16):
        terms = case.terms(distiller)
    expect_losses(terms, "terms")
    expect_backward(terms, distiller, "terms")
    for name, value in terms.items():
        near = abs(value - exact[name]) <= BFLOAT16 * abs(exact[name]) + 1e-3 * total(exact).abs() + 1e-6
        found = f"{name} is {value.item():g} in bfloat16, {exact[name].item():g} in float32"
        expect(bool(near), f"{found} (where that is about 0, give the detectors some spread)")


def _repeatable(case: _Case) -> None:
    """A second run under one seed is equal to the bit, also after another batch: nothing is kept between steps."""
    expect_same(case.terms(case.fresh()), case.usual, "the second run")
    distiller = case.fresh()
    if [*_method_of(distiller).buffers()]:  # which may follow what the method sees
        return
    case.terms(distiller, [image.flip(-1) for image in case.images], without_objects(case.targets, [0]))
    expect_same(case.terms(distiller), case.usual, "a run after another batch")


def _student_untouched(case: _Case) -> None:
    """The student comes out of a step as it does of one without the method, also where an error ends it."""
    distiller, plain = case.fresh(), Distiller(None, copy.deepcopy(case.student)).train()
    before = Snapshot.of(distiller.student)
    torch.manual_seed(SEED)
    plain(case.images, case.targets)
    case.terms(distiller)
    before.expect_of(distiller.student, "after a step, in the student,", values=False)
    Snapshot.of(plain.student).expect_of(distiller.student, "after a step, unlike one without the method,")
    adapter = copy.deepcopy(case.student)
    adapter.model.load_state_dict(distiller.student.state_dict())
    runs = []
    for detector in (adapter, distiller.student_adapter):
        detector.model.eval()
        with torch.no_grad():
            runs.append(outputs(observe(detector, case.images, case.targets).head.predictions))
    expect_same(runs[1], runs[0], "the student after a step, next to a plain model of its state dict")

    distiller = case.fresh()
    teacher = _teacher_of(distiller)
    before, teacher_before = Snapshot.of(distiller.student), Snapshot.of(teacher)
    method, counts = _method_of(distiller), [0, 0]

    def step() -> None:
        case.terms(distiller)

    def counted_step() -> None:
        counts[1] = count_calls(method, step)

    counts[0] = count_calls(teacher, counted_step)
    for model, count in zip((teacher, method), counts, strict=True):
        if count:
            interrupt(model, step, count)
        before.expect_of(distiller.student, "after an error, in the student,", values=False)
        teacher_before.expect_of(teacher, "after an error, in the teacher,")


def _round_trip(case: _Case) -> None:
    """The method's state dict, loaded into one set up afresh, gives equal terms."""
    distiller, other = case.fresh(), case.fresh(seed=SEED + 1)
    _method_of(other).load_state_dict(_method_of(distiller).state_dict())
    expect_same(case.terms(other), case.usual, "with the state dict of another one")


def _copies(case: _Case) -> None:
    """A deep copy of the method, through a pickle, gives equal terms."""
    distiller = case.fresh()
    distiller.methods[0] = pickle.loads(pickle.dumps(copy.deepcopy(_method_of(distiller))))
    expect_same(case.terms(distiller), case.usual, "a pickled copy")


METHOD_CHECKS = by_name(
    _options, _terms, _student_gradient, _own_parameters, _frozen_teacher, _shown_untouched, _passes, _vanishing,
    _magnitude, _weights_of_zero, _no_objects, _one_image_without, _constant_images, _no_signal, _unequal_padding,
    _small_images, _one_image, _two_processes, _channels_last, _mixed_precision, _repeatable,
    _student_untouched, _round_trip, _copies,
)  # fmt: skip
