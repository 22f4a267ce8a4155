import pytest
import timm
import torch

from kdtoolkit import Distiller, adapt
from kdtoolkit.adapters import timm as adapters
from kdtoolkit.contract import Batch, Capability, PriorKind
from kdtoolkit.detectors import backbone
from kdtoolkit.errors import KDError
from kdtoolkit.methods import FGD, LD, PKD, Cosine, CrossKD
from kdtoolkit.models import open_detector
from tests._foundation import CONVNEXT, DINOV2, DINOV3, foundation, write_weights
from tests.conftest import tiny_gfl

FACTS = {DINOV2: ((14,), (32,)), DINOV3: ((16,), (32,)), CONVNEXT: ((4, 8, 16, 32), (8, 16, 24, 32))}


@pytest.fixture(scope="module")
def models():
    return {name: foundation(name) for name in FACTS}


@pytest.mark.parametrize("name", FACTS)
def test_it_shows_features_alone(models, name):
    spec = adapt(models[name]).spec
    assert (spec.strides, spec.channels) == FACTS[name]
    assert spec.priors is PriorKind.NONE
    assert spec.capabilities == {Capability.FEATURES}
    assert spec.name == name.partition("?")[0]


@pytest.mark.parametrize("name", FACTS)
def test_images_of_any_size_become_whole_cells(models, name):
    adapter = adapt(models[name])
    (strides, channels), coarsest = FACTS[name], max(FACTS[name][0])
    images = [torch.rand(3, 50, 70), torch.rand(3, 64, 41)]
    with torch.no_grad():
        batch = adapter.prepare(images)
        maps = adapter.features(batch)
    height, width = batch.images.shape[-2:]
    assert (height, width) == (-(-64 // coarsest) * coarsest, -(-70 // coarsest) * coarsest)
    assert batch.sizes == batch.original_sizes == ((50, 70), (64, 41))
    shapes = [(2, count, height // stride, width // stride) for count, stride in zip(channels, strides, strict=True)]
    assert [tuple(x.shape) for x in maps] == shapes
    config = models[name].pretrained_cfg
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    torch.testing.assert_close(batch.images[0, :, :50, :70], (images[0] - mean) / std)
    assert (batch.images[0, :, 50:] == 0).all()


@pytest.mark.parametrize("name", [DINOV2, DINOV3])
def test_the_map_is_the_patch_tokens_in_rows(models, name):
    """Class and register tokens are dropped, and the final norm is applied."""
    model = models[name]
    adapter = adapt(model)
    patch = FACTS[name][0][0]
    with torch.no_grad():
        batch = adapter.prepare([torch.rand(3, 2 * patch, 3 * patch)])
        (found,) = adapter.features(batch)
        tokens = model.forward_features(batch.images)
    assert tokens.shape[1] - 6 == model.num_prefix_tokens > 1
    for y in range(2):
        for x in range(3):
            torch.testing.assert_close(found[0, :, y, x], tokens[0, model.num_prefix_tokens + 3 * y + x])


def test_as_a_teacher_it_takes_the_students_canvas_and_scale(models):
    like = Batch(torch.zeros(2, 3, 96, 128), ((96, 120), (90, 64)), ((96, 128), (96, 64)), ((96, 120), (90, 64)))
    images = [torch.rand(3, 96, 120), torch.rand(3, 90, 64)]
    half = adapt(models[DINOV2]).prepare(images, like=like.geometry_scaled_by(0.5))
    assert half.sizes == ((48, 60), (45, 32))
    assert half.images.shape[-2:] == (56, 70)  # 48 x 64, in whole patches of 14 px
    whole = adapt(models[DINOV3]).prepare(images, like=like)
    assert whole.sizes == like.sizes
    assert whole.images.shape[-2:] == (96, 128)


@pytest.mark.parametrize(("name", "scale"), [(DINOV2, 0.5), (DINOV2, 1.0), (DINOV3, 0.25), (CONVNEXT, 1.0)])
def test_it_teaches(models, batch, name, scale):
    student, teacher = tiny_gfl(seed=2), models[name]
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    distiller = Distiller(teacher, student, [Cosine(relation_weight=1.0)], teacher_scale=scale).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = distiller(*batch)
    losses.total.backward()
    assert losses["cosine/cosine"].dtype == torch.float32
    assert all(loss.isfinite() for loss in losses.values())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert list(distiller(batch[0], None)) == ["cosine/cosine", "cosine/relation"]


def test_methods_of_features_work_where_strides_are_equal(models, batch):
    distiller = Distiller(models[DINOV3], tiny_gfl(seed=2), [PKD(), FGD()], teacher_scale=0.5)
    assert [method.levels for method in distiller.methods] == [[(2, 0)]] * 2
    assert all(loss.isfinite() for loss in distiller(*batch).values())
    assert [name.partition("/")[0] for name in distiller(batch[0], None)] == ["pkd"]  # nobody finds FGD objects
    with pytest.raises(KDError, match=r"no stride in common: .*\(28,\)\. Use Cosine, which needs none"):
        Distiller(models[DINOV2], tiny_gfl(seed=2), [PKD()], teacher_scale=0.5)


def test_without_labels_methods_that_need_objects_are_refused(models, batch):
    distiller = Distiller(models[DINOV3], tiny_gfl(seed=2), [FGD()])
    with pytest.raises(KDError, match=r"\(FGD\) need objects, and a teacher that shows features alone finds none"):
        distiller(batch[0], None)


@pytest.mark.parametrize("method", [CrossKD, LD])
def test_methods_of_heads_are_refused(models, method):
    with pytest.raises(
        KDError, match=r"which the teacher \(timm/vit_small_patch16_dinov3\.lvd1689m\) does not show\. Use Cosine"
    ):
        Distiller(models[DINOV3], tiny_gfl(seed=2), [method()])


def test_it_is_no_student_and_no_detector(models):
    model = models[DINOV3]
    with pytest.raises(KDError, match="can only teach, because it shows nothing but features"):
        Distiller(tiny_gfl(seed=1), model, [Cosine()])
    adapter = adapt(model)
    with torch.no_grad():
        seen = adapter.prepare([torch.rand(3, 32, 32)])
        maps = adapter.features(seen)
    for call in (lambda: adapter.head(maps, seen), adapter.graph):
        with pytest.raises(KDError, match="shows features alone, so it can neither detect nor be trained"):
            call()


def test_a_model_of_ones_own_must_take_any_size(batch):
    sizes = {"embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 0}
    with pytest.raises(KDError, match="dynamic_img_size=True"):
        adapt(timm.create_model("vit_tiny_patch16_224", **sizes))
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **sizes)
    assert Distiller(model, tiny_gfl(seed=2), [Cosine()])(*batch)["cosine/cosine"].isfinite()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/vit_smal_patch14_dinov2.lvd142m", r"did you mean 'vit_small_patch14_dinov2\.lvd142m'"),
        ("timm/vit_small_patch14_dinov2.lvd142", r"did you mean 'vit_small_patch14_dinov2\.lvd142m'"),
        (f"{DINOV3}&pretrained=true", "takes no pretrained: weights are named beside the model"),
        (f"{DINOV3}&depht=3", "cannot be built from .*depht=3"),
    ],
)
def test_wrong_names_and_arguments_are_explained(name, message):
    with pytest.raises(KDError, match=message):
        open_detector(name, num_classes=3)


def test_weights_of_a_file(tmp_path):
    file = write_weights(tmp_path / "vit.safetensors", DINOV3, **{"head.weight": torch.zeros(7, 32)})
    opened = open_detector(DINOV3, weights=file)
    expected = foundation(DINOV3).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in opened.model.state_dict().items())
    assert opened.trained
    assert opened.class_names is None
    assert opened.name == DINOV3
    assert opened.weights == f"{file}, licence dinov3-license"
    (note,) = opened.notes
    assert "a licence of their own, dinov3-license (https://ai.meta.com" in note
    assert open_detector(DINOV3, weights=file, class_names=["a", "b"]).class_names is None


def test_published_weights_are_loaded(tmp_path, monkeypatch):
    """timm takes them from a file here, where it would download them."""
    file = write_weights(tmp_path / "vit.safetensors", DINOV3)
    monkeypatch.setattr(adapters, "check_downloadable", lambda *about: None)
    opened = open_detector(DINOV3, weights="pretrained", args={"pretrained_cfg_overlay": {"file": str(file)}})
    expected = foundation(DINOV3).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in opened.model.state_dict().items())
    assert opened.weights == "timm's vit_small_patch16_dinov3.lvd1689m, licence dinov3-license"
    assert opened.trained


def test_weights_in_their_publishers_names(tmp_path):
    """Meta's file of DINOv2 has a mask token, and registers of a different name."""
    state = foundation(DINOV2).state_dict()
    state["register_tokens"] = state.pop("reg_token")
    state["cls_token"], state["mask_token"] = state["cls_token"], torch.zeros(1, 32)
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 32), state["pos_embed"]], 1)
    torch.save(state, tmp_path / "dinov2.pth")
    opened = open_detector(DINOV2, weights=tmp_path / "dinov2.pth")
    expected = foundation(DINOV2)
    assert torch.equal(opened.model.reg_token, expected.reg_token)
    assert torch.equal(opened.model.blocks[1].attn.qkv.weight, expected.blocks[1].attn.qkv.weight)
    assert opened.notes == ()  # DINOv2 is Apache-2.0


def test_wrong_weights_are_explained(tmp_path):
    file = write_weights(tmp_path / "vit.safetensors", DINOV3)
    with pytest.raises(KDError, match=r"vit\.safetensors"):
        open_detector(CONVNEXT, weights=file)
    with pytest.raises(KDError, match="of a different shape"):
        open_detector(DINOV3.replace("embed_dim=32", "embed_dim=16"), weights=file)
    with pytest.raises(KDError, match=r"there are no weights 'IMAGENET1K'. The name itself says which"):
        open_detector(DINOV3, weights="IMAGENET1K")


def test_without_a_network_published_weights_are_refused_at_once(monkeypatch):
    monkeypatch.setattr(backbone, "_reaches_hub", lambda: False)
    monkeypatch.setattr(backbone, "try_to_load_from_cache", lambda *about: None)
    with pytest.raises(KDError, match=r"cannot be downloaded from the hub, because there is no network\. Name a file"):
        open_detector("timm/vit_small_patch14_dinov2.lvd142m", weights="pretrained")


def test_models_that_cannot_show_maps_are_refused(monkeypatch):
    monkeypatch.setattr(adapters.FoundationAdapter, "matches", classmethod(lambda cls, model: False))
    with pytest.raises(KDError, match="cannot show its features"):
        foundation(DINOV3)
