import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdtoolkit.methods.pkd import PKD, pkd_loss
from tests.methods._views import batch, exchange, maps, spec


def naive(student, teacher):
    total = 0.0
    for channel in range(student.shape[1]):
        s, t = student[:, channel].flatten().double(), teacher[:, channel].flatten().double()
        total += 1 - torch.corrcoef(torch.stack([s, t]))[0, 1].item()
    n = student[:, 0].numel()
    return total / student.shape[1] * (n - 1) / n  # the loss divides by n, the correlation by n - 1


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(2, 6), st.integers(2, 6), st.integers(0, 10_000))
def test_equals_one_minus_pearson(n, c, h, w, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, n, c, h, w, generator=generator).unbind()
    assert pkd_loss(student, teacher).item() == pytest.approx(naive(student, teacher), rel=1e-4, abs=1e-5)


def test_scale_and_offset_do_not_matter():
    x = torch.randn(2, 3, 6, 5)
    assert pkd_loss(x, 4 * x - 2).item() == pytest.approx(0, abs=1e-6)
    assert pkd_loss(x, -x).item() == pytest.approx(2, rel=0.02)


def test_no_gradient_reaches_the_teacher():
    student, teacher = (torch.randn(2, 3, 6, 5, requires_grad=True) for _ in range(2))
    pkd_loss(student, teacher).backward()
    assert student.grad.any()
    assert teacher.grad is None


@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (2, 2, 4, 4)])
def test_constant_features_and_single_cells_have_finite_gradients(shape):
    student = torch.zeros(shape, requires_grad=True)
    loss = pkd_loss(student, torch.randn(shape))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_unequal_sizes_are_compared_at_the_larger():
    small, large = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 8, 8)
    upsampled = torch.nn.functional.interpolate(small, size=(8, 8), mode="bilinear", align_corners=False)
    assert pkd_loss(small, large) == pkd_loss(upsampled, large)
    assert pkd_loss(large, small) == pkd_loss(large, upsampled)


def test_computes_in_float32():
    student, teacher = torch.randn(2, 2, 3, 16, 16).bfloat16().unbind()
    assert pkd_loss(student, teacher).dtype == torch.float32
    assert pkd_loss(student, teacher) == pkd_loss(student.float(), teacher.float())


def test_levels_are_projected_where_channels_differ_weighted_and_summed():
    specs = spec(channels=(3, 4)), spec(channels=(4, 4))
    student, teacher = (maps(2, 3)[0], maps(2, 4, seed=1)[1]), maps(2, seed=2)
    method = PKD(weight=5.0)
    method.setup(*specs)
    found = method(exchange(batch([], []), features=(student, teacher), specs=specs))
    projected = torch.nn.functional.conv2d(student[0], method.align[0].weight, method.align[0].bias)
    expected = 5 * (naive(projected, teacher[0]) + naive(student[1], teacher[1]))
    assert found["feature"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections_compute_in_float32(dtype):
    specs = spec(channels=(3, 4)), spec(channels=(4, 4))
    student, teacher = (maps(2, 3, dtype=dtype)[0], maps(2, 4, seed=1, dtype=dtype)[1]), maps(2, seed=2)
    method = PKD()
    method.setup(*specs)
    step = exchange(batch([], []), features=(student, teacher), specs=specs)
    plain = method(step)["feature"]
    with torch.autocast("cpu", torch.bfloat16):
        assert method(step)["feature"] == plain


@pytest.mark.parametrize("value", [0.0, 0.7, 1e3])
def test_a_channel_that_does_not_vary_says_nothing_and_gets_no_gradient(value):
    student, teacher = torch.randn(2, 2, 3, 8, 6).unbind()
    student[:, 1] = value
    student.requires_grad_()
    loss = pkd_loss(student, teacher)
    loss.backward()
    n = student[:, 0].numel()
    varying = naive(student.detach()[:, ::2], teacher[:, ::2]) * 2 / 3
    assert loss.item() == pytest.approx(varying + (n - 1) / n / 6, rel=1e-4)  # of the other: the teacher's variance / 2
    assert (student.grad[:, 1] == 0).all()
    assert 0 < student.grad.abs().max() < 1
