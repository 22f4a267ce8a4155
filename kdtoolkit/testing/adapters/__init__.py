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

    `own` and `own_losses` matter most: only the library itself can show that the adapter weights losses and normalises
    images as the library does.

    Args:
        adapter_or_model: a small detector with random weights, or its adapter. It is copied, not changed.
        own: the library's own inference, which `detections` must equal. If there is none, a sentence that says why.
        own_losses: the library's own training losses, which `task_losses` must equal. If there are none, a sentence
            that says why.
        known: the checks that must fail for now, each with the reason. If such a check passes, that is an error.
        only: the names of the checks to run; all by default.
        images: two or more (3, H, W) in [0, 1]. By default two of different sizes, of about 64 px.
        targets: their ground truth. Give both or neither.

    Raises:
        ConformanceError: promises are broken. It lists all of them.
        KDError: no adapter knows the model, no check has a name of `known` or `only`, or a sentence is empty.
    """
    for name, value in (("own", own), ("own_losses", own_losses)):
        if not callable(value) and not (isinstance(value, str) and value.strip()):
            raise KDError(f"{name} must be a function, or the reason (a sentence) why there is nothing to compare with")
    adapter = adapt(adapter_or_model)
    if getattr(adapter, "model", None) is None:
        raise ConformanceError(f"{type(adapter).__name__}.__init__ must call super().__init__(model)")
    if images is None or targets is None:
        images, targets = example_batch(adapter.spec.num_classes, next(adapter.model.parameters()).device)
    case = Case(adapter, tuple(images), tuple(targets), own, own_losses)
    return run(f"adapter of {adapter.spec.name}", ADAPTER_CHECKS, case, known or {}, only)


def _first_stage(case: Case) -> None:
    """The first stage is a detector of one class, and keeps the same promises."""
    stage = case.adapter.first_stage
    if stage is None:
        raise LeftOut("the adapter has no first stage")
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
