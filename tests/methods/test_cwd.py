import math
from dataclasses import replace

import pytest
import torch

from kdtoolkit import Distiller
from kdtoolkit.contract import PriorKind
from kdtoolkit.methods.cwd import CWD, cwd_loss, logit_maps
from tests.conftest import tiny_atss, tiny_gfl
from tests.methods._views import GRID, exchange, maps, predictions, spec
from tests.methods._views import batch as view_batch

BATCH = view_batch([], [])


def naive(student, teacher, temperature):
    """Channel by channel and cell by cell, in float64."""
    total = 0.0
    for s, t in zip(student.flatten(0, 1).flatten(1), teacher.flatten(0, 1).flatten(1), strict=True):
        s, t = ([math.exp(x / temperature) for x in channel.double().tolist()] for channel in (s, t))
        total += sum(b / sum(t) * math.log((b / sum(t)) / (a / sum(s))) for a, b in zip(s, t, strict=True))
    return temperature**2 * total / (student.shape[0] * student.shape[1])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equals_a_loop(temperature):
    student, teacher = maps(2, seed=1), maps(2, seed=2)
    method = CWD(weight=3, temperature=temperature)
    method.setup(spec(), spec())
    terms = method(exchange(BATCH, features=(student, teacher)))
    expected = 3 * sum(naive(s, t, temperature) for s, t in zip(student, teacher, strict=True))
    assert tuple(terms) == CWD.terms
    assert terms["feature"].item() == pytest.approx(expected, rel=1e-5)


def test_gradient_reaches_the_student_alone():
    student, teacher = maps(2, seed=1), maps(2, seed=2)
    method = CWD()
    method.setup(spec(), spec())
    method(exchange(BATCH, features=(student, teacher)))["feature"].backward()
    assert all(x.grad.abs().sum() > 0 for x in student)
    assert all(x.grad is None for x in teacher)


def test_an_offset_of_a_channel_costs_nothing():
    x = torch.randn(2, 3, 5, 5)
    assert cwd_loss(x + torch.randn(2, 3, 1, 1), x).item() == pytest.approx(0, abs=1e-6)


def test_computes_in_float32():
    student, teacher = torch.randn(2, 1, 3, 5, 5).bfloat16().unbind()
    assert cwd_loss(student, teacher).equal(cwd_loss(student.float(), teacher.float()))


def test_projects_and_resizes():
    method = CWD()
    method.setup(spec(channels=(3, 4)), spec())
    student = (torch.randn(2, 3, 5, 5), torch.randn(2, 4, 4, 3))
    assert torch.isfinite(method(exchange(BATCH, features=(student, maps(2))))["feature"])


def test_maps_of_logits_have_a_channel_for_each_class_and_prior_of_a_cell():
    given = predictions(2, seed=1)
    fine, coarse = logit_maps(given)
    (height, width), (other_height, other_width) = GRID
    assert (fine.shape[2:], coarse.shape[2:]) == ((height, width), (other_height, other_width))
    assert torch.equal(fine[1, :, 2, 3], given.logits[1, 2 * width + 3])
    assert torch.equal(coarse[0, :, 1, 0], given.logits[0, height * width + other_width])


def test_logits_are_imitated_as_maps(batch):
    student = tiny_atss(seed=2)
    losses = Distiller(tiny_gfl(seed=1), student, [CWD(on="logits")])(*batch)
    losses["cwd/feature"].backward()
    assert losses["cwd/feature"] > 0
    assert student.predictors["cls"].weight.grad.abs().sum() > 0
    twin = tiny_gfl(seed=1).eval()
    assert Distiller(tiny_gfl(seed=1), twin, [CWD(on="logits")]).eval()(*batch)["cwd/feature"].abs() < 1e-5
    assert "1 prior a cell, the teacher 9 priors" in CWD(on="logits").refuses(spec(), spec(priors_per_cell=(9, 9)))
    assert "grid" in CWD(on="logits").refuses(spec(priors=PriorKind.QUERIES), spec())


def test_one_class_has_a_distribution_over_cells():
    one = spec(num_classes=1)
    heads = [replace(h, logits=h.logits[..., :1]) for h in (predictions(2, seed=1), predictions(2, seed=2))]
    method = CWD(on="logits")
    assert method.refuses(one, one) is None
    method.setup(one, one)
    assert method(exchange(BATCH, heads=heads, specs=(one, one)))["feature"] > 0
