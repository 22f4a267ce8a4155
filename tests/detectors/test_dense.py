from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import nms

from kdtoolkit.detectors import ATSS, GFL, dense
from kdtoolkit.errors import KDError
from tests.conftest import DENSE, tiny_gfl

EACH = pytest.mark.parametrize("make", DENSE)


@EACH
def test_follows_torchvisions_convention(make, batch):
    images, targets = batch
    model = make(seed=0, score_threshold=0.0).train()
    losses = model(images, targets)
    assert all(loss.ndim == 0 and loss.dtype == torch.float32 and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.any() for p in model.predictors.parameters())
    detections = model.eval()(images)
    assert [set(image) for image in detections] == [{"boxes", "scores", "labels"}] * 2
    for (height, width), found in zip([(64, 64), (50, 60)], detections, strict=True):
        assert 0 < len(found["boxes"]) <= 100
        assert (found["boxes"] >= 0).all()
        assert (found["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)


@EACH
def test_learns_one_image(make):
    generator = torch.Generator().manual_seed(0)
    image, box = torch.rand(3, 64, 64, generator=generator) * 0.2, torch.tensor([[14.0, 20.0, 46.0, 50.0]])
    image[1, 20:50, 14:46] += 0.7
    targets = [{"boxes": box, "labels": torch.tensor([1])}] * 2
    model = make(seed=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        sum(model([image, image], targets).values()).backward()
        optimizer.step()
    # In training mode the batch's own statistics normalise it, as they did all along.
    with torch.no_grad():
        prepared = model.prepare([image, image])
        features = model.features(prepared.images)
        found = model.postprocess(model.predict([*model.walk_towers(model.entry(features))][-1]), prepared)[0]
    assert found["labels"][0] == 1
    assert dense_iou(found["boxes"][0], box[0]) > 0.6


def dense_iou(a, b):
    low, high = torch.maximum(a[:2], b[:2]), torch.minimum(a[2:], b[2:])
    common = (high - low).clamp(min=0).prod()
    return common / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - common)


@EACH
def test_without_objects_only_scores_are_trained(make, batch):
    images, _ = batch
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * 2
    bare = [{"boxes": torch.tensor([]), "labels": torch.tensor([])}] * 2
    model = make(seed=0).train()
    losses = model(images, empty)
    assert losses["cls"] > 0
    assert all(loss == 0 for name, loss in losses.items() if name != "cls")
    assert {name: loss.item() for name, loss in model(images, bare).items()} == {k: v.item() for k, v in losses.items()}
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert not model.predictors["reg"].weight.grad.any()


@EACH
def test_autocast_gives_float32_losses_near_those_of_float32(make, batch):
    model = make(seed=0).train()
    expected = model(*batch)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(*batch)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=0.1, atol=0.01)


@EACH
@pytest.mark.parametrize("width", [32, 64])
def test_coarse_levels_of_narrow_images_learn_under_autocast(make, width):
    model = make(seed=0, strides=(8, 16, 32, 64, 128)).train()
    image = torch.rand(3, 96, width, generator=torch.Generator().manual_seed(0))
    target = {"boxes": torch.tensor([[2.0, 4.0, 30.0, 90.0]]), "labels": torch.tensor([1])}

    def gradients(enabled):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            features = model.features(model.prepare([image, image], [target] * 2).images)
        sum((x.float() * (1 + x.detach().float().sign())).sum() for x in features[3:]).backward()
        return [conv.weight.grad.clone() for conv in model.neck.extra_blocks.convs]

    # In bfloat16 they are uninitialised memory on some CPUs: what was there is large here.
    stale = [torch.full((count,), 1e20) for count in (64, 1024, 2304, 4096)]
    del stale
    for exact, got in zip(gradients(False), gradients(True), strict=True):
        assert got.norm() < 2 * exact.norm()


@EACH
def test_trains_after_it_ran_in_inference_mode(make, batch):
    images, targets = batch
    images = [torch.nn.functional.pad(image, (0, 160)) for image in images]  # a size that no cache knows yet
    model = make(seed=0).eval()
    with torch.inference_mode():
        model(images)
    sum(model.train()(images, targets).values()).backward()


def test_coarser_levels_are_added_one_by_one(batch):
    model = tiny_gfl(seed=0, strides=(8, 16, 32, 64, 128))
    features = model.features(model.prepare(batch[0]).images)
    assert [tuple(level.shape) for level in features] == [(2, 16, n, n) for n in (8, 4, 2, 1, 1)]


def test_images_are_normalised_then_padded_with_zero():
    images = [torch.full((3, 40, 33), 0.5), torch.full((3, 20, 64), 0.25)]
    model = tiny_gfl(seed=0, image_mean=(0.5, 0.25, 0.0), image_std=(0.5, 0.25, 0.1))
    batch = model.prepare(images)
    assert batch.images.shape == (2, 3, 64, 64)
    assert batch.sizes == batch.original_sizes == ((40, 33), (20, 64))
    assert batch.padded_sizes == ((64, 64), (32, 64))
    assert batch.images[0, :, 0, 0].tolist() == pytest.approx([0, 1, 5])
    assert batch.images[1, :, 19, 63].tolist() == pytest.approx([-0.5, 0, 2.5])
    assert not batch.images[0, :, 40:].any()
    assert not batch.images[0, :, :, 33:].any()
    assert not batch.images[1, :, 20:].any()
    assert images[0].eq(0.5).all()  # the caller's are left as they are


def random_predictions(model, count, seed):
    """Predictions of a 64 x 80 canvas that are spread out as those of a trained model are."""
    generator = torch.Generator().manual_seed(seed)
    priors = model.priors(((8, 10), (4, 5), (2, 3)))
    shape = (count, len(priors.boxes))
    regression = torch.randn(*shape, *((4, model.bins) if model.bins else (4,)), generator=generator) * 2
    logits = torch.randn(*shape, model.num_classes, generator=generator) * 2 - 2
    quality = torch.randn(shape, generator=generator) if model.has_quality else None
    return dense.Predictions(logits, regression, priors, model.decode, quality)


def detected_by_loops(model, predictions, i, size, original, most):
    """Postprocessing of one image, one class after the other."""
    boxes = predictions.boxes[i].clone()
    boxes[:, 0::2] = boxes[:, 0::2].clamp(0, size[1])
    boxes[:, 1::2] = boxes[:, 1::2].clamp(0, size[0])
    scores = predictions.logits[i].sigmoid()
    chosen, start = [], 0
    for count in predictions.priors.per_level:
        pairs = [(a, k) for a in range(start, start + count) for k in range(model.num_classes)]
        pairs = [(a, k) for a, k in pairs if scores[a, k] > model.score_threshold]
        chosen += sorted(pairs, key=lambda pair: -scores[pair].item())[:most]
        start += count
    found = []
    for k in range(model.num_classes):
        rows = [a for a, label in chosen if label == k and (boxes[a, 2:] > boxes[a, :2]).all()]
        if not rows:
            continue
        final = scores[rows, k]
        if predictions.quality is not None:
            final = final * predictions.quality[i, rows].sigmoid()
        kept = nms(boxes[rows], final, model.nms_iou).tolist()
        found += [(final[j].item(), k, boxes[rows[j]]) for j in kept]
    found = sorted(found, key=lambda one: -one[0])[: model.detections_per_image]
    factor = torch.tensor([original[1] / size[1], original[0] / size[0]]).repeat(2)
    return [(score, label, box * factor) for score, label, box in found]


@EACH
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**20), most=st.sampled_from([12, 1000]), kept=st.sampled_from([7, 100]))
def test_postprocessing_agrees_with_loops(make, seed, most, kept):
    model = make(seed=0, detections_per_image=kept)
    predictions = random_predictions(model, 2, seed)
    sizes, original = ((64, 80), (50, 44)), ((128, 80), (25, 88))
    batch = replace(model.prepare([torch.zeros(3, 64, 80)] * 2), sizes=sizes, original_sizes=original)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "MAX_CANDIDATES", most)
        detections = model.postprocess(predictions, batch)
    for i, found in enumerate(detections):
        expected = detected_by_loops(model, predictions, i, sizes[i], original[i], most)
        assert found["labels"].tolist() == [label for _, label, _ in expected]
        torch.testing.assert_close(found["scores"], torch.tensor([score for score, _, _ in expected]))
        torch.testing.assert_close(found["boxes"], torch.stack([box for _, _, box in expected]))


def test_nothing_above_the_threshold_is_an_empty_detection(batch):
    found = tiny_gfl(seed=0, score_threshold=0.99).eval()(batch[0])
    assert [(image["boxes"].shape, image["labels"].dtype) for image in found] == [((0, 4), torch.int64)] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strides": (8, 16)}, r"strides are \(8, 16\): they must be 8, 16, 32\. A pyramid has at least"),
        ({"strides": (8,)}, r"strides are \(8,\): they must be 8, 16, 32\. "),
        ({"strides": (4, 8, 16)}, r"strides are \(4, 8, 16\): they must be 8, 16, 32\. "),
        ({"strides": (8, 16, 32, 48)}, r"strides are \(8, 16, 32, 48\): they must be 8, 16, 32, 64\. "),
        ({"head_groups": 5}, r"head_channels \(16\) must be a multiple of head_groups \(5\)"),
        ({"backbone": "resnet10x"}, "timm has no model 'resnet10x' \\(did you mean 'resnet10t'"),
    ],
)
def test_wrong_settings_are_explained(changes, message):
    with pytest.raises(KDError, match=message):
        tiny_gfl(seed=0, **changes)


@pytest.mark.parametrize("cls", [GFL, ATSS])
def test_a_backbone_without_the_levels_is_explained(cls):
    with pytest.raises(KDError, match=r"strides \[8, 16\].*\[32\] missing"):
        cls(3, backbone="resnet10t", backbone_args={"out_indices": (2, 3)})


def test_wrong_input_is_explained(batch):
    images, targets = batch
    model = tiny_gfl(seed=0)
    with pytest.raises(KDError, match=r"needs targets; call model\.eval\(\)"):
        model.train()(images)
    with pytest.raises(KDError, match=r"image 1 has the shape \(50, 60, 3\)"):
        model.prepare([images[0], images[1].permute(1, 2, 0)])
    with pytest.raises(KDError, match=r"image 0 is torch\.uint8"):
        model.prepare([(images[0] * 255).byte()])
    counted_from_one = [{"boxes": t["boxes"], "labels": t["labels"] + 1} for t in targets]
    with pytest.raises(KDError, match="labels 1 to 3; this detector's 3 classes are 0 to 2"):
        model(images, counted_from_one)
