"""Comparisons of losses and methods: what each golden file of a loss holds, computed by kdtoolkit.

Each function takes a loaded file and yields a Check for every quantity of it that kdtoolkit computes.
"""

import json
import re
from collections.abc import Iterator, Mapping
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from kdtoolkit.boxes import centres, distances, elementwise_giou, elementwise_iou, from_distances
from kdtoolkit.contract import (
    Assignment,
    Batch,
    DetectorSpec,
    Exchange,
    HeadTrace,
    Predictions,
    PriorKind,
    Priors,
    View,
)
from kdtoolkit.detectors.gfl import distribution_focal_loss, quality_focal_loss
from kdtoolkit.methods.bckd import BCKD
from kdtoolkit.methods.common import distribution_kl, quality_focal_kd, resize_like
from kdtoolkit.methods.cwd import cwd_loss
from kdtoolkit.methods.fbkd import FBKD, Connector
from kdtoolkit.methods.fbkd import spatial_attention as fbkd_attention
from kdtoolkit.methods.features import Level
from kdtoolkit.methods.fgd import FGD, channel_attention, spatial_attention
from kdtoolkit.methods.fitnet import box_region, fine_grained_region, imitation_loss
from kdtoolkit.methods.ld import LD, valuable_region
from kdtoolkit.methods.logitkd import decoupled_kl, dist_loss
from kdtoolkit.methods.mgd import generator, mgd_loss
from kdtoolkit.methods.pkd import pkd_loss
from tests.parity._check import FLOOR, GRADIENT_BOUND, Check

EPS = torch.finfo(torch.float32).eps
Golden = Mapping[str, np.ndarray]


def tensor(z: Golden, key: str) -> Tensor:
    return torch.from_numpy(z[key])


def indexed(z: Golden, prefix: str) -> list[Tensor]:
    """All of `prefix.0`, `prefix.1`, ..."""
    count = sum(bool(re.fullmatch(re.escape(prefix) + r"\.\d+", key)) for key in z)
    return [tensor(z, f"{prefix}.{i}") for i in range(count)]


def sizes(z: Golden, key: str) -> tuple[tuple[int, int], ...]:
    return tuple((int(h), int(w)) for h, w in z[key])


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


def view(spec: DetectorSpec, batch: Batch, features=(), predictions=None, assignment=None) -> View:
    """What a detector would show, without the detector."""
    trace = None if predictions is None else HeadTrace((), predictions)
    return View(SimpleNamespace(spec=spec), batch, tuple(features), trace, assignment)


def batch_of(z: Golden, images: int) -> Batch:
    shape = sizes(z, "img_shape")
    padded = sizes(z, "pad_shape") if "pad_shape" in z else shape
    return Batch(torch.zeros(images, 3, 1, 1), shape, padded, shape, tuple(indexed(z, "gt_boxes")))


# ---- single losses


def pkd(z: Golden) -> Iterator[Check]:
    for key in z:
        if match := re.fullmatch(r"(.*)\.(?:crosskd|mmrazor)_w(\d+)\.loss", key):
            student = tensor(z, f"{match[1]}.student").requires_grad_()
            loss = float(match[2]) * pkd_loss(student, tensor(z, f"{match[1]}.teacher"))
            yield from _loss_and_gradient(z, key, loss, student)
        elif match := re.fullmatch(r"resize\.resize_stu_(True|False)\.loss", key):
            student, teacher = tensor(z, "resize.student").requires_grad_(), tensor(z, "resize.teacher")
            # The reference has a switch for which map is resized; ours always resizes the smaller.
            pair = (
                (resize_like(student, teacher), teacher)
                if match[1] == "True"
                else (student, resize_like(teacher, student))
            )
            yield from _loss_and_gradient(z, key, 6 * pkd_loss(*pair), student)
    yield Check(
        "constchan.loss", pkd_loss(tensor(z, "constchan.student"), tensor(z, "constchan.teacher")), z["constchan.loss"]
    )
    students = [x.requires_grad_() for x in indexed(z, "pyramid.student")]
    loss = 6 * sum(pkd_loss(s, t) for s, t in zip(students, indexed(z, "pyramid.teacher"), strict=True))
    yield Check("pyramid.loss", loss, z["pyramid.loss"])
    for level, student in enumerate(students):
        key = f"pyramid.grad.{level}"
        yield Check(key, gradient(loss, student), z[key], GRADIENT_BOUND)


def _loss_and_gradient(z: Golden, key: str, loss: Tensor, x: Tensor) -> Iterator[Check]:
    """The loss called `key`, and its gradient where the file has it."""
    yield Check(key, loss, z[key])
    name = key.removesuffix("loss") + "grad"
    if name in z:
        yield Check(name, gradient(loss.sum(), x), z[name], GRADIENT_BOUND)


def kdqfl(z: Golden) -> Iterator[Check]:
    target, weight = tensor(z, "target_logits"), tensor(z, "weight")[:, None]
    for key in z:
        if not (match := re.fullmatch(r"beta(\d)\.(\w+)\.loss", key)):
            continue
        student = tensor(z, "pred").requires_grad_()
        loss = quality_focal_kd(student, target, float(match[1]))
        reduced = {
            "mean": lambda x: x.mean(),
            "mean_w": lambda x: (x * weight).mean(),
            "mean_w_avg": lambda x: (x * weight).sum() / (7.5 + EPS),
            "none_w": lambda x: x * weight,
            "sum": lambda x: x.sum(),
            "mean_avg": lambda x: 0.4 * x.sum() / (3 + EPS),
        }[match[2]](loss)
        yield from _loss_and_gradient(z, key, reduced, student)


def kldiv(z: Golden) -> Iterator[Check]:
    soft, weight = tensor(z, "soft"), tensor(z, "weight")
    for key in z:
        if not (match := re.fullmatch(r"T(\d+)\.(mean|sum)\.(\w+?)(?:_lw([\d.]+))?\.loss", key)):
            continue
        student = tensor(z, "pred").requires_grad_()
        loss = distribution_kl(student, soft, float(match[1])) / (soft.shape[-1] if match[2] == "mean" else 1)
        reduced = {
            "mean": lambda x: x.mean(),
            "mean_w": lambda x: (x * weight).mean(),
            "none": lambda x: x,
            "sum": lambda x: x.sum(),
            "w_avg4": lambda x: (x * weight).sum() / (4 + EPS),
        }[match[3]](loss)
        yield from _loss_and_gradient(z, key, float(match[4] or 1) * reduced, student)


def cwd(z: Golden) -> Iterator[Check]:
    for key in z:
        if match := re.fullmatch(r"(case\d+)\.tau(\d+)_w(\d+)\.loss", key):
            student = tensor(z, f"{match[1]}.student").requires_grad_()
            loss = float(match[3]) * cwd_loss(student, tensor(z, f"{match[1]}.teacher"), float(match[2]))
            yield from _loss_and_gradient(z, key, loss, student)


# ---- logits


def logits(z: Golden) -> Iterator[Check]:
    """KL, DKD and DIST; the plain squared distances in the file are `imitation_loss` up to the divisor."""
    teacher, labels = tensor(z, "teacher"), tensor(z, "labels")
    rows, classes = teacher.shape
    for key in z:
        if not key.endswith(".loss"):
            continue
        name, _, tau = key.removesuffix(".loss").partition(".tau")
        student = tensor(z, "student").requires_grad_()
        if name.startswith("dist"):
            inter, intra, weight = (2.0, 0.5, 1.0) if name == "dist_i2" else (1.0, 1.0, 2.0)
            loss = weight * dist_loss(student, teacher, float(tau), inter, intra)
        elif name.startswith("dkd"):
            divisor = rows if name == "dkd_batchmean" else 1
            target, others = (part.sum() / divisor for part in decoupled_kl(student, teacher, labels, float(tau)))
            yield Check(key.replace("loss", "tckd"), target, z[key.replace("loss", "tckd")])
            yield Check(key.replace("loss", "nckd"), others, z[key.replace("loss", "nckd")])
            loss = target + 8 * others
        elif name.startswith("kl_"):
            factor = 3 / (rows * classes) if name == "kl_mean" else 1 / rows
            loss = factor * distribution_kl(student, teacher, float(tau)).sum()
        elif name == "kl4d_tau4":
            student = tensor(z, "student4d").requires_grad_()
            maps = student.movedim(1, -1), tensor(z, "teacher4d").movedim(1, -1)
            loss = distribution_kl(*maps, 4.0).sum() / len(student)
        else:
            student, other = tensor(z, "student4d").requires_grad_(), tensor(z, "teacher4d")
            each = student[0].numel()
            if name == "l2":
                unit = [x / x.flatten(1).norm(dim=1)[:, None, None, None] for x in (student, other)]
                loss = imitation_loss(*unit) * each
            else:
                total = imitation_loss(student, other) * student.numel()
                loss = {"l2_nonorm": total / len(student), "l2_div": total / student.numel(), "l2_dist": total.sqrt()}[
                    name
                ]
        yield from _loss_and_gradient(z, key, loss, student)


# ---- MGD


def mgd(z: Golden) -> Iterator[Check]:
    for case in sorted({key.split(".")[0] for key in z}):
        student, teacher = tensor(z, f"{case}.student").requires_grad_(), tensor(z, f"{case}.teacher")
        align = torch.nn.Conv2d(student.shape[1], teacher.shape[1], 1)
        generate = generator(teacher.shape[1])
        modules = {"generation": generate}
        if f"{case}.param.align.weight" in z:
            modules["align"] = align
        parameters = {f"{name}.{p}": value for name, m in modules.items() for p, value in m.named_parameters()}
        for name, parameter in parameters.items():
            parameter.data = tensor(z, f"{case}.param.{name}")
        aligned = align(student) if "align" in modules else student
        kept = tensor(z, f"{case}.uniform") <= 1 - float(z[f"{case}.lambda_mgd"])
        generated = generate(aligned * kept)
        loss = float(z[f"{case}.alpha_mgd"]) * mgd_loss(generated, teacher)
        yield Check(f"{case}.mask", kept.float(), z[f"{case}.mask"])
        yield Check(f"{case}.generated", generated, z[f"{case}.generated"])
        yield from _loss_and_gradient(z, f"{case}.loss", loss, student)
        for name, parameter in parameters.items():
            key = f"{case}.grad.param.{name}"
            yield Check(key, gradient(loss, parameter), z[key], GRADIENT_BOUND)


# ---- FBKD


def fbkd(z: Golden) -> Iterator[Check]:
    cfg = json.loads(str(z["cfg_json"]))
    student, teacher = tensor(z, "student").requires_grad_(), tensor(z, "teacher")
    # The reference pools twice: 2 x 2, then by maxpool_stride.
    connector = Connector(cfg["in_channels"], teacher.shape[1], 2 * cfg["maxpool_stride"], cfg["reduction"])
    parameters = dict(connector.named_parameters())
    names = {key: _fbkd_name(key.removeprefix("gradnorm.")) for key in z if key.startswith("gradnorm.")}
    for key, name in names.items():
        value = tensor(z, key.removeprefix("gradnorm."))
        parameters[name].data = value.reshape(parameters[name].shape)

    for role, x in (("student", student), ("teacher", teacher)):
        yield Check(f"mid.{role}.spatial_mask", fbkd_attention(x, cfg["spatial_T"]), z[f"mid.{role}.spatial_mask"])
    relation = connector.relation(connector.student_relation(student))
    for name, ours in (
        ("student.channel_pool_adapt", connector.channel(student.mean((2, 3)))),
        ("student.spatial_pool_adapt", connector.spatial(student.mean(1, keepdim=True))),
        ("student.relation_adapt", relation),
        ("student.feat_adapt", connector.feature(student)),
        ("teacher.relation", connector.teacher_relation(teacher)),
    ):
        yield Check(f"mid.{name}", ours, z[f"mid.{name}"])
    terms = connector(student, teacher, cfg["spatial_T"])
    for name, loss in zip(("feat", "channel", "spatial", "nonlocal"), terms, strict=True):
        yield Check(f"loss.unweighted_{name}", loss, z[f"loss.unweighted_{name}"])

    method = FBKD(
        temperature=cfg["spatial_T"],
        feature_weight=cfg["mask_l2_weight"],
        channel_weight=cfg["channel_weight"],
        spatial_weight=cfg["spatial_weight"],
        relation_weight=cfg["nonlocal_weight"],
    )
    specs = [DetectorSpec("", 1, (8,), (x.shape[1],), PriorKind.POINTS) for x in (student, teacher)]
    method.setup(*specs)
    method.connectors[0] = connector
    batch = Batch(torch.zeros(len(student), 3, 1, 1), (), (), ())
    exchange = Exchange(view(specs[0], batch, [student]), view(specs[1], batch, [teacher]))
    total = sum(method(exchange).values())
    yield Check("loss.total", total, z["loss.total"])
    yield Check("grad.student", gradient(total, student), z["grad.student"], GRADIENT_BOUND)
    for key, name in names.items():
        yield Check(key, gradient(total, parameters[name]).norm(), z[key], GRADIENT_BOUND)


def _fbkd_name(name: str) -> str:
    """Our name of a parameter of the reference."""
    for theirs, ours in (
        ("student_connector.student_non_local.", "student_relation."),
        ("teacher_connector.teacher_non_local.", "teacher_relation."),
        ("student_connector.channel_wise_adaptation.", "channel."),
        ("student_connector.spatial_wise_adaptation.", "spatial."),
        ("student_connector.non_local_adaptation.", "relation."),
        ("student_connector.adaptation_layers.", "feature."),
        ("theta.conv.", "query."),
        ("phi.0.0.conv.", "key."),
        ("g.0.0.conv.", "value."),
        ("conv_out.conv.", "out."),
        ("conv_out.bn.weight", "scale"),
        ("conv_out.bn.bias", "shift"),
    ):
        name = name.replace(theirs, ours)
    return name


# ---- FGD


def fgd(z: Golden) -> Iterator[Check]:
    cfg = json.loads(str(z["cfg_json"]))
    student, teacher = tensor(z, "student").requires_grad_(), tensor(z, "teacher")
    method = FGD(
        temperature=cfg["temp"],
        foreground_weight=cfg["alpha_fgd"],
        background_weight=cfg["beta_fgd"],
        attention_weight=cfg["gamma_fgd"],
        global_weight=cfg["lambda_fgd"],
        published_masks=True,
    )
    specs = [DetectorSpec("", 1, (8,), (x.shape[1],), PriorKind.POINTS) for x in (student, teacher)]
    method.setup(*specs)
    parameters = dict(method.named_parameters())
    names = {key: _fgd_name(key.removeprefix("param.")) for key in z if key.startswith("param.")}
    for key, name in names.items():
        parameters[name].data = tensor(z, key)

    batch = batch_of(z, len(student))
    (masks,) = method.masks(batch, {specs[1].strides[0]: (teacher.shape[2], teacher.shape[3])})
    yield Check("mid.mask_fg", masks[0], z["mid.mask_fg"])
    yield Check("mid.mask_bg", masks[1], z["mid.mask_bg"])
    aligned = method.align[0](student)
    for role, x in (("student", aligned), ("teacher", teacher)):
        yield Check(f"mid.chan_att_{role}", channel_attention(x, cfg["temp"]), z[f"mid.chan_att_{role}"])
        yield Check(f"mid.spat_att_{role}", spatial_attention(x, cfg["temp"]), z[f"mid.spat_att_{role}"])
    terms = method.loss(aligned, teacher, Level(0, masks))
    for name, loss in zip(("fg", "bg", "mask", "relation"), terms, strict=True):
        yield Check(f"loss.{name}", loss, z[f"loss.{name}"])
        yield Check(f"grad.{name}", gradient(loss, student), z[f"grad.{name}"], GRADIENT_BOUND)
    exchange = Exchange(view(specs[0], batch, [student]), view(specs[1], batch, [teacher]))
    total = sum(method(exchange).values())
    yield Check("loss.total", total, z["loss.total"])
    yield Check("grad.total", gradient(total, student), z["grad.total"], GRADIENT_BOUND)
    for key, name in names.items():
        if f"grad.{key}" in z:
            # A softmax does not see the bias of the context's mask: its gradient is rounding noise, so it is measured
            # against that of the weight.
            noise = key.startswith("param.conv_mask") and key.endswith("bias")
            scale = float(np.abs(z[f"grad.{key[:-4]}weight"]).max()) if noise else 0.0
            ours = gradient(total, parameters[name])
            yield Check(f"grad.{key}", ours, z[f"grad.{key}"], GRADIENT_BOUND, max(scale, FLOOR))


def _fgd_name(name: str) -> str:
    """Our name of a parameter of the reference."""
    for theirs, ours in (("conv_mask", "mask"), ("channel_add_conv", "add")):
        for suffix, role in (("s", "student"), ("t", "teacher")):
            if name.startswith(f"{theirs}_{suffix}."):
                return name.replace(f"{theirs}_{suffix}", f"{role}_context.0.{ours}")
    return name.replace("align.", "align.0.")


# ---- LD


def ld(z: Golden) -> Iterator[Check]:
    cfg = json.loads(str(z["cfg_json"]))
    repo = "imitation_method" in cfg
    classes, bins = cfg["num_classes"], cfg["reg_max"] + 1
    cls_maps = [x.requires_grad_() for x in indexed(z, "cls_score")]
    box_maps = [x.requires_grad_() for x in indexed(z, "bbox_pred")]
    images, strides = len(cls_maps[0]), tuple(z["strides"].tolist())
    grid = tuple(tuple(x.shape[2:]) for x in cls_maps)
    batch = batch_of(z, images)
    anchors = [_anchors(size, stride) for size, stride in zip(grid, strides, strict=True)]
    labels, weights = indexed(z, "target.labels"), indexed(z, "target.label_weights")

    def exchange(levels: slice) -> Exchange:
        """What LD sees of these levels."""
        boxes = torch.cat(anchors[levels])
        per_anchor = torch.cat(
            [torch.full((len(a),), s) for a, s in zip(anchors[levels], strides[levels], strict=True)]
        )
        priors = Priors(boxes, per_anchor, grid[levels])
        spec = DetectorSpec(
            "", classes, strides[levels], (1,) * len(grid), PriorKind.ANCHORS, bins=tuple(map(float, range(bins)))
        )
        own = Predictions(_flat(cls_maps[levels], (classes,)), _flat(box_maps[levels], (4, bins)), priors, _no_decode)
        soft_cls = indexed(z, "soft_label") if repo else [x.detach() for x in cls_maps]
        soft = Predictions(
            _flat(soft_cls[levels], (classes,)), _flat(indexed(z, "soft_target")[levels], (4, bins)), priors, _no_decode
        )
        assigned = torch.cat(labels[levels], 1)
        assignment = Assignment(
            assigned < classes, assigned, boxes.expand(images, -1, -1), torch.cat(weights[levels], 1), torch.ones(())
        )
        return Exchange(view(spec, batch, (), own, assignment), view(spec, batch, (), soft))

    if repo:
        (weight, temperature), (cls_weight, cls_temperature) = cfg["loss_ld"], cfg["loss_kd"]
        valuable_weight, valuable_temperature = cfg["loss_ld_vlr"]
        assert valuable_temperature == temperature, "LD has one temperature for both regions"
        method = LD(
            weight=weight,
            temperature=temperature,
            valuable_weight=valuable_weight,
            cls_weight=cls_weight,
            cls_temperature=cls_temperature,
        )
    else:
        method = LD(weight=cfg["loss_weight"], temperature=cfg["T"])
    terms = {"main": "loss_ld", "valuable": "loss_ld_vlr", "cls": "loss_kd"} if repo else {"main": "loss_ld"}

    given = exchange(slice(None))
    whole = method(given)
    for term, name in terms.items():
        yield Check(f"{name} (sum of levels)", whole[term], sum(float(x) for x in indexed(z, f"loss.{name}")))
    for level in range(len(grid)):
        parts = method(exchange(slice(level, level + 1)))
        for term, name in terms.items():
            if term != "valuable":  # one level alone has other thresholds; see the region below
                yield Check(f"loss.{name}.{level}", parts[term], z[f"loss.{name}.{level}"])
        if f"grad_loss_ld.bbox_pred.{level}" in z:
            key = f"grad_loss_ld.bbox_pred.{level}"
            yield Check(key, gradient(whole["main"], box_maps[level]), z[key], GRADIENT_BOUND)
    total = sum(whole.values()) + _gfl_losses(z, given)
    for level in range(len(grid)):
        for name, maps in (("cls_score", cls_maps), ("bbox_pred", box_maps)):
            key = f"grad.{name}.{level}"
            yield Check(key, gradient(total, maps[level]), z[key], GRADIENT_BOUND)
    if repo:
        yield from _ld_regions(z, cfg, torch.cat(anchors), batch, torch.cat(weights, 1) > 0, labels)


# ---- BCKD


def bckd(z: Golden) -> Iterator[Check]:
    cfg = json.loads(str(z["cfg_json"]))
    classes, strides = cfg["num_classes"], tuple(z["strides"].tolist())
    cls_maps = [x.requires_grad_() for x in indexed(z, "cls_score")]
    box_maps = [x.requires_grad_() for x in indexed(z, "bbox_pred")]
    images, grid = len(cls_maps[0]), tuple(tuple(x.shape[2:]) for x in cls_maps)
    labels, weights = torch.cat(indexed(z, "target.labels"), 1), torch.cat(indexed(z, "target.label_weights"), 1)
    anchors = torch.cat([_anchors(hw, stride) for hw, stride in zip(grid, strides, strict=True)])
    counts = torch.tensor([h * w for h, w in grid])
    priors = Priors(anchors, torch.tensor(strides).repeat_interleave(counts), grid)
    spec = DetectorSpec("", classes, strides, (1,) * len(grid), PriorKind.ANCHORS, (1,) * len(grid))
    normaliser = tensor(z, "norm.avg_factor").float()
    assert cfg["beta"] == 1, "BCKD has one exponent"

    def predictions(cls: list[Tensor], box: list[Tensor]) -> Predictions:
        return Predictions(_flat(cls, (classes,)), _flat(box, (4, cfg["reg_max"] + 1)), priors, _integral)

    def terms(weights: Tensor, published_levels: bool) -> dict[str, Tensor]:
        method = BCKD(cls_weight=cfg["loss_kd"], box_weight=cfg["loss_score_kd"], published_levels=published_levels)
        assignment = Assignment(labels < classes, labels, anchors.expand(images, -1, -1), weights, normaliser)
        own = predictions(cls_maps, box_maps)
        soft = predictions(indexed(z, "soft_label"), indexed(z, "soft_target"))
        batch = batch_of(z, images)
        return method(Exchange(view(spec, batch, (), own, assignment), view(spec, batch, (), soft)))

    names = {"cls": "loss_kd", "box": "loss_score_kd"}
    published = terms(weights, True)
    total = sum(published.values())
    for term, name in names.items():
        yield Check(f"{name} (sum of levels)", published[term], sum(float(x) for x in indexed(z, f"loss.{name}")))
    yield Check("loss.KD", total, z["loss.KD"])
    level_of = torch.arange(len(grid)).repeat_interleave(counts)
    for level, (cls, box) in enumerate(zip(cls_maps, box_maps, strict=True)):
        alone = terms(weights * (level_of == level), True)
        for term, name in names.items():
            yield Check(f"loss.{name}.{level}", alone[term], z[f"loss.{name}.{level}"])
        for name, maps in (("cls_score", cls), ("bbox_pred", box)):
            key = f"grad_kd.{name}.{level}"
            yield Check(key, gradient(total, maps), z[key], GRADIENT_BOUND)
    # The default counts every level; on those that the published code counts, it is the same.
    counted = (labels < classes).any(0)
    counted = torch.stack([counted[level_of == level].any() for level in range(len(grid))])[level_of]
    yield Check("loss.KD (default, on the levels counted)", sum(terms(weights * counted, False).values()), z["loss.KD"])


def _flat(maps: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    return torch.cat([x.permute(0, 2, 3, 1).reshape(len(x), -1, *shape) for x in maps], 1)


def _integral(regression: Tensor, priors: Priors) -> Tensor:
    """Boxes of distributions over the distances, in strides, from the anchors' centres."""
    sides = (regression.softmax(-1) * torch.arange(regression.shape[-1])).sum(-1)
    return from_distances(centres(priors.boxes), sides * priors.strides[:, None])


def _gfl_losses(z: Golden, given: Exchange) -> Tensor:
    """The detection losses that go with LD in one sum: GFL's, but for the divisor of the box terms."""
    student, labels = given.student.head.predictions, given.matched().student_assignment.labels
    positive = labels < student.logits.shape[-1]
    image, prior = positive.nonzero(as_tuple=True)
    target = torch.cat(indexed(z, "target.bbox_targets"), 1)[positive]
    points, stride = centres(student.priors.boxes)[prior], student.priors.strides[prior][:, None]
    regression = student.regression[positive]
    bins = torch.arange(regression.shape[-1])
    boxes = from_distances(points, (regression.softmax(-1) * bins).sum(-1) * stride)
    quality = torch.zeros_like(student.logits)
    quality[image, prior, labels[positive]] = elementwise_iou(boxes, target).detach()
    weight = student.probabilities.detach().amax(-1)[positive]
    sides = (distances(points, target) / stride).clamp(0, len(bins) - 1 - 0.1)
    box = 2 * (1 - elementwise_giou(boxes, target)) + 0.25 * distribution_focal_loss(regression, sides).mean(-1)
    cls = quality_focal_loss(student.logits, quality).sum(-1) * given.matched().student_assignment.weights
    return cls.sum() / (float(z["norm.avg_factor"]) + EPS) + (weight * box).sum() / (weight.sum() + 1e-6)


def _ld_regions(
    z: Golden, cfg: dict[str, object], anchors: Tensor, batch: Batch, valid: Tensor, labels: list[Tensor]
) -> Iterator[Check]:
    """The valuable region, and feature imitation with its region."""
    per_level = [x.shape[1] for x in labels]
    region = valuable_region(anchors, batch.boxes, valid, per_level)
    yield Check("target.vlr_region", region, torch.cat(indexed(z, "target.vlr_region"), 1))
    if cfg["imitation_method"] == "finegrained":
        region = fine_grained_region(anchors, batch.boxes, valid)
    else:
        region = box_region(anchors, batch.boxes)
    yield Check("target.im_region", region.float(), torch.cat(indexed(z, "target.im_region"), 1))
    u = tensor(z, "im.student_u"), tensor(z, "im.teacher_u")
    pairs = zip(indexed(z, "im.student_v"), indexed(z, "im.teacher_v"), region.split(per_level, 1), strict=True)
    for level, (student_v, teacher_v, inside) in enumerate(pairs):
        student = (u[0][:, :, None, None] * student_v[:, None]).requires_grad_()
        teacher = u[1][:, :, None, None] * teacher_v[:, None]
        # The reference counts a level only if it has a positive; see docs/parity.md.
        counted = bool((labels[level] < cfg["num_classes"]).any())
        loss = cfg["loss_im"] * imitation_loss(student, teacher, inside.view_as(student_v)) * counted
        yield Check(f"loss.loss_im.{level}", loss, z[f"loss.loss_im.{level}"])
        yield Check(
            f"gradnorm.feat.{level}", gradient(loss, student).norm(), z[f"gradnorm.feat.{level}"], GRADIENT_BOUND
        )


def _anchors(size: tuple[int, int], stride: int) -> Tensor:
    """GFL's anchors: squares of 8 strides, centred on the cells' top left corners."""
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    centre = torch.stack([x, y, x, y], -1).reshape(-1, 4).float() * stride
    return centre + 4.0 * stride * torch.tensor([-1, -1, 1, 1])


def _no_decode(regression: Tensor, priors: Priors) -> Tensor:
    raise AssertionError("LD compares distributions, not boxes")
