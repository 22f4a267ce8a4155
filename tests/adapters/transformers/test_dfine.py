"""What is particular to D-FINE and DEIMv2: box sides are distributions. See test_rtdetr.py for the rest."""

from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("transformers")
import transformers

from kdtoolkit.adapters.native import DenseAdapter
from kdtoolkit.adapters.transformers import build_model
from kdtoolkit.adapters.transformers.detr_base import tiny_backbone
from kdtoolkit.adapters.transformers.dfine import Deimv2Adapter, DFineAdapter
from kdtoolkit.distiller import Distiller
from kdtoolkit.errors import IncompatibleError
from kdtoolkit.methods import LD, PKD, CrossKD
from kdtoolkit.models import Detector, save_detector
from tests._traced import traced
from tests.adapters.transformers.test_rtdetr import (
    FAMILIES,
    build,
    deimv2,
    to_pixels,
    two_images,
    without_objects,
)
from tests.conftest import tiny_gfl

KIN = pytest.mark.parametrize("family", ["d-fine", "deimv2"])


@pytest.fixture
def batch():
    return two_images()


@pytest.fixture
def empty():
    return without_objects()


@KIN
def test_corners_are_the_librarys_own(family, batch):
    adapter = build(FAMILIES[family])
    prepared, _, trace = traced(adapter, batch)
    output = adapter.model(prepared.images)
    corners = output.intermediate_predicted_corners[:, -1]
    predictions = trace.predictions
    assert torch.equal(predictions.regression, corners.reshape(2, 20, 4, 33))
    assert torch.equal(predictions.boxes, to_pixels(output.pred_boxes, prepared.images.shape[-2:]))
    # Each side is the first guess's, moved by the mean of its distribution over the spec's bins.
    bins = torch.tensor(adapter.spec.bins)
    assert bins.tolist() == sorted(bins.tolist())
    assert bins[16] == 0
    assert bins[-1] == -bins[0] == 4  # up 0.5, twice, in shares of 1 / reg_scale
    mean = (predictions.regression.softmax(-1) * bins).sum(-1)
    x, y, w, h = (output.initial_reference_points[:, -1] * prepared.images.new_tensor([128, 96, 128, 96])).unbind(-1)
    left, top, right, bottom = (mean / 4 + 0.5).unbind(-1)
    sides = torch.stack([x - left * w, y - top * h, x + right * w, y + bottom * h], -1)
    torch.testing.assert_close(predictions.boxes, sides, rtol=1e-4, atol=1e-3)


@KIN
def test_boxes_follow_the_distributions(family, batch):
    adapter = build(FAMILIES[family])
    _, _, trace = traced(adapter, batch)
    predictions = trace.predictions
    wide = predictions.regression.clone()
    wide[..., :] = -20.0
    wide[..., -1] = 20.0  # all sides as far out as bins go
    grown = replace(predictions, regression=wide).boxes
    assert (grown[..., :2] < predictions.boxes[..., :2]).all()
    assert (grown[..., 2:] > predictions.boxes[..., 2:]).all()
    regression = predictions.regression.detach().clone().requires_grad_()
    replace(predictions, regression=regression).boxes.sum().backward()
    assert regression.grad.abs().sum() > 0


@KIN
def test_boxes_are_precise_under_autocast(family, batch):
    adapter = build(FAMILIES[family])
    _, _, trace = traced(adapter, batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(trace.predictions.boxes, _outside(trace))
        assert trace.predictions.boxes.dtype == torch.float32


def _outside(trace):
    with torch.autocast("cpu", enabled=False):
        return trace.predictions.boxes


@KIN
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_ld_between_two_of_a_family(family, precision, batch, empty):
    student, teacher = build(FAMILIES[family]), build(FAMILIES[family], seed=5, num_queries=25, decoder_layers=2)
    distiller = Distiller(teacher, student, [LD(), CrossKD()]).train()
    for data in (empty, batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            losses = distiller(*data)
        assert all(loss.isfinite() for loss in losses.values())
    assert losses["ld/main"] > 0
    student.model.zero_grad()
    losses["ld/main"].backward()
    decoder = student.model.model.decoder
    assert decoder.bbox_embed[-1].layers[-1].weight.grad.any()
    assert decoder.layers[0].self_attn.q_proj.weight.grad.any()


def test_ld_between_d_fine_and_deimv2(batch):
    losses = Distiller(build(FAMILIES["d-fine"]), build(FAMILIES["deimv2"]), [LD()]).train()(*batch)
    assert losses["ld/main"] > 0


@KIN
def test_ld_vanishes_between_twins(family, batch):
    distiller = Distiller(build(FAMILIES[family]), build(FAMILIES[family]), [LD()]).eval()
    distiller.student_adapter.model.eval()
    torch.testing.assert_close(distiller(*batch)["ld/main"], torch.tensor(0.0), rtol=0, atol=1e-5)


def test_ld_refuses_other_bins_and_priors():
    student = build(FAMILIES["d-fine"])
    with pytest.raises(IncompatibleError, match="17 bins"):
        Distiller(build(FAMILIES["d-fine"], max_num_bins=16), student, [LD()])
    with pytest.raises(IncompatibleError, match="distributions of box sides"):
        Distiller(build(FAMILIES["d-fine"], reg_scale=8.0), student, [LD()])
    with pytest.raises(IncompatibleError):
        Distiller(DenseAdapter(tiny_gfl(seed=1)), student, [LD()])


def test_the_matching_goes_by_boxes_clamped_to_the_canvas(batch):
    adapter = build(FAMILIES["d-fine"])
    prepared, _, trace = traced(adapter, batch)
    predictions = trace.predictions
    regression = torch.full_like(predictions.regression, -20.0)
    regression[..., -1] = 20.0
    assert not (replace(predictions, regression=regression).boxes[..., 0] >= 0).all()
    wide = replace(trace, predictions=replace(predictions, regression=regression))
    boxes = replace(predictions, regression=regression).decode.normalised(regression).clamp(0, 1)
    indices = adapter.matcher()({"logits": predictions.logits, "pred_boxes": boxes}, adapter.library_labels(prepared))
    positive = adapter.assign(wide, prepared).positive
    assert [row.nonzero()[:, 0].tolist() for row in positive] == [sorted(queries.tolist()) for queries, _ in indices]


def lite(feat_strides=(16, 32)):
    return deimv2(
        encoder_type="lite",
        backbone_config=tiny_backbone(3),
        encoder_in_channels=[16],
        feat_strides=list(feat_strides),
        num_feature_levels=2,
        decoder_in_channels=[32, 32],
    )


def atto():
    """As the published ones: their configs have the stride of the backbone's map alone."""
    return lite(feat_strides=(16,))


def dinov3():
    backbone = transformers.DINOv3ViTConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        patch_size=16,
        image_size=64,
        out_indices=[1, 2, 3],
        apply_layernorm=True,
        reshape_hidden_states=True,
    )
    return deimv2(backbone_config=backbone, spatial_tuning_adapter_inplanes=8)


@pytest.mark.parametrize(("make", "strides"), [(lite, (16, 32)), (atto, (16, 32)), (dinov3, (8, 16, 32))])
def test_other_encoders_of_deimv2(make, strides, batch):
    adapter = build((Deimv2Adapter, partial(make)))
    prepared, features, trace = traced(adapter, batch)
    assert adapter.spec.strides == strides
    assert [96 // x.shape[-2] for x in features] == list(strides)
    assert torch.equal(trace.predictions.logits, adapter.model(prepared.images).logits)
    losses = Distiller(adapter, build(FAMILIES["deimv2"]), [PKD(), LD()]).train()(*batch)
    assert losses.total.isfinite()
    assert losses["pkd/feature"] > 0


def test_images_of_deimv2_on_dinov3_are_normalised():
    """As the published ones are; those on HGNet are not."""
    on_dinov3, on_hgnet = build((Deimv2Adapter, partial(dinov3))), build(FAMILIES["deimv2"])
    assert on_dinov3.image_mean == pytest.approx((0.485, 0.456, 0.406))
    assert on_dinov3.image_std == pytest.approx((0.229, 0.224, 0.225))
    assert (on_hgnet.image_mean, on_hgnet.image_std) == ((0.0,) * 3, (1.0,) * 3)


def test_shared_box_heads_come_back_from_a_folder(tmp_path):
    """As published small ones have them: the library saves the last layer's, and loads the first layer's."""
    torch.manual_seed(0)
    model = deimv2(share_bbox_head=True)
    with torch.no_grad():
        for parameter in model.bbox_embed.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = build_model(str(tmp_path), 3, {})
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    fewer = build_model(str(tmp_path), 2, {})
    assert torch.equal(fewer.bbox_embed[0].layers[0].weight, model.bbox_embed[0].layers[0].weight)
    assert fewer.class_embed[0].out_features == 2
    save_detector(Detector(model, "hf/deimv2", ("ant", "bee", "cow")), tmp_path / "saved")
    plain = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())


def test_d_fine_is_not_deimv2():
    assert not DFineAdapter.matches(deimv2())
