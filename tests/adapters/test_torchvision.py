import copy

import pytest
import torch
from torch import nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection import transform as library_transform
from torchvision.ops import box_iou

from kdtoolkit.adapters.native import DenseAdapter
from kdtoolkit.adapters.torchvision import (
    ADAPTERS,
    FasterRCNNAdapter,
    FCOSAdapter,
    RetinaNetAdapter,
    RPNAdapter,
    SSDAdapter,
    build_model,
)
from kdtoolkit.contract import PriorKind
from kdtoolkit.distiller import Distiller
from kdtoolkit.errors import IncompatibleError, KDError
from kdtoolkit.libraries import adapt
from kdtoolkit.methods import PKD, CrossKD
from kdtoolkit.winograd import FastConvolutions, gains
from tests._narrow import check_gradients_of_narrow_images
from tests._traced import traced
from tests.conftest import tiny_gfl

K = 3
FAMILIES = {family: (cls, make) for cls in ADAPTERS for family, make in cls.examples().items()}
EACH = pytest.mark.parametrize("family", FAMILIES)
GRIDS = [family for family in FAMILIES if "R-CNN" not in family]
TWO_STAGE = [family for family in FAMILIES if "R-CNN" in family]


def tiny(family, seed=0):
    torch.manual_seed(seed)
    cls, make = FAMILIES[f"torchvision {family.removeprefix('torchvision ')}"]
    return cls(make(K))


def shift(adapter):
    """What the library adds to labels."""
    return 0 if isinstance(adapter, RetinaNetAdapter | FCOSAdapter) else 1


def library_targets(adapter, images, targets):
    return [
        {
            "boxes": t["boxes"],
            "labels": t["labels"] + shift(adapter),
            "masks": torch.ones(len(t["boxes"]), *image.shape[1:], dtype=torch.uint8),
        }
        for image, t in zip(images, targets, strict=True)
    ]


def library_losses(adapter, images, targets):
    losses = adapter.model(list(images), library_targets(adapter, images, targets))
    losses.pop("loss_mask", None)  # ground truth has no masks here
    return losses


@EACH
def test_losses_and_detections_are_the_librarys_to_the_bit(family, batch):
    images, targets = batch
    adapter = tiny(family)
    adapter.model.train()
    torch.manual_seed(5)
    expected = library_losses(copy.deepcopy(adapter), images, targets)
    torch.manual_seed(5)
    prepared, _, trace = traced(adapter, batch)
    losses, _ = adapter.task_losses(trace, prepared)
    assert list(losses) == list(expected)  # in order, for the order of a sum decides its last bit
    assert {k: v.item() for k, v in losses.items()} == {k: v.item() for k, v in expected.items()}
    adapter.model.eval()
    prepared, _, trace = traced(adapter, (images, None))
    for ours, own in zip(adapter.detections(trace, prepared), adapter.model(images), strict=True):
        assert len(own["scores"]) > 0
        assert torch.equal(ours["boxes"], own["boxes"])
        assert torch.equal(ours["scores"], own["scores"])
        assert torch.equal(ours["labels"], own["labels"] - shift(adapter))


@EACH
def test_labels_count_from_the_first_class_and_background_comes_last(family, batch):
    images, _ = batch
    adapter = tiny(family)
    assert adapter.spec.num_classes == K
    adapter.model.train()
    targets = [{"boxes": torch.tensor([[4.0, 6.0, 30.0, 40.0]]), "labels": torch.tensor([0])}] * 2
    wrong = [{**t, "labels": torch.tensor([2])} for t in targets]
    outcomes = []
    for labels in (targets, wrong):
        torch.manual_seed(5)
        own = library_losses(copy.deepcopy(adapter), images, labels)
        torch.manual_seed(5)
        fresh = copy.deepcopy(adapter)
        prepared, _, trace = traced(fresh, (images, labels))
        losses, _ = fresh.task_losses(trace, prepared)
        assert all(torch.equal(losses[name], own[name]) for name in own)
        outcomes.append(sum(losses.values()).item())
    assert outcomes[0] != outcomes[1]
    assert set(prepared.labels[0].tolist()) == {2}
    assert trace.predictions.logits.shape[-1] == K + shift(adapter)
    assert trace.predictions.probabilities.shape[-1] == K


@pytest.mark.parametrize("family", GRIDS)
def test_predictions_are_the_heads_outputs(family, batch):
    adapter = tiny(family)
    adapter.model.eval()
    if isinstance(adapter, FCOSAdapter):  # so that some distances are cut at 0
        nn.init.zeros_(adapter.model.head.regression_head.bbox_reg.bias)
    prepared, features, trace = traced(adapter, batch)
    own, predictions = adapter.model.head(list(features)), trace.predictions
    logits = own["cls_logits"]
    if shift(adapter):
        logits = torch.cat([logits[..., 1:], logits[..., :1]], -1)
    assert torch.equal(predictions.logits, logits)
    assert torch.equal(predictions.regression, own["bbox_regression"])
    if "bbox_ctrness" in own:
        assert torch.equal(predictions.quality, own["bbox_ctrness"][..., 0])
    images = library_transform.ImageList(prepared.images, list(prepared.sizes))
    anchors = adapter.model.anchor_generator(images, list(features))
    for i, boxes in enumerate(predictions.boxes):
        coder, regression = adapter.model.box_coder, own["bbox_regression"][i]
        expected = (coder.decode if isinstance(adapter, FCOSAdapter) else coder.decode_single)(regression, anchors[i])
        assert torch.equal(boxes, expected)


@pytest.mark.parametrize("family", TWO_STAGE)
def test_proposals_are_predicted_as_the_library_does_it(family, batch):
    adapter = tiny(family)
    adapter.model.eval()
    prepared, features, trace = traced(adapter, batch)
    roi_heads, predictions = adapter.model.roi_heads, trace.predictions
    maps = dict(zip(("0", "1", "2", "3", "pool"), features, strict=True))
    images = library_transform.ImageList(prepared.images, list(prepared.sizes))
    proposals, _ = adapter.model.rpn(images, maps)
    for own, ours, count in zip(proposals, predictions.priors.boxes, predictions.priors.context, strict=True):
        assert torch.equal(own, ours[:count])
    pooled = roi_heads.box_roi_pool(maps, proposals, list(prepared.sizes))
    logits, deltas = roi_heads.box_predictor(roi_heads.box_head(pooled))
    start = 0
    for i, count in enumerate(predictions.priors.context):
        rows = slice(start, start + count)
        assert torch.equal(predictions.logits[i, :count, :-1], logits[rows, 1:])
        assert torch.equal(predictions.logits[i, :count, -1], logits[rows, 0])
        probabilities = logits[rows].softmax(-1)[:, 1:]
        shares = probabilities / probabilities.sum(-1, keepdim=True)
        mean = sum(shares[:, k, None] * deltas[rows, 4 * (k + 1) : 4 * (k + 2)] for k in range(K))
        torch.testing.assert_close(predictions.regression[i, :count], mean)
        decoded = roi_heads.box_coder.decode_single(mean, proposals[i])
        torch.testing.assert_close(predictions.boxes[i, :count], decoded, rtol=1e-4, atol=1e-3)
        start += count


def test_the_specs_facts():
    retinanet, fcos, ssd, lite, rcnn, v2 = (
        tiny(f).spec for f in ("RetinaNet", "FCOS", "SSD", "SSDlite", "Faster R-CNN", "Faster R-CNN v2")
    )
    assert retinanet.strides == fcos.strides == (8, 16, 32, 64, 128)
    assert (retinanet.priors_per_cell, fcos.priors_per_cell) == ((9,) * 5, (1,) * 5)
    assert (retinanet.priors, fcos.priors) == (PriorKind.ANCHORS, PriorKind.POINTS)
    assert [stage.name for stage in retinanet.stages] == ["pyramid", "block 1", "block 2", "block 3", "block 4"]
    assert (ssd.channels, ssd.priors_per_cell) == ((8, 12, 16), (4, 6, 4))
    assert [stage.name for stage in ssd.stages] == ["pyramid"]
    assert lite.stages[1].channels == {"cls": (8, 12, 16), "reg": (8, 12, 16)}
    assert rcnn.strides == (4, 8, 16, 32, 64)
    assert [(stage.name, stage.spatial) for stage in rcnn.stages] == [("roi", True), ("fc6", False), ("fc7", False)]
    assert [stage.spatial for stage in v2.stages] == [True, True, True, False]
    assert rcnn.first_stage.name == "torchvision FasterRCNN RPN"
    assert (len(rcnn.first_stage.stages), len(v2.first_stage.stages)) == (2, 3)
    assert {s.activation for s in (retinanet, fcos, rcnn.first_stage)} == {"sigmoid"}
    assert {s.activation for s in (ssd, lite, rcnn, v2)} == {"softmax"}


def test_retinanet_assigns_by_iou(batch):
    adapter = tiny("RetinaNet")
    prepared, _, trace = traced(adapter, batch)
    found = adapter.assign(trace, prepared)
    total = 0
    for i, (boxes, labels) in enumerate(zip(prepared.boxes, prepared.labels, strict=True)):
        iou = box_iou(boxes, trace.predictions.priors.boxes)
        best, index = iou.max(0)
        positive = (best >= 0.5) | (iou == iou.amax(1, keepdim=True)).any(0)
        between = ~positive & (best >= 0.4)
        assert between.any()
        assert torch.equal(found.positive[i], positive)
        assert torch.equal(found.weights[i] == 0, between)
        assert torch.equal(found.labels[i][positive], labels[index[positive]])
        assert torch.equal(found.boxes[i][positive], boxes[index[positive]])
        total += max(int(positive.sum()), 1)
    assert found.normaliser.item() == total


def test_fcos_assigns_by_place_and_size(batch):
    adapter = tiny("FCOS")
    prepared, _, trace = traced(adapter, batch)
    found = adapter.assign(trace, prepared)
    priors = trace.predictions.priors
    for i, (boxes, labels) in enumerate(zip(prepared.boxes, prepared.labels, strict=True)):
        for p, (x, y, _, _) in enumerate(priors.boxes.tolist()):
            stride = priors.strides[p].item()
            chosen = None
            for g, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
                sides = (x - x1, y - y1, x2 - x, y2 - y)
                low = 0 if stride == 8 else 4 * stride
                high = float("inf") if stride == 128 else 8 * stride
                centred = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2)) < 1.5 * stride
                area = (x2 - x1) * (y2 - y1)
                if min(sides) > 0 and low < max(sides) < high and centred and (chosen is None or area < chosen[0]):
                    chosen = area, int(labels[g])
            assert found.labels[i, p].item() == (K if chosen is None else chosen[1])
    assert found.positive.any(1).all()
    assert found.normaliser.item() == found.positive.sum().item()
    assert found.weights.all()


def test_ssd_assigns_each_object_its_best_box_at_least(batch):
    adapter = tiny("SSD")
    prepared, _, trace = traced(adapter, batch)
    found = adapter.assign(trace, prepared)
    for i, boxes in enumerate(prepared.boxes):
        iou = box_iou(boxes, trace.predictions.priors.boxes)
        expected = (iou.amax(0) >= 0.5).index_fill(0, iou.argmax(1), True)
        assert torch.equal(found.positive[i], expected)
    assert found.weights.all()


def test_all_proposals_are_assigned_and_none_drawn(batch):
    adapter = tiny("Faster R-CNN")
    adapter.model.eval()
    prepared, _, trace = traced(adapter, batch)
    found, priors = adapter.assign(trace, prepared), trace.predictions.priors
    for i, count in enumerate(priors.context):
        best, index = box_iou(prepared.boxes[i], priors.boxes[i, :count]).max(0)
        expected = torch.where(best >= 0.5, prepared.labels[i][index], K)
        assert torch.equal(found.labels[i, :count], expected)
        assert found.weights[i, :count].all()
    assert found.normaliser.item() == sum(priors.context)


@pytest.mark.parametrize("family", TWO_STAGE)
def test_images_with_fewer_proposals_are_filled_up(family, batch):
    images, targets = batch
    adapter = tiny(family)
    adapter.model.roi_heads.fg_bg_sampler.batch_size_per_image = 512  # all of them
    adapter.model.train()
    torch.manual_seed(5)
    expected = library_losses(copy.deepcopy(adapter), images, targets)
    torch.manual_seed(5)
    prepared, _, trace = traced(adapter, batch)
    priors = trace.predictions.priors
    counts, longest = priors.context, priors.boxes.shape[1]
    assert min(counts) < max(counts) == longest
    losses, _ = adapter.task_losses(trace, prepared)
    assert all(torch.equal(losses[name], expected[name]) for name in expected)
    assignment = adapter.assign(trace, prepared)
    for i, count in enumerate(counts):
        height, width = prepared.sizes[i]
        assert priors.boxes[i, count:].tolist() == [[0, 0, width, height]] * (longest - count)
        assert (assignment.labels[i, count:] == K).all()
        assert not assignment.weights[i, count:].any()
        said = trace.predictions
        assert (said.probabilities[i, count:] == 0).all()
        torch.testing.assert_close(said.boxes[i, count:], priors.boxes[i, count:])
    for state, stage in zip(trace.states, adapter.spec.stages, strict=True):
        assert state["box"][0].shape[:2] == (sum(counts), stage.channels["box"][0])
    again = adapter.head(adapter.features(prepared), prepared, priors)
    assert again.predictions.priors is priors
    torch.testing.assert_close(again.predictions.logits, trace.predictions.logits)


def test_boxes_do_not_move_class_scores(batch):
    adapter = tiny("Faster R-CNN")
    adapter.model.eval()
    _, _, trace = traced(adapter, batch)
    trace.predictions.boxes.sum().backward()
    predictor = adapter.model.roi_heads.box_predictor
    assert predictor.cls_score.weight.grad is None
    assert predictor.bbox_pred.weight.grad.any()


def test_without_any_proposal_nothing_is_detected(batch):
    adapter = tiny("Faster R-CNN")
    adapter.model.eval()
    adapter.model.rpn.score_thresh = 2.0
    prepared, _, trace = traced(adapter, batch)
    assert trace.predictions.priors.context == (0, 0)
    assert trace.predictions.boxes.isfinite().all()
    assert not trace.predictions.probabilities.any()
    assert [len(found["scores"]) for found in adapter.detections(trace, prepared)] == [0, 0]
    assert adapter.assign(trace, prepared).normaliser.item() == 1


def test_losses_of_proposals_need_the_draw(batch):
    adapter = tiny("Faster R-CNN")
    adapter.model.eval()
    prepared, _, trace = traced(adapter, batch)
    with pytest.raises(KDError, match=r"model\.train\(\)"):
        adapter.task_losses(trace, prepared)


def test_the_first_stage_is_a_detector_of_one_class(batch):
    images, _ = batch
    adapter = tiny("Faster R-CNN v2")
    adapter.model.eval()
    rpn = adapter.first_stage
    assert isinstance(rpn, RPNAdapter)
    assert not rpn.matches(adapter.model)
    assert rpn.model is adapter.model
    assert rpn.spec == adapter.spec.first_stage
    prepared, features, trace = traced(rpn, batch)
    objectness, regression = adapter.model.rpn.head(list(features))
    assert torch.equal(trace.predictions.logits[:, :192, 0], objectness[0].permute(0, 2, 3, 1).flatten(1)[:, :192])
    assert torch.equal(trace.predictions.regression[0, :3], regression[0][0, :, 0, 0].view(3, 4))
    found = rpn.detections(trace, prepared)
    proposals, scores = rpn.proposals(trace, prepared)
    for i, each in enumerate(found):
        scale = images[i].shape[-1] / prepared.sizes[i][1]
        torch.testing.assert_close(each["boxes"][:, 0], proposals[i][:, 0] * scale)
        assert torch.equal(each["scores"], scores[i])
        assert not each["labels"].any()
    assignment = rpn.assign(trace, prepared)
    for i, boxes in enumerate(prepared.boxes):
        iou = box_iou(boxes, trace.predictions.priors.boxes)
        positive = (iou.amax(0) >= 0.7) | (iou == iou.amax(1, keepdim=True)).any(0)
        assert torch.equal(assignment.labels[i] == 0, positive)
        assert torch.equal(assignment.weights[i] == 0, ~positive & (iou.amax(0) >= 0.3))


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *((family, CrossKD()) for family in GRIDS if family != "torchvision SSD"),
        ("torchvision SSD", CrossKD(stage=0)),
        *(
            (family, CrossKD(priors=whose, proposal_weight=1.0))
            for family in TWO_STAGE
            for whose in ("student", "teacher")
        ),
        ("torchvision Faster R-CNN", CrossKD(stage=0, proposal_weight=1.0)),
    ],
)
def test_a_student_learns_from_a_teacher_of_its_family(family, method, batch):
    student, teacher = tiny(family, 0), tiny(family, 1)
    before = copy.deepcopy(teacher.model.state_dict())
    student.model.train()
    distiller = Distiller(teacher, student, [copy.deepcopy(method), PKD()])
    for targets in (batch[1], [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}] * 2):
        losses = distiller(batch[0], targets)
        assert all(loss.isfinite() for loss in losses.values())
    assert {"crosskd/cls", "crosskd/box", "pkd/feature"} <= losses.keys()
    assert ("crosskd/proposal_cls" in losses) == (family in TWO_STAGE)
    sum(loss for name, loss in losses.items() if name.startswith("crosskd")).backward()
    assert any(p.grad is not None and p.grad.any() for p in student.model.backbone.parameters())
    assert all(p.grad is None for p in teacher.model.parameters())
    assert all(torch.equal(before[name], x) for name, x in teacher.model.state_dict().items())


def test_a_pass_on_the_teachers_proposals_leaves_batch_norm_alone(batch):
    plain, distilled = tiny("Faster R-CNN v2", 0), tiny("Faster R-CNN v2", 0)
    for student, methods in ((plain, []), (distilled, [CrossKD(priors="teacher")])):
        student.model.train()
        distiller = Distiller(tiny("Faster R-CNN v2", 1), student, methods)
        torch.manual_seed(5)
        distiller(*batch)
    for name, x in plain.model.state_dict().items():
        assert torch.equal(x, distilled.model.state_dict()[name]), name


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize(("student", "teacher"), [("fcos", "gfl"), ("gfl", "fcos"), ("retinanet", "fcos")])
def test_kinds_of_equal_strides_teach_each_other(student, teacher, amp):
    def make(kind, seed):
        if kind == "gfl":
            return DenseAdapter(tiny_gfl(seed=seed, strides=(8, 16, 32, 64, 128), neck_channels=24))
        adapter = tiny({"fcos": "FCOS", "retinanet": "RetinaNet"}[kind], seed)
        adapter.model.transform.min_size, adapter.model.transform.max_size = (128,), 128  # GFL does not resize
        return adapter

    pair = make(student, 0), make(teacher, 1)
    pair[0].model.train()
    images = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    targets = [{"boxes": torch.tensor([[8.0, 12.0, 60.0, 80.0]]), "labels": torch.tensor([2])}] * 2
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        losses = Distiller(pair[1], pair[0], [CrossKD(stage=0), PKD()])([*images], targets)
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["crosskd/cls"].item() > 0
    losses.total.backward()
    assert all(p.grad is None for p in pair[1].model.parameters())


def test_levels_in_common_are_compared_and_other_priors_refused(batch):
    images, targets = batch
    assert Distiller(tiny("RetinaNet"), tiny("SSD"), [CrossKD(stage=0)])(images, targets)["crosskd/cls"].isfinite()
    with pytest.raises(IncompatibleError, match="the student predicts at anchors, the teacher at proposals"):
        Distiller(tiny("Faster R-CNN"), tiny("SSD"), [CrossKD(stage=0)])


def test_anchors_keep_their_precision_under_autocast(batch):
    for family in ("RetinaNet", "FCOS", "Faster R-CNN", "SSD"):
        adapter = tiny(family)
        adapter = adapter.first_stage or adapter
        adapter.model.eval()
        expected = traced(adapter, batch)[2].predictions.priors
        with torch.autocast("cpu", torch.bfloat16):
            found = traced(adapter, batch)[2].predictions.priors
        assert torch.equal(found.boxes, expected.boxes)
        assert found.boxes.dtype == found.strides.dtype == torch.float32


def test_detectors_that_assign_alike_share_an_assigner():
    for family in FAMILIES:
        assert tiny(family, 0).assigner == tiny(family, 1).assigner
    assert tiny("RetinaNet").assigner == tiny("RetinaNet v2").assigner
    other = tiny("RetinaNet")
    other.model.proposal_matcher.high_threshold = 0.6
    assert other.assigner != tiny("RetinaNet").assigner


def test_images_are_resized_and_boxes_with_them():
    adapter = tiny("RetinaNet")
    images = [torch.rand(3, 32, 40), torch.rand(3, 30, 128)]
    targets = [{"boxes": torch.tensor([[2.0, 4.0, 10.0, 20.0]]), "labels": torch.tensor([1])}] * 2
    batch = adapter.prepare(images, targets)
    assert batch.original_sizes == ((32, 40), (30, 128))
    assert batch.sizes == ((102, 128), (30, 128))
    assert batch.padded_sizes == ((128, 128), (128, 128))
    assert batch.images.shape == (2, 3, 128, 128)
    torch.testing.assert_close(batch.boxes[0], torch.tensor([[6.4, 12.75, 32.0, 63.75]]))
    assert tiny("SSD").prepare(images).padded_sizes == ((64, 64), (64, 64))


def test_bad_images_are_named():
    with pytest.raises(KDError, match=r"image 0 is torch\.uint8; images are floats"):
        tiny("SSD").prepare([torch.zeros(3, 64, 64, dtype=torch.uint8)])


def test_a_foreign_head_is_named():
    model = tiny("FCOS").model
    model.head = nn.Identity()
    with pytest.raises(KDError, match="Identity is not a head of torchvision"):
        FCOSAdapter(model)


def test_each_class_is_known_by_one_adapter():
    for family, (cls, _) in FAMILIES.items():
        model = tiny(family).model
        assert [adapter for adapter in ADAPTERS if adapter.matches(model)] == [cls]
        assert type(adapt(model)) is cls
    assert not any(adapter.matches(nn.Linear(1, 1)) for adapter in ADAPTERS)


@pytest.mark.parametrize(
    ("name", "adapter", "strides", "per_cell"),
    [
        ("ssdlite320_mobilenet_v3_large", SSDAdapter, (16, 32, 64, 107, 160, 320), (6,) * 6),
        ("fasterrcnn_mobilenet_v3_large_320_fpn", FasterRCNNAdapter, (32, 32, 64), ()),
    ],
)
def test_the_librarys_own_builders(name, adapter, strides, per_cell):
    model = build_model(name, K, {})
    spec = adapter(model).spec
    assert (spec.num_classes, spec.strides, spec.priors_per_cell) == (K, strides, per_cell)


@pytest.mark.parametrize(
    ("name", "adapter", "strides"),
    [
        ("retinanet", RetinaNetAdapter, (8, 16, 32, 64, 128)),
        ("fcos", FCOSAdapter, (8, 16, 32, 64, 128)),
        ("fasterrcnn", FasterRCNNAdapter, (4, 8, 16, 32, 64)),
    ],
)
def test_any_timm_backbone(name, adapter, strides, batch):
    args = {"backbone": "convnext_atto", "out_channels": 64, "min_size": 64, "max_size": 96}
    adapted = adapter(build_model(name, K, args))
    spec = adapted.spec
    assert (spec.num_classes, spec.strides, spec.channels) == (K, strides, (64,) * 5)
    adapted.model.eval()
    with torch.no_grad():
        prepared = adapted.prepare(batch[0])
        features = adapted.features(prepared)
    assert prepared.sizes[0] == (64, 64)
    assert [prepared.images.shape[-2] // x.shape[-2] for x in features[:3]] == list(strides[:3])


def test_backbones_whose_maps_have_channels_last():
    args = {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 1, 1, 1)}
    model = build_model("retinanet", K, {"backbone": "swin_tiny_patch4_window7_224", "backbone_args": args})
    assert isinstance(model, RetinaNet)
    levels = model.backbone(torch.zeros(1, 3, 64, 64))
    assert [tuple(x.shape) for x in levels.values()][:2] == [(1, 256, 8, 8), (1, 256, 4, 4)]


@pytest.mark.parametrize("name", ["retinanet", "fcos", "fasterrcnn"])
def test_timm_backbones_bring_their_normalisation(name):
    transform = build_model(name, K, {"backbone": "test_resnet", "out_channels": 32}).transform
    assert list(transform.image_mean) == list(transform.image_std) == [0.5] * 3  # as timm names it


def test_coarse_levels_are_computed_in_float32():
    backbone = build_model("fcos", K, {"backbone": "test_resnet", "out_channels": 32}).backbone
    with torch.autocast("cpu", torch.bfloat16):
        levels = backbone(torch.zeros(1, 3, 64, 64))
    assert levels["p6"].dtype == levels["p7"].dtype == torch.float32  # bfloat16 gradients may be garbage there


@pytest.mark.parametrize("family", ["RetinaNet", "FCOS"])
def test_narrow_images_are_learnt_from_under_autocast(family):
    adapter = tiny(family)
    transform = adapter.model.transform
    transform.min_size, transform.max_size, transform.size_divisible = (64,), 96, 32
    check_gradients_of_narrow_images(adapter, 64)


def test_wrong_names_and_arguments_are_named():
    with pytest.raises(KDError, match="did you mean 'fcos_resnet50_fpn'"):
        build_model("fcos_resnet50", K, {})
    with pytest.raises(KDError, match=r"no argument 'score_tresh' \(did you mean 'score_thresh'"):
        build_model("fcos_resnet50_fpn", K, {"score_tresh": 0.1})
    with pytest.raises(KDError, match=r"'torchvision/fcos_resnet50_fpn': .*91 but got 3"):
        build_model("fcos_resnet50_fpn", K, {"weights": "COCO_V1"})
    with pytest.raises(KDError, match=r"'torchvision/fcos_resnet50_fpn': .*IMAGENET"):
        build_model("fcos_resnet50_fpn", K, {"weights": "IMAGENET"})
    with pytest.raises(KDError, match="Its arguments are"):
        build_model("fcos", K, {"strides": [8]})
    with pytest.raises(KDError, match=r"timm has no model 'resnet18x' \(did you mean 'resnet18"):
        build_model("retinanet", K, {"backbone": "resnet18x"})
    with pytest.raises(KDError, match=r"\[4\] missing"):
        build_model("fasterrcnn", K, {"backbone": "resnet10t", "backbone_args": {"out_indices": [2, 3, 4]}})
    with pytest.raises(
        KDError, match=r"detector_args takes no argument 'box_nms_tresh' \(did you mean 'box_nms_thresh'"
    ):
        build_model("fasterrcnn", K, {"backbone": "resnet10t", "detector_args": {"box_nms_tresh": 0.3}})
    with pytest.raises(KDError, match=r"detector_args takes no argument 'min_size'"):
        build_model("fasterrcnn", K, {"backbone": "resnet10t", "detector_args": {"min_size": 64}})
    with pytest.raises(KDError, match=r"detector_args: score_thresh is 'high': it must be a number"):
        build_model("fcos", K, {"backbone": "resnet10t", "detector_args": {"score_thresh": "high"}})
    with pytest.raises(KDError, match=r"'torchvision/fcos_resnet50_fpn': score_thresh is 'high': it must be a number"):
        build_model("fcos_resnet50_fpn", K, {"score_thresh": "high"})
    with pytest.raises(KDError, match=r"torchvision/fcos\(min_size='a'\): must be a whole number"):
        build_model("fcos", K, {"min_size": "a"})
    with pytest.raises(KDError, match=r"'torchvision/fasterrcnn' cannot be built from .*detector_args=3"):
        build_model("fasterrcnn", K, {"backbone": "resnet10t", "detector_args": 3})
    assert isinstance(build_model("fcos", K, {"backbone": "resnet10t", "out_channels": 32}), FCOS)


def test_a_detector_on_timm_takes_arguments_of_torchvision():
    args = {"backbone": "test_resnet", "out_channels": 32, "detector_args": {"box_batch_size_per_image": 16}}
    model = build_model("fasterrcnn", K, args)
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == 16


@pytest.mark.skipif(
    not gains(nn.Conv2d(64, 64, 3, padding=1)), reason="this processor or torch has no algorithm of Winograd"
)
def test_fast_convolutions_of_a_tower_take_all_levels_at_once(batch):
    adapter = tiny("FCOS")
    prepared = adapter.prepare(*batch)
    features = [torch.randn(len(batch[0]), 64, size, size) for size in (20, 10, 5, 3, 2)]
    direct = adapter.head(features, prepared)
    with FastConvolutions():
        trace = adapter.head(features, prepared)
    smallest = trace.states[1]["cls"][-1]
    assert "_Convolution" in str(smallest.grad_fn.next_functions)  # before the group norm
    torch.testing.assert_close(trace.predictions.logits, direct.predictions.logits, rtol=1e-3, atol=1e-3)
