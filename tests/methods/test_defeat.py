import math

import pytest
import torch

from kdtoolkit import Distiller
from kdtoolkit.methods.defeat import DeFeat, decoupled_losses, levels_of, object_region
from tests.conftest import DENSE, tiny_fcos, tiny_gfl
from tests.methods._views import GRID, STRIDES, batch, exchange, maps, spec

# The first is an object on the finer level, the second on the coarser; the third is less than a cell.
BATCH = batch([[4, 4, 30, 40], [-70, -60, 47, 63]], [[17, 9, 19, 12]])


def ready(method, student=None, teacher=None):
    torch.manual_seed(0)
    method.setup(student or spec(), teacher or spec())
    return method


def naive_region(boxes, level, height, width):
    """Cells of one image and level, box by box."""
    cells = torch.zeros(height, width, dtype=torch.bool)
    for x1, y1, x2, y2 in boxes:
        root = math.sqrt((x2 - x1 + 1) * (y2 - y1 + 1))
        if max(0, min(len(GRID) - 1, math.floor(math.log2(root / 56)))) != level:
            continue
        left, top = max(0, math.floor(x1 / STRIDES[level])), max(0, math.floor(y1 / STRIDES[level]))
        right, bottom = min(width, int(x2 / STRIDES[level])), min(height, int(y2 / STRIDES[level]))
        if left >= right or top >= bottom:
            cells[top, left] = True
        for y in range(top, bottom):
            for x in range(left, right):
                cells[y, x] = True
    return cells


def naive(student, teacher, boxes):
    """Mean over levels of half the mean squared difference, value by value."""
    totals = [0.0, 0.0]
    for level, (height, width) in enumerate(GRID):
        values = ([], [])
        for i, image in enumerate(boxes):
            cells = naive_region(image.tolist(), level, height, width)
            for y in range(height):
                for x in range(width):
                    difference = student[level][i, :, y, x] - teacher[level][i, :, y, x]
                    values[0 if cells[y, x] else 1].extend(difference.double().square().tolist())
        for k in (0, 1):
            totals[k] += sum(values[k]) / max(2 * len(values[k]), 1) / len(GRID)
    return totals


def test_terms_equal_a_loop():
    student, teacher = maps(2, seed=1), maps(2, seed=2)
    terms = ready(DeFeat(object_weight=2, background_weight=5))(exchange(BATCH, features=(student, teacher)))
    inside, outside = naive(student, teacher, BATCH.boxes)
    assert tuple(terms) == DeFeat.terms
    assert terms["object"].item() == pytest.approx(2 * inside, rel=1e-5)
    assert terms["background"].item() == pytest.approx(5 * outside, rel=1e-5)
    assert inside > 0


def test_regions_equal_a_loop():
    regions = DeFeat().regions(BATCH.boxes, STRIDES, range(len(STRIDES)), GRID)
    for level, size in enumerate(GRID):
        for i, boxes in enumerate(BATCH.boxes):
            assert regions[level][i].equal(naive_region(boxes.tolist(), level, *size))
    assert all(region[0].any() for region in regions)
    assert regions[0][1].sum() == 1  # smaller than a cell


def test_a_level_alone_has_the_region_that_it_has_among_all():
    regions = DeFeat().regions(BATCH.boxes, STRIDES, range(len(STRIDES)), GRID)
    (alone,) = DeFeat().regions(BATCH.boxes, STRIDES, [1], GRID[1:])
    assert alone.equal(regions[1])
    step = exchange(BATCH, features=(maps(2, seed=1), maps(2, seed=2)))
    method = DeFeat(object_weight=1).at_strides(STRIDES[1])
    method.setup(*(spec().at_strides(method.strides),) * 2)
    part = step.at_strides(method.strides)
    terms = method(part)
    difference = (part.student.features[0] - part.teacher.features[0]).square().sum(1)
    expected = difference[alone].sum() / (2 * alone.sum() * 4)
    torch.testing.assert_close(terms["object"], expected)


@pytest.mark.parametrize(("side", "level"), [(1, 0), (110, 0), (112, 1), (223, 1), (224, 2), (5000, 4)])
def test_boxes_go_up_a_level_each_doubling(side, level):
    assert levels_of(torch.tensor([10.0, 10, 9 + side, 9 + side]), 5) == level


def test_boxes_out_of_the_map_cover_its_border_alone():
    outside = torch.tensor([[[500.0, 10, 600, 20]]])
    assert object_region(outside, 8, 4, 6)[0].nonzero().tolist() == [[1, 5]]


def test_regions_lie_where_the_boxes_are_on_padded_images():
    seen = batch([[4, 4, 30, 40]], [[10, 12, 24, 30]])  # the second image fills 40 x 30 of 64 x 48
    (regions,) = DeFeat().regions(seen.boxes, (8,), [0], [(8, 6)])
    for region, ((x1, y1, x2, y2),) in zip(regions, (b.tolist() for b in seen.boxes), strict=True):
        rows, columns = region.any(1).nonzero() * 8, region.any(0).nonzero() * 8
        assert rows.min() <= y1 < rows.min() + 8
        assert columns.min() <= x1 < columns.min() + 8
        assert y2 - 16 <= rows.max() < y2  # the published rule leaves out the last cell
        assert x2 - 16 <= columns.max() < x2


def test_each_region_is_averaged_by_itself():
    student, teacher = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    objects = torch.zeros(1, 4, 4, dtype=torch.bool)
    objects[0, 1, 2] = True
    assert [x.item() for x in decoupled_losses(student, teacher, objects)] == [0.5, 0.5]
    assert [x.item() for x in decoupled_losses(student, teacher, objects & False)] == [0.0, 0.5]


def test_no_gradient_reaches_the_teacher():
    student, teacher = maps(2, seed=1), maps(2, seed=2)
    method = ready(DeFeat())
    sum(method(exchange(BATCH, features=(student, teacher))).values()).backward()
    assert all(x.grad.abs().sum() > 0 for x in student)
    assert all(x.grad is None for x in teacher)
    assert all(p.grad is not None for p in method.parameters())


def test_equal_features_cost_nothing_at_first():
    features = maps(2)
    terms = ready(DeFeat())(exchange(BATCH, features=(features, features)))
    assert all(term.item() == pytest.approx(0, abs=1e-12) for term in terms.values())


def test_without_any_box_all_is_background():
    student, teacher = maps(2, seed=1), maps(2, seed=2)
    terms = ready(DeFeat())(exchange(batch([], []), features=(student, teacher)))
    assert terms["object"] == 0
    assert terms["background"] > 0
    sum(terms.values()).backward()
    assert all(torch.isfinite(x.grad).all() for x in student)


def test_levels_of_one_cell():
    student, teacher = (tuple(torch.randn(1, 4, 1, 1, requires_grad=True) for _ in GRID) for _ in range(2))
    terms = ready(DeFeat())(exchange(batch([[0, 0, 5, 5]]), features=(student, teacher)))
    sum(terms.values()).backward()
    assert terms["object"] > 0
    assert all(torch.isfinite(x.grad).all() for x in student)


def test_half_precision_is_computed_in_float32():
    student, teacher = (maps(2, seed=s, dtype=torch.bfloat16) for s in (1, 2))
    method = ready(DeFeat())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = method(exchange(BATCH, features=(student, teacher)))
    full = method(exchange(BATCH, features=[[x.float() for x in side] for side in (student, teacher)]))
    assert {name: x.item() for name, x in half.items()} == {name: x.item() for name, x in full.items()}
    assert all(x.dtype == torch.float32 for x in half.values())


def test_other_channels_sizes_and_strides():
    method = ready(DeFeat(), spec(channels=(3, 4)))
    student = (torch.randn(2, 3, 5, 5), torch.randn(2, 4, 4, 3))
    terms = method(exchange(BATCH, features=(student, maps(2)), specs=(spec(channels=(3, 4)), spec())))
    assert all(torch.isfinite(x) for x in terms.values())
    assert "no stride in common" in DeFeat().refuses(spec(), spec(strides=(32, 64)))
    assert ready(DeFeat(), spec(strides=(4, 8)), spec()).levels == [(1, 0)]


@pytest.mark.parametrize("detector", DENSE)
def test_a_step_on_detectors(detector, batch):
    student = tiny_gfl(seed=2)
    losses = Distiller(detector(seed=1), student, [DeFeat()])(*batch)
    losses.total.backward()
    assert losses["defeat/object"] > 0
    assert losses["defeat/background"] > 0
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_one_image_without_boxes(batch):
    images, targets = batch
    targets[1] = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    losses = Distiller(tiny_fcos(seed=1), tiny_gfl(seed=2), [DeFeat()])(images, targets)
    assert all(torch.isfinite(x) for x in losses.values())
