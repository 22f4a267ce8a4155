import math

import pytest
import torch

from kdtoolkit import Distiller, IncompatibleError
from kdtoolkit.methods.detkds import DetKDS, detkds_loss, normalise_over_images, pool, weigh_channels
from tests.conftest import DENSE, tiny_gfl
from tests.methods._views import GRID, batch, exchange, maps, spec

BATCH = batch([], [])


def ready(method, student=None, teacher=None):
    torch.manual_seed(0)
    method.setup(student or spec(), teacher or spec())
    return method


def naive_chain(x, temperature):
    """Value by value, in float64: {(image, channel, row, column of the pooled map): value}."""
    x = x.detach().double()
    n, c, height, width = x.shape
    pooled = {}
    for i in range(n):
        strengths = [math.exp(x[i, k].abs().mean().item() / temperature) for k in range(c)]
        for k in range(c):
            factor = math.sqrt(c * strengths[k] / sum(strengths))
            for y in range(0, height, 2):
                for z in range(0, width, 2):
                    cells = [(y + dy, z + dz) for dy in (0, 1) for dz in (0, 1)]
                    values = [x[i, k, a, b].item() * factor if a < height and b < width else 0.0 for a, b in cells]
                    pooled[i, k, y, z] = max(values)
    norms = {}
    for (_, *place), value in pooled.items():
        norms[tuple(place)] = norms.get(tuple(place), 0.0) + value**2
    return {key: value / max(math.sqrt(norms[key[1:]]), 1e-6) for key, value in pooled.items()}


def naive(student, teacher, temperature):
    ours, theirs = naive_chain(student, temperature), naive_chain(teacher, temperature)
    return sum(abs(ours[key] - theirs[key]) for key in ours) / len(ours)


@pytest.mark.parametrize("size", [(6, 4), (5, 7), (1, 1)])
def test_loss_equals_a_loop(size):
    student, teacher = torch.randn(2, 3, 4, *size, generator=torch.Generator().manual_seed(0)).unbind()
    assert detkds_loss(student, teacher, 0.7).item() == pytest.approx(naive(student, teacher, 0.7), rel=1e-5)


def test_term_is_a_weighted_sum_over_levels():
    student, teacher = maps(2, seed=1), maps(2, seed=2)
    terms = ready(DetKDS(weight=4, temperature=0.3))(exchange(BATCH, features=(student, teacher)))
    expected = 4 * sum(naive(s, t, 0.3) for s, t in zip(student, teacher, strict=True))
    assert tuple(terms) == DetKDS.terms
    assert terms["feature"].item() == pytest.approx(expected, rel=1e-5)


def test_steps_of_the_chain():
    x = torch.randn(3, 5, 7, 4, generator=torch.Generator().manual_seed(0))
    factors = (weigh_channels(x) / x)[:, :, 0, 0]
    torch.testing.assert_close(factors.square().mean(1), torch.ones(3))  # attention has mean 1
    assert pool(-x.abs()).shape == (3, 5, 4, 2)
    assert pool(-x.abs())[:, :, 3].max() == 0  # filled up with 0
    torch.testing.assert_close(normalise_over_images(x).square().sum(0), torch.ones(5, 7, 4))


def test_equal_features_cost_nothing():
    features = maps(2)
    assert ready(DetKDS())(exchange(BATCH, features=(features, features)))["feature"] == 0


def test_gradient_reaches_the_student_alone():
    student, teacher = maps(2, seed=1), maps(2, seed=2)
    ready(DetKDS())(exchange(BATCH, features=(student, teacher)))["feature"].backward()
    assert all(x.grad.abs().sum() > 0 for x in student)
    assert all(x.grad is None for x in teacher)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_features_have_moderate_gradients(value):
    student = tuple(torch.full((2, 4, h, w), value, requires_grad=True) for h, w in GRID)
    loss = ready(DetKDS())(exchange(BATCH, features=(student, maps(2))))["feature"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(x.grad.abs().max() < 1e6 for x in student)


def test_values_that_are_0_in_all_images_get_no_gradient():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 6, 16, 12, generator=generator).relu().unbind()  # as SSD's levels
    student[:, 0] = 0.0
    student.requires_grad_()
    loss = detkds_loss(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(naive(student, teacher, 0.5), rel=1e-5)
    dead = pool(student.detach()).amax(0) == 0
    assert 0.1 < dead.float().mean() < 0.9
    assert (student.grad.abs().amax(0) * dead.repeat_interleave(2, 1).repeat_interleave(2, 2) == 0).all()
    assert 0 < student.grad.norm() < 1


def test_attention_that_underflows_has_a_gradient():
    student = torch.randn(2, 4, 6, 6)
    student[:, 0] *= 1e4
    student.requires_grad_()
    detkds_loss(student, torch.randn(2, 4, 6, 6)).backward()
    assert torch.isfinite(student.grad).all()


def test_a_batch_of_one_image_has_nothing_to_compare():
    student, teacher = maps(1, seed=1), maps(1, seed=2)
    with pytest.raises(IncompatibleError, match="batches of two or more"):
        ready(DetKDS())(exchange(batch([]), features=(student, teacher)))


def test_levels_of_one_cell_are_finite():
    student, teacher = (tuple(torch.randn(2, 4, 1, 1, requires_grad=True) for _ in GRID) for _ in range(2))
    loss = ready(DetKDS())(exchange(BATCH, features=(student, teacher)))["feature"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(x.grad).all() for x in student)


def test_half_precision_is_computed_in_float32():
    student, teacher = (maps(2, seed=s, dtype=torch.bfloat16) for s in (1, 2))
    method = ready(DetKDS())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = method(exchange(BATCH, features=(student, teacher)))["feature"]
    full = method(exchange(BATCH, features=[[x.float() for x in side] for side in (student, teacher)]))["feature"]
    assert half.dtype == torch.float32
    assert half == full


def test_other_channels_sizes_and_strides():
    method = ready(DetKDS(), spec(channels=(3, 4)))
    student = (torch.randn(2, 3, 5, 5), torch.randn(2, 4, 4, 3))
    assert torch.isfinite(method(exchange(BATCH, features=(student, maps(2))))["feature"])
    assert "no stride in common" in DetKDS().refuses(spec(), spec(strides=(32, 64)))
    assert ready(DetKDS(), spec(strides=(4, 8)), spec()).levels == [(1, 0)]


@pytest.mark.parametrize("detector", DENSE)
def test_a_step_on_detectors(detector, batch):
    images, targets = batch
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in targets]
    student = tiny_gfl(seed=2)
    losses = Distiller(detector(seed=1), student, [DetKDS()])(images, empty)
    losses.total.backward()
    assert losses["detkds/feature"] > 0
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)
