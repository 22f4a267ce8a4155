"""COCO average precision of a detector on a data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from kdtoolkit.contract import Detections, adapt
from kdtoolkit.data import DetectionDataset, Sample
from kdtoolkit.data.dataset import checked_item, read_in
from kdtoolkit.engine.scoring import IOU_THRESHOLDS, Floats, Found, precisions
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
    device: str | torch.device = "cpu",
    precision: Literal["float32", "bfloat16"] = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Run a detector on all images and score it against the ground truth at original sizes.

    `model` lies on `device` and runs in eval mode; the modes of its modules are restored. One that no adapter knows is
    called as torchvision's detectors are: on a list of images (3, H, W) float32 in [0, 1], for a list of Detections.
    `progress(done, total)` counts images.

    Raises KDError where the detector lies elsewhere or has another number of classes than the data set, and where a
    detection is not finite or has a label that the data set does not know.
    """
    dataset = read_in(dataset)
    _check_device(model, torch.device(device))
    truth = dataset.coco()
    places = {image["id"]: place for place, image in enumerate(truth["images"])}
    found: list[Found] = []
    detect = _detector(model, len(dataset.class_names))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for start in range(0, len(dataset), batch_size):
            items = [checked_item(dataset, i) for i in range(start, min(start + batch_size, len(dataset)))]
            images = [image.to(device).float().div_(255) for image, _ in items]
            with (
                torch.no_grad(),
                torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"),
            ):
                outputs = detect(images)
            found.append(_found(outputs, items, places, len(truth["categories"])))
            if progress is not None:
                progress(start + len(items), len(dataset))
    finally:
        for module, training in modes:
            module.training = training
    return _score(truth, found)


def _check_device(model: nn.Module, device: torch.device) -> None:
    weight = next(model.parameters(), None)
    if weight is not None and weight.device.type != device.type:
        raise KDError(f"the detector is on {weight.device}: call evaluate with device='{weight.device}', or move it")


def _detector(model: nn.Module, num_classes: int) -> Callable[[Sequence[Tensor]], list[Detections]]:
    try:
        adapter = adapt(model)
    except KDError:
        return model
    if (known := adapter.spec.num_classes) != num_classes:
        raise KDError(
            f"{adapter.spec.name} has {known} classes, the data set {num_classes}: labels would not agree. "
            f"Build the detector for {num_classes} classes, or choose the data set's by class_names"
        )

    def detect(images: Sequence[Tensor]) -> list[Detections]:
        batch = adapter.prepare(images)
        return adapter.detections(adapter.head(adapter.features(batch), batch), batch)

    return detect


def _found(
    outputs: Sequence[Detections],
    items: Sequence[tuple[Tensor, Sample]],
    places: Mapping[int, int],
    num_classes: int,
) -> Found:
    """A batch's detections in pixels of the original images, of which `places` has the place by id."""
    counts = [len(output["scores"]) for output in outputs]
    where = np.repeat(np.arange(len(items)), counts)
    boxes, scores = (torch.cat([output[name] for output in outputs]).float().cpu() for name in ("boxes", "scores"))
    labels = torch.cat([output["labels"] for output in outputs]).cpu().numpy()
    for name, tensor in (("boxes", boxes.reshape(-1, 4)), ("scores", scores[:, None])):
        if len(bad := where[~tensor.isfinite().all(1).numpy()]):
            raise KDError(
                f"the detector gives {name} that are NaN or infinite on image {items[bad[0]][1]['image_id']}: its "
                "weights are broken. Train it again with a lower learning rate, or evaluate in float32."
            )
    if len(bad := np.flatnonzero((labels < 0) | (labels >= num_classes))):
        raise KDError(
            f"the detector gives the label {labels[bad[0]]} on image {items[where[bad[0]]][1]['image_id']}; the data "
            f"set has labels 0 to {num_classes - 1}. Build it for {num_classes} classes."
        )
    scales = [
        (sample["original_size"][1] / image.shape[2], sample["original_size"][0] / image.shape[1])
        for image, sample in items
    ]
    corners = boxes.numpy().astype(np.float64) * np.tile(np.array(scales), 2)[where]
    xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    images = np.array([places[sample["image_id"]] for _, sample in items])[where]
    return Found(images, labels.astype(np.int64), xywh, scores.numpy().astype(np.float64))


def _score(truth: dict[str, Any], batches: Sequence[Found]) -> Evaluation:
    found = Found.concatenated(batches)
    precision = precisions(truth, found)
    thresholds = IOU_THRESHOLDS.round(2).tolist()
    all_areas, small, medium, large = range(4)
    categories = sorted(category["id"] for category in truth["categories"])
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
        detections=len(found.scores),
    )


def _mean(precision: Floats) -> float | None:
    """In percent; None where there is nothing to find."""
    found = precision[precision > -1]
    return 100 * float(found.mean()) if found.size else None
