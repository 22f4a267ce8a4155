import math

import pytest
import torch

from kdtoolkit import Distiller
from kdtoolkit.contract import PriorKind
from kdtoolkit.errors import IncompatibleError
from kdtoolkit.methods.common import distribution_kl
from kdtoolkit.methods.ld import LD, match_bins, side_divergence, valuable_region
from tests.conftest import tiny_gfl
from tests.methods._views import CLASSES, GRID, STRIDES, anchors, assignment, batch, exchange, predictions, spec

BATCH = batch([[4, 4, 30, 40], [20, 8, 46, 30]], [[2, 2, 20, 18]])
PER_LEVEL = tuple(h * w for h, w in GRID)


def some_labels(n=2):
    """Positives on the first level in both images and on the second in one."""
    labels = torch.full((n, sum(PER_LEVEL)), CLASSES)
    labels[0, [3, 10, 50]] = torch.tensor([0, 1, 2])
    labels[1, 7] = 1
    return labels


def naive_kl(student, teacher, temperature):
    """Of one distribution, term by term in float64."""
    student, teacher = ([math.exp(x / temperature) for x in logits.double().tolist()] for logits in (student, teacher))
    p, q = [x / sum(student) for x in student], [x / sum(teacher) for x in teacher]
    return temperature**2 * sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))


def naive_iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    area_a, area_b = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    return intersection / (area_a + area_b - intersection), intersection / area_a


def naive_region(boxes, valid):
    """Box by box and anchor by anchor."""
    all_anchors = anchors().double().tolist()
    region = torch.zeros(len(boxes), len(all_anchors))
    for image, image_boxes in enumerate(boxes):
        for box in image_boxes.double().tolist():
            centre = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            distance = [math.hypot((a[0] + a[2]) / 2 - centre[0], (a[1] + a[3]) / 2 - centre[1]) for a in all_anchors]
            overlaps, start = [], 0
            for count in PER_LEVEL:
                level = [k for k in range(start, start + count) if valid[image, k]]
                overlaps += [naive_iou(all_anchors[k], box)[0] for k in sorted(level, key=distance.__getitem__)[:9]]
                start += count
            mean = sum(overlaps) / len(overlaps)
            std = math.sqrt(sum((x - mean) ** 2 for x in overlaps) / (len(overlaps) - 1))
            for k, anchor in enumerate(all_anchors):
                iou, of_anchor = naive_iou(anchor, box)
                hull = max(anchor[2], box[2]) - min(anchor[0], box[0]), max(anchor[3], box[3]) - min(anchor[1], box[1])
                measure = of_anchor - distance[k] ** 2 / (hull[0] ** 2 + hull[1] ** 2)
                if valid[image, k] and 0.25 * (mean + std) <= measure < mean + std:
                    region[image, k] = max(region[image, k].item(), iou)
    return region


def some_boxes(seed):
    """Boxes for two images, at odd places so that no two anchors are equally near."""
    generator = torch.Generator().manual_seed(seed)
    boxes = []
    for count in (3, 1):
        low = torch.rand(count, 2, generator=generator) * 25
        boxes.append(torch.cat([low, low + 4 + torch.rand(count, 2, generator=generator) * 18], 1))
    return boxes


@pytest.mark.parametrize("seed", range(5))
def test_valuable_region_equals_a_loop(seed):
    boxes, valid = some_boxes(seed), torch.ones(2, sum(PER_LEVEL), dtype=torch.bool)
    valid[1, ::3] = False
    ours = valuable_region(anchors(), boxes, valid, PER_LEVEL)
    assert (ours > 0).any()
    torch.testing.assert_close(ours, naive_region(boxes, valid), rtol=1e-4, atol=1e-6)


def test_valuable_region_without_boxes_is_empty():
    valid = torch.ones(2, sum(PER_LEVEL), dtype=torch.bool)
    assert not valuable_region(anchors(), [torch.zeros(0, 4)] * 2, valid, PER_LEVEL).any()
    assert not valuable_region(anchors(), [torch.tensor([[1.0, 1, 9, 9]])] * 2, ~valid, PER_LEVEL).any()


def test_divergence_equals_a_loop():
    student, teacher = torch.randn(2, 3, 4, 7).unbind()
    ours = distribution_kl(student, teacher, 3.0)
    naive = [[naive_kl(s, t, 3.0) for s, t in zip(*rows, strict=True)] for rows in zip(student, teacher, strict=True)]
    torch.testing.assert_close(ours, torch.tensor(naive), rtol=1e-4, atol=1e-6)


def test_terms_equal_a_loop():
    student, teacher, labels = predictions(2, seed=1), predictions(2, seed=2), some_labels()
    given = exchange(BATCH, heads=(student, teacher), assigned=assignment(labels))
    terms = LD(weight=2, temperature=4, valuable_weight=3, cls_weight=5, cls_temperature=2)(given)
    region = naive_region(BATCH.boxes, torch.ones(2, sum(PER_LEVEL), dtype=torch.bool))
    main = valuable = 0.0
    cls = [[], []]
    for i in range(2):
        for k in range(sum(PER_LEVEL)):
            sides = zip(student.regression[i, k], teacher.regression[i, k], strict=True)
            divergence = sum(naive_kl(s, t, 4) / 5 for s, t in sides) / 4
            valuable += region[i, k].item() * divergence / 4
            if labels[i, k] < CLASSES:
                main += student.logits[i, k].sigmoid().max().item() * divergence
                cls[k >= PER_LEVEL[0]].append(naive_kl(student.logits[i, k], teacher.logits[i, k], 2) / CLASSES)
    expected = [2 * main, 3 * valuable, 5 * sum(sum(level) / len(level) for level in cls)]
    assert tuple(terms) == LD.terms
    assert [x.item() for x in terms.values()] == pytest.approx(expected, rel=1e-4)


JOURNAL = {"valuable_weight": 0.25, "cls_weight": 10.0}


def test_defaults_are_the_main_region_alone():
    given = exchange(BATCH, heads=(predictions(2, seed=1), predictions(2, seed=2)), assigned=assignment(some_labels()))
    terms = LD()(given)
    assert terms["main"] > 0
    assert set(terms) == {"main"}
    assert terms["main"] == LD(**JOURNAL)(given)["main"]


def test_no_gradient_reaches_the_teacher():
    student, teacher = predictions(2, seed=1), predictions(2, seed=2)
    given = exchange(BATCH, heads=(student, teacher), assigned=assignment(some_labels()))
    sum(LD(**JOURNAL)(given).values()).backward()
    assert student.regression.grad.abs().sum() > 0
    assert student.logits.grad.abs().sum() > 0
    assert teacher.regression.grad is None
    assert teacher.logits.grad is None


def test_main_region_gives_no_gradient_to_scores():
    student = predictions(2, seed=1)
    given = exchange(BATCH, heads=(student, predictions(2, seed=2)), assigned=assignment(some_labels()))
    LD()(given)["main"].backward()
    assert student.logits.grad is None


def test_equal_predictions_cost_nothing():
    same = predictions(2)
    given = exchange(BATCH, heads=(same, same), assigned=assignment(some_labels()))
    assert all(abs(x.item()) < 1e-6 for x in LD(**JOURNAL)(given).values())


def test_without_boxes_and_positives_it_is_zero():
    student, nothing = predictions(2, seed=1), torch.full((2, sum(PER_LEVEL)), CLASSES)
    given = exchange(batch([], []), heads=(student, predictions(2, seed=2)), assigned=assignment(nothing))
    total = sum(LD(**JOURNAL)(given).values())
    total.backward()
    assert total == 0
    assert not student.regression.grad.any()


def test_half_precision_is_computed_in_float32():
    heads = [predictions(2, seed=s, dtype=torch.bfloat16) for s in (1, 2)]
    terms = LD(**JOURNAL)(exchange(BATCH, heads=heads, assigned=assignment(some_labels())))
    assert all(x.dtype == torch.float32 and torch.isfinite(x) for x in terms.values())
    assert distribution_kl(*(h.regression for h in heads)).equal(
        distribution_kl(*(h.regression.float() for h in heads))
    )


def test_points_stand_for_squares():
    student, teacher = predictions(2, seed=1), predictions(2, seed=2)
    centres = (anchors()[:, :2] + anchors()[:, 2:]) / 2
    strides = torch.cat([torch.full((n,), s) for s, n in zip(STRIDES, PER_LEVEL, strict=True)])[:, None]
    values = []
    for kind, reach in ((PriorKind.POINTS, 0), (PriorKind.ANCHORS, 4)):
        student.priors.boxes[:] = torch.cat([centres - reach * strides, centres + reach * strides], 1)
        specs = spec(priors=kind), spec()
        given = exchange(BATCH, heads=(student, teacher), assigned=assignment(some_labels()), specs=specs)
        values.append(LD(valuable_weight=1.0)(given)["valuable"].item())
    assert values[0] == pytest.approx(values[1])
    assert values[0] > 0


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"priors": PriorKind.QUERIES}, "queries"),
        ({"strides": (64, 128)}, "no stride in common"),
        ({"priors_per_cell": (3, 3)}, "priors a cell"),
    ],
)
def test_refuses_pairs_that_do_not_correspond(change, word):
    assert LD().refuses(spec(), spec()) is None
    assert word in LD().refuses(spec(), spec(**change))
    assert word in LD().refuses(spec(**change), spec())


def test_other_grids_are_an_error_that_names_them():
    student, teacher = predictions(1), predictions(1)
    object.__setattr__(teacher.priors, "grid", ((4, 12), (2, 6)))
    with pytest.raises(IncompatibleError, match=r"\(\(4, 12\), \(2, 6\)\)"):
        LD()(exchange(batch([]), heads=(student, teacher), assigned=assignment(some_labels(2)[:1])))


def test_queries_must_have_equal_bins():
    queries = {"priors": PriorKind.QUERIES, "prior_form": "queries"}
    assert LD().refuses(spec(**queries), spec(**queries)) is None
    assert "2 bins (0 to 1)" in LD().refuses(spec(**queries), spec(**queries, bins=(0.0, 1.0)))
    assert "grid" in LD(valuable_weight=1.0).refuses(spec(**queries), spec(**queries))


@pytest.mark.parametrize("offset", [(0.0, 0.0), (0.5, 0.5), (-0.25, 1.0)])
def test_matched_bins_keep_probability_and_what_it_stands_for(offset):
    teacher, student = tuple(map(float, range(1, 6))), tuple(x / 2 for x in range(15))
    matching = match_bins(student, teacher, offset)
    torch.testing.assert_close(matching.sum(-1), torch.ones(4, 5))
    expected = torch.tensor(teacher) + torch.tensor([[s] for s in (*offset, *(-x for x in offset))])
    torch.testing.assert_close(matching @ torch.tensor(student), expected.clamp(0, 7))
    same = match_bins(teacher, teacher, (0.0, 0.0))
    torch.testing.assert_close(same, torch.eye(5).expand(4, 5, 5))


def test_other_bins_other_places_and_more_levels_are_matched(batch):
    """A teacher whose bins reach further, on a coarser level more, teaches the same on what they share."""
    student = tiny_gfl(seed=2, bins=5)
    values = {}
    for name, changes in {"same": {}, "wider": {"bins": 9}, "taller": {"strides": (8, 16, 32, 64)}}.items():
        losses = Distiller(tiny_gfl(seed=1, **{"bins": 5, **changes}), student, [LD()])(*batch)
        values[name] = losses["ld/main"]
    assert all(value.isfinite() and value > 0 for value in values.values())
    values["wider"].backward()
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())


def test_matching_equal_bins_changes_nothing():
    student, teacher = torch.randn(6, 4, 5), torch.randn(6, 4, 5)
    matching = match_bins(range(5), range(5), (0.0, 0.0))
    torch.testing.assert_close(side_divergence(student, teacher, 10.0, matching), side_divergence(student, teacher))


def test_autocast_does_not_round_the_target():
    student, teacher = torch.randn(6, 4, 5), torch.randn(6, 4, 7)
    matching = match_bins(range(5), range(7), (0.5, 0.0))
    with torch.autocast("cpu", torch.bfloat16):
        found = side_divergence(student, teacher, 10.0, matching)
    assert torch.equal(found, side_divergence(student, teacher, 10.0, matching))


def test_a_softmax_over_one_class_is_refused():
    one = spec(num_classes=1)
    assert LD().refuses(one, one) is None
    assert "LD(cls_weight=0)" in LD(cls_weight=1.0).refuses(one, one)
