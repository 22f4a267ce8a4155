import pytest
import timm
import torch
import torchvision

from kdtoolkit.adapters.torchvision import on_timm
from kdtoolkit.detectors import ATSS, FCOS, GFL, RetinaNet
from kdtoolkit.errors import KDError

HEAD = {"neck_channels": 8, "head_channels": 8, "head_blocks": 1, "head_groups": 4}
NARROW_SWIN = {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 1, 1, 1)}


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("test_convnext", {}),
        ("test_efficientnet", {}),
        ("test_mambaout", {}),  # maps (N, H, W, C)
        ("swin_tiny_patch4_window7_224", NARROW_SWIN),  # likewise, and images of one size unless told otherwise
    ],
)
@pytest.mark.parametrize("size", [(64, 64), (70, 101)])
def test_backbones_of_many_kinds_train(name, args, size):
    torch.manual_seed(0)
    model = GFL(3, backbone=name, backbone_args=args, **HEAD)
    image = torch.rand(3, *size)
    targets = [{"boxes": torch.tensor([[4.0, 6.0, 30.0, 40.0]]), "labels": torch.tensor([1])}] * 2
    losses = model([image, image], targets)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.neck.parameters())
    height, width = model.prepare([image]).images.shape[-2:]
    features = model.features(model.prepare([image]).images)
    assert [tuple(x.shape) for x in features] == [(1, 8, -(-height // s), -(-width // s)) for s in model.strides]
    assert len(model.eval()([image])) == 1


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("test_vit", {}, r"does not run on images of|strides \[.*missing"),
        (
            "maxvit_rmlp_pico_rw_256",
            {},
            r"does not run on images of 64 x 96 px \(.*Take a backbone that takes any size",
        ),
        ("test_resnet", {"depth": 5}, r"cannot be built from depth=5: TypeError"),
        ("test_resnet", {"output_stride": 16}, r"strides \[.*missing"),
        ("inception_next_atto", {"out_indices": (7,)}, "cannot be built from"),
    ],
)
def test_backbones_that_cannot_work_are_refused_when_built(name, args, message):
    with pytest.raises(KDError, match=message):
        GFL(3, backbone=name, backbone_args=args, **HEAD)


@pytest.mark.parametrize("kind", [GFL, ATSS, FCOS, RetinaNet])
def test_images_are_normalised_as_the_backbone_was_trained(kind):
    half = kind(3, backbone="test_resnet", **HEAD)  # timm names 0.5 for it
    assert half.image_mean.flatten().tolist() == half.image_std.flatten().tolist() == [0.5] * 3
    usual = kind(3, backbone="resnet10t", **HEAD)
    assert usual.image_mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    own = kind(3, backbone="test_resnet", image_mean=(0.0, 0.1, 0.2), **HEAD)
    assert own.image_mean.flatten().tolist() == pytest.approx([0.0, 0.1, 0.2])
    assert own.image_std.flatten().tolist() == [0.5] * 3


def test_the_trial_leaves_the_model_as_it_was_built():
    torch.manual_seed(0)
    model = GFL(3, backbone="test_resnet", **HEAD)
    assert all(module.training for module in model.modules())
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(norm.running_mean.any() or norm.num_batches_tracked for norm in norms)


@pytest.fixture(scope="module")
def trained_backbone():
    """The state dict of a whole timm model with weights of its own."""
    generator = torch.Generator().manual_seed(0)
    state = timm.create_model("test_resnet").state_dict()
    return {k: torch.rand(v.shape, generator=generator) if v.is_floating_point() else v for k, v in state.items()}


@pytest.mark.parametrize(
    "form",
    [
        lambda w: w,
        lambda w: {k: v for k, v in w.items() if not k.startswith("fc.")},
        lambda w: {**w, "fc.weight": torch.ones(3, w["fc.weight"].shape[1]), "fc.bias": torch.ones(3)},
        lambda w: {"state_dict": {f"module.{k}": v for k, v in w.items()}, "epoch": 3},
    ],
    ids=["whole", "without classifier", "another classifier", "wrapped"],
)
def test_a_backbone_takes_its_weights_from_a_file(form, trained_backbone, tmp_path):
    path = tmp_path / "backbone.pth"
    torch.save(form(trained_backbone), path)
    native = GFL(3, backbone="test_resnet", pretrained=str(path), **HEAD)
    theirs = on_timm(torchvision.models.detection.FCOS, 3, backbone="test_resnet", pretrained=path, out_channels=32)
    for state in (native.backbone.state_dict(), theirs.backbone.body.state_dict()):
        assert state
        assert all(torch.equal(value, trained_backbone[key]) for key, value in state.items())
    assert native.image_mean.flatten().tolist() == theirs.transform.image_mean == [0.5] * 3
    assert "state_dict" not in native.backbone.pretrained_cfg


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            lambda w: {k: v for k, v in w.items() if k != "conv1.0.weight"},
            r"1 missing: conv1\.0\.weight\. Name the backbone",
        ),
        (lambda w: {**w, "more": torch.ones(2)}, "do not fit ResNet: 1 unknown: more. Name the backbone"),
        (lambda w: {"encoder.weight": torch.ones(2)}, "75 missing: .*; 1 unknown: encoder.weight. Name the backbone"),
    ],
)
def test_weights_that_do_not_fit_a_backbone_are_explained(form, message, trained_backbone, tmp_path):
    torch.save(form(trained_backbone), tmp_path / "x.pth")
    with pytest.raises(KDError, match=message):
        GFL(3, backbone="test_resnet", pretrained=str(tmp_path / "x.pth"), **HEAD)


def test_weights_that_cannot_be_downloaded_are_said_at_once(monkeypatch):
    monkeypatch.setattr("kdtoolkit.detectors.backbone.get_session", lambda: None)  # no network
    with pytest.raises(KDError, match=r"'resnet18': its weights cannot be downloaded .* Give a file, as in pret"):
        GFL(3, backbone="resnet18", pretrained=True, **HEAD)
