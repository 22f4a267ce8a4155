import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdtoolkit.methods.fbkd import FBKD, NonLocal, spatial_attention
from tests.methods._views import batch, exchange, maps, spec

BATCH = batch([], [])


def ready(method, student=None):
    torch.manual_seed(0)
    method.setup(student or spec(), spec())
    return method


def make_identity(connector):
    """Projections that change nothing, so that equal maps are adapted to equal maps."""
    for module in (connector.feature, connector.relation):
        nn.init.dirac_(module.weight)
        nn.init.zeros_(module.bias)
    nn.init.eye_(connector.channel.weight)
    nn.init.zeros_(connector.channel.bias)
    nn.init.dirac_(connector.spatial.weight)
    nn.init.zeros_(connector.spatial.bias)


def test_terms_against_loops():
    student, teacher = maps(2, seed=1), maps(2, seed=2)
    method = ready(FBKD(feature_weight=2.0, channel_weight=3.0, spatial_weight=5.0, relation_weight=7.0))
    ours = method(exchange(BATCH, features=(student, teacher)))
    expected = dict.fromkeys(FBKD.terms, 0.0)
    for s, t, connector in zip(student, teacher, method.connectors, strict=True):
        n, _, height, width = s.shape
        cells = height * width
        attended = 0.0
        for i in range(n):
            attention = torch.zeros(cells)
            for x in (s, t):
                activity = x[i].abs().sum(0).flatten() / x.shape[1] / 0.5
                attention += cells * activity.exp() / activity.exp().sum() / 2
            for row in range(height):
                for column in range(width):
                    adapted = F.linear(s[i, :, row, column], connector.feature.weight[:, :, 0, 0])
                    difference = adapted + connector.feature.bias - t[i, :, row, column]
                    attended += attention[row * width + column] * difference.square().sum()
        channel = F.linear(s.mean((2, 3)), connector.channel.weight, connector.channel.bias) - t.mean((2, 3))
        spatial = F.conv2d(s.mean(1)[:, None], connector.spatial.weight, connector.spatial.bias, padding=1)
        relation = connector.relation(s) - t  # at first the non-local blocks are the identity
        expected["feature"] += 2 * attended.sqrt()
        expected["channel"] += 3 * channel.square().sum().sqrt()
        expected["spatial"] += 5 * (spatial - t.mean(1)[:, None]).square().sum().sqrt()
        expected["relation"] += 7 * relation.square().sum().sqrt()
    for name in FBKD.terms:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", [2, 16])  # 16: one key for the whole map
def test_non_local_block_against_a_loop(pool):
    torch.manual_seed(0)
    block, x = NonLocal(8, pool, 4), torch.randn(2, 8, 5, 6)
    nn.init.normal_(block.scale)
    nn.init.normal_(block.shift)
    query, key, value = (conv(x) for conv in (block.query, block.key, block.value))
    gathered = torch.zeros(2, 2, 5, 6)
    height, width = min(pool, 5), min(pool, 6)
    windows = [
        (slice(top, top + height), slice(left, left + width))
        for top in range(0, 5 - height + 1, height)
        for left in range(0, 6 - width + 1, width)
    ]
    for i in range(2):
        for row in range(5):
            for column in range(6):
                for w in windows:
                    similarity = query[i, :, row, column] @ key[i, :, *w].amax((1, 2)) / len(windows)
                    gathered[i, :, row, column] += similarity * value[i, :, *w].amax((1, 2))
    out = block.out(gathered)
    normed = F.batch_norm(out, None, None, block.scale.flatten(), block.shift.flatten(), training=True)
    torch.testing.assert_close(block(x), x + normed, rtol=1e-4, atol=1e-4)


def test_attention_is_1_on_average_and_highest_where_activity_is():
    x = torch.zeros(2, 3, 4, 5)
    x[:, 1, 2, 3] = -4
    attention = spatial_attention(x, 0.5)
    torch.testing.assert_close(attention.mean((1, 2, 3)), torch.ones(2))
    assert (attention.flatten(1).argmax(1) == 2 * 5 + 3).all()


def test_equal_maps_cost_nothing_and_have_a_finite_gradient():
    student = maps(2, seed=1)
    teacher = tuple(x.detach().clone() for x in student)
    method = ready(FBKD())
    for connector in method.connectors:
        make_identity(connector)
    terms = method(exchange(BATCH, features=(student, teacher)))
    assert all(term == 0 for term in terms.values())
    sum(terms.values()).backward()
    for x in (*student, *method.parameters()):
        assert x.grad is None or torch.isfinite(x.grad).all()
    moved = method(exchange(BATCH, features=([x + 0.1 for x in student], teacher)))
    assert all(term > 0 for term in moved.values())


def test_gradient_reaches_the_student_and_the_connectors_alone():
    student, teacher = maps(2, seed=1), maps(2, seed=2)
    method = ready(FBKD())
    for connector in method.connectors:
        for block in (connector.student_relation, connector.teacher_relation):
            nn.init.ones_(block.scale)  # at 0, as at first, it is all that learns of its block
    sum(method(exchange(BATCH, features=(student, teacher))).values()).backward()
    assert all(x.grad.abs().sum() > 0 for x in student)
    assert all(p.grad.abs().sum() > 0 for p in method.parameters())
    assert all(x.grad is None for x in teacher)


def test_half_precision_is_computed_in_float32():
    student, teacher = (maps(2, seed=s, dtype=torch.bfloat16) for s in (1, 2))
    method = ready(FBKD())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = method(exchange(BATCH, features=(student, teacher)))
    full = method(exchange(BATCH, features=[[x.float() for x in side] for side in (student, teacher)]))
    assert all(half[name].dtype == torch.float32 and half[name] == full[name] for name in FBKD.terms)


def test_projects_and_resizes_down_to_a_single_cell():
    method = ready(FBKD(), spec(channels=(3, 6)))
    student = (torch.randn(1, 3, 5, 5, requires_grad=True), torch.randn(1, 6, 1, 1, requires_grad=True))
    teacher = (torch.randn(1, 4, 8, 6), torch.randn(1, 4, 1, 1))
    terms = method(exchange(BATCH, features=(student, teacher)))
    sum(terms.values()).backward()
    assert all(torch.isfinite(term) for term in terms.values())
    assert all(torch.isfinite(x.grad).all() for x in student)
