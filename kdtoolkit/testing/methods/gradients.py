"""Whether gradients reach everything that must be trained, and nothing else."""

from __future__ import annotations

import torch

from kdtoolkit.testing._expect import expect, expect_backward, total
from kdtoolkit.testing._snapshot import Snapshot
from kdtoolkit.testing.methods._case import Case, method_of, teacher_of
from kdtoolkit.testing.report import LeftOut, by_name


def _student_gradient(case: Case) -> None:
    """Each term has a gradient, and it reaches the student."""
    distiller = case.fresh()
    terms = case.terms(distiller)
    for name, value in terms.items():
        expect(value.requires_grad, f"no gradient flows from {name}: it depends on nothing that is trained")
    expect_backward(terms, distiller.student, "terms", reaches=True)


def _own_parameters(case: Case) -> None:
    """A finite gradient reaches each of the method's own parameters."""
    distiller = case.fresh()
    learned = {name: p for name, p in method_of(distiller).named_parameters() if p.requires_grad}
    if not learned:
        raise LeftOut("the method has no parameters of its own")
    expect_backward(case.terms(distiller), method_of(distiller), "the method's own parameters")
    missing = [name for name, p in learned.items() if p.grad is None]
    expect(not missing, f"no gradient reaches the method's own {', '.join(missing)}")


def _frozen_teacher(case: Case) -> None:
    """The teacher gets no gradient, and none of its parameters and buffers changes."""
    distiller = case.fresh()
    before = Snapshot.of(teacher_of(distiller))
    for _ in range(2):
        torch.autograd.backward(total(case.terms(distiller)))
    before.expect_of(teacher_of(distiller), "after two steps, in the teacher,")


CHECKS = by_name(_student_gradient, _own_parameters, _frozen_teacher)
