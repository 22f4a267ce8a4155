import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence

from kdtoolkit.methods import fgd
from kdtoolkit.methods.fgd import (
    FGD,
    ContextBlock,
    cells_of_content,
    channel_attention,
    focal_losses,
    region_masks,
    spatial_attention,
)
from tests.methods._views import batch, exchange, maps, spec


def naive_masks(boxes, sizes, height, width):
    """One box after the other, one cell after the other."""
    foreground = torch.zeros(len(boxes), height, width)
    for image, (h, w) in enumerate(sizes):
        for x1, y1, x2, y2 in boxes[image].tolist():
            left, right = math.floor(x1 / w * width), math.ceil(x2 / w * width)
            top, bottom = math.floor(y1 / h * height), math.ceil(y2 / h * height)
            weight = 1 / ((bottom + 1 - top) * (right + 1 - left))
            for y in range(top, min(bottom, height - 1) + 1):
                for x in range(left, min(right, width - 1) + 1):
                    foreground[image, y, x] = max(foreground[image, y, x].item(), weight)
    background = (foreground == 0).float()
    for image in background:
        if image.sum() > 0:
            image /= image.sum()
    return foreground, background


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 10_000)
)
def test_masks_equal_a_loop_over_boxes_and_cells(counts, height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(64, 96), (50, 70), (33, 40)][: len(counts)]
    boxes = []
    for count, (h, w) in zip(counts, sizes, strict=True):
        # Quarters of pixels, so that float32 and float64 fall on one side of a cell's border.
        corners = (torch.rand(count, 2, 2, generator=generator) * torch.tensor([w, h]) * 4).round() / 4
        low, high = corners.amin(1), corners.amax(1)
        boxes.append(torch.cat([low, high], 1))
    padded = pad_sequence(boxes, batch_first=True, padding_value=torch.nan)
    ours = region_masks(cells_of_content(padded, sizes, height, width), height, width)
    naive = naive_masks(boxes, sizes, height, width)
    agree = torch.isclose(ours[0], naive[0], rtol=1e-5)
    if agree.all():
        torch.testing.assert_close(ours[1], naive[1])
    else:  # x / w * W can round to either side of an integer: such boxes may differ by one row or column
        assert all(_near_a_border(box, size, height, width) for box, size in _boxes_with_sizes(boxes, sizes, agree))


def _boxes_with_sizes(boxes, sizes, agree):
    for image in range(len(boxes)):
        if not agree[image].all():
            yield boxes[image], sizes[image]


def _near_a_border(boxes, size, height, width):
    cells = boxes.double() / torch.tensor([size[1], size[0]] * 2) * torch.tensor([width, height] * 2)
    return ((cells - cells.round()).abs() < 1e-5).any()


@pytest.mark.parametrize(("stride", "height", "width"), [(8, 8, 6), (16, 4, 3), (32, 2, 2)])
def test_masks_lie_where_the_boxes_are_on_padded_images(stride, height, width):
    seen = batch([[4, 4, 30, 40]], [[10, 12, 24, 30]])  # the second image fills 40 x 30 of 64 x 48
    ((foreground, _),) = FGD().masks(seen, {stride: (height, width)})
    for mask, ((x1, y1, x2, y2),) in zip(foreground, (b.tolist() for b in seen.boxes), strict=True):
        rows, columns = mask.any(1).nonzero() * stride, mask.any(0).nonzero() * stride
        assert rows.min() <= y1 < rows.min() + stride
        assert columns.min() <= x1 < columns.min() + stride
        # The published rule takes in the cell behind the last as well.
        assert y2 - stride <= rows.max() < y2 + stride
        assert x2 - stride <= columns.max() < x2 + stride


def test_published_masks_differ_on_padded_images_alone():
    seen, published = batch([[4, 4, 30, 40]], [[10, 12, 24, 30]]), FGD(published_masks=True)
    (own,), (found,) = (method.masks(seen, {8: (8, 6)}) for method in (FGD(), published))
    for ours, theirs in zip(own, found, strict=True):
        torch.testing.assert_close(ours[0], theirs[0])
        assert not torch.equal(ours[1], theirs[1])
    naive = naive_masks(seen.boxes, seen.sizes, 8, 6)
    for theirs, expected in zip(found, naive, strict=True):
        torch.testing.assert_close(theirs, expected)


def naive_focal(student, teacher, foreground, background, temperature):
    """Cell by cell and channel by channel, in float64."""
    student, teacher = student.detach().double(), teacher.detach().double()
    n, c, h, w = student.shape
    fg = bg = attention = 0.0
    for i in range(n):
        maps = []
        for x in (student[i], teacher[i]):
            cells = [math.exp(x[:, y, k].abs().mean() / temperature) for y in range(h) for k in range(w)]
            channels = [math.exp(x[k].abs().mean() / temperature) for k in range(c)]
            maps.append(([h * w * v / sum(cells) for v in cells], [c * v / sum(channels) for v in channels]))
        (s_cells, s_channels), (t_cells, t_channels) = maps
        attention += sum(abs(a - b) for a, b in zip(s_cells + s_channels, t_cells + t_channels, strict=True))
        for k in range(c):
            for y in range(h):
                for x in range(w):
                    value = (student[i, k, y, x] - teacher[i, k, y, x]).item() ** 2 * t_cells[y * w + x] * t_channels[k]
                    fg += value * foreground[i, y, x].item()
                    bg += value * background[i, y, x].item()
    return fg / n, bg / n, attention / n


def test_focal_terms_equal_a_loop():
    (student, _), (teacher, _) = maps(2, seed=1), maps(2, seed=2)
    masks = torch.rand(2, 2, 8, 6).unbind()
    ours = focal_losses(student, teacher, *masks, 0.7)
    assert [x.item() for x in ours] == pytest.approx(naive_focal(student, teacher, *masks, 0.7), rel=1e-5)


def test_attention_has_mean_one():
    x = torch.randn(3, 5, 7, 4) * 3
    torch.testing.assert_close(spatial_attention(x).mean((1, 2)), torch.ones(3))
    torch.testing.assert_close(channel_attention(x).mean(1), torch.ones(3))


def test_a_fresh_context_block_is_the_identity_and_can_learn():
    block, x = ContextBlock(4), torch.randn(2, 4, 3, 5)
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    assert block.add[3].weight.grad.abs().sum() > 0


def ready(method, student=None, teacher=None):
    torch.manual_seed(0)
    method.setup(student or spec(), teacher or spec())
    return method


BATCH = batch([[4, 4, 30, 40], [20, 8, 28, 12]], [[2, 2, 20, 18]])


def test_terms_are_weighted_sums_over_levels():
    student, teacher = maps(2, seed=1), maps(2, seed=2)
    method = ready(FGD(temperature=0.7, foreground_weight=2, background_weight=3, attention_weight=5, global_weight=7))
    terms = method(exchange(BATCH, features=(student, teacher)))
    expected = [0.0] * 4
    for s, t in zip(student, teacher, strict=True):
        masks = naive_masks(BATCH.boxes, [(64, 48)] * 2, *t.shape[2:])  # the canvas, padding and all
        values = *naive_focal(s, t, *masks, 0.7), (s - t).square().sum().item() / 2  # context blocks add nothing yet
        expected = [a + b for a, b in zip(expected, values, strict=True)]
    assert tuple(terms) == FGD.terms
    weighted = [w * x for w, x in zip((2, 3, 5, 7), expected, strict=True)]
    assert [x.item() for x in terms.values()] == pytest.approx(weighted, rel=1e-4)


def test_no_gradient_reaches_the_teacher():
    student, teacher = maps(2, seed=1), maps(2, seed=2)
    method = ready(FGD())
    sum(method(exchange(BATCH, features=(student, teacher))).values()).backward()
    assert all(x.grad.abs().sum() > 0 for x in student)
    assert all(x.grad is None for x in teacher)
    assert all(p.grad is not None for p in method.parameters())


def test_equal_features_cost_nothing():
    features = maps(2)
    assert sum(ready(FGD())(exchange(BATCH, features=(features, features))).values()) == 0


def test_without_any_box_all_is_background():
    student, teacher = maps(2, seed=1), maps(2, seed=2)
    terms = ready(FGD())(exchange(batch([], []), features=(student, teacher)))
    assert terms["foreground"] == 0
    assert all(torch.isfinite(x) for x in terms.values())
    sum(terms.values()).backward()
    assert all(torch.isfinite(x.grad).all() for x in student)


def test_half_precision_is_computed_in_float32():
    student, teacher = (maps(2, seed=s, dtype=torch.bfloat16) for s in (1, 2))
    method = ready(FGD())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = method(exchange(BATCH, features=(student, teacher)))
    full = method(exchange(BATCH, features=[[x.float() for x in side] for side in (student, teacher)]))
    assert {name: x.item() for name, x in half.items()} == {name: x.item() for name, x in full.items()}
    assert all(x.dtype == torch.float32 for x in half.values())


def test_other_channels_and_sizes_are_projected_and_resized():
    method = ready(FGD(), spec(channels=(3, 4)))
    student = (torch.randn(2, 3, 5, 5), torch.randn(2, 4, 4, 3))
    terms = method(exchange(BATCH, features=(student, maps(2))))
    assert all(torch.isfinite(x) for x in terms.values())


def test_levels_are_paired_by_stride():
    assert FGD().refuses(spec(), spec(strides=(32, 64))) is not None
    method = ready(FGD(), spec(strides=(4, 8)), spec())
    assert method.levels == [(1, 0)]


def test_published_settings():
    assert FGD.for_fcos().temperature == 0.8
    assert FGD.for_fcos().weights == (1.6e-3, 8e-4, 8e-4, 8e-6)
    assert FGD.for_faster_rcnn().weights == (5e-5, 2.5e-5, 5e-5, 5e-7)
    assert FGD().weights == (1e-3, 5e-4, 5e-4, 5e-6)


@pytest.mark.parametrize("chunk", [1, 60, 10_000])
def test_gradients_written_by_hand_are_those_of_the_values(monkeypatch, chunk):
    monkeypatch.setattr(fgd, "CHUNK", chunk)
    student, teacher = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.randn(2, 5, 3, 4, dtype=torch.float64)
    mask = torch.randn(5, dtype=torch.float64), torch.randn(1, dtype=torch.float64)

    def compared(student, weight, bias):
        return tuple(x for x in fgd.compare(student, teacher, weight, bias, 0.5) if x.requires_grad)

    assert torch.autograd.gradcheck(compared, [x.requires_grad_() for x in (student, *mask)])
