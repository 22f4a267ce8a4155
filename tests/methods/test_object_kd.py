import math
from types import SimpleNamespace

import pytest
import torch

from kdtoolkit import Distiller, IncompatibleError
from kdtoolkit.classes import ClassMap
from kdtoolkit.compatibility import why_refused
from kdtoolkit.contract import Assignment, Batch, Exchange, HeadTrace, Predictions, PriorKind, Priors, View
from kdtoolkit.methods import ObjectKD
from kdtoolkit.methods.object_kd import Sides, best_predictions, carried, class_logit
from tests.conftest import tiny_fcos, tiny_gfl
from tests.methods._views import CLASSES, GRID, STRIDES, spec

# Two images; the second is smaller than the canvas. Two objects of the first have the same box.
BOXES = (
    torch.tensor([[4.0, 6, 30, 40], [4.0, 6, 30, 40], [20.0, 30, 46, 60], [0.0, 0, 6, 5]]),
    torch.tensor([[2.0, 3, 26, 30]]),
)
LABELS = (torch.tensor([0, 2, 1, 1]), torch.tensor([2]))
SIZES = ((64, 48), (40, 30))
BATCH = Batch(torch.zeros(2, 3, 64, 48), SIZES, ((64, 48), (48, 32)), SIZES, BOXES, LABELS)
DOUBLED = tuple((2 * height, 2 * width) for height, width in SIZES)
LARGER = Batch(torch.zeros(2, 3, 128, 96), DOUBLED, DOUBLED, SIZES)
BINS = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
K = CLASSES


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(seed, bins=BINS, activation="sigmoid", scale=1.0):
    """A dense head: points on a grid; box sides in strides, as distributions if there are bins."""
    points, strides = [], []
    for stride, (height, width) in zip(STRIDES, GRID, strict=True):
        for row in range(height):
            for column in range(width):
                points.append([(column + 0.5) * stride * scale, (row + 0.5) * stride * scale] * 2)
                strides.append(stride * scale)
    priors = Priors(torch.tensor(points), torch.tensor(strides), GRID)
    sides = random(2, len(points), 4, *([len(bins)] if bins else []), seed=seed)
    values = torch.tensor(bins)

    def decode(regression, priors):
        distance = regression.softmax(-1) @ values if bins else regression.abs() + 0.5
        distance = distance * priors.strides[:, None]
        return torch.cat([priors.boxes[..., :2] - distance[..., :2], priors.boxes[..., :2] + distance[..., 2:]], -1)

    logits = 2 * random(2, len(points), K + (activation == "softmax"), seed=seed + 1)
    return Predictions(logits.requires_grad_(), sides.requires_grad_(), priors, decode, activation=activation)


def proposals(seed, scale=1.0, count=9, activation="softmax"):
    """A head of two stages: some boxes near the objects, and none near the small one."""
    boxes = torch.stack([own[torch.arange(count) % min(3, len(own))] for own in BOXES])
    boxes = (boxes + 3 * random(*boxes.shape, seed=seed)) * scale
    logits = 2 * random(2, count, K + (activation == "softmax"), seed=seed + 1)
    priors = Priors(torch.zeros(2, count, 4), torch.zeros(0))
    return Predictions(logits.requires_grad_(), boxes.requires_grad_(), priors, lambda x, _: x, activation=activation)


def assigned(predictions, rows):
    """An assignment of `rows`: (image, prior, object)."""
    shape = predictions.logits.shape[:2]
    labels, boxes = torch.full(shape, K), torch.zeros(*shape, 4)
    for image, prior, index in rows:
        labels[image, prior] = LABELS[image][index]
        boxes[image, prior] = BOXES[image][index] + 1e-5  # scaled and back
    return Assignment(labels < K, labels, boxes, torch.ones(shape), torch.ones(()))


ROWS = [(0, 0, 0), (0, 2, 0), (0, 5, 1), (0, 7, 3), (0, 8, 0), (1, 3, 0), (1, 4, 0)]  # none for the first image's third


def step(student, teacher, rows=ROWS, method=None, batches=(BATCH, BATCH), bins=((), ())):
    assignments = assigned(student, rows), None
    views = []
    for head, batch, found, own in zip((student, teacher), batches, assignments, bins, strict=True):
        adapter = SimpleNamespace(spec=spec(bins=own))
        views.append(View(adapter, batch, (), HeadTrace((), head), found))
    return (method or ObjectKD())(Exchange(*views))


def probability(predictions, image, prior, label):
    logits = predictions.logits[image, prior].double().tolist()
    if predictions.activation == "sigmoid":
        return 1 / (1 + math.exp(-logits[label]))
    return math.exp(logits[label]) / sum(map(math.exp, logits))


def overlaps(a, b):
    """IoU and GIoU of two boxes."""
    area = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    union = sum(area) - both
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return both / union, both / union - (hull - union) / hull


def beside(box, object_box, iou):
    """How good a prediction's box is beside the teacher's, whose IoU with the object is given."""
    return min(1, overlaps(box, object_box)[0] / iou)


def naive_best(teacher, boxes, image, index):
    """The teacher's best prediction for an object: prior, box, score, IoU; a weight of 0 if none overlaps."""
    best = (0.0, None, None, 0.0, 0.0)
    for prior, box in enumerate(boxes[image].double().tolist()):
        score = probability(teacher, image, prior, LABELS[image][index].item())
        iou, _ = overlaps(box, BOXES[image][index].double().tolist())
        best = max(best, (score * iou, prior, box, score, iou), key=lambda found: found[0])
    return best


def naive(student, teacher, rows, scale=1.0):
    """`cls` and `box` of weight 1, and the three counts, object by object."""
    ours, theirs = student.boxes.detach(), teacher.boxes.detach() / scale
    cls = box = total = 0.0
    counts = dict.fromkeys(ObjectKD.metrics, 0)
    for image in range(2):
        for index in range(len(BOXES[image])):
            quality, _, their_box, score, iou = naive_best(teacher, theirs, image, index)
            object_box = BOXES[image][index].double().tolist()
            own = [prior for i, prior, object_ in rows if (i, object_) == (image, index)]
            covers = score >= 0.05 and iou >= 0.5
            counts["missed" if not covers else "covered" if own else "unassigned"] += 1
            total += bool(own)
            if not own or not quality:
                continue
            height, width = SIZES[image]
            for prior in own:
                s = probability(student, image, prior, LABELS[image][index].item())
                our_box = ours[image, prior].double().tolist()
                good = beside(our_box, object_box, iou)
                target = score * good
                cls -= quality / len(own) * (target * math.log(s) + (1 - target) * math.log(1 - s))
                l1 = 0.0
                for low, size in ((0, width), (1, height)):
                    (a, b), (c, d) = ((x[low], x[low + 2]) for x in (our_box, their_box))
                    l1 += (abs(a + b - c - d) / 2 + abs(b - a - d + c)) / size
                box += good * quality / len(own) * (l1 + 2 * (1 - overlaps(our_box, their_box)[1]))
    return cls / max(total, 1), box / max(total, 1), counts


@pytest.mark.parametrize(
    ("student", "teacher", "scale"),
    [
        (dense(1), proposals(3), 1.0),
        (dense(1), proposals(3, scale=2.0), 2.0),
        (proposals(1), dense(3, bins=()), 1.0),
        (proposals(1, count=12), dense(3, bins=(), scale=2.0), 2.0),
        (proposals(1, activation="sigmoid"), proposals(5, count=4), 1.0),
        (dense(1, activation="softmax"), dense(7), 1.0),
    ],
    ids=["two stages", "two stages, larger", "dense", "dense, larger", "queries", "dense softmax"],
)
def test_terms_and_counts_equal_a_loop(student, teacher, scale):
    found = step(student, teacher, batches=(BATCH, BATCH if scale == 1 else LARGER))
    cls, box, counts = naive(student, teacher, ROWS, scale)
    assert found["cls"].item() == pytest.approx(cls, rel=1e-4)
    assert found["box"].item() == pytest.approx(box, rel=1e-4)
    assert {name: found[name].item() for name in ObjectKD.metrics} == counts
    assert sum(counts.values()) == 5
    weighted = step(student, teacher, method=ObjectKD(cls_weight=0, box_weight=3))
    assert "cls" not in weighted
    if scale == 1:
        assert weighted["box"].item() == pytest.approx(3 * box, rel=1e-4)


def test_all_three_counts():
    """The small object of the first image is missed; no prediction answers for its third."""
    sure = proposals(3)
    with torch.no_grad():
        sure.logits.fill_(1.0)
    found = step(dense(1), sure)
    assert {name: found[name].item() for name in ObjectKD.metrics} == {"covered": 3, "missed": 1, "unassigned": 1}


def places(point, stride, bins):
    """Where the bins of each side lie in the image."""
    x, y = point
    return [[x - b * stride for b in bins], [y - b * stride for b in bins]] + [
        [centre + b * stride for b in bins] for centre in (x, y)
    ]


def spread(probabilities, places, own_places):
    """Each probability is divided between the two nearest places of the student; beyond the ends the last takes it."""
    found = [0.0] * len(own_places)
    order = sorted(range(len(own_places)), key=lambda i: own_places[i])
    for probability_, place in zip(probabilities, places, strict=True):
        below = [i for i in order if own_places[i] <= place]
        above = [i for i in order if own_places[i] > place]
        if not below or not above:
            found[(below or above)[-1 if below else 0]] += probability_
            continue
        low, high = below[-1], above[0]
        share = (place - own_places[low]) / (own_places[high] - own_places[low])
        found[low] += probability_ * (1 - share)
        found[high] += probability_ * share
    return found


@pytest.mark.parametrize(("bins", "scale"), [(BINS, 1.0), ((0.0, 0.5, 2.0, 7.0), 1.0), (BINS, 2.0)])
def test_the_distribution_term_equals_a_loop(bins, scale):
    student, teacher = dense(1), dense(4, bins=bins, scale=scale)
    temperature = 2.0
    method = ObjectKD(cls_weight=0, box_weight=0, distribution_weight=3.0, temperature=temperature)
    batches = BATCH, BATCH if scale == 1 else LARGER
    found = step(student, teacher, method=method, batches=batches, bins=(BINS, bins))["distribution"]
    expected = total = 0.0
    for image in range(2):
        for index in range(len(BOXES[image])):
            own = [prior for i, prior, object_ in ROWS if (i, object_) == (image, index)]
            quality, best, _, _, iou = naive_best(teacher, teacher.boxes.detach() / scale, image, index)
            total += bool(own)
            for prior in own:
                boxes = student.boxes.detach()[image, prior].double().tolist(), BOXES[image][index].double().tolist()
                weight = quality / len(own) * beside(*boxes, iou) if quality else 0.0
                heads = ((student, prior, BINS, 1.0), (teacher, best, bins, scale))
                ours, theirs = (
                    places(
                        (head.priors.boxes[at, :2] / factor).tolist(), head.priors.strides[at].item() / factor, values
                    )
                    for head, at, values, factor in heads
                )
                for side in range(4):
                    s, t = (
                        (head.regression[i, at, side].double() / temperature).softmax(-1).tolist()
                        for (head, at, *_), i in zip(heads, (image, image), strict=True)
                    )
                    target = spread(t, theirs[side], ours[side])
                    kl = sum(a * math.log(a / b) for a, b in zip(target, s, strict=True) if a)
                    expected += weight * kl / 4 * temperature**2
    assert found.item() == pytest.approx(3.0 * expected / max(total, 1), rel=1e-3)


def test_distributions_over_the_same_bins_stay_as_they_are():
    bins = torch.tensor([-3.0, -1, 0, 0.5, 4])
    sides = Sides(random(6, 4, seed=0), torch.tensor([-2.0, -2, 2, 2]).expand(6, 4), bins)
    probabilities = random(6, 4, 5, seed=1).softmax(-1)
    assert torch.allclose(carried(probabilities, sides, sides), probabilities, atol=1e-5)
    flat = Sides(sides.origin, torch.zeros(6, 4), bins)
    assert torch.isfinite(carried(probabilities, sides, flat)).all()
    assert torch.allclose(carried(probabilities, flat, sides).sum(-1), torch.ones(6, 4), atol=1e-5)


def test_autocast_does_not_round_the_carried_distributions():
    probabilities, bins = random(6, 4, 5, seed=1).softmax(-1), torch.arange(5.0)
    ours, theirs = (Sides(torch.full((6, 4), at), torch.full((6, 4), 2.0), bins) for at in (0.0, 0.5))
    with torch.autocast("cpu", torch.bfloat16):
        found = carried(probabilities, theirs, ours)
    assert torch.equal(found, carried(probabilities, theirs, ours))


def test_there_is_no_distribution_term_unless_both_have_bins():
    assert "distribution" not in step(dense(1), dense(4, bins=()), bins=(BINS, ()))
    assert "distribution" not in step(dense(1, bins=()), dense(4), bins=((), BINS))
    assert "distribution" not in step(dense(1), dense(4), method=ObjectKD(distribution_weight=0), bins=(BINS, BINS))


def test_a_softmax_is_a_sigmoid_of_the_class_against_the_rest():
    logits, labels = random(5, K + 1, seed=0), torch.tensor([0, 1, 2, 0, 1])
    expected = logits.softmax(-1).gather(1, labels[:, None])[:, 0]
    assert torch.allclose(class_logit(logits, labels, "softmax").sigmoid(), expected)


@pytest.mark.parametrize("boxes", [torch.tensor([[90.0, 90, 99, 99]]), torch.full((1, 4), torch.inf)])
def test_what_the_teacher_misses_teaches_nothing(boxes):
    student, teacher = dense(1), proposals(3, count=1)
    with torch.no_grad():
        teacher.regression.copy_(boxes)
    found = step(student, teacher)
    assert (found["cls"].item(), found["box"].item(), found["missed"].item()) == (0, 0, 5)
    (found["cls"] + found["box"]).backward()
    assert torch.isfinite(student.logits.grad).all()
    assert torch.isfinite(student.regression.grad).all()


@pytest.mark.parametrize("rows", [[], ROWS[:1]])
def test_without_objects_or_without_answers_terms_are_finite(rows):
    student = dense(1)
    found = step(student, proposals(3), rows=rows)
    (found["cls"] + found["box"]).backward()
    assert bool(student.logits.grad.any()) == bool(rows)
    assert found["covered"] + found["missed"] + found["unassigned"] == 5


def test_a_batch_that_the_teacher_hardly_knows_teaches_little():
    student, unsure = dense(1), proposals(3)
    with torch.no_grad():
        unsure.logits[:] = torch.tensor([-4.0] * K + [4.0])
    terms = step(student, unsure)
    assert 0 < terms["box"].item() < 1e-2
    assert terms["missed"] == 5


def test_gradient_reaches_the_student_alone():
    student, teacher = dense(1), dense(4)
    terms = step(student, teacher, bins=(BINS, BINS))
    sum(terms[name] for name in ObjectKD.terms).backward()
    assert student.logits.grad.any()
    assert student.regression.grad.any()
    assert teacher.logits.grad is None
    assert teacher.regression.grad is None
    assert not any(terms[name].requires_grad for name in ObjectKD.metrics)


def test_best_predictions_are_finite_without_objects():
    index, score, iou = best_predictions(torch.rand(7, 4), torch.rand(0, 7), torch.zeros(0, 4))
    assert (index.shape, score.shape, iou.shape) == ((0,), (0,), (0,))


def test_a_student_without_an_assignment_is_refused():
    silent = spec(assigns=False, name="Silent")
    assert "the adapter of Silent has no `assign`" in why_refused(ObjectKD, silent, spec())
    assert why_refused(ObjectKD, spec(), silent) is None
    assert why_refused(ObjectKD, spec(priors=PriorKind.QUERIES, bins=()), spec()) is None
    with pytest.raises(IncompatibleError, match="compares class scores"):
        Distiller(tiny_gfl(seed=1, num_classes=4), tiny_gfl(seed=2), [ObjectKD()])


def test_class_lists_may_differ(batch):
    shared = ClassMap(student=(0, 2), teacher=(3, 1))
    distiller = Distiller(tiny_fcos(seed=1, num_classes=5), tiny_gfl(seed=2), [ObjectKD()], class_map=shared)
    losses = distiller(*batch)
    counted = sum(value.item() for value in losses.metrics.values())
    assert counted == sum((target["labels"] != 1).sum().item() for target in batch[1])
    (losses["objectkd/cls"] + losses["objectkd/box"]).backward()
    assert any(p.grad is not None and p.grad.any() for p in distiller.student.parameters())
