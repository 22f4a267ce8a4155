"""Comparisons of methods of queries: what the golden files of KD-DETR, DETRDistill and D3ETR hold, by kdtoolkit."""

import json
from collections.abc import Iterator
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from kdtoolkit.boxes import pairwise_iou
from kdtoolkit.contract import Batch, DetectorSpec, Exchange, HeadTrace, Predictions, PriorKind, Priors, View
from kdtoolkit.methods.common import quality_focal_kd
from kdtoolkit.methods.kd_detr import KDDETR, PUBLISHED_EPS, box_distances, class_divergence
from tests.parity._check import GRADIENT_BOUND, Check
from tests.parity.losses import Golden, gradient, indexed, tensor

SIZE = (480, 640)  # pixels of the images, in shares of which the files hold boxes; the losses do not depend on it


def _decode(regression: Tensor, priors: Priors) -> Tensor:
    """Boxes in pixels of (centre x, centre y, width, height) in shares of the image."""
    centre, size = regression.chunk(2, -1)
    return torch.cat([centre - size / 2, centre + size / 2], -1) * regression.new_tensor([SIZE[1], SIZE[0]] * 2)


def _view(logits: Tensor, boxes: Tensor) -> View:
    trace = HeadTrace((), Predictions(logits, boxes, Priors(torch.zeros_like(boxes), torch.zeros(0)), _decode))
    spec = DetectorSpec("", logits.shape[-1], (8,), (1,), PriorKind.QUERIES)
    adapter = SimpleNamespace(spec=spec, head=lambda features, batch, priors, stages: trace)
    return View(adapter, Batch(torch.zeros(len(logits), 3, 1, 1), *((SIZE,) * len(logits),) * 3), (), trace)


def kd_detr(z: Golden) -> Iterator[Check]:
    """Each set of queries through the method by itself: it knows the teacher's alone, and one layer."""
    cfg = json.loads(str(z["cfg_json"]))
    last = cfg["layers"] - 1
    kinds = {"teacher_queries": "auxrf"} | ({"random_queries": "randomrf"} if cfg["random_queries"] else {})
    totals = {"last": torch.zeros(()), "all_layers": torch.zeros(())}
    leaves: dict[str, Tensor] = {}
    for queries, kind in kinds.items():
        weights = {name: cfg["weights"][f"loss_kd_{kind}_{name}"] for name in ("cls", "bbox", "giou")}
        method = KDDETR(
            cls_weight=weights["cls"],
            box_weight=weights["bbox"],
            giou_weight=weights["giou"],
            temperature=cfg["T"],
            published_giou=True,
        )
        teacher = _view(*(tensor(z, f"teacher.{queries}.{name}.{last}") for name in ("logits", "boxes")))
        terms = []
        for layer in range(cfg["layers"]):
            names = [f"{queries}.{name}.{layer}" for name in ("logits", "boxes")]
            leaves |= {name: tensor(z, f"student.{name}").requires_grad_() for name in names}
            terms.append(method(Exchange(_view(*(leaves[name] for name in names)), teacher)))
        # The published code compares every layer of the student with the teacher's last.
        for which, shown in (("last", terms[-1:]), ("all_layers", terms)):
            for term, name in (("cls", "cls"), ("box", "bbox"), ("giou", "giou")):
                key = f"loss.dab.{which}.loss_kd_{kind}_{name}"
                yield Check(key, sum(each[term] for each in shown) / weights[name], z[key])
            totals[which] = totals[which] + sum(sum(each.values()) for each in shown)
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
                _view(*(find(f"{queries}.{name}.{layer}") for name in ("logits", "boxes"))).head.predictions
                for find in (leaves.__getitem__, lambda name: tensor(z, f"teacher.{name}"))
            )
            scale = student.boxes.new_tensor([SIZE[1], SIZE[0]] * 2)[None, None]
            distance, overlap = box_distances(student.boxes, theirs.boxes, scale, PUBLISHED_EPS)
            divergence = class_divergence(student.logits, theirs.logits, cfg["T"]) * student.logits.shape[-1]
            weight = theirs.scores / theirs.scores.sum(1, keepdim=True)
            suffix = "" if layer == cfg["layers"] - 1 else f"_{layer}"
            for name, each in (("class", divergence), ("bbox", 4 * distance), ("giou", overlap)):
                loss = (weight * each).sum(1).mean()
                key = f"loss.tprd.{prefix}_loss_{name}{suffix}"
                yield Check(key, loss, z[key])
                total = total + factors[name] * loss
    yield Check("loss.tprd.TOTAL_weighted", total, z["loss.tprd.TOTAL_weighted"])
    for name, leaf in leaves.items():
        yield Check(f"grad.tprd.{name}", gradient(total, leaf), z[f"grad.tprd.{name}"], GRADIENT_BOUND)


# ---- DETRDistill and D3ETR: no methods of kdtoolkit, but sums of what its methods compute, at matched queries


def detr_distill(z: Golden) -> Iterator[Check]:
    """TPRD's DETRDistill and D3ETR, and DETRDistill's own code, which has other names and clips boxes to the image."""
    cfg = json.loads(str(z["cfg_json"]))
    official = "loss.official.TOTAL" in z
    eps = 0.0 if official else PUBLISHED_EPS
    layers = sum(key.startswith("student.logits.") for key in z)
    matcher = json.loads(str(z["inputs_cfg_json"]))["distill_matcher"] if official else cfg["distill_matcher"]
    kinds = ("student", "student_at_teacher_queries")
    fields = ("logits", "boxes", "self_attn", "cross_attn")
    leaves = {
        f"{kind}.{field}.{i}": tensor(z, f"{kind}.{field}.{i}").requires_grad_()
        for kind in kinds
        for field in fields
        for i in range(layers)
        if f"{kind}.{field}.{i}" in z
    }
    features = [x.requires_grad_() for x in indexed(z, "feat_student")]
    leaves |= {f"feat_student.{i}": x for i, x in enumerate(features)}
    total = torch.zeros(())
    for layer in range(layers):
        own, asked = ({f: leaves.get(f"{kind}.{f}.{layer}") for f in fields} for kind in kinds)
        teacher = {f: tensor(z, key) for f in fields if (key := f"teacher.{f}.{layer}") in z}
        whole = teacher
        if official:
            low, high = (x.clamp(0, 1) for x in _corners(teacher["boxes"]).chunk(2, -1))
            yield Check(f"mid.teacher_boxes_clipped.{layer}", torch.cat([low, high], -1), _clipped(z, layer))
            teacher = {**teacher, "boxes": torch.cat([(low + high) / 2, high - low], -1)}
        match = _matching(own, teacher, matcher, eps)
        yield Check(f"mid.match_teacher_of_student.{layer}", match, z[f"mid.match_teacher_of_student.{layer}"])
        losses = {f"distill_loss_{name}": x for name, x in _imitation(own, _taken(teacher, match), eps).items()}
        if "self_attn" in teacher:
            losses |= {f"teacher_loss_{name}": x for name, x in _imitation(asked, teacher, eps).items()}
        else:
            losses |= {f"teacher_loss_{name}": x for name, x in _detection(z, layer, asked, eps).items()}
            scores = _box_scores(z, whole, cfg)
            if f"mid.cls_iou_score.{layer}" in z and not official:
                yield Check(f"mid.cls_iou_score.{layer}", scores[1], z[f"mid.cls_iou_score.{layer}"])
            losses["target_aware_loss"] = _target_aware(z, layer, features, *scores)
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
Layer = dict[str, Tensor]


def _corners(boxes: Tensor) -> Tensor:
    centre, size = boxes.chunk(2, -1)
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def _clipped(z: Golden, layer: int) -> Tensor:
    """The file's clipped boxes, which are in pixels, in shares of each image."""
    sizes = tensor(z, "img_shape").flip(-1).repeat(1, 2)[:, None]
    return tensor(z, f"mid.teacher_boxes_clipped.{layer}") / sizes


def _distances(student: Tensor, teacher: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """L1, summed over the four sides, and 1 - GIoU of boxes at the same place, in shares of the image."""
    one = torch.ones(1, 1, 4)
    distance, overlap = box_distances(_corners(student), _corners(teacher), one, eps)
    return 4 * distance, overlap


def _matching(student: Layer, teacher: Layer, costs: dict, eps: float) -> Tensor:
    """For each query of the student the teacher's that it is matched to, all of them: (N, Q)."""
    found = []
    with torch.no_grad():
        for logits, boxes, their_logits, their_boxes in zip(
            student["logits"], student["boxes"], teacher["logits"], teacher["boxes"], strict=True
        ):
            bce = quality_focal_kd(*torch.broadcast_tensors(logits[:, None], their_logits[None]), beta=0).sum(-1)
            l1, overlap = _distances(*torch.broadcast_tensors(boxes[:, None], their_boxes[None]), eps)
            cost = costs["cost_class"] * bce + costs["cost_bbox"] * l1 + costs["cost_giou"] * overlap
            found.append(torch.from_numpy(linear_sum_assignment(cost)[1]))
    return torch.stack(found)


def _taken(teacher: Layer, match: Tensor) -> Layer:
    """The teacher's queries in the order of the student's; attention between queries in both its dimensions."""
    images = torch.arange(len(match))[:, None]
    taken = {
        name: x if name == "cross_attn" else x[images, match] for name, x in teacher.items() if name != "self_attn"
    }
    if "self_attn" in teacher:
        rows = zip(teacher["self_attn"], match, strict=True)
        taken["self_attn"] = torch.stack([x[:, order][:, :, order] for x, order in rows])
        taken["cross_attn"] = teacher["cross_attn"]
    return taken


def _imitation(student: Layer, teacher: Layer, eps: float) -> dict[str, Tensor]:
    """Terms between corresponding queries, means over them; of attention maps, means over all."""
    queries = student["logits"].shape[:2].numel()
    l1, overlap = _distances(student["boxes"], teacher["boxes"], eps)
    terms = {
        "class": quality_focal_kd(student["logits"], teacher["logits"], beta=0).sum() / queries,
        "bbox": l1.sum() / queries,
        "giou": overlap.sum() / queries,
    }
    attention = [name for name in ("self_attn", "cross_attn") if name in teacher]
    return terms | {name: F.mse_loss(student[name], teacher[name]) for name in attention}


def _detection(z: Golden, layer: int, student: Layer, eps: float) -> dict[str, Tensor]:
    """The detection losses of the student at the teacher's queries, which answer for what the teacher's do."""
    labels, pairs = torch.zeros_like(student["logits"]), []
    for i, (boxes, classes) in enumerate(zip(indexed(z, "gt_boxes_cxcywh"), indexed(z, "gt_labels"), strict=True)):
        query, box = tensor(z, f"mid.teacher_gt_match.{layer}.{i}")
        labels[i, query, classes[box]] = 1.0
        pairs.append((student["boxes"][i, query], boxes[box]))
    count = max(sum(len(own) for own, _ in pairs), 1)
    l1, overlap = _distances(*(torch.cat(side)[None] for side in zip(*pairs, strict=True)), eps)
    focal = sigmoid_focal_loss(student["logits"], labels, alpha=0.25, gamma=2).sum()
    return {"class": focal / count, "bbox": l1.sum() / count, "giou": overlap.sum() / count}


def _box_scores(z: Golden, teacher: Layer, cfg: dict) -> tuple[Tensor, Tensor]:
    """The queries of the teacher's highest class scores, and each score times its best IoU with a box: (N, M) both."""
    if "inputs_cfg_json" in z:
        cfg = json.loads(str(z["inputs_cfg_json"]))
    best, at = teacher["logits"].sigmoid().flatten(1).topk(cfg["max_per_img"])
    query = at // teacher["logits"].shape[-1]
    scores = []
    for score, chosen, boxes, truth in zip(best, query, teacher["boxes"], indexed(z, "gt_boxes_cxcywh"), strict=True):
        overlap = pairwise_iou(_corners(boxes[chosen]), _corners(truth))
        union = (boxes[chosen, None, 2:].prod(-1) + truth[:, 2:].prod(-1)) / (1 + overlap)
        overlap = overlap * union / (union + PUBLISHED_EPS)
        scores.append(score * (overlap.amax(1) if len(truth) else 1.0))
    return query, torch.stack(scores)


def _target_aware(z: Golden, layer: int, features: list[Tensor], query: Tensor, score: Tensor) -> Tensor:
    """Squared difference of features, weighted by how much each cell is like the teacher's best queries."""
    states = tensor(z, f"teacher.query.{layer}")
    states = states[torch.arange(len(states))[:, None], query]
    losses = []
    for student, teacher in zip(features, indexed(z, "feat_teacher"), strict=True):
        alike = torch.einsum("nqc,nchw->nqhw", F.normalize(states, dim=-1), F.normalize(teacher, dim=1))
        mask = (score[..., None, None] * alike).sum(1, keepdim=True).clamp(min=0.01)
        mask = mask / mask.amax((1, 2, 3), keepdim=True)
        losses.append(F.mse_loss(student * mask, teacher * mask))
    return torch.stack(losses).sum()
