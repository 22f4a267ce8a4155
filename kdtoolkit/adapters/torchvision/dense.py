"""The adapters of RetinaNet and FCOS, whose two towers run on all levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead

from kdtoolkit.adapters.torchvision.base import DenseGraph, require, thresholds
from kdtoolkit.adapters.torchvision.examples import tiny_fcos, tiny_retinanet
from kdtoolkit.adapters.torchvision.grid import GridAdapter, flatten
from kdtoolkit.adapters.torchvision.models import CoarserLevels
from kdtoolkit.adapters.torchvision.towers import Block, blocks_of
from kdtoolkit.boxes import centres
from kdtoolkit.contract import Assignment, Batch, ClassRows, Detections, HeadTrace, Predictions, PriorKind, Priors
from kdtoolkit.detectors.precision import without_narrow_bfloat16
from kdtoolkit.graph import at_least_the_best


class TwoTowersAdapter(GridAdapter):
    """Base of the adapters of RetinaNet and FCOS, which have a tower for classes and one for boxes.

    Stage 0 is the pyramid; stage i is the state of both towers after block i.
    """

    head_class: ClassVar[type[nn.Module]]

    def _check_head(self) -> None:
        require(self.model.head, self.head_class)

    @property
    def _num_classes(self) -> int:
        return int(self.model.head.classification_head.num_classes)

    @property
    def class_layers(self) -> Mapping[str, ClassRows]:
        """The predictor of classes, for each anchor of a cell."""
        return {"head.classification_head.cls_logits": ClassRows()}

    def features(self, batch: Batch) -> tuple[Tensor, ...]:
        """Run backbone and pyramid."""
        if any(isinstance(module, CoarserLevels) for module in self.model.backbone.modules()):
            return super().features(batch)
        with without_narrow_bfloat16(batch.images, self._strides[-1]):
            return super().features(batch)

    def _towers(self) -> Mapping[str, Sequence[Sequence[Block]]]:
        modules = {"cls": self.model.head.classification_head, "reg": self.model.head.regression_head}
        return {branch: [blocks_of(head.conv)] * len(self._levels.strides) for branch, head in modules.items()}

    def _outputs(self, predictions: Predictions) -> dict[str, Tensor]:
        """The outputs of the library's head."""
        return {"cls_logits": predictions.logits, "bbox_regression": predictions.regression}

    def _anchors(self, priors: Priors) -> Tensor:
        """The anchors (A, 4) of the library."""
        return priors.boxes

    def task_losses(self, trace: HeadTrace, batch: Batch) -> tuple[dict[str, Tensor], Assignment]:
        """Compute `classification`, `bbox_regression` and, for FCOS, `bbox_ctrness`."""
        predictions, matches = trace.predictions, self._matches(trace.predictions.priors, batch)
        anchors = [self._anchors(predictions.priors)] * len(batch.sizes)
        outputs = self._outputs(predictions)
        losses = self.model.head.compute_loss(self._targets(batch), outputs, anchors, list(matches))
        return losses, self._assigned(matches, batch)

    def detections(self, trace: HeadTrace, batch: Batch) -> list[Detections]:
        """Run the detector's own post-processing."""
        priors = trace.predictions.priors
        per_level = list(priors.per_level)
        outputs = {name: list(torch.split(x, per_level, 1)) for name, x in self._outputs(trace.predictions).items()}
        anchors = [list(torch.split(self._anchors(priors), per_level))] * len(batch.sizes)
        return self._detections(self.model.postprocess_detections(outputs, anchors, list(batch.sizes)), batch)

    def graph(self) -> nn.Module:
        """The detector with its own post-processing."""
        return _Graph(self)


class _Graph(DenseGraph):
    """The best candidates of each level go into NMS. FCOS' scores are the root of class times centerness."""

    def candidates(self, probabilities: Tensor, predictions: Predictions) -> Tensor:
        model = self.model
        if predictions.quality is not None:
            probabilities = (probabilities * predictions.quality.sigmoid()[..., None]).sqrt()
        scores = probabilities * (probabilities > model.score_thresh)
        levels = torch.split(scores, list(predictions.priors.per_level), 1)
        return torch.cat([at_least_the_best(x.flatten(1), model.topk_candidates).view_as(x) for x in levels], 1)


class RetinaNetAdapter(TwoTowersAdapter):
    """Adapter of both versions of RetinaNet. A prior between the two IoU thresholds has the weight 0."""

    library_class = RetinaNet
    head_class = RetinaNetHead

    @classmethod
    def examples(cls) -> Mapping[str, Callable[[int], nn.Module]]:
        """Both versions, with few channels."""
        return {
            "torchvision RetinaNet": tiny_retinanet,
            "torchvision RetinaNet v2": partial(tiny_retinanet, norm_groups=4, loss="giou"),
        }

    @property
    def assigner(self) -> object:
        """What the assignment depends on: the matcher's thresholds and the anchors."""
        generator = self.model.anchor_generator
        return (
            "torchvision RetinaNet",
            thresholds(self.model.proposal_matcher),
            generator.sizes,
            generator.aspect_ratios,
        )

    def _normaliser(self, positive: Tensor) -> Tensor:
        """The sum over images of max(positives, 1)."""
        return positive.sum(1).clamp(min=1).sum()

    def _predict(self, maps: Mapping[str, Sequence[Tensor]]) -> tuple[Tensor, Tensor, None]:
        head = self.model.head
        logits = flatten([head.classification_head.cls_logits(x) for x in maps["cls"]], self._num_classes)
        return logits, flatten([head.regression_head.bbox_reg(x) for x in maps["reg"]], 4), None


class FCOSAdapter(TwoTowersAdapter):
    """Adapter of FCOS. Centerness is predicted from the tower for boxes."""

    library_class = FCOS
    head_class = FCOSHead
    kind = PriorKind.POINTS

    @classmethod
    def examples(cls) -> Mapping[str, Callable[[int], nn.Module]]:
        """One example: a narrow FCOS."""
        return {"torchvision FCOS": tiny_fcos}

    @property
    def assigner(self) -> object:
        """What the assignment depends on: the sampling radius, and the sides of the squares around the points."""
        return "torchvision FCOS", self.model.center_sampling_radius, self.model.anchor_generator.sizes

    def _priors(self, grid: tuple[tuple[int, int], ...], batch: Batch) -> Priors:
        """Points. Their `strides` are the sides of their squares, which are the unit of the regression."""
        squares = super()._priors(grid, batch)
        middle = centres(squares.boxes)
        sides = squares.boxes[:, 2] - squares.boxes[:, 0]
        return Priors(middle.repeat(1, 2), sides, squares.grid, per_cell=squares.per_cell)

    def _anchors(self, priors: Priors) -> Tensor:
        """The squares (A, 4) around points (A, 4)."""
        return _squares(priors)

    @property
    def _decode(self) -> Callable[[Tensor, Priors], Tensor]:
        return partial(_decode_sides, self.model.box_coder)

    def _predict(self, maps: Mapping[str, Sequence[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        head = self.model.head
        regression_head = head.regression_head
        logits = flatten([head.classification_head.cls_logits(x) for x in maps["cls"]], self._num_classes)
        regression = flatten([F.relu(regression_head.bbox_reg(x)) for x in maps["reg"]], 4)
        return logits, regression, flatten([regression_head.bbox_ctrness(x) for x in maps["reg"]], 1)[..., 0]

    def _outputs(self, predictions: Predictions) -> dict[str, Tensor]:
        assert predictions.quality is not None
        return {**super()._outputs(predictions), "bbox_ctrness": predictions.quality[..., None]}

    def _matches(self, priors: Priors, batch: Batch) -> Tensor:
        """(N, A): the index of the image's box that each point answers for, by place and size.

        Negative means no box.
        """
        # The rule has no function of its own: it is the part of compute_loss before the head computes the losses. So
        # compute_loss runs here with a head that returns the matches.
        matcher = SimpleNamespace(
            center_sampling_radius=self.model.center_sampling_radius,
            head=SimpleNamespace(compute_loss=lambda targets, outputs, anchors, matches: matches),
        )
        anchors = [self._anchors(priors)] * len(batch.sizes)
        compute_loss = cast(Any, FCOS).compute_loss
        return torch.stack([*compute_loss(matcher, self._targets(batch), {}, anchors, list(priors.per_level))])


def _decode_sides(coder: Any, regression: Tensor, priors: Priors) -> Tensor:
    """Boxes (..., A, 4) from distances to the four sides (..., A, 4), in units of the sides of the points' squares."""
    decoded: Tensor = coder.decode(regression, _squares(priors))
    return decoded


def _squares(priors: Priors) -> Tensor:
    """The squares (A, 4) around points (A, 4). The library calls them anchors."""
    half = priors.strides[:, None] / 2
    return priors.boxes + torch.cat([-half, -half, half, half], 1)
