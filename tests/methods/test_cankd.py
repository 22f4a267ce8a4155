import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdtoolkit import Distiller
from kdtoolkit.methods.cankd import CanKD, CrossAttention, cankd_loss
from tests.conftest import DENSE, tiny_gfl
from tests.methods._views import GRID, batch, exchange, maps, spec

BATCH = batch([], [])


def ready(method, student=None, teacher=None, learnt=True):
    """Set up; `learnt` moves the blocks from their start, at which they add nothing."""
    torch.manual_seed(0)
    method.setup(student or spec(), teacher or spec())
    if learnt:
        for block in method.attention:
            nn.init.normal_(block.scale)
    return method


def naive_attention(block, student, teacher):
    """As published: the affinities of all cells of the student with all pooled cells of the teacher."""
    n, _, height, width = student.shape
    keys, values = (F.max_pool2d(layer(teacher), 2).flatten(2) for layer in (block.phi, block.g))
    queries = block.theta(student).flatten(2)
    found = torch.zeros(n, values.shape[1], height * width)
    for i in range(n):
        for q in range(height * width):
            for p in range(keys.shape[2]):
                found[i, :, q] += (queries[i, :, q] @ keys[i, :, p]) * values[i, :, p] / keys.shape[2]
    added = block.out(found.view(n, -1, height, width))
    norm = nn.BatchNorm2d(student.shape[1])
    norm.weight.data = block.scale.data.flatten()
    return student + norm(added)


def naive_loss(student, teacher):
    """Instance normalisation image by image and channel by channel, in float64."""
    total = 0.0
    for s, t in zip(student.double().flatten(0, 1), teacher.double().flatten(0, 1), strict=True):
        s, t = ((x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() for x in (s, t))
        total += (s - t).square().mean().item()
    return total / len(student) / student.shape[1]


def test_equals_a_loop():
    student, teacher = maps(2, seed=1), maps(2, seed=2)
    method = ready(CanKD(weight=3))
    terms = method(exchange(BATCH, features=(student, teacher)))
    expected = 0.0
    with torch.no_grad():
        for block, s, t in zip(method.attention, student, teacher, strict=True):
            expected += naive_loss(naive_attention(block, s, t), t)
    assert tuple(terms) == CanKD.terms
    assert terms["feature"].item() == pytest.approx(3 * expected, rel=1e-5)


def test_attention_equals_a_loop_on_odd_maps():
    torch.manual_seed(0)
    block = CrossAttention(6)
    nn.init.normal_(block.scale)
    student, teacher = torch.randn(2, 3, 6, 5, 7).unbind()
    torch.testing.assert_close(block(student, teacher), naive_attention(block, student, teacher), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(block(student, teacher), student)


def test_a_fresh_block_adds_nothing_and_can_learn():
    block, x, y = CrossAttention(4), torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    assert torch.equal(block(x, y), x)
    (block(x, y) - y).square().sum().backward()
    assert block.scale.grad.abs().sum() > 0


def test_equal_features_cost_nothing_at_first():
    features = maps(2)
    assert ready(CanKD(), learnt=False)(exchange(BATCH, features=(features, features)))["feature"] == 0


def test_scale_and_offset_of_channels_do_not_matter():
    x = torch.randn(2, 3, 6, 5)
    assert cankd_loss(x, 7 * x - 4).item() == pytest.approx(0, abs=1e-6)


def test_gradient_reaches_the_student_and_the_blocks_alone():
    student, teacher = maps(2, seed=1), maps(2, seed=2)
    method = ready(CanKD())
    method(exchange(BATCH, features=(student, teacher)))["feature"].backward()
    assert all(x.grad.abs().sum() > 0 for x in student)
    assert all(x.grad is None for x in teacher)
    assert all(p.grad is not None and p.grad.any() for p in method.parameters())


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_features_are_finite(value):
    student = tuple(torch.full((1, 4, h, w), value, requires_grad=True) for h, w in GRID)
    terms = ready(CanKD())(exchange(batch([]), features=(student, maps(1))))
    terms["feature"].backward()
    assert torch.isfinite(terms["feature"])
    assert all(torch.isfinite(x.grad).all() for x in student)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 1)])
def test_levels_of_a_single_cell_row_or_column(size):
    student, teacher = (tuple(torch.randn(1, 4, *size, requires_grad=True) for _ in GRID) for _ in range(2))
    loss = ready(CanKD())(exchange(batch([]), features=(student, teacher)))["feature"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(x.grad).all() for x in student)


def test_half_precision_is_computed_in_float32():
    student, teacher = (maps(2, seed=s, dtype=torch.bfloat16) for s in (1, 2))
    method = ready(CanKD())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = method(exchange(BATCH, features=(student, teacher)))["feature"]
    full = method(exchange(BATCH, features=[[x.float() for x in side] for side in (student, teacher)]))["feature"]
    assert half.dtype == torch.float32
    assert half == full


def test_other_channels_sizes_and_strides():
    method = ready(CanKD(), spec(channels=(3, 4)))
    student = (torch.randn(2, 3, 5, 5), torch.randn(2, 4, 4, 3))
    assert torch.isfinite(method(exchange(BATCH, features=(student, maps(2))))["feature"])
    assert "no stride in common" in CanKD().refuses(spec(), spec(strides=(32, 64)))
    assert ready(CanKD(), spec(strides=(4, 8)), spec()).levels == [(1, 0)]


@pytest.mark.parametrize("detector", DENSE)
def test_a_step_on_detectors(detector, batch):
    images, targets = batch
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in targets]
    student = tiny_gfl(seed=2)
    losses = Distiller(detector(seed=1), student, [CanKD()])(images, empty)
    losses.total.backward()
    assert losses["cankd/feature"] > 0
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)
