"""COCO average precision of a detector on a data set, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from kdtoolkit.contract import Detections, adapt
from kdtoolkit.data import DetectionDataset, Sample
from kdtoolkit.errors import KDError


@dataclass(frozen=True)
class Evaluation:
    """Average precisions in percent, [0, 100]; None where nothing of that kind is in the ground truth.

    `ap` is the mean over IoU thresholds 0.50:0.05:0.95; `ap_small` and so on are of objects below 32^2, from there to
    96^2, and above 96^2 pixels of the original image. `images` and `detections` are counts.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    per_class: dict[str, float | None]
    images: int
    detections: int


def evaluate(
    model: nn.Module,
    dataset: DetectionDataset,
    *,
    batch_size: int = 32,
    device: str = "cpu",
    precision: Literal["float32", "bfloat16"] = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Run a detector on all images and score it against the ground truth at original sizes.

    `model` lies on `device` and runs in eval mode; the modes of its modules are restored. One that no adapter knows is
    called as torchvision's detectors are: on a list of images (3, H, W) float32 in [0, 1], for a list of Detections.
    `progress(done, total)` counts images.

    Raises KDError where a detection is not finite or has a label that the data set does not know.
    """
    truth = dataset.coco()
    category_ids = [category["id"] for category in truth["categories"]]
    results: list[dict[str, Any]] = []
    detect = _detector(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for start in range(0, len(dataset), batch_size):
            items = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
            images = [image.to(device).float().div_(255) for image, _ in items]
            with (
                torch.no_grad(),
                torch.autocast(device.split(":")[0], torch.bfloat16, enabled=precision == "bfloat16"),
            ):
                outputs = detect(images)
            for (image, sample), output in zip(items, outputs, strict=True):
                results += _as_coco(output, sample, image, category_ids)
            if progress is not None:
                progress(start + len(items), len(dataset))
    finally:
        for module, training in modes:
            module.training = training
    for number, result in enumerate(results, 1):
        result["id"] = number
    return _score(truth, results)


def _detector(model: nn.Module) -> Callable[[Sequence[Tensor]], list[Detections]]:
    try:
        adapter = adapt(model)
    except KDError:
        return model

    def detect(images: Sequence[Tensor]) -> list[Detections]:
        batch = adapter.prepare(images)
        return adapter.detections(adapter.head(adapter.features(batch), batch), batch)

    return detect


def _as_coco(output: Detections, sample: Sample, image: Tensor, category_ids: list[int]) -> list[dict[str, Any]]:
    """One image's detections in COCO's format, in pixels of the original image."""
    boxes, scores = output["boxes"].float().cpu(), output["scores"].float().cpu()
    labels = output["labels"].cpu()
    for name, tensor in (("boxes", boxes), ("scores", scores)):
        if not tensor.isfinite().all():
            raise KDError(
                f"the detector gives {name} that are NaN or infinite on image {sample['image_id']}: its weights are "
                "broken. Train it again with a lower learning rate, or evaluate in float32."
            )
    if unknown := {label for label in labels.tolist() if not 0 <= label < len(category_ids)}:
        raise KDError(
            f"the detector gives the label {min(unknown)} on image {sample['image_id']}; the data set has labels 0 to "
            f"{len(category_ids) - 1}. Build it for {len(category_ids)} classes."
        )
    height, width = sample["original_size"]
    scale = torch.tensor([width / image.shape[2], height / image.shape[1]], dtype=torch.float64).repeat(2)
    corners = boxes * scale
    xywh = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    areas = xywh[:, 2:].prod(1)
    return [
        {
            "image_id": sample["image_id"],
            "category_id": category_ids[label],
            "bbox": box,
            "area": area,
            "score": score,
            "iscrowd": 0,
        }
        for box, area, score, label in zip(xywh.tolist(), areas.tolist(), scores.tolist(), labels.tolist(), strict=True)
    ]


def _score(truth: dict[str, Any], results: list[dict[str, Any]]) -> Evaluation:
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what it does
        # Copies, for it writes into them; numbered from 1, for it takes a match with number 0 for none.
        annotations = [{**annotation, "id": number} for number, annotation in enumerate(truth["annotations"], 1)]
        expected = _index({**truth, "annotations": annotations})
        scoring = COCOeval(expected, _index({**truth, "annotations": results}), "bbox")  # type: ignore[no-untyped-call]
        scoring.evaluate()  # type: ignore[no-untyped-call]
        scoring.accumulate()  # type: ignore[no-untyped-call]
    # (thresholds, recalls, categories, areas, largest numbers of detections); -1 where there is nothing to find.
    precision: np.ndarray[Any, np.dtype[np.float64]] = scoring.eval["precision"][..., -1]
    thresholds = scoring.params.iouThrs.round(2).tolist()
    all_areas, small, medium, large = range(4)
    categories = list(scoring.params.catIds)
    return Evaluation(
        ap=_mean(precision[..., all_areas]),
        ap50=_mean(precision[thresholds.index(0.5), ..., all_areas]),
        ap75=_mean(precision[thresholds.index(0.75), ..., all_areas]),
        ap_small=_mean(precision[..., small]),
        ap_medium=_mean(precision[..., medium]),
        ap_large=_mean(precision[..., large]),
        per_class={
            category["name"]: _mean(precision[:, :, categories.index(category["id"]), all_areas])
            for category in truth["categories"]
        },
        images=len(truth["images"]),
        detections=len(results),
    )


def _index(document: dict[str, Any]) -> COCO:
    coco = COCO()  # type: ignore[no-untyped-call]
    coco.dataset = document
    coco.createIndex()  # type: ignore[no-untyped-call]
    return coco


def _mean(precision: np.ndarray[Any, np.dtype[np.float64]]) -> float | None:
    """In percent; None where there is nothing to find."""
    found = precision[precision > -1]
    return 100 * float(found.mean()) if found.size else None
