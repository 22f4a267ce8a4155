import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch

from kdtoolkit.contract import Assignment, Exchange, PriorKind
from kdtoolkit.errors import KDError
from kdtoolkit.methods import DETRDistill
from kdtoolkit.methods.detrdistill import Outputs, match, matching_costs
from kdtoolkit.methods.queries import layer_pairs
from tests.methods._decoders import QUERIES, SIZES, batch, beyond, corners, iou_and_giou, l1, layers, padded, view
from tests.methods._views import CLASSES, spec

OBJECTS = batch([[(4, 6, 30, 40), (20, 20, 44, 60)], [(5, 5, 25, 35)]], [[0, 2], [1]])
OWN = {"prior_cls_weight": 0, "prior_box_weight": 0, "prior_giou_weight": 0, "feature_weight": 0}
PRIOR = {"cls_weight": 0, "box_weight": 0, "giou_weight": 0, "feature_weight": 0}
FEATURE = {**OWN, "cls_weight": 0, "box_weight": 0, "giou_weight": 0, "feature_weight": 1.0}


def method(**options):
    built = DETRDistill(**options)
    built.setup(QUERIES, QUERIES)
    return built


def probabilities(logits):
    """Python's own, of all classes; with background if there is one."""
    if len(logits) == CLASSES:
        return [1 / (1 + math.exp(-x)) for x in logits]
    total = sum(map(math.exp, logits))
    return [math.exp(x) / total for x in logits]


def class_loss(student, teacher):
    ours, theirs = probabilities(student), probabilities(teacher)
    if len(student) > CLASSES:
        return -sum(t * math.log(s) for s, t in zip(ours, theirs, strict=True))
    return -sum(t * math.log(s) + (1 - t) * math.log(1 - s) for s, t in zip(ours, theirs, strict=True))


def clipped(box):
    return tuple(min(max(x, 0), 1) for x in corners(box))


def naive_matched(student, teacher):
    """All matchings are tried."""
    sums = [0.0, 0.0, 0.0]
    for ours, theirs in zip(student, teacher, strict=True):
        for i in range(2):
            (s_logits, s_boxes, _), (t_logits, t_boxes, _) = (
                [x[i].double().tolist() for x in y] for y in (ours, theirs)
            )
            terms = {
                (q, p): (
                    class_loss(s_logits[q], t_logits[p]),
                    l1(corners(s_boxes[q]), clipped(t_boxes[p])),
                    1 - iou_and_giou(corners(s_boxes[q]), clipped(t_boxes[p]))[1],
                )
                for q in range(4)
                for p in range(4)
            }
            cost = {pair: a + 5 * b + 2 * c for pair, (a, b, c) in terms.items()}
            best = min(permutations(range(4)), key=lambda order: sum(cost[q, p] for q, p in enumerate(order)))
            for k in range(3):
                sums[k] += sum(terms[q, p][k] for q, p in enumerate(best)) / 8
    return sums


@pytest.mark.parametrize("softmax", [False, True])
def test_terms_of_matched_queries_equal_a_loop_over_all_matchings(softmax):
    student, teacher = layers(1, softmax=softmax), layers(2, softmax=softmax)
    exchange = Exchange(view(student, OBJECTS), view(teacher, OBJECTS))
    terms = method(**OWN, cls_weight=3, box_weight=4, giou_weight=7)(exchange)
    assert list(terms) == ["cls", "box", "giou"]
    expected = naive_matched(student, teacher)
    for value, weight, naive in zip(terms.values(), (3, 4, 7), expected, strict=True):
        assert value.item() == pytest.approx(weight * naive, rel=1e-5)


def assignment(labels, boxes):
    labels = torch.tensor(labels)
    found = torch.zeros(*labels.shape, 4)
    for (i, q), box in boxes.items():
        found[i, q] = torch.tensor(box)
    positive = labels < CLASSES
    weights = torch.ones(labels.shape)
    weights[1, 3] = 0  # answers for an object of a class that is not shown
    return Assignment(positive, labels, found, weights, torch.tensor(3.0))


ASSIGNED = [
    assignment(
        [[0, 3, 2, 3], [3, 1, 3, 3]], {(0, 0): (4, 6, 30, 40), (0, 2): (20, 20, 44, 60), (1, 1): (5, 5, 25, 35)}
    ),
    assignment(
        [[3, 0, 2, 3], [1, 3, 3, 3]], {(0, 1): (4, 6, 30, 40), (0, 2): (20, 20, 44, 60), (1, 0): (5, 5, 25, 35)}
    ),
]


def naive_prior(asked, assigned):
    sums = [0.0, 0.0, 0.0]
    for (logits, boxes, _), each in zip(asked, assigned, strict=True):
        entropy = weights = 0.0
        for i, (height, width) in enumerate(SIZES):
            for q in range(4):
                label, weight = each.labels[i, q].item(), each.weights[i, q].item()
                scores = probabilities(logits[i, q].double().tolist())
                if len(scores) > CLASSES:
                    weight *= 1.0 if label < CLASSES else 0.1
                    entropy -= weight * math.log(scores[label])
                    weights += weight
                else:
                    for k, p in enumerate(scores):
                        positive = k == label
                        factor = 0.25 * (1 - p) ** 2 if positive else 0.75 * p**2
                        sums[0] -= weight * factor * math.log(p if positive else 1 - p) / 3
                if label < CLASSES:
                    x1, y1, x2, y2 = each.boxes[i, q].tolist()
                    box = x1 / width, y1 / height, x2 / width, y2 / height
                    own = corners(boxes[i, q].double().tolist())
                    sums[1] += l1(own, box) / 3
                    sums[2] += (1 - iou_and_giou(own, box)[1]) / 3
        sums[0] += entropy / weights if weights else 0.0
    return sums


@pytest.mark.parametrize("softmax", [False, True])
def test_terms_at_the_teachers_queries_equal_a_loop(softmax):
    student, asked, teacher = (layers(i, softmax=softmax) for i in (1, 2, 3))
    exchange = Exchange(view(student, OBJECTS, given=asked), view(teacher, OBJECTS, assignments=ASSIGNED))
    terms = method(**PRIOR, prior_cls_weight=3, prior_box_weight=4, prior_giou_weight=7)(exchange)
    assert list(terms) == ["prior_cls", "prior_box", "prior_giou"]
    for value, weight, naive in zip(terms.values(), (3, 4, 7), naive_prior(asked, ASSIGNED), strict=True):
        assert value.item() == pytest.approx(weight * naive, rel=1e-5)
    sum(terms.values()).backward()
    assert all(x.grad is None for layer in student for x in layer)
    assert all(layer[0].grad.any() and layer[1].grad.any() for layer in asked)


def naive_feature(student, teacher, said, shown, top, masked):
    total = 0.0
    counted = [
        [(y, x) for y in range(4) for x in range(3) if not (masked and beyond(i, y, x))] for i in range(len(student))
    ]
    values = student.shape[1] * sum(map(len, counted))
    for logits, boxes, states in said:
        for i, (height, width) in enumerate(SIZES):
            scores = logits[i].sigmoid()
            best = sorted(((scores[q, k].item(), q) for q in range(4) for k in range(CLASSES)), reverse=True)[:top]
            mask = torch.full(teacher.shape[2:], 0.0)
            for score, q in best:
                box = corners(boxes[i, q].tolist())
                truth = [(a / width, b / height, c / width, d / height) for a, b, c, d in shown.boxes[i].tolist()]
                weight = score * max((iou_and_giou(box, each)[0] for each in truth), default=1.0)
                for y, x in counted[i]:
                    cell, state = teacher[i, :, y, x], states[i, :, q]
                    mask[y, x] += weight * (cell @ state / (cell.norm() * state.norm())).item()
            mask = mask.clamp(min=0.01)
            mask = mask / max(mask[each] for each in counted[i])
            for y, x in counted[i]:
                total += ((mask[y, x] * (student - teacher)[i, :, y, x]) ** 2).sum().item() / values
    return total


@pytest.mark.parametrize("shown", [OBJECTS, batch([[(4, 6, 30, 40)], []]), batch()], ids=["objects", "one", "none"])
@pytest.mark.parametrize("masks", [(False, False), (True, False), (False, True)], ids=["none", "student", "teacher"])
def test_the_term_of_features_equals_a_loop(shown, masks):
    said = layers(3)
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(2, 6, 4, 3, generator=generator).requires_grad_() for _ in range(2))
    exchange = exchange_of_features(shown, (ours, theirs), said, masks)
    terms = method(**FEATURE, top=5)(exchange)
    assert list(terms) == ["feature"]
    plain = [[x.detach() for x in each] for each in said]
    expected = naive_feature(ours.detach(), theirs.detach(), plain, shown, 5, any(masks))
    assert terms["feature"].item() == pytest.approx(expected, rel=1e-4)
    terms["feature"].backward()
    assert ours.grad.any()
    assert theirs.grad is None
    assert all(x.grad is None for layer in said for x in layer)


def exchange_of_features(shown, maps, said, masks):
    views = [view(each, shown, (x,)) for each, x in zip((layers(1), said), maps, strict=True)]
    for each, masked in zip(views, masks, strict=True):
        each.spec = replace(QUERIES, masks_padding=masked)
    return Exchange(*views)


@pytest.mark.parametrize("masked", [True, False])
def test_more_padding_changes_nothing_if_it_is_masked(masked):
    maps = torch.randn(2, 2, 6, 4, 3, generator=torch.Generator().manual_seed(0)).unbind()
    canvas, *larger = padded(OBJECTS, maps[0], 2 * maps[1])
    found = method(**FEATURE)(exchange_of_features(OBJECTS, (maps[0], 2 * maps[1]), layers(3), (masked, masked)))
    again = method(**FEATURE)(exchange_of_features(canvas, larger, layers(3), (masked, masked)))
    assert torch.allclose(again["feature"], found["feature"], rtol=1e-5) == masked


def test_fewer_queries_of_the_teacher_are_matched_with_as_many_of_the_student():
    student, teacher = (
        Outputs(torch.randn(2, 6, 3), torch.rand(2, 6, 4)),
        Outputs(torch.randn(2, 4, 3), torch.rand(2, 4, 4)),
    )
    for a, b, expected in ((student, teacher, (2, 4)), (teacher, student, (2, 4))):
        ((rows, columns),) = match([matching_costs(a, b)])
        assert rows.shape == columns.shape == expected
        assert all(len(set(each.tolist())) == 4 for each in (*rows, *columns))


def test_layers_of_unlike_decoders_are_paired_by_their_share_of_the_depth():
    assert layer_pairs("abc", "uvwxyz") == [("a", "v"), ("b", "x"), ("c", "z")]
    assert layer_pairs("abcd", "xy") == [("a", "x"), ("b", "x"), ("c", "y"), ("d", "y")]
    assert layer_pairs("ab", "xy") == [("a", "x"), ("b", "y")]


def test_what_cannot_be_compared_is_refused_with_what_to_set():
    other = spec(priors=PriorKind.QUERIES, priors_per_cell=(), bins=(), prior_form="points of 8", strides=(8,))
    assert "prior_giou_weight=0) leaves the teacher's queries out" in DETRDistill().refuses(other, QUERIES)
    assert "DETRDistill(feature_weight=0) leaves the features out" in DETRDistill(
        prior_cls_weight=0, prior_box_weight=0, prior_giou_weight=0
    ).refuses(other, QUERIES)
    assert DETRDistill(**OWN).refuses(other, QUERIES) is None
    assert "the student predicts at anchors" in DETRDistill().refuses(spec(), QUERIES)
    with pytest.raises(KDError, match=r"DETRDistill\(top=0\)"):
        DETRDistill(top=0)


def test_a_repaired_teacher_teaches_what_its_earlier_layers_knew():
    teacher = layers(2)
    student = [tuple(x.detach().clone().requires_grad_() for x in layer) for layer in teacher]
    exchange = Exchange(view(student, OBJECTS), view(teacher, OBJECTS, assignments=ASSIGNED))
    plain, repaired = (method(**OWN, repair=repair)(exchange) for repair in (False, True))
    assert repaired["cls"].item() != pytest.approx(plain["cls"].item(), rel=1e-3)
