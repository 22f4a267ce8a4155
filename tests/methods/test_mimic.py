import copy
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kdtoolkit import Distiller, IncompatibleError
from kdtoolkit.contract import PriorKind
from kdtoolkit.methods.mimic import Mimic
from tests.conftest import DENSE, tiny_atss, tiny_fcos, tiny_gfl, tiny_retinanet
from tests.methods._views import CLASSES, assignment, batch, exchange, predictions, spec

BATCH = batch([], [])


def mimic(student, teacher, labels, method=None):
    step = exchange(BATCH, heads=(student, teacher), assigned=assignment(labels))
    step.student.adapter.assigner = step.teacher.adapter.assigner = "the same"
    return (method or Mimic())(step)


def background(predictions):
    return torch.full(predictions.logits.shape[:2], CLASSES)


def test_distributions_against_a_loop():
    student, teacher = predictions(2, seed=1), predictions(2, seed=2)
    labels = background(student)
    labels[0, 5] = 1
    ours = mimic(student, teacher, labels, Mimic(cls_weight=2.0, distribution_weight=3.0))
    cls, box, weights = 0.0, 0.0, 0.0
    for i in range(2):
        for a in range(labels.shape[1]):
            for k in range(CLASSES):
                p, q = student.logits[i, a, k].sigmoid(), teacher.logits[i, a, k].sigmoid()
                cls -= (q * p.log() + (1 - q) * (1 - p).log()) * (p - q).abs()
            score = teacher.logits[i, a].max().sigmoid()
            weights += score
            for side in range(4):
                p, q = student.regression[i, a, side].softmax(0), teacher.regression[i, a, side].softmax(0)
                box += score * (q * (q / p).log()).sum() / 4
    assert set(ours) == {"cls", "box"}
    torch.testing.assert_close(ours["cls"], 2 * cls, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["box"], 3 * box / weights, rtol=1e-4, atol=1e-5)


def test_twins_are_at_the_minimum():
    student = predictions(2, seed=1)
    teacher = predictions(2, seed=1)
    terms = mimic(student, teacher, background(student))
    assert all(term.item() == pytest.approx(0, abs=1e-6) for term in terms.values())
    sum(terms.values()).backward()
    for x in (student.logits, student.regression):
        torch.testing.assert_close(x.grad, torch.zeros_like(x), rtol=0, atol=1e-6)
    assert all(term > 1e-3 for term in mimic(student, predictions(2, seed=2), background(student)).values())


@pytest.mark.parametrize("detector", DENSE)
def test_gradient_reaches_the_students_predictors_and_nothing_of_the_teacher(detector, batch):
    teacher, student = detector(seed=1), detector(seed=2)
    losses = Distiller(teacher, student, [Mimic()])(*batch)
    kd = {name: loss for name, loss in losses.items() if name.startswith("mimic/")}
    assert all(torch.isfinite(loss) and loss > 0 for loss in kd.values())
    sum(kd.values()).backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert all(gradients[f"predictors.{branch}.weight"].any() for branch in ("cls", "reg"))
    assert any(gradients[name].any() for name in gradients if "backbone" in name)
    assert all(torch.isfinite(g).all() for g in gradients.values())
    assert all(p.grad is None for p in teacher.parameters())


def test_decoded_boxes_of_a_twin_cost_nothing(batch):
    teacher = tiny_retinanet(seed=1).eval()
    losses = Distiller(teacher, copy.deepcopy(teacher).eval(), [Mimic()])(*batch)
    assert losses["mimic/cls"].item() == pytest.approx(0, abs=1e-5)
    assert losses["mimic/box"].item() == pytest.approx(0, abs=1e-4)


def test_centerness_is_compared_at_positives_alone():
    student, teacher = predictions(2, seed=1), predictions(2, seed=2)
    ours, theirs = torch.randn(2, *student.logits.shape[:2], generator=torch.Generator().manual_seed(3)).unbind()
    labels = background(student)
    labels[0, 5] = labels[1, 7] = 1
    terms = mimic(replace(student, quality=ours), replace(teacher, quality=theirs), labels, Mimic(quality_weight=2.0))
    target = theirs.sigmoid()
    at = [(0, 5), (1, 7)]
    expected = -sum(target[p] * F.logsigmoid(ours[p]) + (1 - target[p]) * F.logsigmoid(-ours[p]) for p in at)
    torch.testing.assert_close(terms["quality"], 2 * expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("detector", DENSE)
def test_empty_targets_are_finite(detector, batch):
    images, targets = batch
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in targets]
    student = detector(seed=2)
    losses = Distiller(detector(seed=1), student, [Mimic()])(images, empty)
    losses.total.backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"priors": PriorKind.PROPOSALS}, "the student predicts at proposals, the teacher at anchors"),
        ({"strides": (16, 32)}, r"the student has the strides \(16, 32\)"),
        ({"priors_per_cell": (9, 9)}, "the student has 9 priors a cell, the teacher 1 prior"),
        ({"priors": PriorKind.POINTS}, "relative to points, the teacher relative to anchors"),
        ({"activation": "softmax"}, "the student's class scores are a softmax, the teacher's a sigmoid"),
        ({"bins": ()}, r"the student predicts plain boxes, the teacher has 5 bins \(0 to 4\)"),
    ],
)
def test_priors_that_do_not_correspond_are_refused(change, reason):
    assert Mimic().refuses(spec(), spec()) is None
    assert re.search(reason, Mimic().refuses(spec(**change), spec()))


@pytest.mark.parametrize("student", [tiny_gfl, tiny_fcos, tiny_retinanet])
def test_other_kinds_of_heads_are_refused_before_the_first_step(student):
    with pytest.raises(IncompatibleError, match="Mimic"):
        Distiller(tiny_atss(seed=1), student(seed=2), [Mimic()])
