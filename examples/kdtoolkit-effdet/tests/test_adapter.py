"""The adapter against effdet's own benches: same losses, same detections; and against kdtoolkit's conformance kit."""

import copy
import math

import numpy as np
import pytest
import torch
from effdet import DetBenchPredict, DetBenchTrain, EfficientDet
from effdet.config import get_efficientdet_config
from effdet.data.transforms import transforms_coco_eval
from kdtoolkit import Distiller, KDError
from kdtoolkit.detectors import FCOS, GFL
from kdtoolkit.libraries import adapt
from kdtoolkit.methods import PKD, CrossKD
from kdtoolkit.testing import check_adapter, check_method, example_batch
from PIL import Image

from kdtoolkit_effdet import EfficientDetAdapter

torch.set_num_threads(1)
EXAMPLES = EfficientDetAdapter.examples()
CLASSES = 3


@pytest.fixture(params=EXAMPLES)
def model(request):
    return _trained_a_little(EXAMPLES[request.param](CLASSES))


def _trained_a_little(model):
    """Weights and statistics with which scores differ from prior to prior, as they do not at the start."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for _ in range(3):
            model.train()(torch.randn(4, 3, 128, 128))
    return model.eval()


def _images(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (3, *size), generator=generator).float() / 255 for size in sizes]


TARGETS = [
    {"boxes": torch.tensor([[4.0, 6.0, 70.0, 60.0], [40.0, 20.0, 100.0, 90.0]]), "labels": torch.tensor([0, 2])},
    {"boxes": torch.tensor([[10.0, 10.0, 40.0, 45.0]]), "labels": torch.tensor([1])},
]


def _library_target(batch):
    """Ground truth as effdet's loader pads it: y first, classes from 1, the rest of 100 rows filled with -1."""
    boxes, labels = torch.full((len(batch.images), 100, 4), -1.0), torch.full((len(batch.images), 100), -1.0)
    for i, (own, classes) in enumerate(zip(batch.boxes, batch.labels, strict=True)):
        boxes[i, : len(own)] = own[:, [1, 0, 3, 2]]
        labels[i, : len(own)] = classes + 1
    return {"bbox": boxes, "cls": labels}


def _library_losses(model, images, targets):
    batch = adapt(model).prepare(images, targets)
    return DetBenchTrain(model)(batch.images, _library_target(batch))


def own_losses(model, images, targets):
    losses = _library_losses(model, images, targets)
    return {"class_loss": losses["class_loss"], "box_loss": model.config.box_loss_weight * losses["box_loss"]}


def own(model, images):
    """The library's inference, on the canvas: it clips to each image's content, and is brought back axis by axis."""
    batch = adapt(model).prepare(images)
    sizes = torch.tensor([[width, height] for height, width in batch.sizes]).float()
    found = DetBenchPredict(model)(batch.images, {"img_scale": torch.ones(len(images)), "img_size": sizes})
    originals = torch.tensor([[width, height] for height, width in batch.original_sizes])
    ratios = (originals / sizes).repeat(1, 2)
    return [
        {"boxes": rows[:, :4] * ratio, "scores": rows[:, 4], "labels": rows[:, 5].long() - 1}
        for rows, ratio in zip((rows[rows[:, 5] > 0] for rows in found), ratios, strict=True)
    ]


def _show(model, images, targets=None):
    adapter = adapt(model)
    batch = adapter.prepare(images, targets)
    return adapter, batch, adapter.head(adapter.features(batch), batch)


def test_the_adapter_keeps_the_contract(model):
    report = check_adapter(model, own=own, own_losses=own_losses)
    assert {name for name, result in report.results.items() if result.outcome != "passed"} == {
        "given_priors",
        "first_stage",
        "layers",
        "placed_queries",
        "padding",
    }


def test_detections_are_those_of_the_librarys_whole_pipeline(model):
    """From PIL images through its own transforms, where they need no resizing."""
    images = _images((128, 128), (96, 128))
    transform = transforms_coco_eval(128, use_prefetcher=True)
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    canvases, scales, sizes = [], [], []
    for image in images:
        picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
        pixels, annotations = transform(picture, {})
        canvases.append((torch.from_numpy(np.asarray(pixels)).float() - mean) / std)
        scales.append(annotations["img_scale"])
        sizes.append([float(side) for side in picture.size])
    info = {"img_scale": torch.tensor(scales), "img_size": torch.tensor(sizes)}
    with torch.no_grad():
        theirs = DetBenchPredict(model)(torch.stack(canvases), info)
        adapter, batch, trace = _show(model, images)
        ours = adapter.detections(trace, batch)
    torch.testing.assert_close(batch.images, torch.stack(canvases), atol=1e-5, rtol=0)
    for found, rows in zip(ours, theirs, strict=True):
        rows = rows[rows[:, 5] > 0]
        assert len(rows) > 20
        assert torch.equal(found["labels"], rows[:, 5].long() - 1)
        torch.testing.assert_close(found["boxes"], rows[:, :4], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(found["scores"], rows[:, 4], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [(60, 80), (64, 50), (200, 240)])
def test_images_are_resized_as_the_library_does(size):
    """Up to the rounding of pixels to whole numbers, which PIL does."""
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8), size, mode="bicubic")[0].clamp(0, 1)
    picture = Image.fromarray((smooth * 255).round().byte().permute(1, 2, 0).numpy())
    pixels, _ = transforms_coco_eval(128, use_prefetcher=True)(picture, {})
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    batch = adapt(EXAMPLES["EfficientDet"](CLASSES)).prepare([image])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    ours = batch.images[0] * std + mean
    assert (ours * 255 - torch.from_numpy(np.asarray(pixels))).abs().max() < 1.01


@pytest.mark.parametrize("autocast", [False, True])
def test_losses_are_the_librarys_to_the_last_bit(model, autocast):
    images = _images((128, 128), (96, 128))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs = _library_losses(copy.deepcopy(model).train(), images, TARGETS)
        adapter, batch, trace = _show(model.train(), images, TARGETS)
        ours, _ = adapter.task_losses(trace, batch)
    assert torch.equal(ours["class_loss"], theirs["class_loss"])
    assert torch.equal(ours["class_loss"] + ours["box_loss"], theirs["loss"])
    assert theirs["box_loss"] > 0


def test_gradients_are_the_librarys_to_the_last_bit(model):
    images, twin = _images((128, 128), (96, 128)), copy.deepcopy(model).train()
    _library_losses(twin, images, TARGETS)["loss"].backward()
    Distiller(None, model.train())(images, TARGETS).total.backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_predictions_are_the_models_own_outputs(model):
    with torch.no_grad():
        _, batch, trace = _show(model, _images((128, 128)))
        scores, boxes = model(batch.images)
    predictions, start = trace.predictions, 0
    for level, count in enumerate(predictions.priors.per_level):
        height, width = predictions.priors.grid[level]
        for y, x, anchor in ((0, 0, 0), (height - 1, 0, 8), (height // 2, width - 1, 4)):
            prior = start + (y * width + x) * 9 + anchor
            own_scores, own_codes = (maps[level][0, :, y, x].view(9, -1)[anchor] for maps in (scores, boxes))
            assert torch.equal(predictions.logits[0, prior], own_scores)
            assert torch.equal(predictions.regression[0, prior], own_codes)
        start += count


def test_assignment_answers_for_the_boxes_that_overlap_most(model):
    """A naive matching of IoU at least 0.5, each box's best anchor in any case."""
    adapter, batch, trace = _show(model, _images((128, 128), (128, 128)), TARGETS)
    found = adapter.assign(trace, batch)
    positives = 0
    for i, (boxes, labels) in enumerate(zip(batch.boxes, batch.labels, strict=True)):
        for j, prior in enumerate(trace.predictions.priors.boxes.tolist()):
            overlaps = [_iou(prior, box) for box in boxes.tolist()]
            if max(overlaps) > 0.501:
                assert found.labels[i, j] == labels[overlaps.index(max(overlaps))]
                torch.testing.assert_close(found.boxes[i, j], boxes[overlaps.index(max(overlaps))], atol=1e-3, rtol=0)
                positives += 1
            elif max(overlaps) < 0.3:
                assert found.labels[i, j] == CLASSES
    assert 0 < positives <= found.positive.sum() == found.normaliser - 1


def _iou(a, b):
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def _config(**changes):
    model = EXAMPLES["EfficientDet"](CLASSES)
    config = get_efficientdet_config("efficientdet_d0")
    config.update({**model.config, **changes})
    return config


def test_strides_that_are_no_whole_numbers_are_rounded_in_the_spec_alone():
    """A side of 160 px makes two cells on the coarsest level."""
    model = EfficientDet(_config(image_size=(160, 160)), pretrained_backbone=False)
    adapter, _, trace = _show(model.eval(), _images((100, 120)))
    assert adapter.spec.strides == (8, 16, 32, 53, 80)
    assert trace.predictions.priors.strides.unique().tolist() == pytest.approx([8, 16, 32, 160 / 3, 80])
    check_adapter(model, own=own, own_losses=own_losses)


@pytest.mark.parametrize("size", [(64, 64), (96, 128)])
def test_sizes_whose_levels_are_no_pyramid_are_refused(size):
    with pytest.raises(KDError, match="multiples of 128"):
        adapt(EfficientDet(_config(image_size=size), pretrained_backbone=False))


def test_a_students_canvas_is_scaled_as_a_whole(model):
    student = adapt(_native(GFL)).prepare(_images((100, 200), (60, 80)), TARGETS)
    batch = adapt(model).prepare(_images((100, 200), (60, 80)), TARGETS, like=student)
    assert student.images.shape[-2:] == (128, 224)
    assert batch.images.shape[-2:] == (128, 128)
    assert batch.sizes == ((57, 114), (34, 46))
    for ours, theirs, size, other in zip(batch.boxes, student.boxes, batch.sizes, student.sizes, strict=True):
        factors = torch.tensor([size[1] / other[1], size[0] / other[0]] * 2)
        torch.testing.assert_close(ours, theirs * factors)


def test_images_of_bytes_are_refused(model):
    with pytest.raises(KDError, match=r"image 0 .*uint8"):
        adapt(model).prepare([torch.zeros(3, 8, 8, dtype=torch.uint8)])


def test_assigners_are_equal_where_anchors_are():
    first, second = (adapt(EXAMPLES["EfficientDet"](k)) for k in (2, 5))
    other = adapt(EfficientDet(_config(anchor_scale=3.0), pretrained_backbone=False))
    assert first.assigner == second.assigner != other.assigner


def _native(kind):
    torch.manual_seed(0)
    small = {"channels": (8, 8, 16, 16), "stem_width": 4}
    return kind(
        CLASSES, backbone="resnet10t", backbone_args=small, neck_channels=16, head_channels=24, head_blocks=2,
        head_groups=4,
    )  # fmt: skip


@pytest.mark.parametrize("kind", [GFL, FCOS])
def test_distilled_from_and_into_kdtoolkits_own_detectors(model, kind):
    for student, teacher in ((model, _native(kind)), (_native(kind), copy.deepcopy(model))):
        distiller = Distiller(teacher, student, [CrossKD(), PKD()]).train()
        losses = distiller(_images((128, 128), (96, 128)), TARGETS)
        losses.total.backward()
        assert {"crosskd/cls", "crosskd/box", "pkd/feature"} < set(losses)
        assert all(math.isfinite(value) and value > 0 for value in torch.stack([*losses.values()]).tolist())
        assert all(p.grad is None for p in teacher.parameters())
        assert any(p.grad is not None and p.grad.any() for p in student.backbone.parameters())


def test_boxes_that_a_head_blows_up_stay_finite():
    _, _, trace = _show(EXAMPLES["EfficientDet"](CLASSES).eval(), _images((128, 128)))
    priors = trace.predictions.priors
    codes = torch.tensor([0.0, 0.0, 100.0, 100.0]).expand_as(priors.boxes)
    boxes = trace.predictions.decode(codes, priors)
    assert boxes.isfinite().all()
    torch.testing.assert_close(boxes[:, 2:] - boxes[:, :2], 62.5 * (priors.boxes[:, 2:] - priors.boxes[:, :2]))


@pytest.mark.parametrize("method", [PKD, CrossKD])
def test_methods_keep_the_contract_with_it(method):
    student, teacher = _trained_a_little(EXAMPLES["EfficientDet"](CLASSES)), _native(GFL)
    images, targets = example_batch(CLASSES)
    assert check_method(method, student, teacher, images=images, targets=targets).refused is None
    if method is CrossKD:  # whose work is done in the teacher's head
        assert check_method(method, teacher, student, images=images, targets=targets).refused is None
