"""What is particular to RF-DETR and LW-DETR: windows, and groups of queries. See test_rtdetr.py for the rest."""

import pytest
import torch

pytest.importorskip("transformers")

from kdtoolkit.adapters.transformers.base import queries_of
from kdtoolkit.adapters.transformers.rfdetr import tiny_lw_detr
from kdtoolkit.distiller import Distiller
from kdtoolkit.errors import KDError
from kdtoolkit.libraries import adapt
from kdtoolkit.methods import CrossKD
from tests._traced import traced
from tests.adapters.transformers.test_rtdetr import FAMILIES, build, two_images

KIN = pytest.mark.parametrize("family", ["rf-detr", "lw-detr"])


@pytest.fixture
def batch():
    return two_images()


@KIN
def test_sizes_fit_patches_and_windows(family):
    adapter = build(FAMILIES[family])
    step = {"rf-detr": 8 * 2, "lw-detr": 16 * 2}[family]
    images = [torch.rand(3, 49, 33), torch.rand(3, 17, 81)]
    prepared = adapter.prepare(images)
    height, width = prepared.images.shape[-2:]
    assert height % step == width % step == 0
    assert (height, width) == ((96, 96) if family == "rf-detr" else (64, 96))
    assert prepared.sizes == ((49, 33), (17, 81))
    assert prepared.padded_sizes == (((64, 64), (96, 96)) if family == "rf-detr" else ((64, 64), (32, 96)))
    mean, std = (prepared.images.new_tensor(x)[:, None, None] for x in (adapter.image_mean, adapter.image_std))
    assert torch.equal(prepared.images[1, :, :17, :81], (images[1] - mean) / std)
    assert not prepared.images[1, :, 17:].any()
    adapter.head(adapter.features(prepared), prepared)


def test_features_lie_where_the_image_has_them():
    """RF-DETR's windows exchange height and width on canvases that are no squares: there cells would be elsewhere."""
    adapter = build(FAMILIES["rf-detr"])
    image = torch.full((3, 64, 128), 0.5)
    spot = image.clone()
    spot[:, 40:56, 16:32] = 1.0
    levels = []
    for each in (image, spot):
        prepared = adapter.prepare([each])
        levels.append(adapter.model.model.backbone.backbone(prepared.images).feature_maps[0])
    changed = (levels[1] - levels[0]).abs().sum(1)[0]
    assert changed.shape == (16, 16)
    row, column = divmod(int(changed.argmax()), 16)
    assert 5 <= row <= 6
    assert 2 <= column <= 3


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_detector_without_levels_is_refused():
    """As the library's default config of LW-DETR builds it."""
    with pytest.raises(KDError, match=r"projector_scale_factors=\[1\.0\]"):
        adapt(tiny_lw_detr(3, projector_scale_factors=[]))


@KIN
def test_the_first_group_is_the_one_that_detects(family, batch):
    adapter = build(FAMILIES[family], dropout=0.0)
    prepared = adapter.prepare(*batch)
    features = adapter.features(prepared)
    detecting = adapter.head(features, prepared)
    adapter.model.train()
    training = adapter.head(features, prepared)
    torch.testing.assert_close(training.predictions.logits, detecting.predictions.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(training.predictions.boxes, detecting.predictions.boxes, rtol=1e-4, atol=1e-2)
    assert torch.equal(
        queries_of(training.predictions.priors).content, queries_of(detecting.predictions.priors).content
    )


@KIN
def test_all_groups_learn(family, batch):
    adapter = build(FAMILIES[family])
    adapter.model.train()
    prepared, _, trace = traced(adapter, batch)
    losses, _ = adapter.task_losses(trace, prepared)
    assert {"loss_ce", "loss_bbox", "loss_giou", "loss_ce_0", "loss_giou_1", "loss_bbox_enc"} <= set(losses)
    sum(losses.values()).backward()
    model = adapter.model.model
    for group in model.query_feat.weight.grad.split(20):
        assert group.any()
    assert all(linear.weight.grad.any() for linear in model.enc_output)


@KIN
def test_queries_handed_over_see_each_other_in_train_mode(family, batch):
    """Self-attention cuts its queries into groups in train mode: those handed over must not be cut."""
    student, teacher = build(FAMILIES[family], dropout=0.0), build(FAMILIES[family], seed=5, num_queries=25)
    prepared, features, _ = traced(student, batch)
    _, _, theirs = traced(teacher, batch)
    detecting = student.head(features, prepared, theirs.predictions.priors).predictions
    student.model.train()
    training = student.head(features, prepared, theirs.predictions.priors).predictions
    torch.testing.assert_close(training.logits, detecting.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(training.boxes, detecting.boxes, rtol=1e-4, atol=1e-2)


def test_crosskd_from_one_to_the_other(batch):
    losses = Distiller(build(FAMILIES["lw-detr"]), build(FAMILIES["rf-detr"]), [CrossKD()]).train()(*batch)
    losses.total.backward()
    assert losses["crosskd/cls"].isfinite()
