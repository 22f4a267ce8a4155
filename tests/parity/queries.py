"""Comparisons of methods of queries: what the golden files of KD-DETR, DETRDistill and D3ETR hold, by kdtoolkit."""

import json
from collections.abc import Iterator
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

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
from kdtoolkit.methods.detrdistill import (
    best_scores,
    cell_mask,
    detection_losses,
    imitation,
    masked_difference,
    match,
    matching_costs,
    taken,
)
from kdtoolkit.methods.kd_detr import KDDETR, class_divergence
from kdtoolkit.methods.queries import PUBLISHED_EPS, Outputs, box_distances
from tests.parity._check import GRADIENT_BOUND, Check
from tests.parity.losses import Golden, gradient, indexed, tensor

SIZE = (480, 640)  # pixels of the images, in shares of which the files hold boxes; the losses do not depend on it


def _decode(regression: Tensor, priors: Priors) -> Tensor:
    """Boxes in pixels of (centre x, centre y, width, height) in shares of the image."""
    return _corners(regression) * regression.new_tensor([SIZE[1], SIZE[0]] * 2)


def _view(*layers: tuple[Tensor, Tensor]) -> View:
    """A decoder that says these logits and boxes, layer by layer."""
    passes = tuple(
        HeadTrace((), Predictions(logits, boxes, Priors(torch.zeros_like(boxes), torch.zeros(0)), _decode))
        for logits, boxes in layers
    )
    images, _, classes = layers[0][0].shape
    spec = DetectorSpec("", classes, (8,), (1,), PriorKind.QUERIES)
    adapter = SimpleNamespace(
        spec=spec, head=lambda features, batch, priors, stages: passes[-1], layers=lambda trace: passes
    )
    return View(adapter, Batch(torch.zeros(images, 3, 1, 1), *((SIZE,) * images,) * 3), (), passes[-1])


def kd_detr(z: Golden) -> Iterator[Check]:
    """Each set of queries through the method by itself: it knows the teacher's alone."""
    cfg = json.loads(str(z["cfg_json"]))
    last = cfg["layers"] - 1
    kinds = {"teacher_queries": "auxrf"} | ({"random_queries": "randomrf"} if cfg["random_queries"] else {})
    totals = {"last": torch.zeros(()), "all_layers": torch.zeros(())}
    leaves: dict[str, Tensor] = {}
    for queries, kind in kinds.items():
        weights = {name: cfg["weights"][f"loss_kd_{kind}_{name}"] for name in ("cls", "bbox", "giou")}
        teacher = _view(tuple(tensor(z, f"teacher.{queries}.{name}.{last}") for name in ("logits", "boxes")))
        layers = [[f"{queries}.{name}.{layer}" for name in ("logits", "boxes")] for layer in range(cfg["layers"])]
        leaves |= {name: tensor(z, f"student.{name}").requires_grad_() for names in layers for name in names}
        for which, shown in (("last", "last"), ("all_layers", "all")):
            method = KDDETR(
                cls_weight=weights["cls"],
                box_weight=weights["bbox"],
                giou_weight=weights["giou"],
                temperature=cfg["T"],
                layers=shown,
                published_giou=True,
            )
            terms = method(Exchange(_view(*(tuple(leaves[name] for name in names) for names in layers)), teacher))
            for term, name in (("cls", "cls"), ("box", "bbox"), ("giou", "giou")):
                key = f"loss.dab.{which}.loss_kd_{kind}_{name}"
                yield Check(key, terms[term] / weights[name], z[key])
            totals[which] = totals[which] + sum(terms.values())
    for which, total in totals.items():
        yield Check(f"loss.dab.{which}.TOTAL_weighted", total, z[f"loss.dab.{which}.TOTAL_weighted"])
        for name, leaf in leaves.items():
            if (key := f"grad.dab.{which}.{name}") in z:
                yield Check(key, gradient(total, leaf), z[key], GRADIENT_BOUND)
    yield from _tprd(z, cfg, leaves) if "loss.tprd.TOTAL_weighted" in z else ()


def _tprd(z: Golden, cfg: dict, leaves: dict[str, Tensor]) -> Iterator[Check]:
    """TPRD's reading, by the method's functions: means over images, sums over classes and sides, layer by layer."""
    total = torch.zeros(())
    factors = {"class": cfg["weights"]["loss_kd_auxrf_cls"], "bbox": cfg["weights"]["loss_kd_auxrf_bbox"]}
    factors["giou"] = cfg["weights"]["loss_kd_auxrf_giou"]
    for queries, prefix in (("random_queries", "random"), ("teacher_queries", "teacher")):
        for layer in range(cfg["layers"]):
            student, theirs = (
                _outputs(*(find(f"{queries}.{name}.{layer}") for name in ("logits", "boxes")))
                for find in (leaves.__getitem__, lambda name: tensor(z, f"teacher.{name}"))
            )
            distance, overlap = box_distances(student.boxes, theirs.boxes, PUBLISHED_EPS)
            divergence = class_divergence(student.logits, theirs.logits, cfg["T"]) * student.logits.shape[-1]
            scores = theirs.probabilities.amax(-1)
            weight = scores / scores.sum(1, keepdim=True)
            suffix = "" if layer == cfg["layers"] - 1 else f"_{layer}"
            for name, each in (("class", divergence), ("bbox", 4 * distance), ("giou", overlap)):
                loss = (weight * each).sum(1).mean()
                key = f"loss.tprd.{prefix}_loss_{name}{suffix}"
                yield Check(key, loss, z[key])
                total = total + factors[name] * loss
    yield Check("loss.tprd.TOTAL_weighted", total, z["loss.tprd.TOTAL_weighted"])
    for name, leaf in leaves.items():
        yield Check(f"grad.tprd.{name}", gradient(total, leaf), z[f"grad.tprd.{name}"], GRADIENT_BOUND)


def detr_distill(z: Golden) -> Iterator[Check]:
    """DETRDistill by its own code and TPRD's, and TPRD's D3ETR, which adds attention maps that kdtoolkit has not.

    TPRD does not cut the teacher's boxes, and has different weights and a GIoU with an epsilon.
    """
    cfg = json.loads(str(z["cfg_json"]))
    official = "loss.official.TOTAL" in z
    inputs = json.loads(str(z["inputs_cfg_json"])) if official else cfg
    eps = 0.0 if official else PUBLISHED_EPS
    layers = sum(key.startswith("student.logits.") for key in z)
    costs = tuple(inputs["distill_matcher"][f"cost_{name}"] for name in ("class", "bbox", "giou"))
    leaves = {
        key: tensor(z, key).requires_grad_()
        for key in z
        if key.startswith(("student.", "student_at_teacher_queries.", "feat_student."))
    }
    features = [leaves[f"feat_student.{i}"] for i in range(sum(key.startswith("feat_student.") for key in z))]
    objects = indexed(z, "gt_boxes_cxcywh")
    total = torch.zeros(())
    for layer in range(layers):
        own, asked = (
            _outputs(leaves[f"{kind}.logits.{layer}"], leaves[f"{kind}.boxes.{layer}"])
            for kind in ("student", "student_at_teacher_queries")
        )
        whole = teacher = _outputs(tensor(z, f"teacher.logits.{layer}"), tensor(z, f"teacher.boxes.{layer}"))
        if official:
            teacher = teacher._replace(boxes=teacher.boxes.clamp(0, 1))
            yield Check(f"mid.teacher_boxes_clipped.{layer}", teacher.boxes, _clipped(z, layer))
        ((rows, columns),) = match([matching_costs(own, teacher, costs, eps)])
        yield Check(f"mid.match_teacher_of_student.{layer}", columns, z[f"mid.match_teacher_of_student.{layer}"])
        losses = _named("distill_loss", imitation(taken(own, rows), taken(teacher, columns), eps))
        if f"teacher.self_attn.{layer}" in z:
            losses |= _named("teacher_loss", imitation(asked, teacher, eps)) | _attention(z, layer, leaves, columns)
        else:
            assignment, boxes = _assignment(z, layer, asked)
            losses |= _named("teacher_loss", detection_losses(asked, assignment, boxes, eps))
            query, score = best_scores(whole, [_corners(boxes) for boxes in objects], inputs["max_per_img"])
            if f"mid.cls_iou_score.{layer}" in z and not official:
                yield Check(f"mid.cls_iou_score.{layer}", score, z[f"mid.cls_iou_score.{layer}"])
            states = tensor(z, f"teacher.query.{layer}")
            losses["target_aware_loss"] = torch.stack(
                [
                    masked_difference(ours, theirs, [cell_mask(states, query, score, theirs, counts)], counts)
                    for ours, theirs in zip(features, indexed(z, "feat_teacher"), strict=True)
                    for counts in [torch.ones_like(theirs[:, 0], dtype=torch.bool)]
                ]
            ).sum()
        for name, loss in losses.items():
            if official:
                theirs, setting = OFFICIAL[name]
                loss, key = cfg[setting] * loss, f"loss.official.{theirs}.{layer}"
            else:
                key = f"loss.{name}.{layer}"
            yield Check(key, loss, z[key])
            total = total + (loss if official else cfg["weights"][name] * loss)
    key = "loss.official.TOTAL" if official else "loss.TOTAL_weighted"
    yield Check(key, total, z[key])
    for name, leaf in leaves.items():
        key = f"grad.official.{name}" if official else f"grad.{name}"
        if key in z:
            yield Check(key, gradient(total, leaf), z[key], GRADIENT_BOUND)


OFFICIAL = {  # names and weights in DETRDistill's own code
    "distill_loss_class": ("loss_cls_distill", "loss_cls_distill"),
    "distill_loss_bbox": ("loss_bbox_distill", "loss_bbox_distill"),
    "distill_loss_giou": ("loss_iou_distill", "loss_iou_distill"),
    "teacher_loss_class": ("teacher_query_loss_cls", "loss_cls"),
    "teacher_loss_bbox": ("teacher_query_loss_bbox", "loss_bbox"),
    "teacher_loss_giou": ("teacher_query_loss_iou", "loss_iou"),
    "target_aware_loss": ("target_aware", "target_aware"),
}


def _named(prefix: str, losses: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {f"{prefix}_{name}": loss for name, loss in zip(("class", "bbox", "giou"), losses, strict=True)}


def _outputs(logits: Tensor, boxes: Tensor) -> Outputs:
    return Outputs(logits, _corners(boxes))


def _corners(boxes: Tensor) -> Tensor:
    centre, size = boxes.chunk(2, -1)
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def _clipped(z: Golden, layer: int) -> Tensor:
    """The file's clipped boxes, which are in pixels, in shares of each image."""
    sizes = tensor(z, "img_shape").flip(-1).repeat(1, 2)[:, None]
    return tensor(z, f"mid.teacher_boxes_clipped.{layer}") / sizes


def _assignment(z: Golden, layer: int, asked: Outputs) -> tuple[Assignment, Tensor]:
    """The file's assignment of objects to the teacher's queries, and their boxes."""
    images, queries, classes = asked.logits.shape
    labels, boxes = torch.full((images, queries), classes), torch.zeros(images, queries, 4)
    truth = zip(indexed(z, "gt_boxes_cxcywh"), indexed(z, "gt_labels"), strict=True)
    for i, (own, own_labels) in enumerate(truth):
        query, box = tensor(z, f"mid.teacher_gt_match.{layer}.{i}")
        labels[i, query], boxes[i, query] = own_labels[box], _corners(own)[box]
    count = torch.tensor(float(max(sum(map(len, indexed(z, "gt_labels"))), 1)))
    return Assignment(labels < classes, labels, boxes, torch.ones(images, queries), count), boxes


def _attention(z: Golden, layer: int, leaves: dict[str, Tensor], match: Tensor) -> dict[str, Tensor]:
    """D3ETR's terms of attention maps, at matched queries and at the teacher's; cross-attention is not permuted."""
    theirs = tensor(z, f"teacher.self_attn.{layer}"), tensor(z, f"teacher.cross_attn.{layer}")
    ordered = torch.stack([x[:, order][:, :, order] for x, order in zip(theirs[0], match, strict=True)])
    losses = {}
    for prefix, kind, at in (("distill", "student", ordered), ("teacher", "student_at_teacher_queries", theirs[0])):
        losses[f"{prefix}_loss_self_attn"] = F.mse_loss(leaves[f"{kind}.self_attn.{layer}"], at)
        losses[f"{prefix}_loss_cross_attn"] = F.mse_loss(leaves[f"{kind}.cross_attn.{layer}"], theirs[1])
    return losses
