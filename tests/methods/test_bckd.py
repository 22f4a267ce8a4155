import copy
import re
from dataclasses import replace

import pytest
import torch

from kdtoolkit import Distiller, IncompatibleError
from kdtoolkit.contract import PriorKind
from kdtoolkit.methods.bckd import BCKD
from tests.conftest import DENSE, tiny_atss, tiny_gfl, tiny_retinanet
from tests.methods._views import CLASSES, GRID, assignment, batch, exchange, predictions, spec

BATCH = batch([], [])


def boxed(n, seed, dtype=torch.float32):
    """Predictions whose regression is boxes: those of the anchors, shifted."""
    generator = torch.Generator().manual_seed(100 + seed)
    head = predictions(n, seed=seed, dtype=dtype)
    shift = 3 * torch.randn(n, *head.priors.boxes.shape, generator=generator)
    return replace(head, regression=(head.priors.boxes + shift).to(dtype).requires_grad_())


def bckd(student, teacher, labels, method=None, **changes):
    assigned = replace(assignment(labels), **changes)
    return (method or BCKD())(exchange(BATCH, heads=(student, teacher), assigned=assigned))


def background(head):
    return torch.full(head.logits.shape[:2], CLASSES)


def giou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return intersection / union - (hull - union) / hull


def test_equals_a_loop():
    student, teacher = boxed(2, 1), boxed(2, 2)
    weights = torch.ones(2, student.logits.shape[1])
    weights[1, 7:20] = 0
    ours = bckd(
        student,
        teacher,
        background(student),
        BCKD(cls_weight=2.0, box_weight=3.0),
        weights=weights,
        normaliser=torch.tensor(5.0),
    )
    cls = box = 0.0
    for i in range(2):
        for a in range(weights.shape[1]):
            differences = []
            for k in range(CLASSES):
                p = student.logits[i, a, k].double().sigmoid()
                q = teacher.logits[i, a, k].double().sigmoid()
                differences.append((p - q).abs().item())
                cls -= weights[i, a].item() * ((q * p.log() + (1 - q) * (1 - p).log()) * (p - q).abs()).item()
            overlap = giou(student.regression[i, a].tolist(), teacher.regression[i, a].tolist())
            box += weights[i, a].item() * max(differences) * (1 - overlap)
    assert tuple(ours) == BCKD.terms
    assert ours["cls"].item() == pytest.approx(2 * cls / 5, rel=1e-5)
    assert ours["box"].item() == pytest.approx(3 * box / 5, rel=1e-5)


def test_the_published_code_leaves_out_levels_without_positives():
    student, teacher = boxed(2, 1), boxed(2, 2)
    first = GRID[0][0] * GRID[0][1]
    labels = background(student)
    labels[1, 5] = 0  # on the first level, in one of the images
    weights = torch.ones(2, student.logits.shape[1])
    weights[:, first:] = 0
    alone = bckd(student, teacher, labels, weights=weights)
    published = bckd(student, teacher, labels, BCKD(published_levels=True))
    everywhere = bckd(student, teacher, labels)
    for name, loss in published.items():
        torch.testing.assert_close(loss, alone[name])
        assert loss < everywhere[name]
    assert not any(bckd(student, teacher, background(student), BCKD(published_levels=True)).values())


def test_twins_are_at_the_minimum():
    student, teacher = boxed(2, 1), boxed(2, 1)
    terms = bckd(student, teacher, background(student))
    assert all(term == 0 for term in terms.values())
    sum(terms.values()).backward()
    assert student.logits.grad.abs().max() == 0
    assert student.regression.grad.abs().max() == 0
    assert all(term > 1e-3 for term in bckd(student, boxed(2, 2), background(student)).values())


def test_gradient_reaches_the_student_alone():
    student, teacher = boxed(2, 1), boxed(2, 2)
    terms = bckd(student, teacher, background(student))
    terms["box"].backward(retain_graph=True)
    assert student.logits.grad is None  # how much a box counts is no way out of it
    terms["cls"].backward()
    assert student.logits.grad.any()
    assert student.regression.grad.any()
    assert teacher.logits.grad is None
    assert teacher.regression.grad is None


def test_half_precision_gives_float32_terms():
    student, teacher = boxed(2, 1, torch.bfloat16), boxed(2, 2, torch.bfloat16)
    terms = bckd(student, teacher, background(student))
    full = bckd(
        *(replace(x, logits=x.logits.float(), regression=x.regression.float()) for x in (student, teacher)),
        background(student),
    )
    assert all(x.dtype == torch.float32 for x in terms.values())
    assert {name: x.item() for name, x in terms.items()} == {name: x.item() for name, x in full.items()}


@pytest.mark.parametrize("detector", DENSE)
def test_a_step_on_detectors(detector, batch):
    teacher, student = detector(seed=1), detector(seed=2)
    losses = Distiller(teacher, student, [BCKD()])(*batch)
    kd = {name: loss for name, loss in losses.items() if name.startswith("bckd/")}
    assert len(kd) == 2
    assert all(torch.isfinite(loss) and loss > 0 for loss in kd.values())
    sum(kd.values()).backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert all(gradients[f"predictors.{branch}.weight"].any() for branch in ("cls", "reg"))
    assert all(torch.isfinite(g).all() for g in gradients.values())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("detector", DENSE)
def test_empty_targets_are_finite(detector, batch):
    images, targets = batch
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in targets]
    student = detector(seed=2)
    losses = Distiller(detector(seed=1), student, [BCKD()])(images, empty)
    losses.total.backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_a_twin_costs_nothing(batch):
    teacher = tiny_retinanet(seed=1).eval()
    losses = Distiller(teacher, copy.deepcopy(teacher).eval(), [BCKD()])(*batch)
    assert losses["bckd/cls"].item() == pytest.approx(0, abs=1e-5)
    assert losses["bckd/box"].item() == pytest.approx(0, abs=1e-5)


def test_detectors_that_predict_boxes_otherwise_can_be_paired(batch):
    losses = Distiller(tiny_gfl(seed=1), tiny_atss(seed=2), [BCKD()])(*batch)
    assert losses["bckd/box"] > 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"priors": PriorKind.QUERIES}, "on a grid .*, and the student predicts at queries"),
        ({"strides": (16, 32)}, r"the student has the strides \(16, 32\)"),
        ({"priors_per_cell": (9, 9)}, "the student has 9 priors a cell, the teacher 1 prior"),
        ({"activation": "softmax"}, "the student's class scores are a softmax over all classes"),
    ],
)
def test_pairs_that_do_not_correspond_are_refused(change, reason):
    assert BCKD().refuses(spec(), spec()) is None
    assert BCKD().refuses(spec(bins=()), spec()) is None
    assert re.search(reason, BCKD().refuses(spec(**change), spec()))


def test_unequal_grids_are_an_error_that_says_so():
    student, teacher = boxed(2, 1), boxed(2, 2)
    other = replace(teacher, priors=replace(teacher.priors, grid=((9, 6), GRID[1])))
    with pytest.raises(IncompatibleError, match="build both detectors with the same image size"):
        bckd(student, other, background(student))
