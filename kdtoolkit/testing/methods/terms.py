"""Whether the terms of a method mean what it declares."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from functools import partial
from typing import Any, get_type_hints

import torch
from torch import Tensor

from kdtoolkit.compatibility import why_refused
from kdtoolkit.contract import Capability, Exchange, Method, Predictions, PriorKind
from kdtoolkit.errors import KDError
from kdtoolkit.testing._batch import observe
from kdtoolkit.testing._doubles import WatchedView, transformed
from kdtoolkit.testing._expect import expect, expect_backward, expect_finite, expect_losses, total
from kdtoolkit.testing.methods._case import ROUNDING, Case, method_of
from kdtoolkit.testing.report import SEED, LeftOut, by_name

ZERO = 1e-3  # how large a vanishing term may be, relative to that of a different student: rounding in the head

# Bounds of the sum of terms if levels have a spread of 1 and logits one of 2. Ours lie between 0.03 and 300 if they
# compare heads, and are at least 0.002 if they compare features, for maps of four cells.
LEAST_OF_HEADS, LEAST_OF_FEATURES, MOST = 0.01, 5e-4, 1e4


def _options(case: Case) -> None:
    """Options have type hints, so that wrong values are refused, and weights below 0 are refused."""
    cls = type(case.factory())
    if cls.__init__ is Method.__init__:
        raise LeftOut("the method has no options")
    hints = get_type_hints(cls.__init__)
    for name, parameter in inspect.signature(cls).parameters.items():
        gathers = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        expect(not gathers, f"{cls.__name__} takes any option as {name}, also one with a wrong spelling")
        expect(name in hints, f"the option {name} has no type hint, so wrong values cannot be refused")
        if name.endswith("weight"):
            try:
                cls(**{name: -1.0})
            except KDError:
                continue
            raise AssertionError(f"{cls.__name__}({name}=-1.0) is accepted, but no weight may be below 0")


def _terms(case: Case) -> None:
    """Terms are finite float32 scalars, and have declared names."""
    distiller = case.fresh()
    method, terms = method_of(distiller), case.terms(distiller)
    for what, names in (("returns", terms), ("`vanishing` names", method.vanishing)):
        unknown = ", ".join(sorted(set(names) - set(method.terms)))
        expect(not unknown, f"{what} {unknown}; `terms` declares {', '.join(method.terms)}")
    expect_losses(terms, "terms")


_WITHOUT: dict[Capability, dict[str, Any]] = {
    Capability.FEATURES: {"strides": (), "channels": ()},
    Capability.PREDICTIONS: {"priors": PriorKind.NONE},
    Capability.STAGES: {"stages": ()},
    Capability.ASSIGNMENT: {"assigns": False},
    Capability.PLACED_QUERIES: {"places_queries": False},
}
"""The fields of a spec that does not show a capability."""


@torch.no_grad()
def _needs(case: Case) -> None:
    """A detector that does not show what the method takes of it is refused: by `needs`, or by `refuses`."""
    distiller = case.fresh()
    method, teacher = method_of(distiller), distiller.teacher_adapter
    assert teacher is not None
    batch = distiller.student_adapter.prepare(case.images, case.targets)
    beside = distiller.teacher_batch(case.images, case.targets, batch)
    views = {
        "student": WatchedView(distiller.student_adapter, batch, frozen=False),
        "teacher": WatchedView(teacher, beside, frozen=True),
    }
    method(Exchange(views["student"], views["teacher"]).at_strides(method.strides))
    for role, view in views.items():
        for taken in sorted(view.taken):
            specs = {each: views[each].spec for each in views}
            specs[role] = replace(view.spec, **_WITHOUT[taken])
            expect(
                why_refused(case.factory(), specs["student"], specs["teacher"]) is not None,
                f"it takes {taken} of the {role}, and a {role} that does not show this is not refused. Add "
                f"Capability.{taken.name} to `needs`: else neither such a detector nor other classes are refused",
            )


def _vanishing(case: Case) -> None:
    """If the student equals the teacher, terms named in `vanishing` are 0, their minimum, and gradients are finite.

    The gradient need not be 0: at a kink (GIoU, |a - b|) it is that of one side, which rounding decides. Each level
    has a dead channel, because trained detectors have some. The cosine of two such maps is computed as 0, not as 1.
    """
    teacher = transformed(copy.deepcopy(case.teacher), levels=_without_first_channel)
    teacher.model.eval().requires_grad_(False)
    method = case.factory()
    if not method.vanishing:
        raise LeftOut("the method's `vanishing` is empty")
    if reason := why_refused(method, teacher.spec, teacher.spec):
        raise LeftOut(f"the method refuses a student that is the teacher: {reason}")
    spec = teacher.spec.at_strides(method.strides)
    method.setup(spec, spec)
    method.to(case.images[0].device).eval()
    with torch.no_grad():
        theirs = observe(teacher, case.images, case.targets)

    def terms(distance: float) -> dict[str, float]:
        """The vanishing terms of a student with weights this far from the teacher's, relative to their size."""
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
        found = (
            f"{name} is {value:g} if the student equals the teacher, and {other:g} if it does not. Channel 0 of the "
            "features is 0 in both, as in trained detectors: a loss of 1 - cosine must leave out channels that are 0, "
            "or nearly 0, in both. If the loss is meant to have its minimum elsewhere, take the term out of `vanishing`"
        )
        expect(abs(value) <= limit, found)
        lowest = min(near[name], other)
        expect(lowest >= -limit, f"{name} falls to {lowest:g} near the teacher, so 0 is not its minimum")


def _magnitude(case: Case) -> None:
    """Between detectors that differ as trained ones do, terms are neither too small to matter nor too large.

    Random detectors predict nearly the same. So levels are scaled to a spread of 1, logits to one of 2, and
    distributions of box sides to one of 1.
    """
    loud = partial(transformed, levels=_with_spread, predictions=_with_contrast)
    with torch.no_grad():
        found = float(total(case.terms(case.fresh(change_student=loud, change_teacher=loud))))
    least = LEAST_OF_FEATURES if case.factory().needs == {Capability.FEATURES} else LEAST_OF_HEADS
    problem = (
        f"terms are {found:.2g} in sum if levels have a spread of 1 and logits one of 2; expected {least:g} to {MOST:g}"
    )
    expect(least <= found <= MOST, f"{problem}. Look at what sums are divided by, and at the weights")


def _without_first_channel(level: Tensor) -> Tensor:
    alive = torch.ones(level.shape[1], device=level.device)
    alive[0] = 0
    return level * alive[:, None, None]


def _with_spread(x: Tensor) -> Tensor:
    return x / (x.detach().std() + 1e-6) if x.numel() > 1 else x


def _with_contrast(predictions: Predictions) -> Predictions:
    centred = predictions.logits - predictions.logits.detach().mean()
    regression = predictions.regression
    if regression.ndim == 4:
        regression = _with_spread(regression - regression.detach().mean())
    return replace(predictions, logits=2 * _with_spread(centred), regression=regression)


def _weights_of_zero(case: Case) -> None:
    """With all weights 0 a method runs and adds nothing."""
    cls = case.factory
    if not isinstance(cls, type):
        raise LeftOut("the method is built by a function, whose weights are not known")
    weights = [name for name in inspect.signature(cls).parameters if name.endswith("weight")]
    if not weights:
        raise LeftOut("the method has no weights")
    distiller = case.fresh(factory=partial(cls, **dict.fromkeys(weights, 0.0)))
    terms, what = case.terms(distiller), f"with {', '.join(weights)} = 0"
    expect_finite(terms, what)
    left = [name for name, value in terms.items() if bool(value)]
    expect(not left, f"{what} there still is {', '.join(left)}")
    if any(value.requires_grad for value in terms.values()):
        expect_backward(terms, distiller, what)


CHECKS = by_name(_options, _terms, _needs, _vanishing, _magnitude, _weights_of_zero)
