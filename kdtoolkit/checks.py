"""Checks of the batch that a user hands in, before any detector sees it: containers, shapes, ranges, boxes, labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from kdtoolkit.canvas import check_images
from kdtoolkit.contract import DetectorSpec, Recorded, RecordedAlone, Target
from kdtoolkit.errors import KDError
from kdtoolkit.uncompiled import uncompiled

LOWEST, HIGHEST = -0.5, 1.5  # allowed in images: resizing and changes of colour may leave [0, 1] by a little
SMALLEST = 16  # px; if an image is larger and all its boxes lie within 0..1, the boxes are not in pixels


def checked_images(images: Sequence[Tensor] | Tensor, model: nn.Module) -> list[Tensor]:
    """Check images without ground truth, as `checked_batch` does. Returns them as `model` needs them."""
    images = _images(images, next(model.parameters()))
    lows, highs = zip(*(torch.aminmax(image) for image in images), strict=True)
    _check_ranges(torch.stack([torch.stack(lows), torch.stack(highs)], 1).float().tolist())
    return images


def checked_batch(
    images: Sequence[Tensor] | Tensor, targets: Sequence[Mapping[str, Any]], model: nn.Module, spec: DetectorSpec
) -> tuple[list[Tensor], list[Target]]:
    """Check images and their ground truth. Returns both as `model` needs them.

    Images must be float tensors (3, H, W) in [0, 1] on the model's device. The result has the dtype of the model's
    weights. Ground truth may be on the host: then it is checked there and copied to the device. All checks together
    make the host wait for a GPU only once.

    Raises KDError that names the image, box or label that is wrong, and says what it should be.
    """
    images = _images(images, next(model.parameters()))
    ground_truth = _targets(targets, len(images))
    device = images[0].device
    boxes, labels = (torch.cat([target[key] for target in ground_truth]) for key in ("boxes", "labels"))
    sizes = [(image.shape[2], image.shape[1]) for image in images]  # (width, height)
    solid_boxes, known_labels = _checks(boxes, labels, spec)
    facts = torch.stack([solid_boxes.all(), known_labels.all(), *_places(boxes, ground_truth, sizes)]).float()
    lows, highs = zip(*(torch.aminmax(image) for image in images), strict=True)
    ranges = torch.stack([*lows, *highs]).float()
    solid, known, overlaps, *numbers = torch.cat([facts.to(device, non_blocking=True), ranges]).tolist()
    count = len(images)
    relative, lowest, highest = numbers[:count], numbers[count : 2 * count], numbers[2 * count :]
    _check_ranges(list(zip(lowest, highest, strict=True)))
    for i, size in enumerate(sizes):
        if relative[i] and min(size) >= SMALLEST:
            raise KDError(
                f"target {i}: all boxes lie within 0..1, and boxes must be x1, y1, x2, y2 in pixels: multiply them by "
                "the width and height of their image"
            )
    if not (solid and known):
        _explain(ground_truth, spec)
    if len(boxes) and not overlaps:
        i, target = next((i, target) for i, target in enumerate(ground_truth) if len(target["boxes"]))
        raise KDError(
            f"no box of this batch overlaps its image: box 0 of target {i} is {target['boxes'][0].tolist()}, and image "
            f"{i} is {sizes[i][0]} px wide and {sizes[i][1]} px high. Are the boxes in pixels of the image before it "
            "was resized?"
        )
    return images, [
        {
            "boxes": target["boxes"].to(device, non_blocking=True),
            "labels": target["labels"].to(device, non_blocking=True),
        }
        for target in ground_truth
    ]


def without_recorded(
    targets: Sequence[Target] | Sequence[RecordedAlone] | None,
) -> tuple[Sequence[Target] | None, list[Recorded] | None]:
    """Ground truth and recorded detections of a batch, each None if there are none.

    Raises KDError if only some of the targets have recorded detections.
    """
    labelled = cast("Sequence[Target] | None", targets)
    if not isinstance(targets, Sequence) or not targets:
        return labelled, None
    lacking = [i for i, target in enumerate(targets) if not isinstance(target, Mapping) or "recorded" not in target]
    if len(lacking) == len(targets):
        return labelled, None
    if lacking:
        raise KDError(
            f"target {lacking[0]} has no 'recorded', and further targets of the batch do: hand in the teacher's "
            "detections for each image, empty ones where it found nothing"
        )
    has_labels = any(target.keys() & {"boxes", "labels"} for target in targets)
    return labelled if has_labels else None, [target["recorded"] for target in targets]


@uncompiled
def checked_recorded(recorded: Sequence[Recorded], images: Sequence[Tensor], spec: DetectorSpec) -> list[Recorded]:
    """Recorded detections on the images' device. `spec` is that of the teacher that they are of.

    Raises KDError that names the image whose detections are wrong.
    """
    if len(recorded) != len(images):
        raise KDError(
            f"there are {len(images)} images, and recorded detections of {len(recorded)}: hand in one for each"
        )
    for i, each in enumerate(recorded):
        if reason := _why_not_recorded(each, spec):
            raise KDError(f"target {i}: recorded {reason}")
    device = images[0].device
    return [
        Recorded(
            boxes=each["boxes"].to(device, torch.float32, non_blocking=True),
            probabilities=each["probabilities"].to(device, torch.float32, non_blocking=True),
        )
        for each in recorded
    ]


def _why_not_recorded(each: object, spec: DetectorSpec) -> str | None:
    """What is wrong with the recorded detections of an image, as the end of a sentence."""
    if not isinstance(each, Mapping) or not all(isinstance(each.get(k), Tensor) for k in ("boxes", "probabilities")):
        return "must be a dict with the tensors 'boxes' and 'probabilities'"
    boxes, probabilities = each["boxes"], each["probabilities"]
    if boxes.ndim != 2 or boxes.shape[1] != 4 or probabilities.shape != (len(boxes), spec.num_classes):
        return (
            f"boxes must be (D, 4) and probabilities (D, {spec.num_classes}), one for each class of {spec.name}, but "
            f"they are {tuple(boxes.shape)} and {tuple(probabilities.shape)}"
        )
    if bad := (~(boxes.isfinite().all(1) & (boxes[:, 2:] >= boxes[:, :2]).all(1))).nonzero().tolist():
        at = bad[0][0]
        return f"box {at} is {boxes[at].tolist()}, and boxes are x1, y1, x2, y2 in pixels, with x1 <= x2 and y1 <= y2"
    if bad := (~((probabilities >= 0) & (probabilities <= 1))).nonzero().tolist():
        at, label = bad[0]
        return f"probabilities of box {at} have {float(probabilities[at, label])}; they must lie between 0 and 1"
    return None


def _images(images: Sequence[Tensor] | Tensor, weight: Tensor) -> list[Tensor]:
    """Images (3, H, W) with the dtype of the weights. They must be on the same device."""
    if not isinstance(images, Sequence | Tensor) or isinstance(images, str):
        raise KDError(f"images must be a list of tensors (3, H, W), not {type(images).__name__}")
    if not len(images):
        raise KDError("the batch is empty: hand in at least one image")
    check_images(images)
    for i, image in enumerate(images):
        if image.device != weight.device:
            raise KDError(f"image {i} is on {image.device}, the student on {weight.device}: move one of them")
    return [image.to(weight.dtype) if weight.is_floating_point() else image for image in images]


def _targets(targets: Sequence[Mapping[str, Any]], count: int) -> list[Target]:
    """Ground truth as (G, 4) float32 and (G,) int64, on the device where it was handed in."""
    if not isinstance(targets, Sequence) or isinstance(targets, str):
        raise KDError(
            f"targets must be a list with one dict of boxes and labels for each image, not {_kind(targets)}; or None, "
            "if the images have no labels"
        )
    if len(targets) != count:
        raise KDError(f"there are {count} images and {len(targets)} targets: hand in one target for each image")
    return [_target(i, target) for i, target in enumerate(targets)]


def _target(i: int, target: Mapping[str, Any]) -> Target:
    if not isinstance(target, Mapping):
        raise KDError(f"target {i} must be a dict with boxes and labels, not {_kind(target)}")
    for key in ("boxes", "labels"):
        if key not in target:
            raise KDError(
                f"target {i} has no '{key}', only {', '.join(map(repr, target)) or 'nothing'}; it needs both "
                "'boxes' and 'labels'"
            )
        if not isinstance(target[key], Tensor):
            raise KDError(f"target {i}: {key} must be a tensor, not {_kind(target[key])}")
    boxes, labels = target["boxes"], target["labels"]
    if not boxes.numel() and not labels.numel():  # torch.tensor([]) has the shape (0,), and is float
        return {"boxes": boxes.new_zeros((0, 4), dtype=torch.float32), "labels": labels.new_zeros(0, dtype=torch.int64)}
    if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
        raise KDError(
            f"target {i}: boxes must be (G, 4) and labels (G,), but they are {tuple(boxes.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise KDError(f"target {i}: labels are {labels.dtype}; they must be integers that count classes from 0")
    if boxes.device != labels.device:
        raise KDError(f"target {i}: boxes are on {boxes.device}, labels on {labels.device}; move one of them")
    return {"boxes": boxes.float(), "labels": labels.long()}


def _kind(value: object) -> str:
    if type(value).__module__ == "numpy":
        return "a numpy array (torch.from_numpy makes a tensor)"
    return type(value).__name__


def _checks(boxes: Tensor, labels: Tensor, spec: DetectorSpec) -> tuple[Tensor, Tensor]:
    """Two masks (G,): boxes that are finite and have an area; labels that the detector knows."""
    solid = boxes.isfinite().all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    return solid, (labels >= 0) & (labels < spec.num_classes)


def _places(boxes: Tensor, targets: Sequence[Target], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Whether any box overlaps its image of `sizes`; then of each image whether its boxes are relative to its size.

    What lies in the first pixel, at the image's corner, may be what is left of an object that was cut off there.
    """
    owners = [i for i, target in enumerate(targets) for _ in range(len(target["boxes"]))]
    limits = boxes.new_tensor([sizes[i] for i in owners]).view(-1, 2)
    overlaps = ((boxes[:, 2:] > 0) & (boxes[:, :2] < limits)).all(1)
    within = ((boxes >= 0) & (boxes <= 1)).all(1)
    apart = within & (boxes[:, :2] > 0).any(1)
    counts = boxes.new_zeros(len(targets), 2)
    counts.index_add_(
        0, torch.tensor(owners, dtype=torch.int64, device=boxes.device), torch.stack([~within, apart], 1).float()
    )
    return [overlaps.any(), *((counts[:, 0] == 0) & (counts[:, 1] > 0))]


def _check_ranges(ranges: Iterable[Sequence[float]]) -> None:
    """Raise KDError if an image is not in [0, 1]. NaN passes: the training loop reports where it arises."""
    for i, (low, high) in enumerate(ranges):
        if low < LOWEST or high > HIGHEST:
            hint = (
                "divide them by 255"
                if low >= 0 and high > 2
                else "hand them in before normalisation, which the detector does itself"
            )
            raise KDError(f"image {i} has values from {low:.3g} to {high:.3g}; images are in [0, 1]: {hint}")


def _explain(targets: Sequence[Target], spec: DetectorSpec) -> None:
    """Raise KDError about the first box or label that is wrong."""
    for i, target in enumerate(targets):
        solid, known = _checks(target["boxes"], target["labels"], spec)
        if not bool(solid.all()):
            at = int((~solid).nonzero()[0])
            raise KDError(
                f"target {i}: box {at} is {target['boxes'][at].tolist()}, and boxes are x1, y1, x2, y2 in pixels, with "
                "x1 < x2 and y1 < y2"
            )
        if not bool(known.all()):
            at = int((~known).nonzero()[0])
            raise KDError(
                f"target {i}: label {at} is {int(target['labels'][at])}, and {spec.name} has {spec.num_classes} "
                f"classes: labels must lie in 0..{spec.num_classes - 1}, and background has no label"
            )
