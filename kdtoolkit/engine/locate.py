"""Finds where the first non-finite value of a step arises. A training run that stops because of it says so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kdtoolkit.checks import checked_batch, checked_images, without_recorded
from kdtoolkit.contract import Batch, Capability, DetectorAdapter, RecordedAlone, Target
from kdtoolkit.distiller import Distiller


@torch.no_grad()
def locate_non_finite(
    distiller: Distiller, images: Sequence[Tensor], targets: Sequence[Target] | Sequence[RecordedAlone] | None
) -> str:
    """Say in words where the first non-finite value arises in each detector, for the batch of the last step.

    The teacher is left out if it did not run in that step. Levels are named by their strides. If all values are finite,
    it names the largest one: then a loss overflowed. A search that fails is no error, because that would hide the one
    that it is made for: the text says so.
    """
    found: list[str] = []
    try:
        found.extend(_places(distiller, images, targets))
    except Exception as error:
        found.append(f"the search for the place ended with {type(error).__name__}: {error}")
    return "; ".join(found)


def _places(
    distiller: Distiller, images: Sequence[Tensor], targets: Sequence[Target] | Sequence[RecordedAlone] | None
) -> Iterator[str]:
    student = distiller.student_adapter
    targets, recorded = without_recorded(targets)
    if targets is None:
        images = checked_images(images, distiller.student)
    else:
        images, targets = checked_batch(images, targets, distiller.student, student.spec)
    batch = student.prepare(images, targets)
    yield f"student: {_first_non_finite(student, batch)}"
    last_step = (distiller.calls - 1) // distiller.accumulation  # the call is counted already
    if distiller.active(last_step, labelled=targets is not None):
        seen = distiller.teacher_batch(images, targets, batch, recorded)
        yield f"teacher: {_first_non_finite(distiller.seen[1], seen)}"


def _first_non_finite(adapter: DetectorAdapter, batch: Batch) -> str:
    """Where one detector's first value that is not finite arises, in words."""
    seen = [("images", batch.images)]
    features = adapter.features(batch)
    strides = adapter.spec.strides
    seen += [(f"features at stride {stride}", x) for stride, x in zip(strides, features, strict=True)]
    if Capability.PREDICTIONS in adapter.spec.capabilities:
        seen += _of_head(adapter, features, batch)
    for name, value in seen:
        if not bool(value.isfinite().all()):
            return f"not finite, first in {name}"
    largest, place = max((float(x.abs().max()), name) for name, x in seen if x.numel())
    return f"all finite, the largest value is {largest:.3g} ({place})"


def _of_head(adapter: DetectorAdapter, features: tuple[Tensor, ...], batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """The hidden states and predictions of a head, in the order in which they are computed, with their names."""
    strides = adapter.spec.strides
    trace = adapter.head(features, batch)
    for stage, state in zip(adapter.spec.stages, trace.states, strict=True):
        for branch, tensors in state.items():
            at = [f" at stride {stride}" for stride in strides] if len(tensors) == len(strides) else [""]
            for where, x in zip(at, tensors, strict=True):
                yield f"state '{stage.name}' of branch {branch}{where}", x
    predictions = trace.predictions
    sizes = list(predictions.priors.per_level)
    for name, value in (("logits", predictions.logits), ("regression", predictions.regression)):
        at = [f" at stride {stride}" for stride in strides] if len(sizes) == len(strides) else [""] * len(sizes)
        for where, x in zip(at, torch.split(value, sizes, 1), strict=True):
            yield f"{name}{where}", x
