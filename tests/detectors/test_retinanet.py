import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from kdtoolkit.contract import Batch
from kdtoolkit.detectors import RetinaNet, load_published
from kdtoolkit.detectors.retinanet import STDS, MaxIoUAssigner, anchors, decode_offsets, encode_offsets
from kdtoolkit.libraries import adapt
from kdtoolkit.models import build_model
from tests._traced import traced
from tests.conftest import BACKBONE, TINY, tiny_retinanet

STRIDES = (8, 16, 32)
GRID = ((8, 10), (4, 5), (2, 3))
CLASSES = 4
PRIORS = anchors(GRID, STRIDES, torch.device("cpu"))


def batch_of(boxes, labels, padded):
    return Batch(torch.zeros(len(boxes), 3, 64, 80), padded, padded, padded, tuple(boxes), tuple(labels))


def random_targets(counts, seed):
    """Boxes on whole pixels, now and then the same one twice: so that IoUs tie, and several boxes want one anchor."""
    generator = torch.Generator().manual_seed(seed)
    boxes, labels = [], []
    for count in counts:
        corner = torch.randint(0, 60, (count, 2), generator=generator)
        image = torch.cat([corner, corner + torch.randint(1, 50, (count, 2), generator=generator)], 1).float()
        boxes.append(image[torch.randint(0, max(count, 1), (count,), generator=generator)])
        labels.append(torch.randint(0, CLASSES, (count,), generator=generator))
    return boxes, labels


def assigned_by_loops(boxes, labels, padded):
    """One image: label, box and weight of each anchor."""
    centre = (PRIORS.boxes[:, :2] + PRIORS.boxes[:, 2:]) / 2
    valid = [i for i, (x, y) in enumerate(centre.round().tolist()) if x < padded[1] and y < padded[0]]
    found, weights = [CLASSES] * len(centre), [0.0] * len(centre)
    targets = torch.zeros(len(centre), 4)
    iou = box_iou(boxes, PRIORS.boxes).tolist()
    for a in valid:
        weights[a] = 1.0
        best = max(range(len(boxes)), key=lambda g: iou[g][a], default=None)
        if best is not None and iou[best][a] >= 0.5:
            found[a], targets[a] = int(labels[best]), boxes[best]
        elif best is not None and iou[best][a] >= 0.4:
            weights[a] = 0.0
    for g in range(len(boxes)):
        highest = max((iou[g][a] for a in valid), default=0.0)
        for a in valid:
            if highest > 0 and iou[g][a] == highest:
                found[a], targets[a], weights[a] = int(labels[g]), boxes[g], 1.0
    return found, targets, weights


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=3), seed=st.integers(0, 2**20), data=st.data())
def test_agrees_with_a_loop_over_images_boxes_and_anchors(counts, seed, data):
    padded = tuple((data.draw(st.sampled_from([32, 64])), data.draw(st.sampled_from([32, 64, 80]))) for _ in counts)
    boxes, labels = random_targets(counts, seed)
    assignment = MaxIoUAssigner()(PRIORS, batch_of(boxes, labels, padded), CLASSES)
    normaliser = 0
    for i in range(len(counts)):
        found, targets, weights = assigned_by_loops(boxes[i], labels[i], padded[i])
        positive = torch.tensor(found) < CLASSES
        assert assignment.labels[i].tolist() == found
        assert assignment.weights[i].tolist() == weights
        assert torch.equal(assignment.boxes[i][positive], targets[positive])
        normaliser += max(int(positive.sum()), 1)
    assert assignment.normaliser.item() == normaliser


def test_a_box_that_fits_no_anchor_gets_its_best_ones_and_an_empty_one_gets_none():
    sliver, empty = torch.tensor([[10.0, 10.0, 12.0, 60.0]]), torch.tensor([[20.0, 20.0, 20.0, 40.0]])
    assert box_iou(sliver, PRIORS.boxes).max() < 0.4
    batch = batch_of([sliver, empty], [torch.tensor([1]), torch.tensor([2])], ((64, 80),) * 2)
    assignment = MaxIoUAssigner()(PRIORS, batch, CLASSES)
    assert 0 < int(assignment.positive(CLASSES)[0].sum()) < 10
    assert not assignment.positive(CLASSES)[1].any()


def test_nine_anchors_a_cell():
    assert PRIORS.boxes.shape == (9 * (80 + 20 + 6), 4)
    assert PRIORS.per_level == (720, 180, 54)
    cell = PRIORS.boxes[9 * 11 : 9 * 12]  # level 0, second row and column
    width, height = (cell[:, 2:] - cell[:, :2]).unbind(-1)
    torch.testing.assert_close((cell[:, :2] + cell[:, 2:]) / 2, torch.full((9, 2), 8.0))
    expected = [32 * 2 ** (i / 3) for i in range(3)] * 3
    assert (width * height).sqrt().tolist() == pytest.approx(expected, rel=1e-5)
    assert (height / width).tolist() == pytest.approx([0.5] * 3 + [1] * 3 + [2] * 3, rel=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 50), min_size=4, max_size=4), st.lists(st.floats(2, 50), min_size=4, max_size=4))
def test_offsets_lead_from_the_anchor_to_the_box(corners, sizes):
    boxes = torch.tensor([corners[:2], corners[2:]])
    boxes = torch.cat([boxes, boxes + torch.tensor([sizes[:2], sizes[2:]])], 1)
    found = decode_offsets(encode_offsets(boxes[:1], boxes[1:]), boxes[1:], STDS)
    torch.testing.assert_close(found, boxes[:1], rtol=1e-4, atol=1e-3)


def trace_of(model, batch):
    adapter = adapt(model)
    prepared, _, trace = traced(adapter, batch)
    return adapter, prepared, trace


def test_losses_follow_their_formulas(batch):
    model = tiny_retinanet(seed=0)
    _, prepared, trace = trace_of(model, batch)
    predictions, assignment = trace.predictions, model.assign(trace.predictions, prepared)
    cls = box = 0.0
    for i, a in assignment.weights.nonzero().tolist():
        label = int(assignment.labels[i, a])
        for k in range(model.num_classes):
            score = 1 / (1 + math.exp(-predictions.logits[i, a, k].item()))
            right, balance = (score, 0.25) if k == label else (1 - score, 0.75)
            cls -= balance * (1 - right) ** 2 * math.log(right)
        if label < model.num_classes:
            target = encode_offsets(assignment.boxes[i, a], predictions.priors.boxes[a])
            box += (predictions.regression[i, a] - target).abs().sum().item()
    losses = model.losses(predictions, assignment)
    assert losses["cls"].item() == pytest.approx(cls / assignment.normaliser.item(), rel=1e-4)
    assert losses["box"].item() == pytest.approx(box / assignment.normaliser.item(), rel=1e-4)


def test_the_adapter_gives_the_models_losses_and_resumes_to_the_bit(batch):
    model = tiny_retinanet(seed=0).train()
    expected = {name: loss.item() for name, loss in model(*batch).items()}
    adapter, prepared, trace = trace_of(model, batch)
    assert {name: loss.item() for name, loss in adapter.task_losses(trace, prepared)[0].items()} == expected
    for stage, state in enumerate(trace.states):
        again = adapter.resume(state, stage, trace)
        assert torch.equal(again.logits, trace.predictions.logits)
        assert torch.equal(again.boxes, trace.predictions.boxes)
    assert set(adapter.spec.priors_per_cell) == {9}
    assert trace.predictions.logits.shape == (2, 9 * 84, 3)


def test_without_objects_only_scores_are_trained(batch):
    model = tiny_retinanet(seed=0).train()
    losses = model(batch[0], [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * 2)
    assert losses["cls"] > 0
    assert losses["box"] == 0
    sum(losses.values()).backward()
    assert model.predictors["cls"].weight.grad.any()
    assert not model.predictors["reg"].weight.grad.any()


def test_coarser_levels_start_from_the_backbones_last_map(batch):
    model = tiny_retinanet(seed=0, strides=(8, 16, 32, 64, 128)).eval()
    images = model.prepare(batch[0]).images
    features, last = model.features(images), model.backbone(images)[model.neck.levels.indices[-1]]
    first, second = model.neck.extra_blocks.convs
    assert torch.equal(features[3], first(last))
    assert torch.equal(features[4], second(features[3]))


def test_build_model_and_published_names():
    args = {**TINY, "backbone_args": BACKBONE, "strides": (8, 16, 32, 64), "head_groups": 0}
    model, source = build_model("kdtoolkit/retinanet", 3, args), build_model("kdtoolkit/retinanet", 3, args)
    assert isinstance(model, RetinaNet)
    published = {f"backbone.{key}": value for key, value in source.backbone.state_dict().items()}
    own = source.state_dict()
    for i in range(3):
        for kind in ("weight", "bias"):
            published[f"neck.lateral_convs.{i}.conv.{kind}"] = own[f"neck.inner_blocks.{i}.0.{kind}"]
            published[f"neck.fpn_convs.{i}.conv.{kind}"] = own[f"neck.layer_blocks.{i}.0.{kind}"]
    for kind in ("weight", "bias"):
        published[f"neck.fpn_convs.3.conv.{kind}"] = own[f"neck.extra_blocks.convs.0.{kind}"]
        for name in ("cls", "reg"):
            published[f"bbox_head.retina_{name}.{kind}"] = own[f"predictors.{name}.{kind}"]
            for i in range(2):
                published[f"bbox_head.{name}_convs.{i}.conv.{kind}"] = own[f"towers.{name}.{i}.0.{kind}"]
    load_published(model, published)
    assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())
