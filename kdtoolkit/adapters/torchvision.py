"""torchvision's detectors: RetinaNet, FCOS, SSD, SSDlite, Faster R-CNN, and the box part of Mask and Keypoint R-CNN.

Heads are walked along the submodules that the library's own forward runs, in its order; losses, matching, anchors, box
coders, transforms and post-processing are the library's functions. Followed: torchvision/models/detection/*.py of
0.29. Underscored names: RetinaNet's `_loss_type`, in an example alone. Undocumented ones: ImageList, resize_boxes,
permute_and_flatten, fastrcnn_loss, the heads' and RoIHeads' parts, and that FCOS.compute_loss hands its matches to
`self.head.compute_loss` (see FCOSAdapter.assign).

Class 0 of SSD and the R-CNN kind is background; here it comes last. Under autocast anchors, regression and losses stay
in float32, where the library's own forward rounds anchors to the precision of the feature maps.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, partial
from itertools import chain, pairwise
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import RPNHead, permute_and_flatten
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import FeaturePyramidNetwork, box_iou
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from kdtoolkit.canvas import Layout, check_images, lay_out, round_up
from kdtoolkit.contract import (
    Assignment,
    Batch,
    Capability,
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
from kdtoolkit.detectors.backbone import build_backbone, without_autocast
from kdtoolkit.errors import KDError
from kdtoolkit.models import construct

_CAPABILITIES = frozenset({Capability.FEATURES, Capability.PREDICTIONS, Capability.STAGES, Capability.ASSIGNMENT})
_PROBE = 512  # pixels: every usual stride divides it
_LIBRARY: Any = torchvision.models  # much of it is untyped

Layer = Callable[[Tensor], Tensor]
Blocks = Sequence[Sequence[Layer]]
"""A tower: the layers of each of its blocks, without the activation between blocks."""


@dataclass(frozen=True)
class Levels:
    """What the backbone gives: `names` of its feature maps, their `strides` (pixels) and `channels`."""

    names: tuple[str, ...]
    strides: tuple[int, ...]
    channels: tuple[int, ...]


class TorchvisionAdapter(DetectorAdapter):
    """What all of torchvision's detectors share: the transform before the backbone, and the backbone."""

    model: Any
    background = 0  # number of classes that the library counts before the first one

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._check_head()

    def _check_head(self) -> None:
        """Raise KDError where the head is not one of the library's own."""

    @property
    def _num_classes(self) -> int:
        """Number of classes, without background."""
        raise NotImplementedError

    @cached_property
    def _levels(self) -> Levels:
        model = self.model
        fixed = model.transform.fixed_size  # (width, height)
        height, width = (fixed[1], fixed[0]) if fixed else (_PROBE, _PROBE)
        # The backbone runs on tensors without storage: a copy, for running it must not move batch norm's statistics.
        memo: dict[int, Any] = {
            id(x): torch.empty_like(x, device="meta")
            for x in chain(model.backbone.parameters(), model.backbone.buffers())
        }
        backbone = copy.deepcopy(model.backbone, memo).eval()
        with torch.no_grad():
            maps = _named_maps(backbone(torch.empty(1, 3, height, width, device="meta")))
        strides = tuple(round(height / x.shape[-2]) for x in maps.values())
        return Levels(tuple(maps), strides, tuple(x.shape[1] for x in maps.values()))

    def prepare(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None, like: Batch | None = None
    ) -> Batch:
        """Normalise, resize and pad by the detector's own transform.

        Raises KDError for what is no image.
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
        """Backbone and pyramid."""
        return tuple(_named_maps(self.model.backbone(batch.images)).values())

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


class GridAdapter(TorchvisionAdapter):
    """What heads on a grid share: towers along the levels, each with its predictor."""

    kind = PriorKind.ANCHORS
    activation: Callable[[Tensor], Tensor] = staticmethod(F.relu)

    @property
    def _generator(self) -> nn.Module:
        """The anchor generator."""
        return cast(nn.Module, self.model.anchor_generator)

    @property
    def _strides(self) -> tuple[int, ...]:
        return self._levels.strides

    def _towers(self) -> Mapping[str, Sequence[Blocks]]:
        """Each branch's tower on each level."""
        raise NotImplementedError

    def _predict(self, maps: Mapping[str, Sequence[Tensor]], priors: Priors) -> Predictions:
        """Predictions from the predictors' input."""
        raise NotImplementedError

    @cached_property
    def spec(self) -> DetectorSpec:
        """The detector's facts."""
        return DetectorSpec(
            name=f"torchvision {type(self.model).__name__}",
            num_classes=self._num_classes,
            strides=self._strides,
            channels=self._levels.channels,
            priors=self.kind,
            priors_per_cell=tuple(cast(Any, self._generator).num_anchors_per_location()),
            stages=_stages(self._towers(), self._levels.channels, self.activation),
            activation="softmax" if self.background else "sigmoid",
            capabilities=_CAPABILITIES,
        )

    def head(
        self,
        features: tuple[Tensor, ...],
        batch: Batch,
        priors: Priors | None = None,
        stages: Collection[int] | None = None,
    ) -> HeadTrace:
        """Towers and predictors; for its own priors whatever is given."""
        towers = self._towers()
        states, last = keep_states(_walk_towers(dict.fromkeys(towers, features), 0, towers, self.activation), stages)
        return HeadTrace(states, self._finish(last, self._priors(features, batch)))

    def resume(self, state: State, stage: int, trace: HeadTrace) -> Predictions:
        """The rest of towers and predictors."""
        towers = {branch: [_still(blocks) for blocks in levels] for branch, levels in self._towers().items()}
        _, last = keep_states(_walk_towers(state, stage, towers, self.activation), ())
        return self._finish(last, trace.predictions.priors)

    def _finish(self, state: State, priors: Priors) -> Predictions:
        towers = self._towers()
        activated = {
            branch: [self.activation(x) if blocks else x for x, blocks in zip(maps, towers[branch], strict=True)]
            for branch, maps in state.items()
        }
        return self._predict(activated, priors)

    def _priors(self, features: tuple[Tensor, ...], batch: Batch) -> Priors:
        """The generator's anchors of one image, which all images share."""
        # It looks at shapes, device and dtype alone, and would round anchors to bfloat16 as maps are under autocast.
        maps = [torch.zeros((), device=x.device).expand(x.shape) for x in features]
        boxes = self._generator(ImageList(batch.images, [batch.sizes[0]]), maps)[0]
        grid = tuple((x.shape[-2], x.shape[-1]) for x in features)
        per_cell = tuple(cast(Any, self._generator).num_anchors_per_location())
        counts = [height * width * each for (height, width), each in zip(grid, per_cell, strict=True)]
        strides = torch.cat(
            [boxes.new_full((count,), stride) for count, stride in zip(counts, self._strides, strict=True)]
        )
        return Priors(boxes, strides, grid, per_cell=per_cell)


class RetinaNetAdapter(GridAdapter):
    """Adapter of RetinaNet, both versions: stage 0 is the pyramid, stage i the towers' state after block i."""

    @classmethod
    def examples(cls) -> Mapping[str, Callable[[int], nn.Module]]:
        """Both versions, narrow."""
        return {
            "torchvision RetinaNet": _tiny_retinanet,
            "torchvision RetinaNet v2": partial(_tiny_retinanet, norm_groups=4, loss="giou"),
        }

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether `model` is a RetinaNet."""
        return isinstance(model, RetinaNet)

    def _check_head(self) -> None:
        _require(self.model.head, RetinaNetHead)

    @property
    def _num_classes(self) -> int:
        return int(self.model.head.classification_head.num_classes)

    @property
    def assigner(self) -> object:
        """Thresholds and anchors."""
        generator = self.model.anchor_generator
        return (
            "torchvision RetinaNet",
            _thresholds(self.model.proposal_matcher),
            generator.sizes,
            generator.aspect_ratios,
        )

    def _towers(self) -> Mapping[str, Sequence[Blocks]]:
        return _shared_towers(self.model.head, len(self._levels.strides))

    def _predict(self, maps: Mapping[str, Sequence[Tensor]], priors: Priors) -> Predictions:
        head = self.model.head
        return Predictions(
            logits=_flatten([head.classification_head.cls_logits(x) for x in maps["cls"]], self._num_classes),
            regression=_flatten([head.regression_head.bbox_reg(x) for x in maps["reg"]], 4),
            priors=priors,
            decode=partial(_decode_offsets, self.model.box_coder),
        )

    def task_losses(self, trace: HeadTrace, batch: Batch) -> tuple[dict[str, Tensor], Assignment]:
        """`classification` and `bbox_regression`."""
        predictions, matches = trace.predictions, self._matches(trace, batch)
        outputs = {"cls_logits": predictions.logits, "bbox_regression": predictions.regression}
        anchors = _each_image(predictions.priors, batch)
        losses = self.model.head.compute_loss(self._targets(batch), outputs, anchors, list(matches))
        return losses, self._assigned(matches, batch)

    def assign(self, trace: HeadTrace, batch: Batch) -> Assignment:
        """By IoU; of weight 0 between the thresholds. The normaliser is the sum over images of max(positives, 1)."""
        return self._assigned(self._matches(trace, batch), batch)

    def _matches(self, trace: HeadTrace, batch: Batch) -> Tensor:
        """What the library's compute_loss hands to that of its head."""
        return _match(self.model.proposal_matcher, trace.predictions.priors, batch)

    def _assigned(self, matches: Tensor, batch: Batch) -> Assignment:
        positives = (matches >= 0).sum(1).clamp(min=1).sum()
        return _assignment(matches, batch, self._num_classes, positives)

    def detections(self, trace: HeadTrace, batch: Batch) -> list[Detections]:
        """The detector's own post-processing."""
        predictions = trace.predictions
        per_level = list(predictions.priors.per_level)
        outputs = {
            "cls_logits": list(torch.split(predictions.logits, per_level, 1)),
            "bbox_regression": list(torch.split(predictions.regression, per_level, 1)),
        }
        anchors = [list(torch.split(predictions.priors.boxes, per_level))] * len(batch.sizes)
        return self._detections(self.model.postprocess_detections(outputs, anchors, list(batch.sizes)), batch)


class FCOSAdapter(GridAdapter):
    """Adapter of FCOS: stages as in RetinaNet, centerness from the regression tower."""

    kind = PriorKind.POINTS

    @classmethod
    def examples(cls) -> Mapping[str, Callable[[int], nn.Module]]:
        """A narrow one."""
        return {"torchvision FCOS": _tiny_fcos}

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether `model` is an FCOS."""
        return isinstance(model, FCOS)

    def _check_head(self) -> None:
        _require(self.model.head, FCOSHead)

    @property
    def _num_classes(self) -> int:
        return int(self.model.head.classification_head.num_classes)

    @property
    def assigner(self) -> object:
        """Radius, and squares around the points."""
        return "torchvision FCOS", self.model.center_sampling_radius, self.model.anchor_generator.sizes

    def _towers(self) -> Mapping[str, Sequence[Blocks]]:
        return _shared_towers(self.model.head, len(self._levels.strides))

    def _priors(self, features: tuple[Tensor, ...], batch: Batch) -> Priors:
        """Points, each with the side of its square in place of the stride: the unit of its regression."""
        squares = super()._priors(features, batch)
        middle = (squares.boxes[:, :2] + squares.boxes[:, 2:]) / 2
        sides = squares.boxes[:, 2] - squares.boxes[:, 0]
        return Priors(middle.repeat(1, 2), sides, squares.grid, per_cell=squares.per_cell)

    def _predict(self, maps: Mapping[str, Sequence[Tensor]], priors: Priors) -> Predictions:
        head = self.model.head
        regression_head = head.regression_head
        return Predictions(
            logits=_flatten([head.classification_head.cls_logits(x) for x in maps["cls"]], self._num_classes),
            regression=_flatten([F.relu(regression_head.bbox_reg(x)) for x in maps["reg"]], 4),
            priors=priors,
            decode=partial(_decode_sides, self.model.box_coder),
            quality=_flatten([regression_head.bbox_ctrness(x) for x in maps["reg"]], 1)[..., 0],
        )

    def task_losses(self, trace: HeadTrace, batch: Batch) -> tuple[dict[str, Tensor], Assignment]:
        """`classification`, `bbox_regression` and `bbox_ctrness`."""
        outputs, anchors, _ = self._outputs(trace, batch)
        matches = self._matches(trace, batch)
        losses = self.model.head.compute_loss(self._targets(batch), outputs, anchors, list(matches))
        return losses, self._assigned(matches, batch)

    def _outputs(self, trace: HeadTrace, batch: Batch) -> tuple[dict[str, Tensor], list[Tensor], list[int]]:
        """The head's outputs, each image's anchors and the number of them on each level, as the library wants them."""
        predictions = trace.predictions
        assert predictions.quality is not None
        outputs = {
            "cls_logits": predictions.logits,
            "bbox_regression": predictions.regression,
            "bbox_ctrness": predictions.quality[..., None],
        }
        anchors = [_squares(predictions.priors)] * len(batch.sizes)
        return outputs, anchors, list(predictions.priors.per_level)

    def assign(self, trace: HeadTrace, batch: Batch) -> Assignment:
        """By place and size; all weights are 1, and the normaliser is max(positives, 1)."""
        return self._assigned(self._matches(trace, batch), batch)

    def _matches(self, trace: HeadTrace, batch: Batch) -> Tensor:
        """(N, A) what the library's compute_loss hands to that of its head."""
        _, anchors, per_level = self._outputs(trace, batch)
        # The rule has no function of its own: it is the part of compute_loss before the head computes the losses. So it
        # runs with a head that hands back the matches.
        matcher = SimpleNamespace(
            center_sampling_radius=self.model.center_sampling_radius,
            head=SimpleNamespace(compute_loss=lambda targets, outputs, anchors, matches: matches),
        )
        matches: Sequence[Tensor] = cast(Any, FCOS).compute_loss(matcher, self._targets(batch), {}, anchors, per_level)
        return torch.stack([*matches])

    def _assigned(self, matches: Tensor, batch: Batch) -> Assignment:
        return _assignment(matches, batch, self._num_classes, (matches >= 0).sum().clamp(min=1))

    def detections(self, trace: HeadTrace, batch: Batch) -> list[Detections]:
        """The detector's own post-processing."""
        outputs, anchors, per_level = self._outputs(trace, batch)
        by_level = {name: list(torch.split(x, per_level, 1)) for name, x in outputs.items()}
        anchors_by_level = [list(torch.split(x, per_level)) for x in anchors]
        found = self.model.postprocess_detections(by_level, anchors_by_level, list(batch.sizes))
        return self._detections(found, batch)


class SSDAdapter(GridAdapter):
    """Adapter of SSD and SSDlite: the head is one convolution a level, in SSDlite after a depthwise block (stage 1)."""

    background = 1
    activation = staticmethod(F.relu6)

    @classmethod
    def examples(cls) -> Mapping[str, Callable[[int], nn.Module]]:
        """Both kinds, narrow, with levels of unlike channels."""
        return {"torchvision SSD": _tiny_ssd, "torchvision SSDlite": partial(_tiny_ssd, lite=True)}

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether `model` is an SSD."""
        return isinstance(model, SSD)

    def _check_head(self) -> None:
        _require(self.model.head, SSDHead, SSDLiteHead)

    @property
    def _num_classes(self) -> int:
        return int(self.model.head.classification_head.num_columns) - 1

    @property
    def _strides(self) -> tuple[int, ...]:
        """The generator's steps, by which it lays its boxes out, where it has any."""
        steps = self.model.anchor_generator.steps
        return tuple(steps) if steps else self._levels.strides

    @property
    def assigner(self) -> object:
        """Threshold and default boxes."""
        generator = self.model.anchor_generator
        boxes = (repr(generator.aspect_ratios), tuple(generator.scales), generator.clip, self._strides)
        return "torchvision SSD", _thresholds(self.model.proposal_matcher), boxes

    def _layout(self, like: Batch) -> Layout:
        """On the one canvas that it is built for: its default boxes are shares of it."""
        width, height = self.model.transform.fixed_size
        return Layout.fitted(like, (height, width))

    def _towers(self) -> Mapping[str, Sequence[Blocks]]:
        head = self.model.head
        return {
            branch: [_blocks(predictor)[:-1] for predictor in module.module_list]
            for branch, module in (("cls", head.classification_head), ("reg", head.regression_head))
        }

    def _predict(self, maps: Mapping[str, Sequence[Tensor]], priors: Priors) -> Predictions:
        head = self.model.head
        logits, regression = (
            _flatten(
                [_last(block)(x) for block, x in zip(module.module_list, maps[branch], strict=True)], module.num_columns
            )
            for branch, module in (("cls", head.classification_head), ("reg", head.regression_head))
        )
        return Predictions(
            logits=logits.roll(-1, -1),
            regression=regression,
            priors=priors,
            decode=partial(_decode_offsets, self.model.box_coder),
            activation="softmax",
        )

    def _outputs(self, trace: HeadTrace) -> dict[str, Tensor]:
        """The head's outputs as the library has them, background first."""
        predictions = trace.predictions
        return {"cls_logits": predictions.logits.roll(1, -1), "bbox_regression": predictions.regression}

    def task_losses(self, trace: HeadTrace, batch: Batch) -> tuple[dict[str, Tensor], Assignment]:
        """`bbox_regression` and `classification`, the latter of positives and the hardest background."""
        priors = trace.predictions.priors
        matches = _match(self.model.proposal_matcher, priors, batch)
        anchors = _each_image(priors, batch)
        losses = self.model.compute_loss(self._targets(batch), self._outputs(trace), anchors, list(matches))
        return losses, self._assigned(matches, batch)

    def assign(self, trace: HeadTrace, batch: Batch) -> Assignment:
        """By IoU; all weights are 1, whichever background is hard. The normaliser is max(positives, 1)."""
        return self._assigned(_match(self.model.proposal_matcher, trace.predictions.priors, batch), batch)

    def _assigned(self, matches: Tensor, batch: Batch) -> Assignment:
        return _assignment(matches, batch, self._num_classes, (matches >= 0).sum().clamp(min=1))

    def detections(self, trace: HeadTrace, batch: Batch) -> list[Detections]:
        """The detector's own post-processing."""
        anchors = _each_image(trace.predictions.priors, batch)
        found = self.model.postprocess_detections(self._outputs(trace), anchors, list(batch.sizes))
        return self._detections(found, batch)


class RPNAdapter(GridAdapter):
    """Adapter of a two-stage detector's region proposal network: a detector of one class, "object".

    `model` is the whole detector. It is reached through `first_stage` alone.
    """

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Never: a two-stage detector is shown whole."""
        return False

    def _check_head(self) -> None:
        _require(self.model.rpn.head, RPNHead)

    @property
    def _num_classes(self) -> int:
        return 1

    @property
    def _generator(self) -> nn.Module:
        return cast(nn.Module, self.model.rpn.anchor_generator)

    @cached_property
    def spec(self) -> DetectorSpec:
        """The first stage's facts."""
        spec = super().spec
        return DetectorSpec(**{**vars(spec), "name": f"{spec.name} RPN"})

    @property
    def assigner(self) -> object:
        """Thresholds and anchors."""
        generator = self.model.rpn.anchor_generator
        return (
            "torchvision RPN",
            _thresholds(self.model.rpn.proposal_matcher),
            generator.sizes,
            generator.aspect_ratios,
        )

    def _towers(self) -> Mapping[str, Sequence[Blocks]]:
        return {"rpn": [_blocks(self.model.rpn.head.conv)[:-1]] * len(self._levels.strides)}

    def _predict(self, maps: Mapping[str, Sequence[Tensor]], priors: Priors) -> Predictions:
        head = self.model.rpn.head
        return Predictions(
            logits=_flatten([head.cls_logits(x) for x in maps["rpn"]], 1),
            regression=_flatten([head.bbox_pred(x) for x in maps["rpn"]], 4),
            priors=priors,
            decode=partial(_decode_offsets, self.model.rpn.box_coder),
        )

    def proposals(self, trace: HeadTrace, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """Boxes (P, 4) on the canvas and scores (P,) of each image, without gradient."""
        predictions = trace.predictions
        boxes = predictions.decode(predictions.regression.detach(), predictions.priors)
        found: tuple[list[Tensor], list[Tensor]] = self.model.rpn.filter_proposals(
            boxes, predictions.logits, list(batch.sizes), list(predictions.priors.per_level)
        )
        return found

    def task_losses(self, trace: HeadTrace, batch: Batch) -> tuple[dict[str, Tensor], None]:
        """`loss_objectness` and `loss_rpn_box_reg`, of anchors drawn at random."""
        rpn, predictions = self.model.rpn, trace.predictions
        anchors = _each_image(predictions.priors, batch)
        labels, boxes = rpn.assign_targets_to_anchors(anchors, self._targets(batch))
        objectness, regression = predictions.logits.flatten(0, 1), predictions.regression.flatten(0, 1)
        losses = rpn.compute_loss(objectness, regression, labels, rpn.box_coder.encode(boxes, anchors))
        return dict(zip(("loss_objectness", "loss_rpn_box_reg"), losses, strict=True)), None

    def assign(self, trace: HeadTrace, batch: Batch) -> Assignment:
        """By IoU, nothing drawn; of weight 0 between the thresholds. The normaliser is max(positives, 1)."""
        found, boxes = self.model.rpn.assign_targets_to_anchors(
            _each_image(trace.predictions.priors, batch), self._targets(batch)
        )
        objects = torch.stack(found)  # 1 for an object, 0 for background, -1 between
        return Assignment(
            labels=(objects != 1).long(),
            boxes=torch.stack(boxes),
            weights=(objects >= 0).float(),
            normaliser=(objects == 1).sum().clamp(min=1).float(),
        )

    def detections(self, trace: HeadTrace, batch: Batch) -> list[Detections]:
        """The proposals."""
        found = [
            {"boxes": boxes, "scores": scores, "labels": torch.zeros_like(scores, dtype=torch.int64)}
            for boxes, scores in zip(*self.proposals(trace, batch), strict=True)
        ]
        return self._detections(found, batch)


@dataclass(frozen=True)
class BoxOutputs:
    """What the box head said of the R real proposals, raw.

    `class_logits` (R, K + 1), background first; `box_regression` (R, (K + 1) * 4). In training `matches`, `labels` and
    `targets` are those of the proposals drawn, by image, and `rpn_losses` the first stage's.
    """

    class_logits: Tensor
    box_regression: Tensor
    matches: list[Tensor] | None = None
    labels: list[Tensor] | None = None
    targets: list[Tensor] | None = None
    rpn_losses: Mapping[str, Tensor] | None = None


class FasterRCNNAdapter(TorchvisionAdapter):
    """Adapter of Faster R-CNN, and of what Mask R-CNN and Keypoint R-CNN say of boxes.

    Stage 0 is what is pooled of each proposal, stage i the box head's state after layer i. In training the head draws
    proposals as the library does. `Predictions.regression` is the mean of the classes' offsets by their probabilities.
    """

    background = 1

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._rpn = RPNAdapter(model)

    @classmethod
    def examples(cls) -> Mapping[str, Callable[[int], nn.Module]]:
        """Narrow ones of each box head, and one with masks."""
        return {
            "torchvision Faster R-CNN": _tiny_fasterrcnn,
            "torchvision Faster R-CNN v2": _tiny_fasterrcnn_v2,
            "torchvision Mask R-CNN": _tiny_maskrcnn,
        }

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether `model` is a Faster R-CNN, or a kind of it."""
        return isinstance(model, FasterRCNN)

    def _check_head(self) -> None:
        _require(self.model.roi_heads.box_head, TwoMLPHead, FastRCNNConvFCHead)
        _require(self.model.roi_heads.box_predictor, FastRCNNPredictor)

    @property
    def _num_classes(self) -> int:
        return int(self.model.roi_heads.box_predictor.cls_score.out_features) - 1

    @cached_property
    def spec(self) -> DetectorSpec:
        """The detector's facts."""
        levels = self._levels
        return DetectorSpec(
            name=f"torchvision {type(self.model).__name__}",
            num_classes=self._num_classes,
            strides=levels.strides,
            channels=levels.channels,
            priors=PriorKind.PROPOSALS,
            stages=self._stages(),
            activation="softmax",
            prior_form="boxes",
            capabilities=_CAPABILITIES,
            first_stage=self._rpn.spec,
        )

    def _stages(self) -> tuple[Stage, ...]:
        stages = [Stage("roi", {"box": self._levels.channels[:1]})]
        for i, block in enumerate(self._blocks(), 1):
            width, spatial = _width(block), any(isinstance(layer, nn.Conv2d) for layer in block)
            name = f"fc{i + 5}" if isinstance(self.model.roi_heads.box_head, TwoMLPHead) else f"block {i}"
            stages.append(Stage(name, {"box": (width,)}, spatial=spatial, activation=F.relu))
        return tuple(stages)

    def _blocks(self) -> Blocks:
        head = self.model.roi_heads.box_head
        if isinstance(head, TwoMLPHead):
            return [[partial(torch.flatten, start_dim=1), head.fc6], [head.fc7]]
        return _blocks(head)[:-1]

    @property
    def assigner(self) -> object:
        """Thresholds."""
        return "torchvision RoI heads", _thresholds(self.model.roi_heads.proposal_matcher)

    @property
    def first_stage(self) -> RPNAdapter:
        """The region proposal network."""
        return self._rpn

    def head(
        self,
        features: tuple[Tensor, ...],
        batch: Batch,
        priors: Priors | None = None,
        stages: Collection[int] | None = None,
    ) -> HeadTrace:
        """The first stage and, in training, the draw of proposals; or the `priors` given; then the box head."""
        roi_heads = self.model.roi_heads
        matches = labels = targets = rpn_losses = first = None
        blocks = self._blocks() if priors is None else _still(self._blocks())
        # The pooler tells strides by the size of images, which in the library is that of their content. Where much of a
        # canvas is another detector's padding that would be wrong.
        shown = list(batch.sizes) if priors is None else [tuple(batch.images.shape[-2:])]
        if priors is None:
            first = self._rpn.head(features, batch, stages=None if stages is None else ())
            proposals, _ = self._rpn.proposals(first, batch)
            if self.model.training and batch.boxes:
                # In the library's order, for both losses draw at random.
                rpn_losses, _ = self._rpn.task_losses(first, batch)
                proposals, matches, labels, targets = roi_heads.select_training_samples(proposals, self._targets(batch))
            priors = _filled(proposals, batch)
        rows = _Rows.of(priors)
        maps = {name: x.float() for name, x in zip(self._levels.names, features, strict=True)}
        # A copy, for the pooler writes down the scales of the first maps it sees.
        pooled = copy.copy(roi_heads.box_roi_pool)(maps, rows.boxes, shown)
        walk = ({"box": (x,)} for x in _walk(pooled, blocks, 0, F.relu))
        states, last = keep_states(walk, stages)
        class_logits, box_regression = self._outputs(last["box"][0])
        outputs = BoxOutputs(
            class_logits[: rows.count], box_regression[: rows.count], matches, labels, targets, rpn_losses
        )
        spread = tuple({branch: tuple(map(rows.spread, x)) for branch, x in state.items()} for state in states)
        return HeadTrace(spread, self._predictions(class_logits, box_regression, priors, rows), outputs, first)

    def resume(self, state: State, stage: int, trace: HeadTrace) -> Predictions:
        """The rest of the box head."""
        priors = trace.predictions.priors
        rows = _Rows.of(priors)
        *_, last = _walk(rows.take(state["box"][0]), _still(self._blocks()), stage, F.relu)
        return self._predictions(*self._outputs(last), priors, rows)

    def _outputs(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The predictor's raw class logits (R, K + 1) and offsets (R, (K + 1) * 4), from the last stage's state."""
        class_logits, box_regression = self.model.roi_heads.box_predictor(F.relu(state))
        return class_logits.float(), box_regression.float()

    def _predictions(self, class_logits: Tensor, box_regression: Tensor, priors: Priors, rows: _Rows) -> Predictions:
        shape = priors.boxes.shape[:2]
        # Each class has offsets of its own. Their mean by the probabilities of classes, background apart, is what the
        # proposal becomes; probabilities are not moved by what boxes should be.
        shares = class_logits.detach()[:, 1:].softmax(-1)[..., None]
        regression = (torch.unflatten(box_regression, -1, (-1, 4))[:, 1:] * shares).sum(1)
        return Predictions(
            logits=torch.unflatten(rows.spread(class_logits.roll(-1, -1)), 0, shape),
            regression=torch.unflatten(rows.spread(regression), 0, shape),
            priors=priors,
            decode=partial(_decode_offsets, self.model.roi_heads.box_coder),
            activation="softmax",
        )

    def _targets(self, batch: Batch) -> list[dict[str, Tensor]]:
        targets = super()._targets(batch)
        if self.model.roi_heads.has_mask():
            # `check_targets` asks for masks; what is called here does not look at them.
            targets = [{**target, "masks": target["boxes"]} for target in targets]
        return targets

    def task_losses(self, trace: HeadTrace, batch: Batch) -> tuple[dict[str, Tensor], None]:
        """`loss_classifier`, `loss_box_reg`, `loss_objectness` and `loss_rpn_box_reg`; none of masks and keypoints.

        Raises KDError where the head ran in eval mode, or on priors of another detector: then no proposals were drawn.
        """
        outputs = cast(BoxOutputs, trace.context)
        if outputs.labels is None or outputs.targets is None or outputs.rpn_losses is None:
            raise KDError(
                f"{self.spec.name} draws the proposals of its losses while its head runs: call model.train() before, "
                "and prepare the batch with targets"
            )
        losses = fastrcnn_loss(outputs.class_logits, outputs.box_regression, outputs.labels, outputs.targets)
        return {**dict(zip(("loss_classifier", "loss_box_reg"), losses, strict=True)), **outputs.rpn_losses}, None

    def assign(self, trace: HeadTrace, batch: Batch) -> Assignment:
        """By IoU, all proposals, none drawn; of weight 0 where they fill up. The normaliser is the sum of weights."""
        priors, outputs = trace.predictions.priors, cast(BoxOutputs, trace.context)
        proposals, targets = priors.boxes, self._targets(batch)
        if outputs.matches is not None and outputs.labels is not None:  # the library matched what it drew
            rows = proposals.shape[1]
            matches, found = (
                [F.pad(x, (0, rows - len(x))) for x in each] for each in (outputs.matches, outputs.labels)
            )
        else:
            matches, found = self.model.roi_heads.assign_targets_to_proposals(
                list(proposals), [t["boxes"] for t in targets], [t["labels"] for t in targets]
            )
        counted = torch.stack(found)  # 0: background, -1: between thresholds
        counts = torch.tensor(_counts(priors), device=proposals.device)
        real = torch.arange(proposals.shape[1], device=proposals.device) < counts[:, None]
        labels = torch.where(real & (counted > 0), counted - 1, self._num_classes)
        weights = (real & (counted >= 0)).float()
        boxes = torch.stack(
            [
                own[index] if len(own) else torch.zeros_like(proposals[0])
                for own, index in zip(batch.boxes, matches, strict=True)
            ]
        )
        return Assignment(labels, boxes, weights, weights.sum().clamp(min=1))

    def detections(self, trace: HeadTrace, batch: Batch) -> list[Detections]:
        """The detector's own post-processing of boxes."""
        outputs = cast(BoxOutputs, trace.context)
        priors = trace.predictions.priors
        real = [boxes[:count] for boxes, count in zip(priors.boxes, _counts(priors), strict=True)]
        found = self.model.roi_heads.postprocess_detections(
            outputs.class_logits, outputs.box_regression, real, list(batch.sizes)
        )
        images = [dict(zip(("boxes", "scores", "labels"), image, strict=True)) for image in zip(*found, strict=True)]
        return self._detections(images, batch)


@dataclass(frozen=True)
class _Rows:
    """The real proposals among the N * P of a batch, one after the other.

    Only they go through the box head, for its batch norm and its losses must not see what fills up. In states and
    predictions, a row that fills up repeats the last real one before it.
    """

    boxes: list[Tensor]  # of each image (P_i, 4)
    count: int  # of all images
    index: Tensor | None  # (R,) rows of the real ones; None where all are
    source: Tensor | None  # (N * P,) which of them each row shows

    @classmethod
    def of(cls, priors: Priors) -> _Rows:
        images, longest = priors.boxes.shape[:2]
        counts = _counts(priors)
        run = counts if any(counts) else (longest,) * images  # nothing proposed: run something, and detect nothing
        boxes = [image[:count] for image, count in zip(priors.boxes, run, strict=True)]
        if min(run) == longest:
            return cls(boxes, sum(counts), None, None)
        # On the host, where the numbers are known.
        index = torch.tensor([i * longest + j for i, count in enumerate(run) for j in range(count)])
        real = torch.zeros(images * longest, dtype=torch.long).index_fill(0, index, 1)
        source = (real.cumsum(0) - 1).clamp(min=0)
        device = priors.boxes.device
        return cls(boxes, sum(counts), index.to(device), source.to(device))

    def take(self, x: Tensor) -> Tensor:
        """(N * P, ...) -> (R, ...)."""
        return x if self.index is None else x[self.index]

    def spread(self, x: Tensor) -> Tensor:
        """(R, ...) -> (N * P, ...)."""
        return x if self.source is None else x[self.source]


def _counts(priors: Priors) -> tuple[int, ...]:
    """Number of proposals of each image that do not fill up; all, where whoever proposed did not say."""
    if isinstance(priors.context, tuple):
        return priors.context
    images, longest = priors.boxes.shape[:2]
    return (longest,) * images


def _filled(proposals: Sequence[Tensor], batch: Batch) -> Priors:
    """Proposals (N, P, 4) of images with unlike numbers of them; the numbers are the context."""
    counts = tuple(len(boxes) for boxes in proposals)
    longest = max(1, *counts)
    height_width = torch.tensor(batch.sizes, device=proposals[0].device, dtype=torch.float32)
    whole = torch.cat([torch.zeros_like(height_width), height_width.flip(-1)], -1)
    boxes = torch.stack(
        [torch.cat([own, image.expand(longest - len(own), 4)]) for own, image in zip(proposals, whole, strict=True)]
    )
    return Priors(boxes, boxes.new_zeros(0), context=counts)


def _named_maps(output: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A backbone's feature maps by name; some have one only."""
    return {"0": output} if isinstance(output, Tensor) else output


def _require(head: nn.Module, *known: type[nn.Module]) -> None:
    if not isinstance(head, known):
        raise KDError(
            f"{type(head).__name__} is no head of torchvision's ({' or '.join(cls.__name__ for cls in known)}), so its "
            "stages are unknown: write an adapter for it (CONTRIBUTING.md, 'Add a detector library')"
        )


def _thresholds(matcher: Any) -> tuple[float, float, bool]:
    return matcher.high_threshold, matcher.low_threshold, matcher.allow_low_quality_matches


def _blocks(tower: nn.Module) -> list[list[Layer]]:
    """A tower's layers, block by block, without the activation that ends each; last what follows the last of them."""
    children = list(tower) if isinstance(tower, nn.Sequential) else [tower]
    blocks: list[list[Layer]] = [[]]
    for layer in chain.from_iterable(child if isinstance(child, nn.Sequential) else [child] for child in children):
        if isinstance(layer, nn.ReLU | nn.ReLU6):
            blocks.append([])
        else:
            blocks[-1].append(layer)
    return blocks


def _still(blocks: Blocks) -> Blocks:
    """The same layers, without what they learn by running: batch norm's statistics are of the detector's own pass."""
    return [
        [
            partial(
                F.batch_norm,
                running_mean=None,
                running_var=None,
                weight=layer.weight,
                bias=layer.bias,
                training=True,
                eps=layer.eps,
            )
            if isinstance(layer, nn.BatchNorm2d) and layer.training
            else layer
            for layer in block
        ]
        for block in blocks
    ]


def _last(tower: nn.Module) -> Layer:
    return tower[-1] if isinstance(tower, nn.Sequential) else tower


def _shared_towers(head: Any, levels: int) -> Mapping[str, Sequence[Blocks]]:
    """Towers of RetinaNet and FCOS, which all levels share."""
    modules = {"cls": head.classification_head, "reg": head.regression_head}
    return {branch: [_blocks(module.conv)[:-1]] * levels for branch, module in modules.items()}


def _width(block: Sequence[Layer]) -> int:
    """Channels that a block gives."""
    return next(
        layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
        for layer in block
        if isinstance(layer, nn.Conv2d | nn.Linear)
    )


def _stages(
    towers: Mapping[str, Sequence[Blocks]], channels: tuple[int, ...], activation: Callable[[Tensor], Tensor]
) -> tuple[Stage, ...]:
    depth = len(next(iter(towers.values()))[0])
    return (
        Stage("pyramid", dict.fromkeys(towers, channels)),
        *(
            Stage(
                f"block {i + 1}",
                {branch: tuple(_width(blocks[i]) for blocks in levels) for branch, levels in towers.items()},
                activation=activation,
            )
            for i in range(depth)
        ),
    )


def _walk(x: Tensor, blocks: Blocks, stage: int, activation: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """States of one tensor from `stage`, whose state is `x`, to the tower's end, each before the activation."""
    yield x
    for i in range(stage, len(blocks)):
        x = activation(x) if i else x
        for layer in blocks[i]:
            x = layer(x)
        yield x


def _walk_towers(
    state: State,
    stage: int,
    towers: Mapping[str, Sequence[Blocks]],
    activation: Callable[[Tensor], Tensor],
) -> Iterator[State]:
    """States of all branches and levels from `stage`, whose state is given, to the end, one by one."""
    walks = {
        branch: [_walk(x, blocks, stage, activation) for x, blocks in zip(maps, towers[branch], strict=True)]
        for branch, maps in state.items()
    }
    depth = max(len(blocks) for levels in towers.values() for blocks in levels)
    for _ in range(stage, depth + 1):
        yield {branch: tuple(map(next, levels)) for branch, levels in walks.items()}


def _flatten(maps: Sequence[Tensor], columns: int) -> Tensor:
    """One (N, A, columns) in float32 of maps (N, priors per cell * columns, H, W)."""
    flat = [permute_and_flatten(x, x.shape[0], x.shape[1] // columns, columns, x.shape[2], x.shape[3]) for x in maps]
    return torch.cat(flat, 1).float()


def _decode_offsets(coder: Any, regression: Tensor, priors: Priors) -> Tensor:
    """Boxes (..., A, 4) from offsets (..., A, 4)."""
    boxes = priors.boxes.expand_as(regression).reshape(-1, 4)
    decoded: Tensor = coder.decode_single(regression.reshape(-1, 4), boxes)
    return decoded.view_as(regression)


def _decode_sides(coder: Any, regression: Tensor, priors: Priors) -> Tensor:
    """Boxes (..., A, 4) from distances to the sides (..., A, 4), in sides of the points' squares."""
    decoded: Tensor = coder.decode(regression, _squares(priors))
    return decoded


def _squares(priors: Priors) -> Tensor:
    """The squares (A, 4) around points (A, 4): what the library calls their anchors."""
    half = priors.strides[:, None] / 2
    return priors.boxes + torch.cat([-half, -half, half, half], 1)


def _each_image(priors: Priors, batch: Batch) -> list[Tensor]:
    return [priors.boxes] * len(batch.sizes)


def _match(matcher: Callable[[Tensor], Tensor], priors: Priors, batch: Batch) -> Tensor:
    """(N, A) which of the image's boxes each prior answers for; negative for none."""
    none = torch.full((len(priors.boxes),), -1, device=priors.boxes.device)
    return torch.stack([matcher(box_iou(boxes, priors.boxes)) if len(boxes) else none for boxes in batch.boxes])


def _assignment(matches: Tensor, batch: Batch, num_classes: int, normaliser: Tensor) -> Assignment:
    """From which box each prior answers for (N, A); of -2, between thresholds, the weight is 0."""
    labels = torch.full_like(matches, num_classes)
    boxes = batch.images.new_zeros(*matches.shape, 4)
    for i, (own, own_labels) in enumerate(zip(batch.boxes, batch.labels, strict=True)):
        if len(own):
            index = matches[i].clamp(min=0)
            labels[i] = own_labels[index].masked_fill(matches[i] < 0, num_classes)
            boxes[i] = own[index]
    return Assignment(labels, boxes, (matches != -2).float(), normaliser.float())


ADAPTERS: tuple[type[DetectorAdapter], ...] = (RetinaNetAdapter, FCOSAdapter, SSDAdapter, FasterRCNNAdapter)


class TimmPyramid(nn.Module):
    """A timm backbone with torchvision's feature pyramid: what RetinaNet, FCOS and Faster R-CNN take as `backbone`.

    Args:
        name: of a timm model with feature maps of all `strides`.
        strides: of the levels that the pyramid is made of, in pixels, finest first.
        out_channels: of the pyramid.
        extra: makes the coarser levels.
        pretrained: load timm's ImageNet weights (downloads them).
        args: further arguments of timm.create_model.

    Raises:
        KDError: timm has no such model, or the model has no such levels or takes images of one size only.
    """

    def __init__(
        self,
        name: str,
        strides: Sequence[int],
        out_channels: int,
        extra: ExtraFPNBlock,
        *,
        pretrained: bool = False,
        args: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        self.body, self.levels = build_backbone(name, strides, pretrained=pretrained, args=args)
        self.fpn = FeaturePyramidNetwork(list(self.levels.channels), out_channels, extra_blocks=extra)
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Pyramid levels (N, C, H, W) by name, finest first, of images (N, 3, H, W)."""
        maps = self.levels.of(self.body(images))
        levels: dict[str, Tensor] = self.fpn(OrderedDict((str(i), x) for i, x in enumerate(maps)))
        return levels

    @property
    def normalisation(self) -> dict[str, Any]:
        """The detector's arguments that let it normalise images as the backbone's own training did."""
        return {"image_mean": list(self.levels.mean), "image_std": list(self.levels.std)}


class _CoarserLevels(LastLevelP6P7):
    """P6 and P7 in float32 whatever autocast says; why: `kdtoolkit.detectors.dense.ExtraLevels`."""

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Append levels to the pyramid's."""
        with without_autocast(p[-1]):
            levels: tuple[list[Tensor], list[str]] = super().forward(
                [*p[:-1], p[-1].float()], [*c[:-1], c[-1].float()], names
            )
            return levels


def retinanet(
    num_classes: int,
    *,
    backbone: str = "resnet50",
    backbone_args: Mapping[str, object] | None = None,
    pretrained: bool = False,
    out_channels: int = 256,
    min_size: int = 800,
    max_size: int = 1333,
) -> RetinaNet:
    """The library's RetinaNet above a timm backbone. Arguments are those of `TimmPyramid` and of the detector."""
    extra = _CoarserLevels(out_channels, out_channels)
    levels = TimmPyramid(backbone, (8, 16, 32), out_channels, extra, pretrained=pretrained, args=backbone_args)
    sizes = {"min_size": min_size, "max_size": max_size}
    return cast(RetinaNet, _LIBRARY.detection.RetinaNet(levels, num_classes, **sizes, **levels.normalisation))


def fcos(
    num_classes: int,
    *,
    backbone: str = "resnet50",
    backbone_args: Mapping[str, object] | None = None,
    pretrained: bool = False,
    out_channels: int = 256,
    min_size: int = 800,
    max_size: int = 1333,
) -> FCOS:
    """The library's FCOS above a timm backbone. Arguments are those of `TimmPyramid` and of the detector."""
    extra = _CoarserLevels(out_channels, out_channels)
    levels = TimmPyramid(backbone, (8, 16, 32), out_channels, extra, pretrained=pretrained, args=backbone_args)
    return FCOS(levels, num_classes, min_size=min_size, max_size=max_size, **levels.normalisation)


def fasterrcnn(
    num_classes: int,
    *,
    backbone: str = "resnet50",
    backbone_args: Mapping[str, object] | None = None,
    pretrained: bool = False,
    out_channels: int = 256,
    min_size: int = 800,
    max_size: int = 1333,
) -> FasterRCNN:
    """The library's Faster R-CNN above a timm backbone; `num_classes` is without background.

    Arguments are those of `TimmPyramid` and of the detector.
    """
    extra = LastLevelMaxPool()
    levels = TimmPyramid(backbone, (4, 8, 16, 32), out_channels, extra, pretrained=pretrained, args=backbone_args)
    sizes = {"min_size": min_size, "max_size": max_size}
    return cast(FasterRCNN, _LIBRARY.detection.FasterRCNN(levels, num_classes + 1, **sizes, **levels.normalisation))


_TIMM_MODELS: Mapping[str, Callable[..., nn.Module]] = {"retinanet": retinanet, "fcos": fcos, "fasterrcnn": fasterrcnn}


def build_model(name: str, num_classes: int, args: Mapping[str, object]) -> nn.Module:
    """Build one of torchvision's detectors.

    Args:
        name: of a builder of torchvision's, such as "fcos_resnet50_fpn", which loads no weights unless `args` say so;
            or "retinanet", "fcos" or "fasterrcnn", which take any timm backbone.
        num_classes: without background.
        args: further arguments of the builder, or of the detector that it builds.

    Raises:
        KDError: there is no such builder, or it takes no such arguments.
    """
    full = f"torchvision/{name}"
    if name in _TIMM_MODELS:
        return construct(_TIMM_MODELS[name], full, num_classes, args)
    names = [*_TIMM_MODELS, *_LIBRARY.list_models(module=detection)]
    if name not in names:
        raise KDError(f"unknown model {full!r}" + _meant(name, names) + f" There are {', '.join(names)}")
    builder = _LIBRARY.get_model_builder(name)
    signature = inspect.signature(builder)
    detector = signature.return_annotation
    # The transform takes any argument and ignores those it does not know, so names are looked at here.
    taken = {**signature.parameters, **inspect.signature(detector.__init__).parameters}
    allowed = sorted(taken.keys() - {"self", "kwargs", "backbone", "num_classes", "size"})
    if unknown := sorted(args.keys() - set(allowed)):
        raise KDError(
            f"model {full!r} takes no argument {unknown[0]!r}"
            + _meant(unknown[0], allowed)
            + f" Its arguments are {', '.join(allowed)}"
        )
    outputs = num_classes + (0 if issubclass(detector, RetinaNet | FCOS) else 1)
    options: dict[str, Any] = {"weights": None, "weights_backbone": None, **args}
    try:
        return cast(nn.Module, builder(num_classes=outputs, **options))
    except (TypeError, ValueError, KeyError, OSError) as error:  # weights of other classes, unknown, or no network
        raise KDError(f"model {full!r}: {error}") from error


def _meant(name: str, names: Iterable[str]) -> str:
    close = get_close_matches(name, names)
    return f"; did you mean {' or '.join(close)}?" if close else "."


# Tiny detectors, for tests: a few thousand weights, images of 64 px.

_TINY_BACKBONE = {"channels": (8, 8, 16, 16), "stem_width": 4}
# What the coarsest level's stride divides: the library spreads anchors by the canvas divided by cells, rounded down.
_TINY_SIZES: Mapping[str, Any] = {"min_size": 128, "max_size": 128, "size_divisible": 128}


def _tiny_levels(strides: Sequence[int], channels: int, extra: ExtraFPNBlock) -> TimmPyramid:
    return TimmPyramid("resnet10t", strides, channels, extra, args=_TINY_BACKBONE)


def _enliven(head: nn.Module) -> None:
    """Weights that make a head say something else of each place, as a trained one does; the library's are near 0."""
    for layer in head.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)


def _tiny_retinanet(num_classes: int, *, norm_groups: int = 0, loss: str = "l1") -> RetinaNet:
    sizes = tuple((4 * stride, 5 * stride, 6 * stride) for stride in (8, 16, 32, 64, 128))
    anchors = _LIBRARY.detection.anchor_utils.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    norm = partial(nn.GroupNorm, norm_groups) if norm_groups else None
    head = RetinaNetHead(16, 9, num_classes, norm_layer=norm)
    head.regression_head._loss_type = loss
    _enliven(head)
    levels = _tiny_levels((8, 16, 32), 16, LastLevelP6P7(16, 16))
    options = {"anchor_generator": anchors, "head": head, "score_thresh": 0.001, **_TINY_SIZES}
    return cast(RetinaNet, _LIBRARY.detection.RetinaNet(levels, num_classes, **options))


def _tiny_fcos(num_classes: int) -> FCOS:
    levels = _tiny_levels(
        (8, 16, 32), 64, LastLevelP6P7(64, 64)
    )  # the head has 32 groups, of two for a map of one cell
    head = FCOSHead(64, 1, num_classes, num_convs=2)
    _enliven(head)
    nn.init.constant_(cast(Tensor, head.regression_head.bbox_reg.bias), 6.0)  # below 0 boxes are empty
    return FCOS(levels, num_classes, head=head, score_thresh=0.001, **_TINY_SIZES)


class _TinyMaps(nn.Module):
    """Three levels of strides 8, 16 and 32, each with other channels, without a pyramid."""

    def __init__(self) -> None:
        super().__init__()
        self.out_channels = [8, 12, 16]
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.ReLU())
        widths = [8, *self.out_channels]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU())
            for before, after in pairwise(widths)
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x, maps = self.stem(images), OrderedDict()
        for i, block in enumerate(self.blocks):
            x = maps[str(i)] = block(x)
        return maps


def _tiny_ssd(num_classes: int, *, lite: bool = False) -> SSD:
    backbone = _TinyMaps()
    boxes = DefaultBoxGenerator([[2], [2, 3], [2]], steps=[8, 16, 32])
    per_cell = boxes.num_anchors_per_location()
    head: nn.Module
    if lite:
        head = SSDLiteHead(backbone.out_channels, per_cell, num_classes + 1, nn.BatchNorm2d)
    else:
        head = SSDHead(backbone.out_channels, per_cell, num_classes + 1)
    _enliven(head)
    return SSD(backbone, boxes, (64, 64), num_classes + 1, head=head)


def _tiny_fasterrcnn(num_classes: int, *, kind: Callable[..., FasterRCNN] = FasterRCNN, **parts: Any) -> FasterRCNN:
    sizes = ((16,), (24,), (32,), (48,), (64,))
    library = _LIBRARY.detection
    options = {
        "rpn_anchor_generator": library.anchor_utils.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        "rpn_head": RPNHead(16, 3),
        "box_head": library.faster_rcnn.TwoMLPHead(16 * 7 * 7, 24),
        "box_predictor": library.faster_rcnn.FastRCNNPredictor(24, num_classes + 1),
        **{f"rpn_{when}_nms_top_n_{mode}": 50 for when in ("pre", "post") for mode in ("train", "test")},
        "box_batch_size_per_image": 32,
        "box_score_thresh": 0.01,
        **_TINY_SIZES,
        **parts,
    }
    model = kind(_tiny_levels((4, 8, 16, 32), 16, LastLevelMaxPool()), **options)
    _enliven(cast(nn.Module, model.rpn.head))
    _enliven(model.roi_heads)
    return model


def _tiny_fasterrcnn_v2(num_classes: int) -> FasterRCNN:
    return _tiny_fasterrcnn(
        num_classes,
        rpn_head=RPNHead(16, 3, conv_depth=2),
        box_head=FastRCNNConvFCHead((16, 7, 7), [16, 16], [24], norm_layer=nn.BatchNorm2d),
    )


def _tiny_maskrcnn(num_classes: int) -> FasterRCNN:
    library = _LIBRARY.detection.mask_rcnn
    return _tiny_fasterrcnn(
        num_classes,
        kind=detection.MaskRCNN,
        mask_head=library.MaskRCNNHeads(16, (8,), 1),
        mask_predictor=library.MaskRCNNPredictor(8, 8, num_classes + 1),
    )
