import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kdtoolkit import Distiller, IncompatibleError
from kdtoolkit.contract import (
    Batch,
    DetectorAdapter,
    DetectorSpec,
    Exchange,
    HeadTrace,
    Predictions,
    PriorKind,
    Priors,
    View,
)
from kdtoolkit.methods.kd_detr import KDDETR
from kdtoolkit.methods.queries import box_distances, centres_and_sizes
from tests.conftest import tiny_gfl
from tests.methods import _decoders as decoders
from tests.methods._views import CLASSES, batch, spec

QUERIES = spec(priors=PriorKind.QUERIES, priors_per_cell=(), bins=(), prior_form="points of 4")
BATCH = batch([], [])  # 64 x 48 and 40 x 30


class TinyQueries(nn.Module):
    """A detector of queries: each looks at the image's mean feature, and says a class and a box around its point."""

    def __init__(self, seed, queries=6):
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = nn.Conv2d(3, 4, 16, 16)
        self.queries = nn.Parameter(torch.randn(queries, 4))
        self.classes, self.boxes = nn.Linear(4, CLASSES), nn.Linear(4, 4)


class QueryAdapter(DetectorAdapter):
    """Boxes are (centre, size) relative to each image; labels go to the first queries."""

    def describe(self):
        return DetectorSpec(
            name="TinyQueries",
            num_classes=CLASSES,
            strides=(16,),
            channels=(4,),
            priors=PriorKind.QUERIES,
            prior_form="points of 4",
        )

    @classmethod
    def matches(cls, model):
        return isinstance(model, TinyQueries)

    def prepare(self, images, targets=None, like=None):
        sizes = tuple(tuple(image.shape[1:]) for image in images)
        canvas = images[0].new_zeros(len(images), 3, 64, 64)
        for canvas_image, image in zip(canvas, images, strict=True):
            canvas_image[:, : image.shape[1], : image.shape[2]] = image
        boxes, labels = ([target[name] for target in targets or ()] for name in ("boxes", "labels"))
        return Batch(canvas, sizes, sizes, sizes, tuple(boxes), tuple(labels))

    def features(self, batch):
        return (self.model.backbone(batch.images),)

    def head(self, features, batch, priors=None, stages=None):
        n = len(batch.sizes)
        if priors is None:
            queries = self.model.queries.expand(n, -1, -1)
            priors = Priors(torch.zeros(*queries.shape[:2], 4), torch.zeros(0), context=queries)
        state = priors.context + features[0].float().mean((2, 3))[:, None]
        scale = torch.tensor([(w, h) * 2 for h, w in batch.sizes], dtype=torch.float32)[:, None]
        regression = self.model.boxes(state).float().sigmoid()
        return HeadTrace((), Predictions(self.model.classes(state).float(), regression, priors, decoder(scale)))

    def task_losses(self, trace, batch):
        return {"cls": trace.predictions.logits.square().mean()}, None

    def detections(self, trace, batch):
        raise NotImplementedError


def decoder(scale):
    def decode(regression, priors):
        centre, size = regression.chunk(2, -1)
        return torch.cat([centre - size / 2, centre + size / 2], -1) * scale

    return decode


def outputs(seed, batch=BATCH, classes=CLASSES, queries=7, dtype=torch.float32, activation="sigmoid"):
    """Logits (2, 7, K) and boxes (2, 7, 4), leaves, and what a view of them shows."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(len(batch.sizes), queries, classes, generator=generator)
    relative = 0.2 + 0.3 * torch.rand(len(batch.sizes), queries, 4, generator=generator)
    logits, relative = (x.to(dtype).requires_grad_() for x in (logits, relative))
    scale = torch.tensor([(w, h) * 2 for h, w in batch.sizes], dtype=torch.float32)[:, None]
    priors = Priors(torch.zeros(len(batch.sizes), queries, 4), torch.zeros(0))
    head = Predictions(logits.float(), relative.float(), priors, decoder(scale), activation=activation)
    return logits, relative, head


def step(student, teacher, method=None, batches=(BATCH, BATCH)):
    """Both heads say the same whatever the queries."""
    views = []
    for head, each in zip((student, teacher), batches, strict=True):
        trace = HeadTrace((), head)
        adapter = SimpleNamespace(spec=QUERIES, head=lambda *_, trace=trace: trace)
        views.append(View(adapter, each, (), trace))
    return (method or KDDETR())(Exchange(*views))


def giou(a, b):
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    left, right = max(ax - aw / 2, bx - bw / 2), min(ax + aw / 2, bx + bw / 2)
    top, bottom = max(ay - ah / 2, by - bh / 2), min(ay + ah / 2, by + bh / 2)
    intersection = max(right - left, 0) * max(bottom - top, 0)
    union = aw * ah + bw * bh - intersection
    width = max(ax + aw / 2, bx + bw / 2) - min(ax - aw / 2, bx - bw / 2)
    height = max(ay + ah / 2, by + bh / 2) - min(ay - ah / 2, by - bh / 2)
    return intersection / union - (width * height - union) / (width * height)


def naive(student, teacher, temperature, *, background):
    """Query by query, on boxes relative to the image."""
    cls = box = overlap = total = 0.0
    for i in range(student[0].shape[0]):
        for q in range(student[0].shape[1]):
            s, t = (x[0][i, q].double().tolist() for x in (student, teacher))
            if background:
                exponentials = [math.exp(v) for v in t]
                weight = max(exponentials[:-1]) / sum(exponentials)
            else:
                weight = max(1 / (1 + math.exp(-v)) for v in t)
            ours, theirs = ([math.exp(v / temperature) for v in x] for x in (s, t))
            ours, theirs = ([v / sum(x) for v in x] for x in (ours, theirs))
            kl = sum(b * math.log(b / a) for a, b in zip(ours, theirs, strict=True))
            cls += weight * kl * temperature**2 / len(s)
            a, b = (x[1][i, q].double().tolist() for x in (student, teacher))
            box += weight * sum(abs(x - y) for x, y in zip(a, b, strict=True)) / 4
            overlap += weight * (1 - giou(a, b))
            total += weight
    return cls, box / total, overlap / total


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_terms_equal_a_loop(activation):
    classes = CLASSES + (activation == "softmax")
    *student, ours = outputs(1, classes=classes, activation=activation)
    *teacher, theirs = outputs(2, classes=classes, activation=activation)
    terms = step(ours, theirs, KDDETR(cls_weight=3, box_weight=4, giou_weight=7, temperature=2))
    expected = naive(student, teacher, 2, background=activation == "softmax")
    assert tuple(terms) == KDDETR.terms
    for value, weight, naive_value in zip(terms.values(), (3, 4, 7), expected, strict=True):
        assert value.item() == pytest.approx(weight * naive_value, rel=1e-4)


def test_images_of_other_sizes_are_compared_relative_to_them():
    larger = Batch(BATCH.images, *(((128, 96), (80, 60)),) * 3, BATCH.boxes, BATCH.labels)
    ours, theirs = outputs(1)[-1], outputs(2, larger)[-1]
    terms = step(ours, theirs, batches=(BATCH, larger))
    same = step(outputs(1)[-1], outputs(2)[-1])
    assert {n: x.item() for n, x in terms.items()} == pytest.approx({n: x.item() for n, x in same.items()}, rel=1e-5)


def test_twins_are_at_the_minimum():
    *_, ours = outputs(1)
    terms = step(ours, outputs(1)[-1])
    assert all(term.item() == pytest.approx(0, abs=1e-6) for term in terms.values())
    assert all(term > 1e-3 for term in step(ours, outputs(2)[-1]).values())


def test_gradient_reaches_the_student_alone():
    (logits, relative, ours), (teacher_logits, teacher_relative, theirs) = outputs(1), outputs(2)
    sum(step(ours, theirs).values()).backward()
    assert logits.grad.any()
    assert relative.grad.any()
    assert teacher_logits.grad is None
    assert teacher_relative.grad is None


def test_half_precision_gives_float32_terms():
    ours, theirs = outputs(1, dtype=torch.bfloat16)[-1], outputs(2, dtype=torch.bfloat16)[-1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = step(ours, theirs)
    assert all(x.dtype == torch.float32 for x in half.values())
    assert {n: x.item() for n, x in half.items()} == {n: x.item() for n, x in step(ours, theirs).items()}


def test_boxes_without_extent_and_unsure_teachers_are_finite():
    student = torch.zeros(1, 3, 4, requires_grad=True)
    l1, overlap = box_distances(student, torch.ones(1, 3, 4))
    (l1.sum() + overlap.sum()).backward()
    assert torch.isfinite(student.grad).all()
    assert centres_and_sizes(torch.tensor([2.0, 4, 8, 6])).tolist() == [5, 5, 6, 2]
    logits, relative, ours = outputs(1)
    _, _, theirs = outputs(2)
    theirs.logits.data.fill_(-200)
    terms = step(ours, theirs)
    sum(terms.values()).backward()
    assert all(torch.isfinite(x) for x in terms.values())
    assert torch.isfinite(logits.grad).all()
    assert torch.isfinite(relative.grad).all()


@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_a_step_goes_through_both_decoders_with_one_set_of_queries(batch, whose):
    images, targets = batch
    targets[1] = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    teacher, student = TinyQueries(1, queries=5), TinyQueries(2, queries=9)
    distiller = Distiller(QueryAdapter(teacher), QueryAdapter(student), [KDDETR(priors=whose)])
    losses = distiller(images, targets)
    kd = [loss for name, loss in losses.items() if name.startswith("kddetr/")]
    assert len(kd) == 3
    assert all(torch.isfinite(loss) and loss > 0 for loss in kd)
    sum(kd).backward()
    assert student.backbone.weight.grad.any()
    assert student.boxes.weight.grad.any()
    assert (student.queries.grad is not None) == (whose == "student")
    assert all(p.grad is None for p in teacher.parameters())


def test_the_same_weights_cost_nothing_although_queries_differ(batch):
    teacher, student = TinyQueries(1), TinyQueries(1)
    with torch.no_grad():
        student.queries.add_(1)
    losses = Distiller(QueryAdapter(teacher), QueryAdapter(student), [KDDETR()])(*batch)
    assert all(losses[f"kddetr/{term}"].item() == pytest.approx(0, abs=1e-5) for term in KDDETR.terms)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"priors": PriorKind.PROPOSALS}, "it compares queries, and the student predicts at proposals"),
        (
            {"prior_form": "boxes of 8"},
            "the student.s are boxes of 8, the teacher.s points of 4",
        ),
        ({"activation": "softmax"}, "the student's class scores are a softmax, the teacher's a sigmoid"),
    ],
)
def test_queries_that_do_not_correspond_are_refused(change, reason):
    facts = {"priors": PriorKind.QUERIES, "priors_per_cell": (), "bins": (), "prior_form": "points of 4"}
    assert KDDETR().refuses(QUERIES, QUERIES) is None
    assert re.search(reason, KDDETR().refuses(spec(**(facts | change)), QUERIES))


def test_a_softmax_over_one_class_is_refused_and_boxes_alone_are_not():
    one = spec(priors=PriorKind.QUERIES, priors_per_cell=(), bins=(), prior_form="points of 4", num_classes=1)
    assert "Use KDDETR(cls_weight=0)" in KDDETR().refuses(one, one)
    boxes = KDDETR(cls_weight=0)
    assert boxes.refuses(one, one) is None
    assert set(step(outputs(1, classes=1)[-1], outputs(2, classes=1)[-1], boxes)) == {"box", "giou"}


def test_the_published_giou_adds_to_union_and_hull_in_shares_of_the_image():
    a, b = torch.tensor([[10.0, 10, 14, 16]]), torch.tensor([[11.0, 12, 17, 15]])
    a, b = (x / torch.tensor([800.0, 600, 800, 600]) for x in (a, b))
    found = box_distances(a, b, 1e-6)[1].item()
    area = 800 * 600
    intersection, union, hull = 9 / area, 33 / area, 42 / area
    assert found == pytest.approx(1 - intersection / (union + 1e-6) + (hull - union) / (hull + 1e-6), rel=1e-5)
    assert found > box_distances(a, b)[1].item() + 1e-3
    published = KDDETR(published_giou=True)
    assert published.giou_eps == 1e-6
    assert published.vanishing == ("cls", "box")  # equal boxes have a GIoU below 1


def test_detectors_on_a_grid_are_refused():
    with pytest.raises(IncompatibleError, match="it compares queries, and the student predicts at anchors"):
        Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [KDDETR()])


def test_with_all_layers_each_of_the_students_is_compared_with_the_teachers_last():
    shown = decoders.batch([[(4, 6, 30, 40)], []])
    ours, theirs = decoders.layers(1), decoders.layers(2)

    def terms(student, **options):
        exchange = Exchange(decoders.view(student, shown, given=student), decoders.view(theirs, shown))
        return KDDETR(**options)(exchange)

    each = [terms([layer]) for layer in ours]
    found = terms(ours, layers="all")
    for name, value in found.items():
        torch.testing.assert_close(value, sum(one[name] for one in each))
    torch.testing.assert_close(terms(ours)["cls"], each[1]["cls"])
