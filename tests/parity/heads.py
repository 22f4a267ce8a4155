"""Comparisons of heads: detection losses, detections, cross-head predictions and CrossKD's losses of a golden file.

Detectors are built from the file's settings and weights alone; their backbones are of no use here.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit.adapters.native import DenseAdapter
from kdtoolkit.boxes import centres, distances
from kdtoolkit.contract import Assignment, Batch, Exchange, HeadTrace, Predictions, Priors, View
from kdtoolkit.detectors import ATSS, FCOS, GFL, RetinaNet
from kdtoolkit.detectors.atss import centerness
from kdtoolkit.detectors.dense import DenseDetector
from kdtoolkit.detectors.published import rename, rename_published
from kdtoolkit.detectors.retinanet import encode_offsets
from kdtoolkit.detectors.towers import flatten
from kdtoolkit.methods import PKD, CrossKD
from kdtoolkit.methods.common import EPS, box_kd, classification_kd
from kdtoolkit.methods.crosskd import align_statistics
from kdtoolkit.methods.pkd import pkd_loss
from tests.parity._check import GRADIENT_BOUND, Check

Golden = Mapping[str, np.ndarray]
DETECTORS = {"GFLHead": GFL, "ATSSHead": ATSS, "RetinaHead": RetinaNet, "FCOSHead": FCOS}
EXACT = 1e-9  # less than one in the largest label or count
LOSS_NAMES = {"cls": "loss_cls", "box": "loss_bbox", "dfl": "loss_dfl", "centerness": "loss_centerness"}
BCKD_EXTRA = 2e-4  # found by solving the box terms of its reference files for it: 1.98e-4 to 2.00e-4 on each level
FCOS_MINIMUM = 1e-6  # what the reference divides FCOS's KD terms by where there is no positive; here that is 1


def compare(z: Golden) -> Iterator[Check]:
    """All checks of a `crosskd_*` file, or the detection part of `ld_*`, `ldrepo_*` and `bckd_*`.

    What is above its bound is computed again from inputs that are rounded otherwise: a value that this moves as far is
    ill-conditioned, on either side. It is compared up to four times its movement, and its name says so.
    """
    cfg = json.loads(str(z["cfg_json"]))
    kind = _crosskd if "detector" in cfg else _distribution_head
    checks = list(kind(z, cfg))
    if not all(check.passed for check in checks):
        shaken = [list(kind(_rounded_otherwise(z, seed), cfg)) for seed in range(3)]
        checks = [_conditioned(check, others) for check, *others in zip(checks, *shaken, strict=True)]
    yield from checks


def _rounded_otherwise(z: Golden, seed: int) -> Golden:
    """The file with all features off by up to two roundings of float32."""
    generator = np.random.default_rng(seed)
    noise = {
        key: (x * (1 + generator.uniform(-1, 1, x.shape) * 2.0**-22)).astype(x.dtype)
        for key, x in z.items()
        if key.startswith("feat_")
    }
    return {**z, **noise}


def _conditioned(check: Check, others: list[Check]) -> Check:
    movement = max(Check(check.quantity, other.ours, check.ours, scale=check.scale).difference for other in others)
    # Labels and counts are exact, but those of detections follow the order of scores that may be nearly equal.
    fixed = check.bound == EXACT and not check.quantity.startswith("det")
    if check.passed or fixed or 4 * movement <= check.bound or not np.isfinite(movement):
        return check
    return check._replace(
        quantity=f"{check.quantity} (ill-conditioned: {movement:.0e})", bound=max(check.bound, 4 * movement)
    )


def _crosskd(z: Golden, cfg: dict[str, Any]) -> Iterator[Check]:
    student, teacher = _detector(z, cfg["head"], "student"), _detector(z, cfg["teacher_head"], "teacher")
    teacher.model.eval().requires_grad_(False)
    features = tuple(x.requires_grad_() for x in _levels(z, "feat_student"))
    batch = _batch(z)
    trace = student.head(features, batch)
    losses, assignment = student.task_losses(trace, batch)
    with torch.no_grad():
        teacher_features = tuple(_levels(z, "feat_teacher"))
        teacher_trace = teacher.head(teacher_features, batch)

    yield from _predictions(z, "student", student.model, trace.predictions)
    yield from _predictions(z, "teacher", teacher.model, teacher_trace.predictions)
    yield from _targets(z, student.model, assignment, trace.predictions.priors)
    for prefix in ("plain.loss", "loss"):
        yield from _detection_losses(z, prefix, student.model, trace.predictions, assignment)
    plain = sum(losses.values())
    yield Check("plain.loss.TOTAL", plain, z["plain.loss.TOTAL"])
    yield from _gradients(z, "plain.", student.model, features, plain)
    yield from _detections(z, "det", student, trace, replace(batch, original_sizes=batch.sizes))
    yield from _detections(z, "det_rescaled", student, trace, batch)

    kd = cfg["kd_cfg"]
    weight = {name: settings["loss_weight"] for name, settings in kd.items() if isinstance(settings, dict)}
    method = CrossKD(
        stage=cfg["reused_teacher_head_idx"],
        cls_weight=weight["loss_cls_kd"],
        distribution_weight=weight["loss_reg_kd"],
        box_weight=weight["loss_reg_kd"],
        quality_weight=weight.get("loss_center_kd", 0.0),
        beta=kd["loss_cls_kd"]["beta"],
        box_loss="iou" if kd["loss_reg_kd"]["type"] == "IoULoss" else "giou",
    )
    methods = [method] + ([PKD(weight=weight["loss_feat_kd"])] if "loss_feat_kd" in weight else [])
    exchange = Exchange(
        View(student, batch, features, trace, assignment), View(teacher, batch, teacher_features, teacher_trace)
    )
    yield from _middle(z, method.stage, exchange)
    total = plain
    for part in methods:
        part.setup(student.spec, teacher.spec)
        factor = _unguard(assignment, student.model) if part is method else 1.0
        terms = {name: term * factor for name, term in part(exchange).items()}
        total = total + sum(terms.values())
        yield from _sums(z, terms)
    yield from _crosskd_levels(z, method, exchange)
    for level, (s, t) in enumerate(zip(features, teacher_features, strict=True)):
        for key in (f"loss.loss_feat_kd.{level}", f"loss.loss_feat_kd_{level}"):
            if key in z:
                yield Check(key, weight["loss_feat_kd"] * pkd_loss(s, t), z[key])
    yield Check("loss.TOTAL", total, z["loss.TOTAL"])
    yield from _gradients(z, "", student.model, features, total)


def _distribution_head(z: Golden, cfg: dict[str, Any]) -> Iterator[Check]:
    model = _tiny(GFL, cfg["num_classes"], z, bins=cfg["reg_max"] + 1)
    maps = _levels(z, "cls_score")
    priors = model.priors(tuple((x.shape[-2], x.shape[-1]) for x in maps))
    if (scale := cfg.get("octave_base_scale", 8)) != 8:  # anchors of another size than the detector's own
        middle = centres(priors.boxes).repeat(1, 2)
        priors = replace(priors, boxes=middle + (priors.boxes - middle) * scale / 8)
    regression = model.shape_regression(flatten(_levels(z, "bbox_pred"), 4 * model.bins))
    predictions = Predictions(flatten(maps, model.num_classes), regression, priors, model.decode)
    assignment = model.assign(predictions, _batch(z))
    yield from _targets(z, model, assignment, priors)
    weighing = predictions
    if "loss_score_kd" in cfg:  # BCKD's code adds to the scores that weigh its box terms
        weighing = replace(predictions, logits=(predictions.probabilities + BCKD_EXTRA).clamp(max=1 - 1e-7).logit())
    # Here the box terms are divided by the sum of their weights, however small, and 1e-6.
    total = _box_weights(model, weighing, assignment).sum()
    factor = total.clamp(min=1) / (total + 1e-6)
    box_terms = [f"loss.{LOSS_NAMES[name]}." for name in ("box", "dfl")]
    for shown, wanted in ((predictions, False), (weighing, True)):
        for check in _detection_losses(z, "loss", model, shown, assignment, box_factor=factor):
            if any(check.quantity.startswith(name) for name in box_terms) == wanted:
                yield check


# What a file is built into.


def _levels(z: Golden, prefix: str) -> list[Tensor]:
    """All of `prefix.0`, `prefix.1`, ..."""
    count = sum(key.startswith(f"{prefix}.") and key[len(prefix) + 1 :].isdigit() for key in z)
    return [torch.from_numpy(z[f"{prefix}.{i}"]) for i in range(count)]


def _batch(z: Golden) -> Batch:
    sizes, padded = ([(int(h), int(w)) for h, w in z[key]] for key in ("img_shape", "pad_shape"))
    original = [(int(h), int(w)) for h, w in z["ori_shape"]] if "ori_shape" in z else sizes
    boxes, labels = _levels(z, "gt_boxes"), _levels(z, "gt_labels")
    images = torch.zeros(len(sizes), 3, 1, 1)
    return Batch(images, tuple(sizes), tuple(padded), tuple(original), tuple(boxes), tuple(labels))


def _tiny(cls: type[DenseDetector], num_classes: int, z: Golden, **head: Any) -> Any:
    args = {"channels": (8, 8, 8, 8), "stem_width": 8}
    strides = tuple(int(stride) for stride in z["strides"])
    return cls(num_classes, backbone="resnet10t", backbone_args=args, strides=strides, **head)


def _detector(z: Golden, cfg: dict[str, Any], role: str) -> DenseAdapter:
    test = cfg["test_cfg"]
    normed = f"{role}.cls_convs.0.gn.weight" in z
    head = {
        "neck_channels": cfg["in_channels"],
        "head_channels": cfg["feat_channels"],
        "head_blocks": cfg["stacked_convs"],
        "head_groups": (cfg.get("norm_cfg") or {"num_groups": 32})["num_groups"] if normed else 0,
        "score_threshold": test["score_thr"],
        "nms_iou": test["nms"]["iou_threshold"],
        "detections_per_image": test["max_per_img"],
    }
    if cfg["type"] == "GFLHead":
        head["bins"] = cfg["reg_max"] + 1
    if cfg["type"] == "FCOSHead":
        head |= {key: cfg[key] for key in ("norm_on_bbox", "centerness_on_reg") if key in cfg}
        head["center_sampling_radius"] = cfg.get("center_sample_radius", 1.5) if cfg.get("center_sampling") else None
    model = _tiny(DETECTORS[cfg["type"]], cfg["num_classes"], z, **head)
    published = {
        f"bbox_head.{key.removeprefix(f'{role}.')}": torch.from_numpy(np.asarray(value))
        for key, value in z.items()
        if key.startswith(f"{role}.")
    }
    missing, unexpected = model.load_state_dict(rename_published(model, published), strict=False)
    assert not unexpected
    assert not [key for key in missing if not key.startswith(("backbone.", "neck."))]
    return DenseAdapter(model)


# What is compared.


def _rows(maps: Tensor) -> Tensor:
    """(N, H * W, C) of maps (N, C, H, W)."""
    return maps.flatten(2).transpose(1, 2)


def _split(x: Tensor, priors: Priors) -> tuple[Tensor, ...]:
    """(N, A, ...) by level."""
    return torch.split(x, list(priors.per_level), 1)


def _predictions(z: Golden, role: str, model: DenseDetector, predictions: Predictions) -> Iterator[Check]:
    priors = predictions.priors
    outputs = {"cls": predictions.logits, "bbox": predictions.regression, "centerness": predictions.quality}
    if isinstance(model, FCOS):
        sides = model.sides(predictions.regression, priors)
        # With norm_on_bbox the reference counts in strides where the head is in training mode, else in pixels.
        outputs["bbox"] = sides / priors.strides[:, None] if model.norm_on_bbox and role == "student" else sides
        if "pred.student_bbox_eval.0" in z and role == "student":
            outputs["bbox_eval"] = sides
    for name, ours in outputs.items():
        if ours is None:
            continue
        for level, part in enumerate(_split(ours.reshape(*ours.shape[:2], -1), priors)):
            key = f"pred.{role}_{name}.{level}"
            reference = _rows(torch.from_numpy(z[key]))
            yield Check(key, part.reshape(len(part), -1, model.priors_per_cell * part.shape[-1]), reference)


def _box_targets(model: DenseDetector, assignment: Assignment, priors: Priors) -> Tensor:
    """(N, A, 4): the assigned boxes in the terms of the reference."""
    if isinstance(model, RetinaNet):
        return encode_offsets(assignment.boxes, priors.boxes)
    if isinstance(model, FCOS):
        sides = distances(centres(priors.boxes), assignment.boxes)
        return sides / priors.strides[:, None] if model.norm_on_bbox else sides
    return assignment.boxes


def _targets(z: Golden, model: DenseDetector, assignment: Assignment, priors: Priors) -> Iterator[Check]:
    targets = (assignment.labels, assignment.weights, _box_targets(model, assignment, priors))
    parts = (_split(x, priors) for x in targets)
    for level, (labels, weights, boxes) in enumerate(zip(*parts, strict=True)):
        key = f"target.labels.{level}"
        reference_labels = torch.from_numpy(z[key]).reshape(labels.shape)  # FCOS: all images in one row
        yield Check(key, labels, reference_labels, EXACT)
        if (key := f"target.label_weights.{level}") in z:
            yield Check(key, weights, z[key], EXACT)
        else:
            yield Check(f"{key} (absent: 1)", weights, torch.ones_like(weights), EXACT)
        key = f"target.bbox_targets.{level}"
        positive = reference_labels < model.num_classes
        yield Check(key, boxes[positive], torch.from_numpy(z[key]).reshape(boxes.shape)[positive])
        if (key := f"target.anchors.{level}") in z:
            anchors = _split(priors.boxes[None], priors)[level].expand(len(labels), -1, -1)
            valid = weights > 0  # the reference leaves the others at 0
            yield Check(key, anchors[valid], torch.from_numpy(z[key])[valid])
    count = assignment.positive(model.num_classes).sum()
    if "norm.avg_factor" in z:
        yield Check("norm.avg_factor", assignment.normaliser, z["norm.avg_factor"])
    if "norm.num_pos" in z:
        yield Check("norm.num_pos", count.clamp(min=1), z["norm.num_pos"], EXACT)
    if "norm.num_positive_locations" in z:
        yield Check("norm.num_positive_locations", count, z["norm.num_positive_locations"], EXACT)


def _box_weights(model: DenseDetector, predictions: Predictions, assignment: Assignment) -> Tensor:
    """(N, A): by what the detector weights its box terms, whose sum divides them."""
    positive = assignment.positive(model.num_classes)
    if predictions.quality is None:
        return predictions.probabilities.detach().amax(-1) * positive
    sides = distances(centres(predictions.priors.boxes), assignment.boxes)
    return torch.where(positive, centerness(sides), 0.0)


def _detection_losses(
    z: Golden,
    prefix: str,
    model: DenseDetector,
    predictions: Predictions,
    assignment: Assignment,
    box_factor: Tensor | float = 1.0,
) -> Iterator[Check]:
    """The loss terms of each level: the loss of this level's priors alone, with the divisors of all."""
    if isinstance(model, FCOS):  # whose reference has all levels in one
        for name, loss in model.losses(predictions, assignment).items():
            yield Check(f"{prefix}.{LOSS_NAMES[name]}", loss, z[f"{prefix}.{LOSS_NAMES[name]}"])
        return
    weights = _box_weights(model, predictions, assignment)
    if "norm.bbox_avg_factor_raw" in z:
        yield Check("norm.bbox_avg_factor_raw", weights.sum(), z["norm.bbox_avg_factor_raw"])
    if (key := "norm.bbox_weight_sum_per_level") in z:
        yield Check(key, torch.stack([x.sum() for x in _split(weights, predictions.priors)]), z[key])
    start = 0
    for level, count in enumerate(predictions.priors.per_level):
        here = slice(start, start + count)
        priors = predictions.priors
        part = replace(
            predictions,
            logits=predictions.logits[:, here],
            regression=predictions.regression[:, here],
            quality=None if predictions.quality is None else predictions.quality[:, here],
            priors=Priors(priors.boxes[here], priors.strides[here], (priors.grid[level],)),
        )
        assigned = Assignment(
            assignment.labels[:, here], assignment.boxes[:, here], assignment.weights[:, here], assignment.normaliser
        )
        losses = model.losses(part, assigned)
        divisor_ratio = weights[:, here].sum().clamp(min=1) / weights.sum().clamp(min=1)
        for name, loss in losses.items():
            by_weight = name in ("box", "dfl") and not isinstance(model, RetinaNet)
            ours = loss * divisor_ratio * box_factor if by_weight else loss
            key = f"{prefix}.{LOSS_NAMES[name]}.{level}"
            yield Check(key, ours, z[key])
        start += count


def _gradients(
    z: Golden, prefix: str, model: DenseDetector, features: tuple[Tensor, ...], loss: Tensor
) -> Iterator[Check]:
    names = [key for key in z if key.startswith(f"{prefix}gradnorm.student.")]
    own = dict(model.named_parameters())
    used = [own[name] for name in own if not name.startswith(("backbone.", "neck."))]
    found = torch.autograd.grad(loss, [*features, *used], retain_graph=True, allow_unused=True)
    gradients = {id(p): torch.zeros_like(p) if g is None else g for p, g in zip([*features, *used], found, strict=True)}
    for level, feature in enumerate(features):
        key = f"{prefix}grad.feat_student.{level}"
        yield Check(key, gradients[id(feature)], z[key], GRADIENT_BOUND)
    for key in names:
        published = key.removeprefix(f"{prefix}gradnorm.student.")
        if published.startswith("scales."):
            gradient = gradients[id(own["scales"])][int(published.split(".")[1])]
        else:
            gradient = gradients[id(own[rename(model, f"bbox_head.{published}")])]
        yield Check(key, gradient.norm(), z[key], GRADIENT_BOUND)
        if (summed := key.replace("gradnorm", "gradsum")) in z:
            # A sum may cancel to rounding noise; the norm is what that noise is relative to.
            yield Check(summed, gradient.sum(), z[summed], GRADIENT_BOUND, max(float(z[key]), 1e-6))


def _detections(z: Golden, prefix: str, student: DenseAdapter, trace: HeadTrace, batch: Batch) -> Iterator[Check]:
    for i, found in enumerate(student.detections(trace, batch)):
        yield Check(f"{prefix}.boxes.{i}", found["boxes"], z[f"{prefix}.boxes.{i}"])
        yield Check(f"{prefix}.scores.{i}", found["scores"], z[f"{prefix}.scores.{i}"])
        yield Check(f"{prefix}.labels.{i}", found["labels"], z[f"{prefix}.labels.{i}"], EXACT)


def _middle(z: Golden, stage: int, exchange: Exchange) -> Iterator[Check]:
    """Tapped and aligned states."""
    for branch in ("cls", "reg"):
        for level in range(len(exchange.student.features)):
            if f"mid.hold_student_{branch}.{level}" not in z:
                continue
            held = []
            for role, view in (("student", exchange.student), ("teacher", exchange.teacher)):
                activation = view.spec.stages[stage].activation or (lambda x: x)
                held.append(activation(view.head.states[stage][branch][level]))
                yield Check(f"mid.hold_{role}_{branch}.{level}", held[-1], z[f"mid.hold_{role}_{branch}.{level}"])
            key = f"mid.aligned_{branch}.{level}"
            yield Check(key, align_statistics(*held), z[key])


def _unguard(assignment: Assignment, model: DenseDetector) -> float:
    """What turns CrossKD's terms into the reference's: not 1 only for FCOS without any positive."""
    guarded = isinstance(model, FCOS) and not assignment.positive(model.num_classes).any()
    return (1 + EPS) / (FCOS_MINIMUM + EPS) if guarded else 1.0


def _sums(z: Golden, terms: Mapping[str, Tensor]) -> Iterator[Check]:
    """The methods' own terms against sums over levels, or against the one term of all levels."""
    names = {"cls": "loss_cls_kd", "box": "loss_reg_kd", "quality": "losses_center_kd", "feature": "loss_feat_kd"}
    for term, loss in terms.items():
        values = [float(z[key]) for key in z if re.fullmatch(rf"loss\.{names[term]}([._]\d+)?", key)]
        yield Check(f"{names[term]} (sum of levels)", loss, sum(values))


def _crosskd_levels(z: Golden, method: CrossKD, exchange: Exchange) -> Iterator[Check]:
    """Cross-head predictions, and CrossKD's terms by level, from the functions it is made of."""
    cross, teacher = method.cross(exchange.matched()), exchange.teacher.head.predictions
    assignment, priors = exchange.matched().teacher_assignment, teacher.priors
    model = exchange.teacher.adapter.model
    factor = _unguard(assignment, model)
    note = "" if factor == 1 else f" (guarded here; x {factor:.4g})"
    yield from _predictions(z, "reused", model, cross)
    reference_normaliser = assignment.normaliser * (1 if factor == 1 else FCOS_MINIMUM)
    for key in ("norm.kd_cls_avg_factor", "norm.kd_reg_avg_factor"):
        if key in z:
            yield Check(key + note, reference_normaliser, z[key])
    normaliser = assignment.normaliser + EPS
    cls = method.cls_weight * classification_kd(cross, teacher, method.beta) * assignment.weights / normaliser
    box, divisor = box_kd(cross, teacher, assignment, method.box_loss)
    weights = teacher.probabilities.amax(-1) * assignment.weights
    if "norm.kd_reg_weight_sum" in z:
        yield Check("norm.kd_reg_weight_sum", divisor, z["norm.kd_reg_weight_sum"])
        key = "norm.kd_reg_weight_sum_per_level"
        yield Check(key, torch.stack([part.sum() for part in _split(weights, priors)]), z[key])
    box = (method.distribution_weight if teacher.regression.ndim == 4 else method.box_weight) * box / (divisor + EPS)
    terms = {"loss_cls_kd": cls, "loss_reg_kd": box}
    if cross.quality is not None and teacher.quality is not None and method.quality_weight:
        quality = F.binary_cross_entropy_with_logits(cross.quality, teacher.quality.sigmoid(), reduction="none")
        positive = assignment.positive(exchange.teacher.spec.num_classes)
        terms["losses_center_kd"] = method.quality_weight * quality * positive / normaliser
    if "kd.reg_weights" in z:  # FCOS: all levels in one
        yield Check("kd.reg_weights", torch.cat([w.flatten() for w in _split(weights, priors)]), z["kd.reg_weights"])
        for name, term in terms.items():
            yield Check(f"loss.{name}{note}", term.sum() * factor, z[f"loss.{name}"])
        return
    for level, part in enumerate(_split(weights, priors)):
        if (key := f"kd.reg_weights.{level}") in z:
            yield Check(key, part.flatten(), z[key])
    for name, term in terms.items():
        for level, part in enumerate(_split(term, priors)):
            yield Check(f"loss.{name}.{level}", part.sum(), z[f"loss.{name}.{level}"])
