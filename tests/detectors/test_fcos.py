import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdtoolkit import Distiller
from kdtoolkit.contract import Batch, PriorKind
from kdtoolkit.detectors import FCOS
from kdtoolkit.detectors.fcos import FCOSAssigner, points
from kdtoolkit.detectors.published import rename_published
from kdtoolkit.libraries import adapt
from kdtoolkit.methods import CrossKD
from kdtoolkit.models import build_model
from tests._traced import traced
from tests.conftest import BACKBONE, TINY, tiny_fcos

STRIDES = (8, 16, 32)
GRID = ((8, 10), (4, 5), (2, 3))
CLASSES = 4
PRIORS = points(GRID, STRIDES, torch.device("cpu"))
JOURNAL = {"norm_on_bbox": True, "centerness_on_reg": True, "center_sampling_radius": 1.5}
BOTH = pytest.mark.parametrize("options", [{}, JOURNAL], ids=["first", "journal"])


def batch_of(counts, seed):
    """Boxes on a grid of 4 pixels, as points are: so that distances fall on the limits of levels and boxes too."""
    generator = torch.Generator().manual_seed(seed)
    boxes, labels = [], []
    for count in counts:
        corner = torch.randint(0, 13, (count, 2), generator=generator)
        size = torch.randint(1, 50, (count, 2), generator=generator)
        boxes.append(torch.cat([corner, corner + size], 1) * 4.0)
        labels.append(torch.randint(0, CLASSES, (count,), generator=generator))
    sizes = ((64, 80),) * len(counts)
    return Batch(torch.zeros(len(counts), 3, 64, 80), sizes, sizes, sizes, tuple(boxes), tuple(labels))


def assigned_by_loops(boxes, labels, radius):
    """One image: label and box of each point, and the sum of centerness over positives."""
    found, targets, total = [], [], 0.0
    limits = {8: (0, 64), 16: (64, 128), 32: (128, math.inf)}
    for (height, width), stride in zip(GRID, STRIDES, strict=True):
        for y in range(height):
            for x in range(width):
                px, py = (x + 0.5) * stride, (y + 0.5) * stride
                smallest, label, target, quality = math.inf, CLASSES, [0.0] * 4, 0.0
                for (x1, y1, x2, y2), candidate in zip(boxes.tolist(), labels.tolist(), strict=True):
                    left, top, right, bottom = px - x1, py - y1, x2 - px, y2 - py
                    low, high = limits[stride]
                    near = radius is None or (
                        abs(px - (x1 + x2) / 2) < radius * stride and abs(py - (y1 + y2) / 2) < radius * stride
                    )
                    inside = min(left, top, right, bottom) > 0
                    fits = low <= max(left, top, right, bottom) <= high
                    if near and inside and fits and (x2 - x1) * (y2 - y1) < smallest:
                        smallest, label, target = (x2 - x1) * (y2 - y1), candidate, [x1, y1, x2, y2]
                        horizontal = min(left, right) / max(left, right)
                        quality = math.sqrt(horizontal * min(top, bottom) / max(top, bottom))
                found.append(label)
                targets.append(target)
                total += quality
    return found, torch.tensor(targets), total


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    seed=st.integers(0, 2**20),
    radius=st.sampled_from([None, 0.75, 1.5]),
)
def test_agrees_with_a_loop_over_images_points_and_boxes(counts, seed, radius):
    batch = batch_of(counts, seed)
    assignment = FCOSAssigner(radius)(PRIORS, batch, CLASSES)
    total = 0.0
    for i in range(len(counts)):
        found, targets, quality = assigned_by_loops(batch.boxes[i], batch.labels[i], radius)
        positive = torch.tensor(found) < CLASSES
        assert assignment.labels[i].tolist() == found
        assert torch.equal(assignment.boxes[i][positive], targets[positive])
        total += quality
    assert assignment.normaliser.item() == pytest.approx(total or 1.0, rel=1e-4)
    assert (assignment.weights == 1).all()


def test_without_a_positive_crosskd_stays_of_ordinary_size(batch):
    teacher, student = tiny_fcos(seed=0), tiny_fcos(seed=1)
    assignment = FCOSAssigner()(PRIORS, batch_of([0, 0], 0), CLASSES)
    assert not assignment.positive(CLASSES).any()
    assert assignment.normaliser.item() == 1
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * 2
    losses = Distiller(teacher, student, methods=[CrossKD.for_fcos()])(batch[0], empty)
    assert 0 < losses.total.item() < 1e3


def trace_of(model, batch):
    adapter = adapt(model)
    prepared, _, trace = traced(adapter, batch)
    return adapter, prepared, trace


@BOTH
def test_boxes_are_around_the_middle_of_the_cell(options):
    model = tiny_fcos(seed=0, **options)
    priors = model.priors(((1, 2), (1, 1), (1, 1)))
    regression = torch.tensor([[1.0, 2.0, 0.5, -1.0]]).expand(4, 4)
    boxes = model.decode(regression, priors)
    if options:  # in strides, not below 0
        assert boxes[1].tolist() == pytest.approx([12 - 8, 4 - 16, 12 + 4, 4])
        assert boxes[3].tolist() == pytest.approx([16 - 32, 16 - 64, 16 + 16, 16])
    else:
        left, top, right, bottom = (math.exp(x) for x in (1, 2, 0.5, -1))
        assert boxes[1].tolist() == pytest.approx([12 - left, 4 - top, 12 + right, 4 + bottom])
        assert boxes[3].tolist() == pytest.approx([16 - left, 16 - top, 16 + right, 16 + bottom])


@BOTH
def test_losses_follow_their_formulas(options, batch):
    model = tiny_fcos(seed=0, **options)
    _, prepared, trace = trace_of(model, batch)
    predictions, assignment = trace.predictions, model.assign(trace.predictions, prepared)
    cls = box = quality = total = positives = 0.0
    boxes = predictions.boxes
    for i, image in enumerate(assignment.labels.tolist()):
        for a, label in enumerate(image):
            for k in range(model.num_classes):
                score = 1 / (1 + math.exp(-predictions.logits[i, a, k].item()))
                right, balance = (score, 0.25) if k == label else (1 - score, 0.75)
                cls -= balance * (1 - right) ** 2 * math.log(right)
            if label < model.num_classes:
                x, y = predictions.priors.boxes[a, :2].tolist()
                x1, y1, x2, y2 = assignment.boxes[i, a].tolist()
                u1, v1, u2, v2 = boxes[i, a].tolist()
                common = max(min(x2, u2) - max(x1, u1), 0) * max(min(y2, v2) - max(y1, v1), 0)
                iou = common / ((x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - common)
                horizontal, vertical = sorted((x - x1, x2 - x)), sorted((y - y1, y2 - y))
                centerness = math.sqrt(horizontal[0] / horizontal[1] * vertical[0] / vertical[1])
                box -= centerness * math.log(max(iou, 1e-6))
                logit = predictions.quality[i, a].item()
                quality += math.log(1 + math.exp(logit)) - centerness * logit
                total, positives = total + centerness, positives + 1
    losses = model.losses(predictions, assignment)
    assert losses["cls"].item() == pytest.approx(cls / positives, rel=1e-4)
    assert losses["box"].item() == pytest.approx(box / total, rel=1e-4)
    assert losses["centerness"].item() == pytest.approx(quality / positives, rel=1e-4)


@BOTH
def test_the_adapter_gives_the_models_losses_and_resumes_to_the_bit(options, batch):
    model = tiny_fcos(seed=0, **options).train()
    expected = {name: loss.item() for name, loss in model(*batch).items()}
    adapter, prepared, trace = trace_of(model, batch)
    assert {name: loss.item() for name, loss in adapter.task_losses(trace, prepared)[0].items()} == expected
    for stage, state in enumerate(trace.states):
        again = adapter.resume(state, stage, trace)
        for name in ("logits", "boxes", "quality"):
            assert torch.equal(getattr(again, name), getattr(trace.predictions, name)), (stage, name)
    assert adapter.spec.priors is PriorKind.POINTS


@BOTH
def test_centerness_comes_from_the_tower_asked_for(options, batch):
    adapter, _, trace = trace_of(tiny_fcos(seed=0, **options), batch)
    for branch in ("cls", "reg"):
        changed = {b: tuple(-x for x in maps) if b == branch else maps for b, maps in trace.states[-1].items()}
        same = torch.equal(adapter.resume(changed, 2, trace).quality, trace.predictions.quality)
        assert same == ((branch == "reg") != bool(options))


@BOTH
def test_without_objects_only_scores_are_trained(options, batch):
    model = tiny_fcos(seed=0, **options).train()
    losses = model(batch[0], [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * 2)
    assert losses["cls"] > 0
    assert losses["box"] == losses["centerness"] == 0
    sum(losses.values()).backward()
    assert model.predictors["cls"].weight.grad.any()
    assert not model.predictors["reg"].weight.grad.any()
    assert not model.predictors["quality"].weight.grad.any()


def test_a_relu_stands_between_the_coarser_levels(batch):
    model = tiny_fcos(seed=0, strides=(8, 16, 32, 64, 128)).eval()
    features = model.features(model.prepare(batch[0]).images)
    first, second = model.neck.extra_blocks.convs
    assert (features[3] < 0).any()
    assert torch.equal(features[3], first(features[2]))
    assert torch.equal(features[4], second(features[3].relu()))


def test_build_model_and_published_names():
    args = {**TINY, "backbone_args": BACKBONE, **JOURNAL}
    model = build_model("kdtoolkit/fcos", 4, args)
    assert isinstance(model, FCOS)
    assert model.assigner == FCOSAssigner(1.5) != FCOSAssigner()
    names = {"conv_cls": "cls", "conv_reg": "reg", "conv_centerness": "quality"}
    published = {f"bbox_head.{theirs}.bias": torch.ones(1) for theirs in names}
    published |= {f"bbox_head.scales.{i}.scale": torch.tensor(i + 1.0) for i in range(3)}
    renamed = rename_published(model, published)
    assert renamed.keys() == {f"predictors.{ours}.bias" for ours in names.values()} | {"scales"}
    assert renamed["scales"].tolist() == [1, 2, 3]
