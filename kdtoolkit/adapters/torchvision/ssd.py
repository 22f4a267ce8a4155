"""The adapter of SSD and SSDlite, whose head is one convolution on each level, or two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.models.detection.ssdlite import SSDLiteHead

from kdtoolkit.adapters.torchvision.base import DenseGraph, each_image, require, thresholds
from kdtoolkit.adapters.torchvision.examples import tiny_ssd
from kdtoolkit.adapters.torchvision.grid import GridAdapter, flatten
from kdtoolkit.adapters.torchvision.towers import Block, blocks_of
from kdtoolkit.canvas import Layout
from kdtoolkit.contract import Assignment, Batch, ClassRows, Detections, HeadTrace, Predictions
from kdtoolkit.graph import at_least_the_best


class SSDAdapter(GridAdapter):
    """Adapter of SSD and SSDlite.

    The head is one convolution on each level; SSDlite has a depthwise block before it (stage 1).
    """

    library_class = SSD
    background = 1
    activation = staticmethod(F.relu6)

    @classmethod
    def examples(cls) -> Mapping[str, Callable[[int], nn.Module]]:
        """Both kinds, with few channels. Their levels differ in the number of channels."""
        return {"torchvision SSD": tiny_ssd, "torchvision SSDlite": partial(tiny_ssd, lite=True)}

    def _check_head(self) -> None:
        require(self.model.head, SSDHead, SSDLiteHead)

    @property
    def _num_classes(self) -> int:
        return int(self.model.head.classification_head.num_columns) - 1

    @property
    def _strides(self) -> tuple[int, ...]:
        """The generator's steps, if it has any: it lays its boxes out by them."""
        steps = self.model.anchor_generator.steps
        return tuple(steps) if steps else self._levels.strides

    @property
    def assigner(self) -> object:
        """What the assignment depends on: the matcher's threshold and the default boxes."""
        generator = self.model.anchor_generator
        boxes = (repr(generator.aspect_ratios), tuple(generator.scales), generator.clip, self._strides)
        return "torchvision SSD", thresholds(self.model.proposal_matcher), boxes

    @property
    def class_layers(self) -> Mapping[str, ClassRows]:
        """The predictor of classes on each level, for each default box of a cell; background is first."""
        name = "head.classification_head.module_list"
        predictors = self.model.head.classification_head.module_list
        names = [
            f"{name}.{i}" + (f".{len(each) - 1}" if isinstance(each, nn.Sequential) else "")
            for i, each in enumerate(predictors)
        ]
        return dict.fromkeys(names, ClassRows(before=1))

    def _layout(self, like: Batch) -> Layout:
        """On the one canvas that the detector is built for, because its default boxes are shares of the canvas."""
        width, height = self.model.transform.fixed_size
        return Layout.fitted(like, (height, width))

    def _towers(self) -> Mapping[str, Sequence[Sequence[Block]]]:
        head = self.model.head
        return {
            branch: [blocks_of(predictor) for predictor in module.module_list]
            for branch, module in (("cls", head.classification_head), ("reg", head.regression_head))
        }

    def _predict(self, maps: Mapping[str, Sequence[Tensor]]) -> tuple[Tensor, Tensor, None]:
        head = self.model.head
        logits, regression = (
            flatten(
                [_last(block)(x) for block, x in zip(module.module_list, maps[branch], strict=True)], module.num_columns
            )
            for branch, module in (("cls", head.classification_head), ("reg", head.regression_head))
        )
        return logits.roll(-1, -1), regression, None

    def _outputs(self, trace: HeadTrace) -> dict[str, Tensor]:
        """The head's outputs as the library has them, background first."""
        predictions = trace.predictions
        return {"cls_logits": predictions.logits.roll(1, -1), "bbox_regression": predictions.regression}

    def task_losses(self, trace: HeadTrace, batch: Batch) -> tuple[dict[str, Tensor], Assignment]:
        """Compute `bbox_regression` and `classification`. The latter counts positives and the hardest background."""
        priors = trace.predictions.priors
        matches = self._matches(priors, batch)
        anchors = each_image(priors, batch)
        losses = self.model.compute_loss(self._targets(batch), self._outputs(trace), anchors, list(matches))
        return losses, self._assigned(matches, batch)

    def detections(self, trace: HeadTrace, batch: Batch) -> list[Detections]:
        """Run the detector's own post-processing."""
        anchors = each_image(trace.predictions.priors, batch)
        found = self.model.postprocess_detections(self._outputs(trace), anchors, list(batch.sizes))
        return self._detections(found, batch)

    def graph(self) -> nn.Module:
        """The detector with its own post-processing."""
        return _Graph(self)


class _Graph(DenseGraph):
    """The best candidates of each class go into NMS."""

    def candidates(self, probabilities: Tensor, predictions: Predictions) -> Tensor:
        scores = probabilities * (probabilities > self.model.score_thresh)
        return at_least_the_best(scores.transpose(1, 2), self.model.topk_candidates).transpose(1, 2)


def _last(tower: nn.Module) -> nn.Module:
    return tower[-1] if isinstance(tower, nn.Sequential) else tower
