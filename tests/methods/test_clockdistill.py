import math
from dataclasses import replace

import pytest
import torch

from kdtoolkit.contract import Exchange, PriorKind, Priors
from kdtoolkit.errors import KDError
from kdtoolkit.methods import CLoCKDistill
from kdtoolkit.methods.clockdistill import filled
from tests.methods._decoders import QUERIES, SIZES, batch, beyond, corners, iou_and_giou, l1, layers, padded, view
from tests.methods._views import CLASSES, spec

OBJECTS = batch([[(4, 6, 30, 40), (20, 20, 44, 60)], [(5, 5, 25, 28)]], [[0, 2], [1]])
MEMORY = {"cls_weight": 0, "box_weight": 0, "giou_weight": 0}
QUERY = {"foreground_weight": 0, "background_weight": 0, "queries": 2}


def stages(width):
    from kdtoolkit.contract import Stage

    return tuple(Stage(str(i), {"decoder": (width,)}, spatial=False) for i in range(3))


def method(student_width=6, teacher_width=6, **options):
    built = CLoCKDistill(**options)
    facts = {"priors": PriorKind.QUERIES, "priors_per_cell": (), "bins": (), "prior_form": "x", "strides": (16,)}
    built.setup(*(spec(**facts, channels=(width,), stages=stages(width)) for width in (student_width, teacher_width)))
    return built


def asked_at(seen, said, shown=OBJECTS):
    """A view whose decoder says `said` of any queries, and writes into `seen` which they were."""
    found = view(said, shown, given=said)

    def queries_at(content, boxes, batch):
        seen.append((content, boxes))
        return Priors(boxes, boxes.new_zeros(0))

    found.adapter.queries_at = queries_at
    return found


def naive_memory(student, teacher, shown, stride, masked):
    sums = [0.0, 0.0]
    for i in range(len(student)):
        height, width = student.shape[2:]
        boxes = [
            (math.floor(x1 / stride), math.floor(y1 / stride), math.ceil(x2 / stride), math.ceil(y2 / stride))
            for x1, y1, x2, y2 in shown.boxes[i].tolist()
        ]
        over = {
            (y, x): max(
                (1 / ((y2 + 1 - y1) * (x2 + 1 - x1)) for x1, y1, x2, y2 in boxes if x1 <= x <= x2 and y1 <= y <= y2),
                default=0.0,
            )
            for y in range(height)
            for x in range(width)
            if not (masked and beyond(i, y, x))
        }
        free = sum(not weight for weight in over.values())
        for (y, x), weight in over.items():
            square = ((student[i, :, y, x] - teacher[i, :, y, x]) ** 2).sum().item()
            sums[0] += weight * square / len(student)
            sums[1] += (not weight) * square / max(free, 1) / len(student)
    return sums


@pytest.mark.parametrize("shown", [OBJECTS, batch([[(4, 6, 12, 12)], []]), batch()], ids=["objects", "one", "none"])
@pytest.mark.parametrize("masks", [(False, False), (True, False), (False, True)], ids=["none", "student", "teacher"])
def test_terms_of_memory_equal_a_loop(shown, masks):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(2, 6, 4, 3, generator=generator).requires_grad_() for _ in range(2))
    exchange = exchange_of_memories(shown, (ours, theirs), masks)
    terms = method(**MEMORY, foreground_weight=3, background_weight=4)(exchange)
    assert list(terms) == ["foreground", "background"]
    expected = naive_memory(ours.detach(), theirs.detach(), shown, 16, any(masks))
    for value, weight, naive in zip(terms.values(), (3, 4), expected, strict=True):
        assert value.item() == pytest.approx(weight * naive, rel=1e-5)
    sum(terms.values()).backward()
    assert ours.grad.any()
    assert theirs.grad is None


def exchange_of_memories(shown, maps, masks):
    views = [view(layers(1), shown, (each,)) for each in maps]
    for each, masked in zip(views, masks, strict=True):
        each.spec = replace(QUERIES, masks_padding=masked)
    return Exchange(*views)


@pytest.mark.parametrize("masked", [True, False])
def test_more_padding_changes_nothing_if_it_is_masked(masked):
    maps = torch.randn(2, 2, 6, 4, 3, generator=torch.Generator().manual_seed(0)).unbind()
    canvas, *larger = padded(OBJECTS, maps[0], 2 * maps[1])
    distill = method(**MEMORY, foreground_weight=3, background_weight=4)
    found = distill(exchange_of_memories(OBJECTS, (maps[0], 2 * maps[1]), (masked, masked)))
    again = distill(exchange_of_memories(canvas, larger, (masked, masked)))
    for name in ("foreground", "background"):  # a box lies over all cells that it touches, one of padding among them
        assert torch.allclose(again[name], found[name], rtol=1e-5) == masked


def naive_kl(student, teacher):
    if len(student) > CLASSES:
        ours, theirs = ([math.exp(x) for x in each] for each in (student, teacher))
        return sum(
            t / sum(theirs) * math.log(t / sum(theirs) * sum(ours) / s) for s, t in zip(ours, theirs, strict=True)
        )
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        s, t = 1 / (1 + math.exp(-s)), 1 / (1 + math.exp(-t))
        total += t * math.log(t / s) + (1 - t) * math.log((1 - t) / (1 - s))
    return total


def naive_queries(student, teacher, counts):
    sums = [0.0, 0.0, 0.0]
    for ours, theirs in zip(student, teacher, strict=True):
        found, weights = [0.0, 0.0, 0.0], 0.0
        for i, count in enumerate(counts):
            for q in range(count):
                (s, a, _), (t, b, _) = ([x[i, q].double().tolist() for x in y[:2]] + [0] for y in (ours, theirs))
                exponentials = [math.exp(x) for x in t]
                best = max(exponentials[:CLASSES])
                weight = best / sum(exponentials) if len(t) > CLASSES else best / (1 + best)
                a, b = corners(a), corners(b)
                weights += weight
                for k, value in enumerate((naive_kl(s, t), l1(a, b), 1 - iou_and_giou(a, b)[1])):
                    found[k] += weight * value
        sums = [each + value / weights for each, value in zip(sums, found, strict=True)]
    return sums


@pytest.mark.parametrize("softmax", [False, True])
def test_terms_at_the_objects_equal_a_loop(softmax):
    """The second image has one object, so its second query fills a gap."""
    student, teacher = (layers(seed, queries=2, softmax=softmax) for seed in (1, 2))
    exchange = Exchange(asked_at([], student), asked_at([], teacher))
    terms = method(**QUERY, cls_weight=3, box_weight=4, giou_weight=7)(exchange)
    assert terms.pop("left_out") == 0
    assert list(terms) == ["cls", "box", "giou"]
    for value, weight, naive in zip(terms.values(), (3, 4, 7), naive_queries(student, teacher, (2, 1)), strict=True):
        assert value.item() == pytest.approx(weight * naive, rel=1e-5)
    sum(terms.values()).backward()
    assert all(layer[0].grad.any() and layer[1].grad.any() for layer in student)
    assert all(x.grad is None for layer in teacher for x in layer)


def test_both_decoders_are_asked_for_the_same_thing_at_the_same_place():
    seen = []
    method(**QUERY)(Exchange(*(asked_at(seen, layers(seed, queries=2)) for seed in (1, 2))))
    (content, boxes), (their_content, their_boxes) = seen
    assert torch.equal(content, their_content)
    assert torch.equal(boxes, their_boxes)
    assert boxes[0].tolist() == OBJECTS.boxes[0].tolist()
    assert boxes[1].tolist() == [OBJECTS.boxes[1][0].tolist(), [0, 0, 30, 40]]
    assert not content[1, 1].any()
    again = []
    method(**QUERY)(Exchange(*(asked_at(again, layers(seed, queries=2)) for seed in (1, 2))))
    assert torch.equal(again[0][0], content)
    wider = []
    method(teacher_width=8, **QUERY)(Exchange(*(asked_at(wider, layers(seed, queries=2)) for seed in (1, 2))))
    assert [each[0].shape[-1] for each in wider] == [6, 8]


def test_each_image_gets_as_many_queries_as_were_asked_for():
    boxes, labels = filled(OBJECTS, 1, CLASSES)
    assert boxes.tolist() == [[each.tolist()] for each in (OBJECTS.boxes[0][0], OBJECTS.boxes[1][0])]
    assert labels.tolist() == [[0], [1]]
    boxes, labels = filled(batch(), 2, CLASSES)
    assert boxes.tolist() == [[[0.0, 0.0, width, height]] * 2 for height, width in SIZES]
    assert labels.tolist() == [[CLASSES] * 2] * 2
    with pytest.raises(KDError, match=r"CLoCKDistill\(queries=0\)"):
        CLoCKDistill(queries=0)


def test_objects_without_a_query_are_counted():
    exchange = Exchange(*(asked_at([], layers(seed, queries=1)) for seed in (1, 2)))
    assert method(**{**QUERY, "queries": 1})(exchange)["left_out"] == 1


def test_a_batch_without_objects_has_no_loss():
    exchange = Exchange(*(asked_at([], layers(seed, queries=2), batch()) for seed in (1, 2)))
    assert all(x.item() == 0 for x in method(**QUERY)(exchange).values())


def test_a_repaired_teacher_is_compared_with_what_its_earlier_layers_knew():
    teacher = layers(2, queries=2)
    said = [layers(2, queries=2), teacher]
    plain, repaired = (
        method(**QUERY, repair=repair)(Exchange(*(asked_at([], each) for each in said))) for repair in (False, True)
    )
    assert all(x.item() == pytest.approx(0, abs=1e-6) for x in plain.values())
    assert all(x.item() >= 0 for x in repaired.values())
    assert CLoCKDistill(repair=True).vanishing == ("foreground", "background")


def test_what_cannot_be_compared_is_refused_with_what_to_set():
    other = spec(priors=PriorKind.QUERIES, priors_per_cell=(), bins=(), prior_form="points of 8", strides=(8,))
    assert "CLoCKDistill(foreground_weight=0, background_weight=0)" in CLoCKDistill().refuses(other, QUERIES)
    assert CLoCKDistill(**QUERY).refuses(other, QUERIES) is None
