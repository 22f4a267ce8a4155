"""What the adapters of all torchvision detectors share: the transform of images, and the backbone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import box_iou

from kdtoolkit.canvas import Layout, check_images, lay_out, round_up
from kdtoolkit.contract import Assignment, Batch, Detections, DetectorAdapter, Predictions, Priors, Target
from kdtoolkit.errors import KDError
from kdtoolkit.graph import Detected, best, clip_to, normalised, pad, resize, suppress

_PROBE = 512  # pixels: every usual stride divides it
LIBRARY: Any = torchvision.models  # much of it is untyped


@dataclass(frozen=True)
class Levels:
    """The feature maps of a backbone: their `names`, `strides` in pixels, and `channels`."""

    names: tuple[str, ...]
    strides: tuple[int, ...]
    channels: tuple[int, ...]


class TorchvisionAdapter(DetectorAdapter):
    """Base of all torchvision adapters: the transform of images, and the backbone."""

    model: Any
    library_class: ClassVar[type[nn.Module]]
    background: ClassVar[int] = 0  # number of classes that the library counts before the first one

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._check_head()

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether `model` is of the library's class that this adapter is for, or of a subclass."""
        return isinstance(model, cls.library_class)

    def _check_head(self) -> None:
        """Raise KDError if the head is not one of the library's own."""

    @property
    def _num_classes(self) -> int:
        """Number of classes, without background."""
        raise NotImplementedError

    @property
    def backbone(self) -> tuple[str, ...]:
        """The backbone without its pyramid."""
        return ("backbone.body",) if hasattr(self.model.backbone, "body") else ("backbone",)

    @cached_property
    def _levels(self) -> Levels:
        model = self.model
        fixed = model.transform.fixed_size  # (width, height)
        height, width = (fixed[1], fixed[0]) if fixed else (_PROBE, _PROBE)
        # A copy of the backbone runs on tensors without storage: running the model would move batch norm's statistics.
        memo: dict[int, Any] = {
            id(x): torch.empty_like(x, device="meta")
            for x in chain(model.backbone.parameters(), model.backbone.buffers())
        }
        backbone = copy.deepcopy(model.backbone, memo).eval()
        with torch.no_grad():
            maps = _named_maps(backbone(torch.empty(1, 3, height, width, device="meta")))
        strides = tuple(round(height / x.shape[-2]) for x in maps.values())
        return Levels(tuple(maps), strides, tuple(x.shape[1] for x in maps.values()))

    @property
    def level_names(self) -> tuple[str, ...]:
        """The library's names of the feature maps."""
        return self._levels.names

    def prepare(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None, like: Batch | None = None
    ) -> Batch:
        """Normalise, resize and pad by the detector's own transform.

        Raises KDError for images that are not (3, H, W) floats.
        """
        transform = self.model.transform
        if like is not None:
            layout = self._layout(like)
            return lay_out(images, targets, layout, mean=transform.image_mean, std=transform.image_std)
        check_images(images)
        if targets is not None:
            targets = [{"boxes": t["boxes"].float().reshape(-1, 4), "labels": t["labels"].long()} for t in targets]
        batched, resized = transform(list(images), targets)
        divisor = transform.size_divisible
        sizes = tuple((int(height), int(width)) for height, width in batched.image_sizes)
        return Batch(
            batched.tensors,
            sizes,
            tuple((round_up(height, divisor), round_up(width, divisor)) for height, width in sizes),
            tuple((image.shape[-2], image.shape[-1]) for image in images),
            tuple(target["boxes"] for target in resized or ()),
            tuple(target["labels"] for target in resized or ()),
        )

    def _layout(self, like: Batch) -> Layout:
        """Where the images of a student's batch lie."""
        return Layout.of(like, self.model.transform.size_divisible)

    def features(self, batch: Batch) -> tuple[Tensor, ...]:
        """Run backbone and pyramid."""
        return tuple(_named_maps(self.model.backbone(batch.images)).values())

    def canvas(self, images: Tensor) -> Batch:
        """Prepare images (N, 3, H, W) of one size as `prepare` does, by tensors alone, for a graph.

        The batch has one size, which holds for all images.
        """
        transform = self.model.transform
        images = normalised(images, transform.image_mean, transform.image_std)
        if transform.fixed_size is not None:
            width, height = transform.fixed_size
            images = F.interpolate(images, (height, width), mode="bilinear", align_corners=False)
        else:
            images = resize(images, float(transform.min_size[-1]), float(transform.max_size))
        size = images.shape[-2], images.shape[-1]
        return Batch(pad(images, transform.size_divisible, False, 0.0), (size,), (), ())

    def _targets(self, batch: Batch) -> list[dict[str, Tensor]]:
        """Ground truth as the library counts classes."""
        return [
            {"boxes": boxes, "labels": labels + self.background}
            for boxes, labels in zip(batch.boxes, batch.labels, strict=True)
        ]

    def _detections(self, found: Iterable[Mapping[str, Tensor]], batch: Batch) -> list[Detections]:
        """What the library found on the canvas, in pixels of the original images."""
        return [
            {
                "boxes": resize_boxes(image["boxes"], list(size), list(original)),
                "scores": image["scores"],
                "labels": image["labels"] - self.background,
            }
            for image, size, original in zip(found, batch.sizes, batch.original_sizes, strict=True)
        ]


class Graph(nn.Module):
    """Base of the graphs: the detector on a batch of images of one size, by tensors alone."""

    def __init__(self, adapter: TorchvisionAdapter) -> None:
        super().__init__()
        self.model = adapter.model
        self.adapter = adapter

    def forward(self, images: Tensor) -> Detected:
        """Detect in images (N, 3, H, W): boxes (N, D, 4), scores (N, D) and labels (N, D)."""
        batch = self.adapter.canvas(images)
        boxes, scores, labels = self.detect(self.adapter.features(batch), batch)
        (height, width), (own_height, own_width) = images.shape[-2:], batch.sizes[0]
        x, y = width / own_width, height / own_height
        return boxes * torch.stack([torch.scalar_tensor(each) for each in (x, y, x, y)]), scores, labels

    def detect(self, features: tuple[Tensor, ...], batch: Batch) -> Detected:
        """Run the head and the library's post-processing on the canvas."""
        raise NotImplementedError


class DenseGraph(Graph):
    """The graph of a head on a grid."""

    def candidates(self, probabilities: Tensor, predictions: Predictions) -> Tensor:
        """Scores (N, A, K) of the predictions that NMS sees, and 0 elsewhere."""
        raise NotImplementedError

    def detect(self, features: tuple[Tensor, ...], batch: Batch) -> Detected:
        """Run the head, and NMS on the candidates."""
        model, predictions = self.model, self.adapter.head(features, batch, stages=()).predictions
        scores = self.candidates(predictions.probabilities, predictions)
        boxes = clip_to(predictions.boxes, *batch.sizes[0])
        kept = suppress(boxes, scores.transpose(1, 2), model.nms_thresh, model.detections_per_img)
        return best(boxes, kept.transpose(1, 2), model.detections_per_img)


def _named_maps(output: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A backbone's feature maps by name. Some backbones give a single map without a name."""
    return {"0": output} if isinstance(output, Tensor) else output


def require(head: nn.Module, *known: type[nn.Module]) -> None:
    """Raise KDError if the head's class is not one of `known`."""
    if not isinstance(head, known):
        raise KDError(
            f"{type(head).__name__} is not a head of torchvision ({' or '.join(cls.__name__ for cls in known)}), so "
            "its stages are unknown: write an adapter for it (docs/own_detector.md)"
        )


def thresholds(matcher: Any) -> tuple[float, float, bool]:
    """The settings of one of the library's matchers."""
    return matcher.high_threshold, matcher.low_threshold, matcher.allow_low_quality_matches


def each_image(priors: Priors, batch: Batch) -> list[Tensor]:
    """The priors (A, 4) once for each image, as the library takes them."""
    return [priors.boxes] * len(batch.sizes)


def match_by_iou(matcher: Callable[[Tensor], Tensor], priors: Priors, batch: Batch) -> Tensor:
    """(N, A): the index of the image's box that each prior answers for. Negative numbers mean no box."""
    none = torch.full((len(priors.boxes),), -1, device=priors.boxes.device)
    return torch.stack([matcher(box_iou(boxes, priors.boxes)) if len(boxes) else none for boxes in batch.boxes])


def assignment_of(matches: Tensor, batch: Batch, num_classes: int, normaliser: Tensor) -> Assignment:
    """The assignment made of matches (N, A), the indices of boxes. -2, between the thresholds, has the weight 0."""
    labels = torch.full_like(matches, num_classes)
    boxes = batch.images.new_zeros(*matches.shape, 4)
    for i, (own, own_labels) in enumerate(zip(batch.boxes, batch.labels, strict=True)):
        if len(own):
            index = matches[i].clamp(min=0)
            labels[i] = own_labels[index].masked_fill(matches[i] < 0, num_classes)
            boxes[i] = own[index]
    return Assignment(matches >= 0, labels, boxes, (matches != -2).float(), normaliser)
