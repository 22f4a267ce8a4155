"""Whether task losses equal the library's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit.contract import Assignment, Capability, DetectorAdapter, Target, View
from kdtoolkit.testing._batch import without_objects
from kdtoolkit.testing._expect import expect, expect_backward, expect_losses, expect_same, total
from kdtoolkit.testing.adapters._case import Case
from kdtoolkit.testing.adapters.assignment import expect_assignment
from kdtoolkit.testing.report import SEED, LeftOut, by_name

ORDER = 30.0  # factor between a plain classification loss and the detector's own losses; in ours from 1/10 to 8


def _task_losses(case: Case) -> None:
    """Task losses are finite float32 scalars, their gradient reaches the detector, and the assignment fits them."""
    adapter = case.fresh(train=True)
    view = case.show(adapter)
    losses, used = adapter.task_losses(view.head, view.batch)
    expect_losses(losses, "task losses")
    if Capability.ASSIGNMENT in case.spec.capabilities:
        with torch.no_grad():
            _expect_fitting(case, adapter, view, losses, used)
    expect_backward(losses, adapter.model, "task losses", reaches=True)


def _expect_fitting(
    case: Case, adapter: DetectorAdapter, view: View, losses: Mapping[str, Tensor], used: Assignment | None
) -> None:
    """Expect that `assign` gives what the losses used, in both modes, with a normaliser that fits them."""
    found = adapter.assign(view.head, view.batch)
    adapter.model.eval()
    others = {"assign in eval mode": adapter.assign(view.head, view.batch)}
    adapter.model.train()
    if used is not None:
        others["the assignment that the losses used"] = used
    for what, other in others.items():
        alike = torch.equal(other.labels, found.labels) and torch.equal(other.weights, found.weights)
        expect(alike, f"{what} has different labels or weights than assign in train mode, for the same pass")
        normalisers = float(other.normaliser), float(found.normaliser)
        near = abs(normalisers[0] - normalisers[1]) <= 1e-5 * abs(normalisers[1])
        expect(near, f"{what} has the normaliser {normalisers[0]:g}, assign in train mode {normalisers[1]:g}")
    logits, labels = view.head.predictions.logits, found.labels
    if case.spec.activation == "softmax":
        plain = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    else:
        scores = F.one_hot(labels, case.spec.num_classes + 1)[..., :-1].float()
        plain = F.binary_cross_entropy_with_logits(logits, scores, reduction="none").sum(-1)
    value, own = float((plain * found.weights).sum() / found.normaliser), float(total(losses))
    ratio = value / own
    expect(
        1 / ORDER <= ratio <= ORDER,
        f"a plain classification loss, summed over priors and divided by the normaliser ({float(found.normaliser):g}), "
        f"is {value:.3g}, and the detector's own losses are {own:.3g} in sum: the detector divides by something else",
    )


def _own_task_losses(case: Case) -> None:
    """Task losses equal the losses of the library's own training forward."""
    if isinstance(case.own_losses, str):
        raise LeftOut(case.own_losses)
    torch.manual_seed(SEED)
    expected = case.own_losses(case.fresh(train=True).model, case.images, case.targets)
    torch.manual_seed(SEED)
    losses = case.losses(case.fresh(train=True))
    if isinstance(expected, Mapping):
        expect_same(losses, expected, "task losses")
        return
    ours, own = total(losses).item(), expected.sum().item()
    expect(abs(ours - own) <= 1e-6 * abs(own), f"the sum of task losses is {ours:.9g}, the library's own {own:.9g}")


def _empty_targets(case: Case) -> None:
    """If no image has an object, losses and gradients are finite."""
    _expect_finite_step(case, without_objects(case.targets, range(len(case.targets))), "no object at all")


def _one_empty_image(case: Case) -> None:
    """If one image has no object, losses and gradients are finite."""
    for i in (0, len(case.targets) - 1):
        _expect_finite_step(case, without_objects(case.targets, [i]), f"no object in image {i}")


def _expect_finite_step(case: Case, targets: Sequence[Target], what: str) -> None:
    adapter = case.fresh(train=True)
    losses = case.losses(adapter, targets)
    expect_losses(losses, what)
    # Losses may be 0: without objects there may be nothing to learn (SSD takes negatives in proportion to positives).
    expect_backward(losses, adapter.model, what)
    if Capability.ASSIGNMENT in case.spec.capabilities:
        adapter.model.eval()
        with torch.no_grad():
            expect_assignment(case, adapter, targets, what)


CHECKS = by_name(_task_losses, _own_task_losses, _empty_targets, _one_empty_image)
