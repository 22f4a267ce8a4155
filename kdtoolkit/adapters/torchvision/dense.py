"""RetinaNet and FCOS: two towers that all levels share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead

from kdtoolkit import processes
from kdtoolkit.adapters._towers import Blocks, blocks_of
from kdtoolkit.adapters.torchvision.base import assignment_of, each_image, match_by_iou, require, thresholds
from kdtoolkit.adapters.torchvision.examples import tiny_fcos, tiny_retinanet
from kdtoolkit.adapters.torchvision.grid import GridAdapter, decode_offsets, flatten
from kdtoolkit.contract import Assignment, Batch, Detections, HeadTrace, Predictions, PriorKind, Priors


class RetinaNetAdapter(GridAdapter):
    """Adapter of RetinaNet, both versions: stage 0 is the pyramid, stage i the towers' state after block i."""

    @classmethod
    def examples(cls) -> Mapping[str, Callable[[int], nn.Module]]:
        """Both versions, narrow."""
        return {
            "torchvision RetinaNet": tiny_retinanet,
            "torchvision RetinaNet v2": partial(tiny_retinanet, norm_groups=4, loss="giou"),
        }

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether `model` is a RetinaNet."""
        return isinstance(model, RetinaNet)

    def _check_head(self) -> None:
        require(self.model.head, RetinaNetHead)

    @property
    def _num_classes(self) -> int:
        return int(self.model.head.classification_head.num_classes)

    @property
    def assigner(self) -> object:
        """Thresholds and anchors."""
        generator = self.model.anchor_generator
        return (
            "torchvision RetinaNet",
            thresholds(self.model.proposal_matcher),
            generator.sizes,
            generator.aspect_ratios,
        )

    def _towers(self) -> Mapping[str, Sequence[Blocks]]:
        return _shared_towers(self.model.head, len(self._levels.strides))

    def _predict(self, maps: Mapping[str, Sequence[Tensor]], priors: Priors) -> Predictions:
        head = self.model.head
        return Predictions(
            logits=flatten([head.classification_head.cls_logits(x) for x in maps["cls"]], self._num_classes),
            regression=flatten([head.regression_head.bbox_reg(x) for x in maps["reg"]], 4),
            priors=priors,
            decode=partial(decode_offsets, self.model.box_coder),
        )

    def task_losses(self, trace: HeadTrace, batch: Batch) -> tuple[dict[str, Tensor], Assignment]:
        """`classification` and `bbox_regression`."""
        predictions, matches = trace.predictions, self._matches(trace, batch)
        outputs = {"cls_logits": predictions.logits, "bbox_regression": predictions.regression}
        anchors = each_image(predictions.priors, batch)
        losses = self.model.head.compute_loss(self._targets(batch), outputs, anchors, list(matches))
        return losses, self._assigned(matches, batch)

    def assign(self, trace: HeadTrace, batch: Batch) -> Assignment:
        """By IoU; of weight 0 between the thresholds. The normaliser is the sum over images of max(positives, 1)."""
        return self._assigned(self._matches(trace, batch), batch)

    def _matches(self, trace: HeadTrace, batch: Batch) -> Tensor:
        """What the library's compute_loss hands to that of its head."""
        return match_by_iou(self.model.proposal_matcher, trace.predictions.priors, batch)

    def _assigned(self, matches: Tensor, batch: Batch) -> Assignment:
        positives = (matches >= 0).sum(1).clamp(min=1).sum()
        return assignment_of(matches, batch, self._num_classes, processes.share(positives))

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
        return {"torchvision FCOS": tiny_fcos}

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether `model` is an FCOS."""
        return isinstance(model, FCOS)

    def _check_head(self) -> None:
        require(self.model.head, FCOSHead)

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
            logits=flatten([head.classification_head.cls_logits(x) for x in maps["cls"]], self._num_classes),
            regression=flatten([F.relu(regression_head.bbox_reg(x)) for x in maps["reg"]], 4),
            priors=priors,
            decode=partial(_decode_sides, self.model.box_coder),
            quality=flatten([regression_head.bbox_ctrness(x) for x in maps["reg"]], 1)[..., 0],
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
        return assignment_of(matches, batch, self._num_classes, processes.share((matches >= 0).sum(), at_least=1))

    def detections(self, trace: HeadTrace, batch: Batch) -> list[Detections]:
        """The detector's own post-processing."""
        outputs, anchors, per_level = self._outputs(trace, batch)
        by_level = {name: list(torch.split(x, per_level, 1)) for name, x in outputs.items()}
        anchors_by_level = [list(torch.split(x, per_level)) for x in anchors]
        found = self.model.postprocess_detections(by_level, anchors_by_level, list(batch.sizes))
        return self._detections(found, batch)


def _shared_towers(head: Any, levels: int) -> Mapping[str, Sequence[Blocks]]:
    """Towers of RetinaNet and FCOS, which all levels share."""
    modules = {"cls": head.classification_head, "reg": head.regression_head}
    return {branch: [blocks_of(module.conv)[:-1]] * levels for branch, module in modules.items()}


def _decode_sides(coder: Any, regression: Tensor, priors: Priors) -> Tensor:
    """Boxes (..., A, 4) from distances to the sides (..., A, 4), in sides of the points' squares."""
    decoded: Tensor = coder.decode(regression, _squares(priors))
    return decoded


def _squares(priors: Priors) -> Tensor:
    """The squares (A, 4) around points (A, 4): what the library calls their anchors."""
    half = priors.strides[:, None] / 2
    return priors.boxes + torch.cat([-half, -half, half, half], 1)
