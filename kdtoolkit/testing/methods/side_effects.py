"""Whether a method runs each detector once, and leaves what it sees as it was."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial

import torch
from torch import Tensor

from kdtoolkit.contract import Capability, DetectorAdapter, Exchange, HeadTrace, Method
from kdtoolkit.distiller import Distiller
from kdtoolkit.errors import IncompatibleError
from kdtoolkit.testing._batch import observe
from kdtoolkit.testing._doubles import transformed
from kdtoolkit.testing._expect import expect, expect_same, outputs
from kdtoolkit.testing._snapshot import Snapshot, count_calls, interrupt
from kdtoolkit.testing.methods._case import Case, method_of, teacher_of
from kdtoolkit.testing.report import SEED, by_name


def _passes(case: Case) -> None:
    """Each detector is run once a step, and the teacher's head once at most."""
    calls: Counter[str] = Counter()

    def counted(role: str, adapter: DetectorAdapter) -> DetectorAdapter:
        return transformed(adapter, note=lambda what: calls.update([f"{what} of the {role}"]))

    with torch.no_grad():
        case.terms(case.fresh(change_student=partial(counted, "student"), change_teacher=partial(counted, "teacher")))
    # The student's head may run again, on the teacher's queries or proposals.
    most = {
        "features of the student": 1,
        "features of the teacher": 1,
        "head of the student": 2,
        "head of the teacher": 1,
    }
    for what, count in calls.items():
        expect(
            count <= most[what],
            f"{what}: run {count} times a step. Use the tensors that `exchange` and `exchange.matched()` have",
        )


class _Recorder(Method):
    """Keeps all tensors that both detectors show in a step, each with its version, which counts writes."""

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
            for role, trace in zip(views, _passes_seen(exchange), strict=True):
                shown += [(role, name, x) for name, x in outputs(trace.predictions).items()]
                shown += [(role, "states", x) for state in trace.states for each in state.values() for x in each]
        self.seen += [(f"the {role}'s {name}", x, x._version) for role, name, x in shown]
        return {}


def _passes_seen(exchange: Exchange) -> tuple[HeadTrace, HeadTrace]:
    """The passes of student and teacher: on the same priors, or each head's own if their priors do not correspond."""
    try:
        pair = exchange.matched()
    except IncompatibleError:  # then the method compares no priors
        return exchange.student.head, exchange.teacher.head
    return pair.student, pair.teacher


def _shown_untouched(case: Case) -> None:
    """What both detectors show is not written to, since the other methods of the step see it too."""
    student, teacher, _ = case._copies
    method = case.factory()
    recorder = _Recorder(method.needs)
    torch.manual_seed(SEED)
    case.terms(Distiller(teacher, student, [recorder, method]).train())
    changed = sorted({name for name, x, version in recorder.seen if x._version != version})
    expect(not changed, f"it writes in place to {', '.join(changed)}, which the other methods of the step see too")


def _student_untouched(case: Case) -> None:
    """A step leaves the student as a step without the method does, also if an error ends it."""
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
    teacher = teacher_of(distiller)
    before, teacher_before = Snapshot.of(distiller.student), Snapshot.of(teacher)
    method, counts = method_of(distiller), [0, 0]

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


CHECKS = by_name(_passes, _shown_untouched, _student_untouched)
