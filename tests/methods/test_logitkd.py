import math
from dataclasses import replace

import pytest
import torch

from kdtoolkit import Distiller, IncompatibleError, KDError
from kdtoolkit.contract import PriorKind
from kdtoolkit.methods.logitkd import LogitKD, decoupled_kl, dist_loss
from tests.conftest import tiny_atss, tiny_gfl
from tests.methods._views import CLASSES, assignment, batch, exchange, predictions, spec

BATCH = batch([], [])
KINDS = ("kd", "dkd", "dist")
SOFTMAX = spec(activation="softmax", bins=())


def rows(seed, count=7, classes=4):
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax_predictions(seed):
    given = predictions(2, seed=seed)
    logits = torch.randn(*given.logits.shape[:2], CLASSES + 1, generator=torch.Generator().manual_seed(seed))
    return replace(given, logits=logits.requires_grad_(), activation="softmax")


def distil(student, teacher, labels, *, weights=None, specs=(SOFTMAX, SOFTMAX), **settings):
    given = assignment(labels)
    given = given if weights is None else replace(given, weights=weights)
    step = exchange(BATCH, heads=(student, teacher), assigned=given, specs=specs)
    step.student.adapter.assigner = step.teacher.adapter.assigner = "the same"
    return LogitKD(**settings)(step)["cls"]


def kl(p, q):
    return sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_decoupled_parts_equal_a_loop(temperature):
    student, teacher, labels = rows(1), rows(2), torch.tensor([0, 1, 2, 3, 0, 1, 3])
    target, others = decoupled_kl(student, teacher, labels, temperature)
    for i, label in enumerate(labels.tolist()):
        p, q = ([math.exp(x / temperature) for x in logits[i].tolist()] for logits in (student, teacher))
        hits = [x[label] / sum(x) for x in (p, q)]
        rest = [[v / (sum(x) - x[label]) for j, v in enumerate(x) if j != label] for x in (p, q)]
        expected = kl([hits[0], 1 - hits[0]], [hits[1], 1 - hits[1]])
        assert target[i].item() == pytest.approx(temperature**2 * expected, rel=1e-4)
        assert others[i].item() == pytest.approx(temperature**2 * kl(*rest), rel=1e-4)


def test_the_decoupled_term_weighs_its_parts_and_averages_over_priors():
    student, teacher = softmax_predictions(1), softmax_predictions(2)
    labels = torch.randint(CLASSES + 1, student.logits.shape[:2], generator=torch.Generator().manual_seed(0))
    settings = {"weight": 3.0, "temperature": 2.0, "target_weight": 2.0, "others_weight": 0.5}
    found = distil(student, teacher, labels, kind="dkd", **settings)
    total = 0.0
    for i, label in enumerate(labels.flatten().tolist()):
        p, q = ([math.exp(v / 2) for v in x.logits.flatten(0, 1)[i].tolist()] for x in (student, teacher))
        hits = [x[label] / sum(x) for x in (p, q)]
        rest = [[v / (sum(x) - x[label]) for j, v in enumerate(x) if j != label] for x in (p, q)]
        total += 4 * (2 * kl([hits[0], 1 - hits[0]], [hits[1], 1 - hits[1]]) + 0.5 * kl(*rest))
    assert found.item() == pytest.approx(3 * total / labels.numel(), rel=1e-4)


@pytest.mark.parametrize("kind", ["kd", "dist"])
def test_the_weight_is_a_factor(kind):
    student, teacher = softmax_predictions(1), softmax_predictions(2)
    labels = torch.zeros(student.logits.shape[:2], dtype=torch.int64)
    once, thrice = (distil(student, teacher, labels, kind=kind, weight=w) for w in (1.0, 3.0))
    torch.testing.assert_close(thrice, 3 * once)


def test_relations_equal_a_loop():
    student, teacher = rows(1), rows(2)
    p, q = student.softmax(1).tolist(), teacher.softmax(1).tolist()

    def pearson(a, b):
        return torch.corrcoef(torch.tensor([a, b], dtype=torch.float64))[0, 1].item()

    inter = sum(1 - pearson(a, b) for a, b in zip(p, q, strict=True)) / len(p)
    columns = list(zip(zip(*p, strict=True), zip(*q, strict=True), strict=True))
    intra = sum(1 - pearson(a, b) for a, b in columns) / len(columns)
    assert dist_loss(student, teacher, 1.0, 2.0, 3.0).item() == pytest.approx(2 * inter + 3 * intra, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_background_counts_where_it_is_a_class_and_ignored_priors_do_not(kind):
    student, teacher = softmax_predictions(1), softmax_predictions(2)
    labels = torch.full(student.logits.shape[:2], CLASSES)
    labels[0, 3] = 1
    weights = torch.zeros(labels.shape)
    weights[0, :5] = 1
    found = distil(student, teacher, labels, weights=weights, kind=kind)
    changed = replace(teacher, logits=teacher.logits.detach().clone())
    changed.logits[0, 5:] += 1.5 * rows(3, changed.logits.shape[1] - 5).float()
    assert distil(student, changed, labels, weights=weights, kind=kind) == found
    changed.logits[0, 4] += rows(3)[0].float()  # background
    assert distil(student, changed, labels, weights=weights, kind=kind) != found


def test_sigmoid_scores_are_compared_at_positives_alone():
    student, teacher = predictions(2, seed=1), predictions(2, seed=2)
    labels = torch.full(student.logits.shape[:2], CLASSES)
    labels[0, 3] = labels[1, 4] = 1
    loss = distil(student, teacher, labels, specs=(spec(), spec()))
    p, q = (torch.stack([x.logits[0, 3], x.logits[1, 4]]).softmax(-1) for x in (student, teacher))
    torch.testing.assert_close(loss, (q * (q / p).log()).sum() / 2)
    loss.backward()
    assert set(student.logits.grad.abs().sum(-1).nonzero()[:, 1].tolist()) == {3, 4}
    assert teacher.logits.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_minimum_empty_and_constant(kind):
    student = softmax_predictions(1)
    labels = torch.full(student.logits.shape[:2], CLASSES)
    twin = replace(student, logits=student.logits.detach())
    assert distil(student, twin, labels, kind=kind).item() == pytest.approx(0, abs=1e-5)
    nothing = distil(student, softmax_predictions(2), labels, weights=torch.zeros(labels.shape), kind=kind)
    assert nothing.item() == 0
    constant = replace(student, logits=torch.zeros_like(student.logits).requires_grad_())
    loss = distil(constant, softmax_predictions(2), labels, kind=kind)
    loss.backward()
    assert loss.isfinite()
    assert constant.logits.grad.isfinite().all()
    coarse = replace(student, logits=student.logits.detach().bfloat16())
    assert distil(coarse, twin, labels, kind=kind).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"strides": (16, 32)}, "strides"),
        ({"priors": PriorKind.PROPOSALS}, "proposals"),
        ({"activation": "softmax"}, "softmax"),
    ],
)
def test_refusals(change, reason):
    assert LogitKD().refuses(spec(), spec()) is None
    assert reason in LogitKD().refuses(spec(**change), spec())
    for kind, classes in (("kd", 1), ("dist", 1), ("dkd", 2)):
        refusal = LogitKD(kind=kind).refuses(spec(num_classes=classes), spec(num_classes=classes))
        assert f"classes, and the detectors have {classes}. Use Mimic or BCKD" in refusal
    with pytest.raises(KDError, match="must be 'kd' or 'dkd' or 'dist'"):
        LogitKD(kind="tkd")


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_between_detectors(batch, kind):
    student = tiny_atss(seed=2)
    losses = Distiller(tiny_gfl(seed=1), student, [LogitKD(kind=kind)])(*batch)
    losses["logitkd/cls"].backward()
    assert losses["logitkd/cls"] > 0
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())
    with pytest.raises(IncompatibleError, match="LogitKD"):
        Distiller(tiny_gfl(seed=1, strides=(8, 16, 32, 64)), student, [LogitKD(kind=kind)])


def test_scores_that_do_not_vary_have_no_steep_gradient():
    teacher = torch.randn(5, 4)
    for student in (torch.zeros(5, 4), torch.randn(4).expand(5, 4)):
        leaf = student.clone().requires_grad_()
        dist_loss(leaf, teacher, 1.0).backward()
        assert leaf.grad.abs().max() < 10
