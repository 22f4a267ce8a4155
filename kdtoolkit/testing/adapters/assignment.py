"""Whether assignments mean what the contract says."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from kdtoolkit.contract import Capability, DetectorAdapter, PriorKind, Target
from kdtoolkit.testing._batch import without_objects
from kdtoolkit.testing._expect import expect
from kdtoolkit.testing.adapters._case import PIXELS, Case, mode
from kdtoolkit.testing.ranks import side_by_side
from kdtoolkit.testing.report import LeftOut, by_name


@torch.no_grad()
def _assignment(case: Case) -> None:
    """Labels, boxes, weights and normaliser of the assignment mean what the contract says, in both modes."""
    if Capability.ASSIGNMENT not in case.spec.capabilities:
        raise LeftOut("the adapter has no `assign`")
    for train in (False, True):
        expect_assignment(case, case.fresh(train=train), case.targets, mode(train))


def expect_assignment(case: Case, adapter: DetectorAdapter, targets: Sequence[Target], what: str) -> None:
    """Expect that the adapter's assignment for these targets means what the contract says."""
    view = case.show(adapter, targets)
    found = adapter.assign(view.head, view.batch)
    classes, size = case.spec.num_classes, tuple(view.head.predictions.logits.shape[:2])
    for name, tensor in (("labels", found.labels), ("weights", found.weights), ("boxes", found.boxes[..., 0])):
        expect(tuple(tensor.shape) == size, f"{what}: {name} are of {tuple(tensor.shape)} priors, not {size}")
    expect(found.labels.dtype == torch.int64, f"{what}: labels are {found.labels.dtype}, not torch.int64")
    low, high = int(found.labels.min()), int(found.labels.max())
    expect(0 <= low <= high <= classes, f"{what}: labels {low} to {high} of {classes} classes and background")
    agree = found.positive.shape == size and torch.equal(found.positive, found.labels < classes)
    expect(agree, f"{what}: positive must be (N, A), True where labels is a class and False where it is {classes}")
    expect(bool((found.weights >= 0).all()), f"{what}: weights below 0, or not a number")
    normaliser = float(found.normaliser)
    expect(found.normaliser.shape == () and 0 < normaliser < float("inf"), f"{what}: normaliser {normaliser}")
    counted = int((found.weights > 0).sum())
    if sum(map(len, view.batch.labels)):
        expect(counted > 0, f"{what}: all weights are 0, so no prior counts")
        most = counted * classes  # as for a mean over all priors that count, and over all classes
        expect(
            normaliser <= most, f"{what}: the normaliser {normaliser:g} is too large for {counted} priors that count"
        )
    allowed = max(PIXELS, 1e-4 * max(view.batch.images.shape[-2:]))
    for i, (boxes, labels) in enumerate(zip(view.batch.boxes, view.batch.labels, strict=True)):
        positive = found.positive[i]
        if not len(boxes):
            expect(not positive.any(), f"{what}: {int(positive.sum())} positives in image {i}, which has no object")
            continue
        some = case.spec.priors == PriorKind.PROPOSALS or bool(positive.any())
        expect(some, f"{what}: no prior is assigned to any of the {len(boxes)} objects of image {i}")
        counts = bool((found.weights[i][positive] > 0).all())
        expect(counts, f"{what}: priors that are assigned to objects of image {i} have weight 0")
        distances = (found.boxes[i][positive][:, None] - boxes).abs().amax(-1)
        if not case.proposes:
            distances = distances.where(found.labels[i][positive][:, None] == labels, float("inf"))
        off = distances.amin(-1).amax().item() if len(distances) else 0.0
        problem = f"a positive prior of image {i} has a box or a label that no object has"
        expect(off <= allowed, f"{what}: {problem} (nearest one with its label: {off:g} pixels)")


def _two_processes(case: Case) -> None:
    """The normaliser is summed over processes: a process without objects has the same as one with all objects."""
    if Capability.ASSIGNMENT not in case.spec.capabilities:
        raise LeftOut("the adapter has no `assign`")

    def normaliser(targets: Sequence[Target]) -> float:
        adapter = case.fresh()
        view = case.show(adapter, targets)
        return float(adapter.assign(view.head, view.batch).normaliser)

    nothing = without_objects(case.targets, range(len(case.targets)))
    first, second = side_by_side([partial(normaliser, targets) for targets in (case.targets, nothing)])
    expect(
        first == second,
        f"the normaliser is {first:g} in a process with all objects and {second:g} in one without: make it "
        "kdtoolkit.processes.share(...) of what is counted",
    )


CHECKS = by_name(_assignment, _two_processes)
