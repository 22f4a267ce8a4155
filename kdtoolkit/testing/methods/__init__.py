"""Checks of a method on a pair of detectors. Each private function of these modules is one promise of the contract."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from kdtoolkit.contract import DetectorAdapter, Method, Target
from kdtoolkit.contract.method import check_facts
from kdtoolkit.errors import KDError
from kdtoolkit.libraries import adapt
from kdtoolkit.testing._batch import example_batch
from kdtoolkit.testing.methods import batches, gradients, numerics, side_effects, terms
from kdtoolkit.testing.methods._case import Case, MethodFactory
from kdtoolkit.testing.report import ConformanceError, ConformanceReport, Result, run


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

    It is no error if the method refuses the pair: the report then says so, with the reason. New detectors with batch
    norm may have nearly constant states. Then some checks can say nothing: perturb the weights first, or run a few
    forwards in train mode.

    Args:
        method_factory: builds a new method: its class, or a function without arguments.
        student: a small detector with random weights, or its adapter. It is copied, not changed.
        teacher: the same for the teacher; it needs the student's number of classes.
        known: the checks that must fail for now, each with the reason. If such a check passes, that is an error.
        only: the names of the checks to run; all by default.
        images: two or more (3, H, W) in [0, 1]. By default two of different sizes, of about 64 px.
        targets: their ground truth. Give both or neither.

    Raises:
        ConformanceError: promises are broken. It lists all of them. Or the method cannot be built.
        KDError: no adapter knows a model, or no check has a name of `known` or `only`.
    """
    pair = adapt(student), adapt(teacher)
    subject = f"{type(_built(method_factory)).__name__} from {pair[1].spec.name} to {pair[0].spec.name}"
    if images is None or targets is None:
        images, targets = example_batch(pair[0].spec.num_classes, next(pair[0].model.parameters()).device)
    case = Case(method_factory, *pair, tuple(images), tuple(targets))
    try:
        reason = case.why_refused()
    except Exception:  # a step fails: one check says why, and all others would repeat it
        return run(subject, METHOD_CHECKS, case, known or {}, ["terms"])
    if reason is not None:
        return ConformanceReport(subject, {"refuses": Result("refused", reason)})
    return run(subject, METHOD_CHECKS, case, known or {}, only)


def _built(factory: MethodFactory) -> Method:
    """A new method. Raises ConformanceError if none can be built, or if its class does not say what it must say."""
    name = getattr(factory, "__name__", "the method")
    try:
        method = factory()
    except Exception as error:
        raise ConformanceError(f"{name} cannot be built without arguments: {type(error).__name__}: {error}") from error
    if not isinstance(method, Method):
        raise ConformanceError(f"{name} builds a {type(method).__name__}, which is no subclass of Method")
    try:
        check_facts(method)
    except KDError as error:
        raise ConformanceError(str(error)) from error
    return method


METHOD_CHECKS = {
    **terms.CHECKS,
    **gradients.CHECKS,
    **batches.CHECKS,
    **numerics.CHECKS,
    **side_effects.CHECKS,
}
