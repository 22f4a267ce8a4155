import pytest
import torch

from kdtoolkit.contract import PriorKind
from kdtoolkit.errors import KDError
from kdtoolkit.methods.fitnet import FitNet, box_region, fine_grained_region, imitation_loss
from tests.methods._views import GRID, STRIDES, anchors, batch, exchange, maps, predictions, spec

BATCH = batch([[4, 4, 30, 40], [20, 9, 46, 30]], [[2, 2, 20, 18]])


def ready(method, student=None):
    torch.manual_seed(0)
    method.setup(student or spec(), spec())
    return method


def naive(student, teacher, boxes, region):
    """Cell by cell; `region` as FitNet has it."""
    all_anchors, start, total = anchors().tolist(), 0, 0.0
    for level, (height, width) in enumerate(GRID):
        values = []
        for i in range(len(boxes)):
            for k in range(height * width):
                a = all_anchors[start + k]
                if region == "whole" or any(matches(a, b, boxes, i, region) for b in boxes[i].tolist()):
                    y, x = divmod(k, width)
                    difference = student[level][i, :, y, x] - teacher[level][i, :, y, x]
                    values += difference.double().square().tolist()
        total += sum(values) / len(values) if values else 0.0
        start += height * width
    return total


def matches(anchor, box, boxes, image, region):
    centre = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2
    if region == "boxes":
        return box[0] < centre[0] < box[2] and box[1] < centre[1] < box[3]
    height, width = BATCH.padded_sizes[image]
    inside = [a for a in anchors().tolist() if (a[0] + a[2]) / 2 < width and (a[1] + a[3]) / 2 < height]
    return anchor in inside and iou(anchor, box) > 0.5 * max(iou(a, box) for a in inside)


def iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    return intersection / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection)


@pytest.mark.parametrize("region", ["whole", "boxes", "fine-grained"])
def test_equals_a_loop(region):
    student, teacher = maps(2, seed=1), maps(2, seed=2)
    given = exchange(BATCH, features=(student, teacher), heads=(predictions(2), None))
    ours = ready(FitNet(weight=3, region=region))(given)
    assert tuple(ours) == FitNet.terms
    assert ours["feature"].item() == pytest.approx(3 * naive(student, teacher, BATCH.boxes, region), rel=1e-5)


def test_whole_maps_need_no_head():
    student, teacher = maps(2, seed=1), maps(2, seed=2)
    assert ready(FitNet())(exchange(BATCH, features=(student, teacher)))["feature"] > 0


def test_a_cell_counts_if_one_of_its_priors_does():
    prior = torch.tensor([[0.0, 0.0, 8.0, 8.0], [40.0, 40.0, 48.0, 48.0]])
    head = predictions(1)
    head.priors.boxes[:] = prior[1]
    doubled = torch.stack([head.priors.boxes, prior[0].expand_as(head.priors.boxes)], 1).reshape(-1, 4)
    object.__setattr__(head.priors, "boxes", doubled)
    method = ready(FitNet(region="boxes"))
    inside = method.regions(exchange(batch([[1, 1, 9, 9]]), features=(maps(1), ()), heads=(head, None)))
    assert [tuple(x.shape) for x in inside] == [(1, *size) for size in GRID]
    assert all(x.all() for x in inside)


@pytest.mark.parametrize("region", ["boxes", "fine-grained"])
def test_without_boxes_it_is_zero(region):
    student, teacher = maps(2, seed=1), maps(2, seed=2)
    given = exchange(batch([], []), features=(student, teacher), heads=(predictions(2), None))
    loss = ready(FitNet(region=region))(given)["feature"]
    loss.backward()
    assert loss == 0
    assert all(not x.grad.any() for x in student)


def test_no_gradient_reaches_the_teacher():
    student, teacher = maps(2, seed=1), maps(2, seed=2)
    ready(FitNet())(exchange(BATCH, features=(student, teacher)))["feature"].backward()
    assert all(x.grad.abs().sum() > 0 for x in student)
    assert all(x.grad is None for x in teacher)


def test_equal_features_cost_nothing():
    features = maps(2)
    assert ready(FitNet())(exchange(BATCH, features=(features, features)))["feature"] == 0


def test_computes_in_float32():
    student, teacher = torch.randn(2, 1, 3, 5, 5).bfloat16().unbind()
    assert imitation_loss(student, teacher).equal(imitation_loss(student.float(), teacher.float()))


def test_projects_and_resizes():
    student = (torch.randn(2, 3, 8, 6), torch.randn(2, 4, 4, 3))
    teacher = (torch.randn(2, 4, 9, 9), torch.randn(2, 4, 4, 3))
    method = ready(FitNet(region="boxes"), spec(channels=(3, 4)))
    loss = method(exchange(BATCH, features=(student, teacher), heads=(predictions(2), None)))["feature"]
    assert torch.isfinite(loss)
    assert loss > 0


def test_regions_of_batches_with_unlike_counts():
    both = box_region(anchors(), BATCH.boxes)
    valid = torch.ones(2, len(anchors()), dtype=torch.bool)
    fine = fine_grained_region(anchors(), BATCH.boxes, valid)
    for i in range(2):
        assert box_region(anchors(), BATCH.boxes[i : i + 1])[0].equal(both[i])
        assert fine_grained_region(anchors(), BATCH.boxes[i : i + 1], valid[:1])[0].equal(fine[i])


def test_refusals():
    assert FitNet().refuses(spec(priors=PriorKind.QUERIES), spec()) is None
    assert "queries" in FitNet(region="boxes").refuses(spec(priors=PriorKind.QUERIES), spec())
    assert "anchors" in FitNet(region="fine-grained").refuses(spec(priors=PriorKind.POINTS), spec())
    assert "strides" in FitNet().refuses(spec(), spec(strides=tuple(8 * s for s in STRIDES)))
    with pytest.raises(KDError, match=r"'fine'.*fine-grained"):
        FitNet(region="fine")
