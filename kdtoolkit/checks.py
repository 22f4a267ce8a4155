"""A batch as users hand it in, checked once before detectors see it: containers, shapes, ranges, boxes and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdtoolkit.contract import DetectorSpec, Target
from kdtoolkit.errors import KDError

LOWEST, HIGHEST = -0.5, 1.5  # of images in [0, 1]: resizing and changes of colour may lead a little beyond
SMALLEST = 16  # px; boxes within 0..1 on larger images are relative ones


def checked_batch(
    images: Sequence[Tensor] | Tensor, targets: Sequence[Mapping[str, Any]], model: nn.Module, spec: DetectorSpec
) -> tuple[list[Tensor], list[Target]]:
    """Check images and their ground truth; returns both as `model` needs them.

    Images must be floats (3, H, W) in [0, 1] on the model's device; they get the dtype of its weights. Ground truth may
    be on the host, where it is checked before it is copied to the device. What is on a GPU is waited for once.

    Raises KDError naming the image, box or label that is wrong, and what it should be.
    """
    images = _images(images, next(model.parameters()))
    ground_truth = _targets(targets, len(images))
    device = images[0].device
    boxes, labels = (torch.cat([target[key] for target in ground_truth]) for key in ("boxes", "labels"))
    facts = torch.stack([check.all() for check in _checks(boxes, labels, spec)]).float()
    lows, highs = zip(*(torch.aminmax(image) for image in images), strict=True)
    ranges = torch.stack([*lows, *highs]).float()
    solid, known, relative, *extremes = torch.cat([facts.to(device, non_blocking=True), ranges]).tolist()
    _check_ranges(list(zip(extremes[: len(images)], extremes[len(images) :], strict=True)))
    if len(boxes) and relative and all(min(image.shape[1:]) >= SMALLEST for image in images):
        raise KDError(
            "all boxes of this batch lie within 0..1, and boxes are x1, y1, x2, y2 in pixels: multiply them by the "
            "width and height of their image"
        )
    if not (solid and known):
        _explain(ground_truth, spec)
    return images, [
        {
            "boxes": target["boxes"].to(device, non_blocking=True),
            "labels": target["labels"].to(device, non_blocking=True),
        }
        for target in ground_truth
    ]


def _images(images: Sequence[Tensor] | Tensor, weight: Tensor) -> list[Tensor]:
    """Images (3, H, W) of the weights' dtype, on their device."""
    if not isinstance(images, Sequence | Tensor) or isinstance(images, str):
        raise KDError(f"images must be a list of tensors (3, H, W), not {type(images).__name__}")
    if not len(images):
        raise KDError("the batch is empty: hand in one image at least")
    for i, image in enumerate(images):
        if not isinstance(image, Tensor):
            raise KDError(f"image {i} is {type(image).__name__}; images are float tensors (3, H, W) in [0, 1]")
        if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
            raise KDError(f"image {i} has the shape {tuple(image.shape)}; images are (3, H, W)")
        if not image.is_floating_point():
            hint = ": hand in image.float() / 255" if image.dtype == torch.uint8 else ""
            raise KDError(f"image {i} is {image.dtype}; images are floats in [0, 1]{hint}")
        if image.device != weight.device:
            raise KDError(f"image {i} is on {image.device}, the student on {weight.device}: move one of them")
    return [image.to(weight.dtype) if weight.is_floating_point() else image for image in images]


def _targets(targets: Sequence[Mapping[str, Any]], count: int) -> list[Target]:
    """Ground truth as (G, 4) float32 and (G,) int64, where it is."""
    if not isinstance(targets, Sequence) or isinstance(targets, str):
        raise KDError(f"targets must be a list, with a dict of boxes and labels for each image, not {_kind(targets)}")
    if len(targets) != count:
        raise KDError(f"{count} images and {len(targets)} targets: there must be a target for each image")
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
    if not boxes.numel() and not labels.numel():  # torch.tensor([]) has another shape, and is of floats
        return {"boxes": boxes.new_zeros((0, 4), dtype=torch.float32), "labels": labels.new_zeros(0, dtype=torch.int64)}
    if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
        raise KDError(
            f"target {i}: boxes must be (G, 4) and labels (G,); they are {tuple(boxes.shape)} and {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise KDError(f"target {i}: labels are {labels.dtype}; they are integers, classes from 0")
    if boxes.device != labels.device:
        raise KDError(f"target {i}: boxes are on {boxes.device}, labels on {labels.device}; move one of them")
    return {"boxes": boxes.float(), "labels": labels.long()}


def _kind(value: object) -> str:
    return (
        "a numpy array (torch.from_numpy makes a tensor)"
        if type(value).__module__ == "numpy"
        else (f"{type(value).__name__}")
    )


def _checks(boxes: Tensor, labels: Tensor, spec: DetectorSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(G,) bool each: boxes that are finite and have an area, labels that the detector has, boxes within 0..1."""
    solid = boxes.isfinite().all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    known = (labels >= 0) & (labels < spec.num_classes)
    return solid, known, ((boxes >= 0) & (boxes <= 1)).all(1)


def _check_ranges(ranges: Sequence[tuple[float, float]]) -> None:
    """NaN passes: who trains is told where it comes from."""
    for i, (low, high) in enumerate(ranges):
        if low < LOWEST or high > HIGHEST:
            hint = (
                "divide them by 255"
                if low >= 0 and high > 2
                else "hand them in as they are before normalisation, which is the detector's own part"
            )
            raise KDError(f"image {i} has values from {low:.3g} to {high:.3g}; images are in [0, 1]: {hint}")


def _explain(targets: Sequence[Target], spec: DetectorSpec) -> None:
    for i, target in enumerate(targets):
        solid, known, _ = _checks(target["boxes"], target["labels"], spec)
        if not bool(solid.all()):
            at = int((~solid).nonzero()[0])
            raise KDError(
                f"target {i}: box {at} is {target['boxes'][at].tolist()}: boxes are x1, y1, x2, y2 in pixels, x1 < x2, "
                "y1 < y2"
            )
        if not bool(known.all()):
            at = int((~known).nonzero()[0])
            raise KDError(
                f"target {i}: label {int(target['labels'][at])}, and {spec.name} has {spec.num_classes} classes: "
                "labels count from 0, without background"
            )
