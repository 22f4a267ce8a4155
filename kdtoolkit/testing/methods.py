"""Checks of a method on a pair of detectors: each private function is one promise, and its name is the check's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from kdtoolkit.contract import Capability, DetectorAdapter, Exchange, Method, Target, adapt
from kdtoolkit.distiller import Distiller, refusal
from kdtoolkit.errors import IncompatibleError
from kdtoolkit.testing._common import (
    Probe,
    Snapshot,
    count_calls,
    example_batch,
    expect,
    expect_backward,
    expect_losses,
    expect_same,
    interrupt,
    observe,
    outputs,
    total,
    without_objects,
    without_onednn,
)
from kdtoolkit.testing.report import SEED, ConformanceReport, LeftOut, Result, by_name, run

MethodFactory = Callable[[], Method]

ZERO = 1e-3  # a vanishing term, relative to that of another student: what float32 leaves of it after a head
ROUNDING = 1e-7  # the same where that of another student is hardly more
BFLOAT16 = 0.3  # relative: terms are differences of detectors that are much alike, and rounded to 8 bits
EXAMPLES = ((64, 64), (50, 60)), ((64, 64), (64, 64))  # (height, width) of the images of a batch, tried in order
SIZES = (8, 16, 32, 64, 128)  # images tried for the smallest that a pair takes


def check_method(
    method_factory: MethodFactory,
    student: DetectorAdapter | nn.Module,
    teacher: DetectorAdapter | nn.Module,
    *,
    known: Mapping[str, str] | None = None,
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
        images: two or more (3, H, W) in [0, 1]; by default two of unequal sizes about 64 px, or of equal sizes where
            the pair does not take them.
        targets: their ground truth; handed in with `images`.

    Raises:
        ConformanceError: promises are broken; lists them all.
        KDError: no adapter knows a model, or `known` names no check.
    """
    pair = adapt(student), adapt(teacher)
    subject = f"{type(method_factory()).__name__} from {pair[1].spec.name} to {pair[0].spec.name}"
    batches: list[tuple[Sequence[Tensor], Sequence[Target]]]
    if images is not None and targets is not None:
        batches = [(images, targets)]
    else:
        about = pair[0].spec.num_classes, next(pair[0].model.parameters()).device
        batches = [example_batch(*about, sizes) for sizes in EXAMPLES]
    reason = ""
    for shown, truth in batches:
        case = _Case(method_factory, *pair, tuple(shown), tuple(truth))
        reason = case.refusal() or ""
        if not reason:
            return run(subject, METHOD_CHECKS, case, known or {})
    return ConformanceReport(subject, {"refuses": Result("refused", reason)})


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

    def fresh(self, seed: int = SEED) -> Distiller:
        """A distiller with a method set up anew, and models without gradients."""
        student, teacher, _ = self._copies
        for model in (student.model, teacher.model):
            model.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        return Distiller(teacher, student, [self.factory()]).train()

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

    def refusal(self) -> str | None:
        if reason := refusal(self.factory(), self.student.spec, self.teacher.spec):
            return reason
        try:
            self.terms(self.fresh())
        except IncompatibleError as error:
            return f"at the first step: {error}"
        except Exception:  # the checks will say what is wrong
            pass
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
        shown = [(role, "features", x) for role in ("student", "teacher") for x in getattr(exchange, role).features]
        if self.needs != {Capability.FEATURES}:
            pair = exchange.matched()
            for role, trace in (("student", pair.student), ("teacher", pair.teacher)):
                shown += [(role, name, getattr(trace.predictions, name)) for name in ("logits", "regression")]
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
    """Gradient reaches the student."""
    distiller = case.fresh()
    expect_backward(case.terms(distiller), distiller.student, "terms", reaches=True)


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
    if reason := refusal(method, teacher.spec, teacher.spec):
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
    exact = case.terms(case.fresh())
    distiller = case.fresh()
    with torch.autocast(case.images[0].device.type, torch.bfloat16):
        terms = case.terms(distiller)
    expect_losses(terms, "terms")
    expect_backward(terms, distiller, "terms")
    for name, value in terms.items():
        near = abs(value - exact[name]) <= BFLOAT16 * abs(exact[name]) + 1e-3 * total(exact).abs() + 1e-6
        found = f"{name} is {value.item():g} in bfloat16, {exact[name].item():g} in float32"
        expect(bool(near), f"{found} (where that is about 0, give the detectors some spread)")


def _repeatable(case: _Case) -> None:
    """Two runs under one seed are equal to the bit."""
    expect_same(case.terms(case.fresh()), case.terms(case.fresh()), "the second run")


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
    for model in (teacher, _method_of(distiller)):
        if count := count_calls(model, lambda: case.terms(distiller)):
            interrupt(model, lambda: case.terms(distiller), count)
        before.expect_of(distiller.student, "after an error, in the student,", values=False)
        teacher_before.expect_of(teacher, "after an error, in the teacher,")


def _round_trip(case: _Case) -> None:
    """The method's state dict, loaded into one set up afresh, gives equal terms."""
    distiller, other = case.fresh(), case.fresh(seed=SEED + 1)
    _method_of(other).load_state_dict(_method_of(distiller).state_dict())
    expect_same(case.terms(other), case.terms(distiller), "with the state dict of another one")


def _copies(case: _Case) -> None:
    """Deep copies and pickles of the method give equal terms."""
    expected = case.terms(case.fresh())
    for what, again in (("a deep copy", copy.deepcopy), ("a pickle", _pickled)):
        distiller = case.fresh()
        distiller.methods[0] = again(_method_of(distiller))
        expect_same(case.terms(distiller), expected, what)


def _pickled(method: Method) -> Method:
    again: Method = pickle.loads(pickle.dumps(method))
    return again


METHOD_CHECKS = by_name(
    _terms, _student_gradient, _own_parameters, _frozen_teacher, _shown_untouched, _vanishing, _no_objects,
    _one_image_without, _constant_images, _small_images, _mixed_precision, _repeatable, _student_untouched,
    _round_trip, _copies,
)  # fmt: skip
