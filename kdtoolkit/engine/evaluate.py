"""COCO average precision of a detector on a data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from kdtoolkit import processes
from kdtoolkit.contract import Detections, DetectorAdapter, DetectorSpec
from kdtoolkit.data import DetectionDataset, InputSize, Sample
from kdtoolkit.data.dataset import checked_item
from kdtoolkit.engine import group
from kdtoolkit.engine.inputs import check_dataset, resolve_device
from kdtoolkit.engine.precision import autocast_type, resolve_precision
from kdtoolkit.engine.scoring import IOU_THRESHOLDS, Floats, Found, precisions
from kdtoolkit.errors import KDError, UnknownDetectorError
from kdtoolkit.libraries import adapt

METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


@dataclass(frozen=True)
class Evaluation:
    """Average precisions in percent, [0, 100]. A value is None if the ground truth has no object of that kind.

    `ap` is the mean over the IoU thresholds 0.50, 0.55 ... 0.95. `ap_small`, `ap_medium` and `ap_large` are for
    objects of less than 32^2, 32^2 to 96^2, and more than 96^2 pixels of the original image. `images` and `detections`
    are counts.
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
    model: nn.Module | DetectorAdapter,
    dataset: DetectionDataset,
    *,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "float32",
    labels_from: Literal[0, 1] | None = None,
    input_size: InputSize | None = None,
    together: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Run a detector on all images and score it against the ground truth at original sizes.

    Args:
        model: a detector or an adapter of one. It runs in eval mode; the modes of its modules are restored.
        dataset: the images and their ground truth.
        batch_size: images at a time.
        device: the device of `model`; None takes it from the model itself.
        precision: `bfloat16` or `float16` for autocast; `auto` for bfloat16 where the hardware has it.
        labels_from: for a plain module, which is called as torchvision's detectors are: with a list of images (3, H, W)
            float32 in [0, 1]; it returns a list of Detections. 0 if the first class has label 0; 1 if label 0 is
            background. None runs the detector through the adapter that knows it. If no adapter does, labels count
            from 0.
        input_size: images are first resized to the largest size of its range.
        together: in a run of several processes, each process evaluates a part of the images, and all get the whole
            result. Then every process must call `evaluate`.
        progress: called with the number of images done and the number of all images.

    Raises KDError before anything runs if the model's adapter refuses it, if its number of classes differs from the
    data set's, or if it lies on another device. Raises KDError later if a detection is not finite, or has a label that
    the data set does not have.
    """
    if not isinstance(model, nn.Module | DetectorAdapter):
        raise KDError(f"the model must be a detector, an nn.Module, or an adapter of one; it is {model!r}")
    if batch_size < 1:
        raise KDError(f"batch_size must be at least 1, not {batch_size}")
    module, detect, spec = _detector(model, labels_from)
    check_dataset(dataset, spec)
    dataset = dataset.in_memory()
    device = resolve_device(module, device)
    precision = resolve_precision(precision, device)
    truth = dataset.coco()
    places = {image["id"]: place for place, image in enumerate(truth["images"])}
    rank, count = (group.rank(), processes.count()) if together else (0, 1)
    first, end = (len(dataset) * place // count for place in (rank, rank + 1))
    found: list[Found] = []
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        for start in range(first, end, batch_size):
            items = [_item(dataset, i, input_size) for i in range(start, min(start + batch_size, end))]
            images = [image.to(device).float().div_(255) for image, _ in items]
            with torch.no_grad(), torch.autocast(device.type, autocast_type(precision), precision != "float32"):
                outputs = detect(images)
            found.append(_found(outputs, items, places, len(truth["categories"]), labels_from or 0))
            if progress is not None:
                progress(start + len(items) - first, end - first)
    finally:
        for part, training in modes:
            part.training = training
    return _score(truth, group.gathered(found) if together else found)


def _item(dataset: DetectionDataset, index: int, input_size: InputSize | None) -> tuple[Tensor, Sample]:
    image, sample = checked_item(dataset, index)
    return (image if input_size is None else input_size.apply(image)), sample


def _detector(
    model: nn.Module | DetectorAdapter, labels_from: int | None
) -> tuple[nn.Module, Callable[[Sequence[Tensor]], Sequence[Detections]], DetectorSpec | None]:
    """The module that detects, how it is called, and the detector's facts where an adapter tells them."""
    if labels_from is not None:
        if labels_from not in (0, 1) or isinstance(model, DetectorAdapter):
            raise KDError(f"labels_from must be 0 or 1, and only for plain modules; it is {labels_from!r}")
        return model, partial(_detect_plainly, model), None
    try:
        adapter = adapt(model)
    except UnknownDetectorError:
        assert isinstance(model, nn.Module)  # adapters are known
        return model, partial(_detect_plainly, model), None
    except KDError as error:
        raise KDError(
            f"{str(error).rstrip('.')}. A module that itself returns boxes, scores and labels as torchvision's "
            "detectors do can be evaluated as it is: evaluate(..., labels_from=1) if label 0 is background, "
            "labels_from=0 if 0 is the first class"
        ) from error

    def detect(images: Sequence[Tensor]) -> list[Detections]:
        batch = adapter.prepare(images)
        return adapter.detections(adapter.head(adapter.features(batch), batch), batch)

    return adapter.model, detect, adapter.spec


def _detect_plainly(model: nn.Module, images: Sequence[Tensor]) -> Sequence[Detections]:
    outputs = model(images)
    keys = Detections.__required_keys__
    if (
        not isinstance(outputs, Sequence)
        or len(outputs) != len(images)
        or not all(isinstance(output, Mapping) and keys <= output.keys() for output in outputs)
    ):
        raise KDError(
            f"{type(model).__name__} must return a list with a dict of boxes, scores and labels for each image, as "
            f"torchvision's detectors do in eval mode; it returned a {type(outputs).__name__}"
        )
    return outputs


def _found(
    outputs: Sequence[Detections],
    items: Sequence[tuple[Tensor, Sample]],
    places: Mapping[int, int],
    num_classes: int,
    labels_from: int,
) -> Found:
    """A batch's detections, in pixels of the original images. `places` gives the place of each image by its id."""
    counts = [len(output["scores"]) for output in outputs]
    where = np.repeat(np.arange(len(items)), counts)
    boxes, scores = (torch.cat([output[name] for output in outputs]).float().cpu() for name in ("boxes", "scores"))
    labels = torch.cat([output["labels"] for output in outputs]).cpu().numpy().astype(np.int64) - labels_from
    for name, tensor in (("boxes", boxes.reshape(-1, 4)), ("scores", scores[:, None])):
        if len(bad := where[~tensor.isfinite().all(1).numpy()]):
            raise KDError(
                f"the detector gives {name} that are NaN or infinite on image {items[bad[0]][1]['image_id']}: its "
                "weights are broken. Train it again with a lower learning rate, or evaluate in float32."
            )
    if len(bad := np.flatnonzero((labels < 0) | (labels >= num_classes))):
        raise KDError(
            f"the detector gives the label {labels[bad[0]] + labels_from} on image "
            f"{items[where[bad[0]]][1]['image_id']}; the data set has labels {labels_from} to "
            f"{num_classes - 1 + labels_from}. Build it for {num_classes} classes, or correct labels_from."
        )
    scales = [
        (sample["original_size"][1] / image.shape[2], sample["original_size"][0] / image.shape[1])
        for image, sample in items
    ]
    corners = boxes.numpy().astype(np.float64) * np.tile(np.array(scales), 2)[where]
    xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    images = np.array([places[sample["image_id"]] for _, sample in items])[where]
    return Found(images, labels, xywh, scores.numpy().astype(np.float64))


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
