"""Checks of an adapter. Each private function of these modules is one promise of the contract."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from kdtoolkit.contract import DetectorAdapter, Target
from kdtoolkit.errors import KDError
from kdtoolkit.libraries import adapt
from kdtoolkit.testing._batch import example_batch
from kdtoolkit.testing._expect import expect
from kdtoolkit.testing.adapters import assignment, detections, head, losses, numerics, preparation, side_effects, spec
from kdtoolkit.testing.adapters._case import Case, Own, OwnLosses
from kdtoolkit.testing.report import ConformanceError, ConformanceReport, LeftOut, by_name, run


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
    case = Case(adapter, tuple(images), tuple(targets), own, own_losses)
    return run(f"adapter of {adapter.spec.name}", ADAPTER_CHECKS, case, known or {}, only)


def _first_stage(case: Case) -> None:
    """What proposes is a detector of one class that keeps the same promises."""
    stage = case.adapter.first_stage
    if stage is None:
        raise LeftOut("has no first stage")
    expect(stage.spec.num_classes == 1, f"a first stage has one class, here {stage.spec.num_classes}")
    proposing = Case(stage, case.images, case.targets, proposes=True)
    run(f"first stage of {case.spec.name}", FIRST_STAGE_CHECKS, proposing, {})


ADAPTER_CHECKS = {
    **preparation.CHECKS,
    **spec.CHECKS,
    **head.CHECKS,
    **detections.CHECKS,
    **losses.CHECKS,
    **assignment.CHECKS,
    **numerics.CHECKS,
    **side_effects.CHECKS,
    **by_name(_first_stage),
}
FIRST_STAGE_CHECKS = {
    name: ADAPTER_CHECKS[name] for name in (*spec.CHECKS, "resume", "given_priors", *assignment.CHECKS)
}
"""The checks that a first stage must pass too. Its losses and detections are parts of its detector's."""
