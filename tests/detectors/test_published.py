import pytest
import torch
from safetensors.torch import save_file

from kdtoolkit.detectors import ATSS, GFL, load_published
from kdtoolkit.errors import KDError

RESNETS = {
    "resnet18": ((64, 64, 128, 256, 512), 2, (2, 2, 2, 2)),
    "resnet50": ((64, 256, 512, 1024, 2048), 3, (3, 4, 6, 3)),
}
HEAD = {"neck_channels": 8, "head_channels": 16, "head_blocks": 2, "head_groups": 4}
LEVELS = 5


def norm(name, channels):
    shapes = {f"{name}.{key}": (channels,) for key in ("weight", "bias", "running_mean", "running_var")}
    return shapes | {f"{name}.num_batches_tracked": ()}


def backbone_shapes(name):
    """torchvision's parameter names of a ResNet."""
    channels, convs, depths = RESNETS[name]
    shapes = {"conv1.weight": (64, 3, 7, 7)} | norm("bn1", 64)
    before = 64
    for stage, depth in enumerate(depths):
        after, middle = channels[stage + 1], 64 * 2**stage
        for block in range(depth):
            at = f"layer{stage + 1}.{block}"
            plan = [(before, middle, 3), (middle, after, 3)]
            if convs == 3:
                plan = [(before, middle, 1), (middle, middle, 3), (middle, after, 1)]
            for i, (c_in, c_out, size) in enumerate(plan):
                shapes[f"{at}.conv{i + 1}.weight"] = (c_out, c_in, size, size)
                shapes |= norm(f"{at}.bn{i + 1}", c_out)
            if block == 0 and before != after:
                shapes[f"{at}.downsample.0.weight"] = (after, before, 1, 1)
                shapes |= norm(f"{at}.downsample.1", after)
            before = after
    return {f"backbone.{key}": shape for key, shape in shapes.items()}


def checkpoint(kind, resnet, *, classes=3, bins=9):
    """A checkpoint of the published layout with random weights."""
    shapes = backbone_shapes(resnet)
    for i, channels in enumerate(RESNETS[resnet][0][2:]):
        shapes |= conv(f"neck.lateral_convs.{i}.conv", channels, 8, 1)
    for i in range(LEVELS):
        shapes |= conv(f"neck.fpn_convs.{i}.conv", 8, 8)
    for branch in ("cls", "reg"):
        for i in range(2):
            at = f"bbox_head.{branch}_convs.{i}"
            shapes[f"{at}.conv.weight"] = (16, 16 if i else 8, 3, 3)
            shapes |= {f"{at}.gn.weight": (16,), f"{at}.gn.bias": (16,)}
    shapes |= {f"bbox_head.scales.{i}.scale": () for i in range(LEVELS)}
    if kind == "gfl":
        shapes |= conv("bbox_head.gfl_cls", 16, classes) | conv("bbox_head.gfl_reg", 16, 4 * bins)
    else:
        shapes |= conv("bbox_head.atss_cls", 16, classes) | conv("bbox_head.atss_reg", 16, 4)
        shapes |= conv("bbox_head.atss_centerness", 16, 1)
    generator = torch.Generator().manual_seed(0)
    weights = {key: torch.rand(shape, generator=generator) * 0.1 + 0.01 for key, shape in shapes.items()}
    for key in weights:
        if key.endswith("num_batches_tracked"):
            weights[key] = torch.tensor(7)
    if kind == "gfl":
        weights["bbox_head.integral.project"] = torch.arange(float(bins))
    return weights


def conv(name, c_in, c_out, size=3):
    return {f"{name}.weight": (c_out, c_in, size, size), f"{name}.bias": (c_out,)}


def build(kind, resnet):
    if kind == "gfl":
        return GFL(3, backbone=resnet, bins=9, **HEAD)
    return ATSS(3, backbone=resnet, **HEAD)


@pytest.mark.parametrize(("kind", "resnet"), [("gfl", "resnet18"), ("gfl", "resnet50"), ("atss", "resnet18")])
def test_every_entry_arrives(kind, resnet):
    model = build(kind, resnet).eval()
    published = checkpoint(kind, resnet)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    before = model.features(image)
    load_published(model, published)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.features(image), strict=True))
    # Neither lost nor doubled: all values of the checkpoint are in the model, and no others.
    given = [v.double().sum().item() for k, v in published.items() if not k.endswith(("project", "scale"))]
    loaded = [v.double().sum().item() for k, v in model.state_dict().items() if k != "scales"]
    assert sorted(given) == sorted(loaded)
    assert [published[f"bbox_head.scales.{i}.scale"].item() for i in range(LEVELS)] == model.scales.tolist()


def test_each_entry_arrives_at_its_place():
    model = build("atss", "resnet18")
    published = checkpoint("atss", "resnet18")
    load_published(model, published)
    pairs = {
        "backbone.layer3.1.bn2.running_var": model.backbone.layer3[1].bn2.running_var,
        "neck.lateral_convs.0.conv.weight": model.neck.inner_blocks[0][0].weight,
        "neck.fpn_convs.2.conv.bias": model.neck.layer_blocks[2][0].bias,
        "neck.fpn_convs.3.conv.weight": model.neck.extra_blocks.convs[0].weight,
        "neck.fpn_convs.4.conv.weight": model.neck.extra_blocks.convs[1].weight,
        "bbox_head.cls_convs.1.conv.weight": model.towers["cls"][1][0].weight,
        "bbox_head.reg_convs.1.gn.bias": model.towers["reg"][1][1].bias,
        "bbox_head.atss_cls.weight": model.predictors["cls"].weight,
        "bbox_head.atss_reg.weight": model.predictors["reg"].weight,
        "bbox_head.atss_centerness.bias": model.predictors["quality"].bias,
        "bbox_head.scales.3.scale": model.scales[3],
    }
    for name, parameter in pairs.items():
        assert torch.equal(published[name], parameter), name


@pytest.mark.parametrize("name", ["wrapped.pth", "bare.pth", "bare.safetensors"])
def test_files(name, tmp_path):
    model, published = build("gfl", "resnet18"), checkpoint("gfl", "resnet18")
    if name.endswith(".pth"):
        torch.save(
            {"state_dict": published, "meta": {"epoch": 12}} if "wrapped" in name else published, tmp_path / name
        )
    else:
        save_file(published, tmp_path / name)
    load_published(model, tmp_path / name)
    assert torch.equal(model.predictors["reg"].weight, published["bbox_head.gfl_reg.weight"])


def test_what_does_not_fit_is_named():
    model, published = build("gfl", "resnet18"), checkpoint("gfl", "resnet18")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cases = {
        r"1 unknown: teacher\.x": published | {"teacher.x": torch.ones(1)},
        r"1 missing: scales; 4 unknown: bbox_head\.scales": {k: v for k, v in published.items() if "scales.4" not in k},
        r"missing: predictors\.cls\.weight": {k: v for k, v in published.items() if k != "bbox_head.gfl_cls.weight"},
        r"are for 80 classes, and this GFL has 3 \(predictors\.cls\.bias \(needs \(3,\), is \(80,\)\)\)": published
        | {"bbox_head.gfl_cls.bias": torch.ones(80)},
        r"1 unknown: bbox_head\.integral\.project": published | {"bbox_head.integral.project": torch.arange(9.0) / 2},
    }
    for message, wrong in cases.items():
        with pytest.raises(KDError, match=message):
            load_published(model, wrong)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
