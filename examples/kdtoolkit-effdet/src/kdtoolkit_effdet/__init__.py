"""EfficientDet for kdtoolkit: an adapter of effdet's detectors, in a package of its own.

Follows effdet 0.4.1: efficientdet.py (HeadNet), bench.py (DetBenchTrain, DetBenchPredict), data/transforms.py
(ResizePad). The adapter takes the plain `EfficientDet`; of a bench, hand in its `model`.

Private name used: `effdet.bench._post_process`, the choice of candidates before NMS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from effdet import EfficientDet
from effdet.anchors import AnchorLabeler, Anchors, decode_box_outputs, generate_detections
from effdet.bench import _post_process
from effdet.config import get_efficientdet_config
from effdet.data import resolve_input_config
from effdet.data.transforms import resolve_fill_color
from effdet.loss import DetectionLoss
from kdtoolkit import processes
from kdtoolkit.canvas import Layout, check_images
from kdtoolkit.contract import (
    Assignment,
    Batch,
    Detections,
    DetectorAdapter,
    DetectorSpec,
    HeadTrace,
    Predictions,
    PriorKind,
    Priors,
    Stage,
    State,
    Target,
    keep_states,
)
from kdtoolkit.errors import KDError
from torch import Tensor, nn

__all__ = ["EfficientDetAdapter"]

MATCH_THRESHOLD = 0.5  # what DetBenchTrain gives its labeler
LARGEST_SIDE = math.log(1000 / 16)  # of a code, as torchvision's box coder has it
Maps = tuple[Tensor, ...]


class EfficientDetAdapter(DetectorAdapter):
    """Adapter of effdet's EfficientDet; stage 0 is the pyramid, stage i the two towers' state after block i.

    Images are brought to the model's own `image_size`, as the library does: scaled to fit, and padded with the mean
    colour. The library scales boxes by one factor, though it rounds the two sides of the image each for itself; here
    each axis has its own, so boxes differ from the library's by less than a pixel of the canvas.

    Raises KDError for an `image_size` that gives two levels one stride, or one level other strides across than down.
    """

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        config = self.model.config
        self.anchors = Anchors.from_config(config)
        self.canvas = int(config.image_size[0]), int(config.image_size[1])
        levels = self.anchors.feat_sizes[config.min_level : config.max_level + 1]
        self.grid = tuple((int(height), int(width)) for height, width in levels)
        height, width = self.canvas
        square = all(height * columns == width * rows for rows, columns in self.grid)
        if not square or len(set(self.grid)) < len(self.grid):
            raise KDError(
                f"image_size {self.canvas} gives levels of {self.grid} cells, which are not square, or not all of "
                f"another stride: build the model with sides that are multiples of {2**config.max_level}"
            )
        self.strides = tuple(height / rows for rows, _ in self.grid)

    @classmethod
    def examples(cls) -> Mapping[str, Callable[[int], nn.Module]]:
        """A narrow EfficientDet, and one of the lite kind: plain sums in the pyramid, ReLU6, norms level by level."""
        lite = {"fpn_name": "bifpn_sum", "act_type": "relu6", "head_bn_level_first": True, "separable_conv": False}
        return {"EfficientDet": _tiny, "EfficientDet-lite": partial(_tiny, changes=lite)}

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether `model` is an EfficientDet."""
        return isinstance(model, EfficientDet)

    def describe(self) -> DetectorSpec:
        """The detector's facts."""
        config = self.model.config
        channels = (int(config.fpn_channels),) * len(self.grid)
        return DetectorSpec(
            name=type(self.model).__name__,
            num_classes=int(config.num_classes),
            strides=tuple(round(stride) for stride in self.strides),
            channels=channels,
            priors=PriorKind.ANCHORS,
            priors_per_cell=(self.anchors.get_anchors_per_location(),) * len(self.grid),
            # States are taken after the activation: SiLU, the usual one, is not idempotent.
            stages=tuple(
                Stage(f"block {i}" if i else "pyramid", dict.fromkeys(self._towers, channels))
                for i in range(config.box_class_repeats + 1)
            ),
        )

    @property
    def assigner(self) -> object:
        """The labeler's rule, and the anchors: equal grids alone do not make them equal."""
        anchors = self.anchors
        shapes = tuple(ratio if isinstance(ratio, float) else tuple(ratio) for ratio in anchors.aspect_ratios)
        return AnchorLabeler, MATCH_THRESHOLD, anchors.num_scales, shapes, tuple(anchors.anchor_scales)

    def prepare(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None, like: Batch | None = None
    ) -> Batch:
        """Scale to fit the model's image size (bilinear, the default of the library's loader), normalise, pad.

        The model is built for that size alone, so the canvas of a student's batch is scaled to fit as a whole. Raises
        KDError for images that are not (3, H, W) floats.
        """
        check_images(images)
        settings = resolve_input_config({}, self.model.config)
        fill = resolve_fill_color(settings["fill_color"], settings["mean"])
        mean, std, colour = (
            images[0].new_tensor(tuple(values)).view(3, 1, 1) for values in (settings["mean"], settings["std"], fill)
        )
        stacked = ((colour / 255 - mean) / std).repeat(len(images), 1, *self.canvas)
        originals = tuple((image.shape[-2], image.shape[-1]) for image in images)
        if like is None:
            sizes, padded = tuple(self._fit(size) for size in originals), (self.canvas,) * len(images)
        else:
            layout = Layout.fitted(like, self._fit((like.images.shape[-2], like.images.shape[-1])))
            sizes, padded = layout.sizes, layout.padded_sizes
        for canvas, image, (height, width) in zip(stacked, images, sizes, strict=True):
            resized = F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
            canvas[:, :height, :width] = (resized - mean) / std
        if targets is None:
            return Batch(stacked, sizes, padded, originals)
        boxes = tuple(
            target["boxes"].float() * _ratio(size, original, target["boxes"])
            for target, size, original in zip(targets, sizes, originals, strict=True)
        )
        return Batch(stacked, sizes, padded, originals, boxes, tuple(target["labels"] for target in targets))

    def features(self, batch: Batch) -> tuple[Tensor, ...]:
        """Backbone and BiFPN."""
        return tuple(self.model.fpn(self.model.backbone(batch.images)))

    def head(
        self,
        features: tuple[Tensor, ...],
        batch: Batch,
        priors: Priors | None = None,
        stages: Collection[int] | None = None,
    ) -> HeadTrace:
        """Towers and predictors. The context is their raw maps, class scores and boxes, as the library's loss wants."""
        states, last = keep_states(self._walk(dict.fromkeys(self._towers, features)), stages)
        scores, boxes = self._predict(last)
        return HeadTrace(states, self._predictions(scores, boxes), context=(scores, boxes))

    def resume(self, state: State, stage: int, trace: HeadTrace) -> Predictions:
        """The rest of towers and predictors; `trace` is not needed."""
        _, last = keep_states(self._walk(state, stage), ())
        return self._predictions(*self._predict(last))

    def _walk(self, state: State, stage: int = 0) -> Iterator[State]:
        """States from `stage`, whose state is given, to the end."""
        yield state
        for i in range(stage, len(self.model.class_net.conv_rep)):
            state = self._block(state, i)
            yield state

    def task_losses(self, trace: HeadTrace, batch: Batch) -> tuple[dict[str, Tensor], Assignment]:
        """The library's two losses, the box loss with its weight: their sum is the library's `loss`."""
        scores, boxes = _maps(trace)
        labels = self._label(batch)
        loss = DetectionLoss(self.model.config)
        _, class_loss, box_loss = loss(scores, boxes, *labels)
        return {"class_loss": class_loss, "box_loss": loss.box_loss_weight * box_loss}, self._assignment(*labels)

    def assign(self, trace: HeadTrace, batch: Batch) -> Assignment:
        """The library's labeler."""
        return self._assignment(*self._label(batch))

    def detections(self, trace: HeadTrace, batch: Batch) -> list[Detections]:
        """The library's choice of candidates and NMS, on the canvas; then to original pixels."""
        scores, boxes = _maps(trace)
        config, anchors = self.model.config, self._anchors(batch.images.device).boxes
        candidates = min(config.max_detection_points, len(anchors) * config.num_classes)
        chosen = _post_process(scores, boxes, config.num_levels, config.num_classes, candidates)
        found: list[Detections] = []
        for i, (size, original) in enumerate(zip(batch.sizes, batch.original_sizes, strict=True)):
            class_out, box_out, indices, classes = (each[i] for each in chosen)
            rows = generate_detections(
                class_out,
                box_out,
                anchors,
                indices,
                classes,
                img_scale=anchors.new_ones(()),
                img_size=anchors.new_tensor([size[1], size[0]]),
                max_det_per_image=config.max_det_per_image,
                soft_nms=config.soft_nms,
            )
            rows = rows[rows[:, 5] > 0]  # classes count from 1; rows of class 0 fill the tensor up
            kept = rows[:, :4] * _ratio(original, size, rows)
            found.append({"boxes": kept, "scores": rows[:, 4], "labels": rows[:, 5].long() - 1})
        return found

    @property
    def _towers(self) -> dict[str, Any]:
        return {"cls": self.model.class_net, "reg": self.model.box_net}

    def _block(self, state: State, i: int) -> State:
        """Block i of both towers: convolutions are shared by the levels, norms are not."""
        after: dict[str, Maps] = {}
        for branch, net in self._towers.items():
            norms = [level[i] for level in net.bn_rep] if net.bn_level_first else net.bn_rep[i]
            levels = zip(state[branch], norms, strict=True)
            after[branch] = tuple(net.act(norm(net.conv_rep[i](level))) for level, norm in levels)
        return after

    def _predict(self, state: State) -> tuple[Maps, Maps]:
        scores, boxes = (tuple(map(net.predict, state[branch])) for branch, net in self._towers.items())
        return scores, boxes

    def _predictions(self, scores: Maps, boxes: Maps) -> Predictions:
        return Predictions(
            logits=_flatten(scores, self.model.config.num_classes),
            regression=_flatten(boxes, 4),
            priors=self._priors(scores[0].device),
            decode=decode,
        )

    def _anchors(self, device: torch.device) -> Any:
        return self.anchors.to(device)

    def _priors(self, device: torch.device) -> Priors:
        boxes = _swapped(self._anchors(device).boxes)
        per_cell = self.anchors.get_anchors_per_location()
        strides = [
            boxes.new_full((h * w * per_cell,), stride) for stride, (h, w) in zip(self.strides, self.grid, strict=True)
        ]
        return Priors(boxes, torch.cat(strides), self.grid)

    def _label(self, batch: Batch) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Class labels (-1 is background) and box codes of each level, and the number of positives of each image."""
        labeler = AnchorLabeler(self._anchors(batch.images.device), self.model.config.num_classes, MATCH_THRESHOLD)
        labels: tuple[list[Tensor], list[Tensor], Tensor] = labeler.batch_label_anchors(
            [_swapped(boxes) for boxes in batch.boxes], [labels + 1 for labels in batch.labels]
        )
        return labels

    def _assignment(self, labels: list[Tensor], codes: list[Tensor], positives: Tensor) -> Assignment:
        flat = torch.cat([level.flatten(1) for level in labels], 1)
        regression = torch.cat([level.reshape(len(level), -1, 4) for level in codes], 1)
        return Assignment(
            positive=flat >= 0,
            labels=flat.where(flat >= 0, self.model.config.num_classes),
            boxes=decode(regression, self._priors(flat.device)),
            weights=torch.ones_like(flat, dtype=torch.float32),
            normaliser=processes.share(positives.sum() + 1 / processes.count()),  # the library's own adds 1
        )

    def _fit(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of an image scaled to fit the canvas, rounded down as ResizePad does."""
        scale = min(canvas / side for canvas, side in zip(self.canvas, size, strict=True))
        return int(size[0] * scale), int(size[1] * scale)


def decode(regression: Tensor, priors: Priors) -> Tensor:
    """Boxes (..., A, 4) xyxy pixels from the library's codes (y, x, height, width) of anchors.

    Sides are cut at 62 times the anchor's: the library lets them grow to infinity, of which no IoU is a number.
    """
    anchors = _swapped(priors.boxes).expand(regression.shape).reshape(-1, 4)
    centres, sides = regression.reshape(-1, 4).split(2, -1)
    codes = torch.cat([centres, sides.clamp(max=LARGEST_SIDE)], -1)
    boxes: Tensor = decode_box_outputs(codes, anchors, output_xyxy=True)
    return boxes.view(regression.shape)


def _flatten(maps: Iterable[Tensor], size: int) -> Tensor:
    """(N, A, size) float32 from maps (N, anchors * size, H, W), one a level."""
    return torch.cat([level.permute(0, 2, 3, 1).reshape(len(level), -1, size) for level in maps], 1).float()


def _swapped(boxes: Tensor) -> Tensor:
    """Boxes xyxy from yxyx and back: the library has y first."""
    return boxes[:, [1, 0, 3, 2]]


def _ratio(to: tuple[int, int], of: tuple[int, int], like: Tensor) -> Tensor:
    """Factors (4,) from boxes on an image of size (height, width) `of` to boxes on one of size `to`."""
    return torch.tensor([to[1] / of[1], to[0] / of[0]] * 2, dtype=torch.float32, device=like.device)


def _maps(trace: HeadTrace) -> tuple[Maps, Maps]:
    assert isinstance(trace.context, tuple)  # `head` puts them there
    scores, boxes = trace.context
    return scores, boxes


def _tiny(num_classes: int, changes: Mapping[str, object] | None = None) -> nn.Module:
    config = get_efficientdet_config("efficientdet_d0")
    config.update(
        {
            "backbone_name": "test_efficientnet",
            "backbone_args": {},
            "image_size": (128, 128),
            "num_classes": num_classes,
            "fpn_channels": 16,
            "fpn_cell_repeats": 1,
            "box_class_repeats": 2,
            **(changes or {}),
        }
    )
    model: nn.Module = EfficientDet(config, pretrained_backbone=False)
    return model
