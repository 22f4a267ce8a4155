"""Comparisons of methods of features: what the golden files of CanKD, DetKDS and DeFeat hold, by kdtoolkit."""

import json
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from kdtoolkit.contract import DetectorSpec, Exchange, Method, PriorKind
from kdtoolkit.methods.cankd import CanKD, cankd_loss, instance_norm
from kdtoolkit.methods.defeat import DeFeat, decoupled_losses, levels_of, object_regions
from kdtoolkit.methods.detkds import DetKDS, detkds_loss, normalise_over_images, pool, weigh_channels
from kdtoolkit.methods.fitnet import fine_grained_region
from tests.parity._check import FLOOR, GRADIENT_BOUND, Check
from tests.parity.losses import Golden, batch_of, gradient, indexed, tensor, view


def pyramids(z: Golden) -> tuple[list[Tensor], list[Tensor]]:
    return [x.requires_grad_() for x in indexed(z, "student")], indexed(z, "teacher")


def exchange(z: Golden, method: Method, student: list[Tensor], teacher: list[Tensor]) -> Exchange:
    """What the method sees; it is set up for it."""
    strides = tuple(z["strides"].tolist()) if "strides" in z else tuple(8 * 2**i for i in range(len(student)))
    specs = [
        DetectorSpec("", 1, strides, tuple(x.shape[1] for x in side), PriorKind.POINTS) for side in (student, teacher)
    ]
    method.setup(*specs)
    shown = {"img_shape": z["img_shape"] if "img_shape" in z else np.ones((len(student[0]), 2), int)}
    batch = batch_of({**z, **shown}, len(student[0]))
    return Exchange(view(specs[0], batch, student), view(specs[1], batch, teacher))


def take(z: Golden, names: dict[str, Tensor]) -> None:
    """Give parameters the file's values."""
    for key, parameter in names.items():
        parameter.data = tensor(z, key).view_as(parameter)


def parameters_of(levels: Iterable[nn.Module], module: str) -> dict[str, Tensor]:
    """The parameters of a module a level, by their keys in a file that calls it `module`."""
    return {
        f"param.{level}.{module}.{name}": p for level, each in enumerate(levels) for name, p in each.named_parameters()
    }


def gradients(
    z: Golden, loss: Tensor, student: list[Tensor], parameters: dict[str, Tensor], prefix: str = "grad"
) -> Iterator[Check]:
    for level, x in enumerate(student):
        key = f"{prefix}.student.{level}"
        yield Check(key, gradient(loss, x), z[key], GRADIENT_BOUND)
    for key, parameter in parameters.items():
        ours = gradient(loss, parameter)
        # A normalisation may not see a bias: its gradient is rounding noise then, so it is measured by its weight's.
        weight = f"{prefix}.{key.removesuffix('bias')}weight"
        scale = float(np.abs(z[weight]).max()) if key.endswith(".bias") and weight in z else 0.0
        name = f"{prefix}.{key}"
        yield Check(name, ours.reshape(z[name].shape), z[name], GRADIENT_BOUND, max(scale, FLOOR))


# ---- CanKD


def cankd(z: Golden) -> Iterator[Check]:
    cfg = json.loads(str(z["cfg_json"]))
    student, teacher = pyramids(z)
    method = CanKD(weight=cfg["loss_weight"] / 2)  # its code halves the mean
    given = exchange(z, method, student, teacher)
    parameters = {}
    for level in range(len(student)):
        block = dict(method.attention[level].named_parameters(prefix=str(level)))
        prefix = f"param.{level}.non_local_att"
        for theirs, ours in {"att.theta": "theta", "att.phi.0": "phi", "g.0": "g"}.items():
            for part in ("weight", "bias"):
                parameters[f"{prefix}.{theirs}.{part}"] = block[f"{level}.{ours}.{part}"]
        parameters[f"{prefix}.W.0.weight"] = block[f"{level}.out.weight"]
        parameters[f"{prefix}.W.1.weight"] = block[f"{level}.scale"]
    take(z, parameters)

    for level, (s, t) in enumerate(zip(student, teacher, strict=True)):
        added = method.attention[level](s, t)
        yield Check(f"loss.{level}", method.weights[0] * cankd_loss(added, t), z[f"loss.{level}"])
        if f"mid.z_student.{level}" in z:
            # Ours has no biases in W: they shift a channel as a whole, which the normalisation takes out again.
            shifts = tensor(z, f"param.{level}.non_local_att.W.1.bias")[:, None, None]
            yield Check(f"mid.z_student.{level}", added + shifts, z[f"mid.z_student.{level}"])
            for role, x in (("student", added), ("teacher", t)):
                yield Check(f"mid.norm_{role}.{level}", instance_norm(x), z[f"mid.norm_{role}.{level}"])
    total = sum(method(given).values())
    yield Check("loss.TOTAL", total, z["loss.TOTAL"])
    yield from gradients(z, total, student, parameters)
    for level in range(len(student)):
        for layer in ("W.0", "W.1"):  # whose bias ours does not have
            key = f"grad.param.{level}.non_local_att.{layer}"
            scale = max(float(np.abs(z[f"grad.param.{level}.non_local_att.W.1.weight"]).max()), FLOOR)
            yield Check(
                f"{key}.bias (ours has none)", np.zeros_like(z[f"{key}.bias"]), z[f"{key}.bias"], GRADIENT_BOUND, scale
            )


# ---- DetKDS


def detkds(z: Golden) -> Iterator[Check]:
    cfg = json.loads(str(z["cfg_json"]))
    student, teacher = pyramids(z)
    method = DetKDS(weight=cfg["gamma_global"], temperature=cfg["T"])
    given = exchange(z, method, student, teacher)
    parameters = parameters_of(method.align, "align")
    take(z, parameters)
    dead = []
    for level, (s, t) in enumerate(zip(student, teacher, strict=True)):
        aligned = method.align[level](s)
        loss = method.weights[0] * detkds_loss(aligned, t, method.temperature)
        yield Check(f"loss.global.{level}", loss, z[f"loss.global.{level}"])
        for role, x in (("student", aligned), ("teacher", t)):
            if f"mid.catt_{role}.{level}" in z:
                weighed = weigh_channels(x, method.temperature)
                pooled = pool(weighed)
                for name, ours in (("catt", weighed), ("pool", pooled), ("norm", normalise_over_images(pooled))):
                    yield Check(f"mid.{name}_{role}.{level}", ours, z[f"mid.{name}_{role}.{level}"])
        zero = (pool(weigh_channels(aligned, method.temperature)) == 0).all(0).repeat_interleave(2, 1)
        dead.append(zero.repeat_interleave(2, 2)[:, : s.shape[2], : s.shape[3]] & (aligned == 0).all(0))
    total = sum(method(given).values())
    yield Check("loss.GLOBAL", total, z["loss.GLOBAL"])
    if not any(zero.any() for zero in dead):
        yield from gradients(z, total, student, parameters)
        return
    # Where all images are 0 the published gradient is 1e12 times the loss's, and ours is 0; elsewhere they agree.
    for level, (x, zero) in enumerate(zip(student, dead, strict=True)):
        key, ours = f"grad.student.{level}", gradient(total, x)
        yield Check(f"{key} (where an image is not 0)", ours[:, ~zero], z[key][:, ~zero.numpy()], GRADIENT_BOUND)
        yield Check(f"{key} (where all are 0: ours is 0)", ours[:, zero], np.zeros_like(z[key][:, zero.numpy()]))


# ---- DeFeat


def defeat(z: Golden) -> Iterator[Check]:
    cfg = json.loads(str(z["cfg_json"]))
    student, teacher = pyramids(z)
    method = DeFeat(object_weight=cfg["hint_neck_w"], background_weight=cfg["hint_neck_back_w"])
    given = exchange(z, method, student, teacher)
    parameters = parameters_of(method.align, "adapt")
    take(z, parameters)
    boxes, grid = indexed(z, "gt_boxes"), [tuple(x.shape[2:]) for x in student]
    strides = tuple(z["strides"].tolist())
    for i, own in enumerate(boxes):
        yield Check(f"level_of.{i}", levels_of(own, len(student)), z[f"level_of.{i}"])
    if "loss.background" in z:
        regions = object_regions(boxes, strides, range(len(grid)), grid)
        terms = method(given)
    else:
        # The same repository's fine-grained imitation: another region, and no term outside of it.
        regions = fine_grained_regions(z, cfg, boxes, strides, grid)
        inside = [
            decoupled_losses(align(s), t, region)[0]
            for align, s, t, region in zip(method.align, student, teacher, regions, strict=True)
        ]
        terms = {"object": cfg["hint_neck_w"] * torch.stack(inside).mean()}
    for level, region in enumerate(regions):
        yield Check(f"mid.mask.{level}", region.double(), z[f"mid.mask.{level}"])
    for name, loss in terms.items():
        yield Check(f"loss.{name}", loss, z[f"loss.{name}"])
    total = sum(terms.values())
    yield Check("loss.TOTAL", total, z["loss.TOTAL"])
    yield from gradients(z, total, student, parameters)
    if "grad.object.student.0" in z:
        yield from gradients(z, terms["object"], student, {}, "grad.object")


def fine_grained_regions(
    z: Golden, cfg: dict, boxes: list[Tensor], strides: tuple[int, ...], grid: list[tuple[int, int]]
) -> list[Tensor]:
    """`fine_grained_region` of each level by itself: with its anchors, and the boxes that belong to it."""
    regions = []
    for level, (stride, (height, width)) in enumerate(zip(strides, grid, strict=True)):
        ratio, scale = torch.tensor(cfg["ratios"]).sqrt()[:, None], torch.tensor(cfg["scales"])
        heights, widths = (stride * scale * ratio).flatten(), (stride * scale / ratio).flatten()
        base = torch.stack([-widths, -heights, widths, heights], 1) / 2
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        anchors = (torch.stack([x, y, x, y], -1).reshape(-1, 1, 4) * stride + base).reshape(-1, 4)
        own = [b[torch.from_numpy(z[f"level_of.{i}"]) == level] for i, b in enumerate(boxes)]
        valid = torch.ones(len(boxes), len(anchors), dtype=torch.bool)
        region = fine_grained_region(anchors, own, valid, cfg["phi"])
        regions.append(region.view(len(boxes), height, width, -1).any(-1))
    return regions
