"""Comparisons of methods of queries: what the golden files of KD-DETR, DETRDistill and D3ETR hold, by kdtoolkit."""

import json
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from kdtoolkit.contract import Batch, DetectorSpec, Exchange, HeadTrace, Predictions, PriorKind, Priors, View
from kdtoolkit.methods.kd_detr import KDDETR, PUBLISHED_EPS, box_distances, class_divergence
from tests.parity._check import GRADIENT_BOUND, Check
from tests.parity.losses import Golden, gradient, tensor

SIZE = (480, 640)  # pixels of the images, in shares of which the files hold boxes; the losses do not depend on it


def _decode(regression: Tensor, priors: Priors) -> Tensor:
    """Boxes in pixels of (centre x, centre y, width, height) in shares of the image."""
    centre, size = regression.chunk(2, -1)
    return torch.cat([centre - size / 2, centre + size / 2], -1) * regression.new_tensor([SIZE[1], SIZE[0]] * 2)


def _view(logits: Tensor, boxes: Tensor) -> View:
    trace = HeadTrace((), Predictions(logits, boxes, Priors(torch.zeros_like(boxes), torch.zeros(0)), _decode))
    spec = DetectorSpec("", logits.shape[-1], (8,), (1,), PriorKind.QUERIES)
    adapter = SimpleNamespace(spec=spec, head=lambda features, batch, priors: trace)
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
