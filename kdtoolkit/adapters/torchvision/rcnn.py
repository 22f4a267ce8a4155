"""The adapters of Faster R-CNN and of its region proposal network; also of the box part of Mask and Keypoint R-CNN."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import RPNHead

from kdtoolkit import processes
from kdtoolkit.adapters.torchvision.base import Graph, TorchvisionAdapter, each_image, require, thresholds
from kdtoolkit.adapters.torchvision.examples import tiny_fasterrcnn, tiny_fasterrcnn_v2, tiny_maskrcnn
from kdtoolkit.adapters.torchvision.grid import GridAdapter, decode_offsets, flatten
from kdtoolkit.adapters.torchvision.towers import Block, blocks_of
from kdtoolkit.canvas import round_up
from kdtoolkit.contract import (
    Assignment,
    Batch,
    ClassRows,
    Detections,
    DetectorSpec,
    HeadTrace,
    Predictions,
    PriorKind,
    Priors,
    Stage,
    State,
    keep_states,
)
from kdtoolkit.detectors.towers import walk_towers
from kdtoolkit.errors import KDError
from kdtoolkit.graph import Detected, at_least_the_best, best, clip_to, pool, suppress

MIN_SIDE = 1e-2  # of detected boxes, in pixels; the library has no name for it
LEVEL_EPS = 1e-6  # of the library's rule that chooses a proposal's level
CERTAIN = 128.0  # a logit so far below another has the probability 0 in float32


class RPNAdapter(GridAdapter):
    """Adapter of the region proposal network of a two-stage detector: a detector of one class, "object".

    `model` is the whole detector. The adapter is reached through `first_stage` only.
    """

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Always False: a two-stage detector is adapted as a whole."""
        return False

    def _check_head(self) -> None:
        require(self.model.rpn.head, RPNHead)

    @property
    def _num_classes(self) -> int:
        return 1

    @property
    def _generator(self) -> nn.Module:
        return cast(nn.Module, self.model.rpn.anchor_generator)

    def describe(self) -> DetectorSpec:
        """Describe the first stage."""
        spec = super().describe()
        return replace(spec, name=f"{spec.name} RPN")

    @property
    def assigner(self) -> object:
        """What the assignment depends on: the matcher's thresholds and the anchors."""
        generator = self.model.rpn.anchor_generator
        return (
            "torchvision RPN",
            thresholds(self.model.rpn.proposal_matcher),
            generator.sizes,
            generator.aspect_ratios,
        )

    def _towers(self) -> Mapping[str, Sequence[Sequence[Block]]]:
        return {"rpn": [blocks_of(self.model.rpn.head.conv)] * len(self._levels.strides)}

    @property
    def _decode(self) -> Callable[[Tensor, Priors], Tensor]:
        return partial(decode_offsets, self.model.rpn.box_coder)

    def _predict(self, maps: Mapping[str, Sequence[Tensor]]) -> tuple[Tensor, Tensor, None]:
        head = self.model.rpn.head
        logits = flatten([head.cls_logits(x) for x in maps["rpn"]], 1)
        return logits, flatten([head.bbox_pred(x) for x in maps["rpn"]], 4), None

    def proposals(self, trace: HeadTrace, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """Boxes (P, 4) on the canvas and scores (P,) of each image, without gradient."""
        predictions = trace.predictions
        boxes = predictions.decode(predictions.regression.detach(), predictions.priors)
        found: tuple[list[Tensor], list[Tensor]] = self.model.rpn.filter_proposals(
            boxes, predictions.logits, list(batch.sizes), list(predictions.priors.per_level)
        )
        return found

    def task_losses(self, trace: HeadTrace, batch: Batch) -> tuple[dict[str, Tensor], None]:
        """Compute `loss_objectness` and `loss_rpn_box_reg` of anchors that are drawn at random."""
        rpn, predictions = self.model.rpn, trace.predictions
        anchors = each_image(predictions.priors, batch)
        labels, boxes = rpn.assign_targets_to_anchors(anchors, self._targets(batch))
        objectness, regression = predictions.logits.flatten(0, 1), predictions.regression.flatten(0, 1)
        losses = rpn.compute_loss(objectness, regression, labels, rpn.box_coder.encode(boxes, anchors))
        return dict(zip(("loss_objectness", "loss_rpn_box_reg"), losses, strict=True)), None

    def assign(self, trace: HeadTrace, batch: Batch) -> Assignment:
        """Assign all anchors by IoU; none is drawn at random. An anchor between the thresholds has the weight 0."""
        found, boxes = self.model.rpn.assign_targets_to_anchors(
            each_image(trace.predictions.priors, batch), self._targets(batch)
        )
        objects = torch.stack(found)  # 1 for an object, 0 for background, -1 between
        return Assignment(
            positive=objects == 1,
            labels=(objects != 1).long(),
            boxes=torch.stack(boxes),
            weights=(objects >= 0).float(),
            normaliser=processes.share((objects == 1).sum(), at_least=1),
        )

    def detections(self, trace: HeadTrace, batch: Batch) -> list[Detections]:
        """Return the proposals."""
        found = [
            {"boxes": boxes, "scores": scores, "labels": torch.zeros_like(scores, dtype=torch.int64)}
            for boxes, scores in zip(*self.proposals(trace, batch), strict=True)
        ]
        return self._detections(found, batch)


@dataclass(frozen=True)
class BoxOutputs:
    """The raw outputs of the box head for the R real proposals.

    `class_logits` (R, K + 1) have background first; `box_regression` is (R, (K + 1) * 4). In training, `matches`,
    `labels` and `targets` belong to the drawn proposals, image by image, and `rpn_losses` are the first stage's
    losses.
    """

    class_logits: Tensor
    box_regression: Tensor
    matches: list[Tensor] | None = None
    labels: list[Tensor] | None = None
    targets: list[Tensor] | None = None
    rpn_losses: Mapping[str, Tensor] | None = None


class FasterRCNNAdapter(TorchvisionAdapter):
    """Adapter of Faster R-CNN, and of the box part of Mask R-CNN and Keypoint R-CNN.

    Stage 0 is what is pooled for each proposal; stage i is the state of the box head after layer i. In training, the
    head draws proposals as the library does. `Predictions.regression` is the mean of all classes' offsets, weighted by
    the class probabilities.
    """

    library_class = FasterRCNN
    background = 1

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._rpn = RPNAdapter(model)

    @classmethod
    def examples(cls) -> Mapping[str, Callable[[int], nn.Module]]:
        """A Faster R-CNN with each kind of box head, and a Mask R-CNN; all have few channels."""
        return {
            "torchvision Faster R-CNN": tiny_fasterrcnn,
            "torchvision Faster R-CNN v2": tiny_fasterrcnn_v2,
            "torchvision Mask R-CNN": tiny_maskrcnn,
        }

    def _check_head(self) -> None:
        require(self.model.roi_heads.box_head, TwoMLPHead, FastRCNNConvFCHead)
        require(self.model.roi_heads.box_predictor, FastRCNNPredictor)

    @property
    def _num_classes(self) -> int:
        return int(self.model.roi_heads.box_predictor.cls_score.out_features) - 1

    def describe(self) -> DetectorSpec:
        """Describe the detector."""
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
        )

    def _stages(self) -> tuple[Stage, ...]:
        stages = [Stage("roi", {"box": self._levels.channels[:1]})]
        for i, block in enumerate(self._blocks(), 1):
            name = f"fc{i + 5}" if isinstance(self.model.roi_heads.box_head, TwoMLPHead) else f"block {i}"
            stages.append(Stage(name, {"box": (block.channels,)}, spatial=block.is_spatial, activation=F.relu))
        return tuple(stages)

    def _blocks(self) -> list[Block]:
        head = self.model.roi_heads.box_head
        if isinstance(head, TwoMLPHead):
            return [Block((partial(torch.flatten, start_dim=1), head.fc6)), Block((head.fc7,))]
        return blocks_of(head)

    @property
    def assigner(self) -> object:
        """What the assignment depends on: the matcher's thresholds."""
        return "torchvision RoI heads", thresholds(self.model.roi_heads.proposal_matcher)

    @property
    def class_layers(self) -> Mapping[str, ClassRows]:
        """The predictors of classes, of their boxes and of their masks; background is first."""
        layers = {
            "roi_heads.box_predictor.cls_score": ClassRows(before=1),
            "roi_heads.box_predictor.bbox_pred": ClassRows(before=1, inner=4),
        }
        if self.model.roi_heads.has_mask():
            layers["roi_heads.mask_predictor.mask_fcn_logits"] = ClassRows(before=1)
        return layers

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
        """Run the first stage and the box head. In training, draw proposals between the two.

        With `priors`, the box head runs on these proposals instead.
        """
        roi_heads = self.model.roi_heads
        matches = labels = targets = rpn_losses = first = None
        blocks = self._blocks() if priors is None else [block.still() for block in self._blocks()]
        # The pooler derives strides from the size of images. The library gives it the size of the content, which would
        # be wrong if much of a canvas is padding for another detector.
        canvas = [tuple(batch.images.shape[-2:])]
        shown = list(batch.sizes) if priors is None and self._is_own_canvas(batch) else canvas
        if priors is None:
            first = self._rpn.head(features, batch, stages=None if stages is None else ())
            proposals, _ = self._rpn.proposals(first, batch)
            if self.model.training and batch.boxes:
                # In the library's order, because both losses draw at random.
                rpn_losses, _ = self._rpn.task_losses(first, batch)
                proposals, matches, labels, targets = roi_heads.select_training_samples(proposals, self._targets(batch))
            priors = _filled(proposals, batch)
        rows = _Rows.of(priors)
        maps = {name: x.float() for name, x in zip(self._levels.names, features, strict=True)}
        # A copy, because the pooler remembers the scales of the first maps that it sees.
        pooled = copy.copy(roi_heads.box_roi_pool)(maps, rows.boxes, shown)
        states, last = keep_states(walk_towers({"box": (pooled,)}, {"box": [blocks]}, activation=F.relu), stages)
        class_logits, box_regression = self._outputs(last["box"][0])
        outputs = BoxOutputs(
            class_logits[: rows.count], box_regression[: rows.count], matches, labels, targets, rpn_losses
        )
        return HeadTrace(states, self._predictions(class_logits, box_regression, priors, rows), outputs, first)

    def _is_own_canvas(self, batch: Batch) -> bool:
        """Whether the canvas is the one that the detector would choose itself for images of these sizes."""
        divisor = self.model.transform.size_divisible
        own = [round_up(max(sides), divisor) for sides in zip(*batch.sizes, strict=True)]
        return own == [*batch.images.shape[-2:]]

    def resume(self, state: State, stage: int, trace: HeadTrace) -> Predictions:
        """Run the rest of the box head."""
        priors = trace.predictions.priors
        rows = _Rows.of(priors)
        towers = {"box": [[block.still() for block in self._blocks()]]}
        _, last = keep_states(walk_towers(state, towers, stage, F.relu), ())
        return self._predictions(*self._outputs(last["box"][0]), priors, rows)

    def _outputs(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The raw class logits (R, K + 1) and offsets (R, (K + 1) * 4), predicted from the last stage's state."""
        class_logits, box_regression = self.model.roi_heads.box_predictor(F.relu(state))
        return class_logits.float(), box_regression.float()

    def _predictions(self, class_logits: Tensor, box_regression: Tensor, priors: Priors, rows: _Rows) -> Predictions:
        # Each class has its own offsets. The box is their mean, weighted by the probabilities of all classes but
        # background. The probabilities get no gradient from boxes.
        shares = class_logits.detach()[:, 1:].softmax(-1)[..., None]
        regression = (torch.unflatten(box_regression, -1, (-1, 4))[:, 1:] * shares).sum(1)
        # A row that fills a gap is background, at its own box. So no method takes it for a prediction.
        background = F.pad(class_logits.new_full((self._num_classes,), -CERTAIN), (0, 1))
        return Predictions(
            logits=rows.spread(class_logits.roll(-1, -1), background),
            regression=rows.spread(regression, regression.new_zeros(4)),
            priors=priors,
            decode=partial(decode_offsets, self.model.roi_heads.box_coder),
            activation=self.spec.activation,
        )

    def _targets(self, batch: Batch) -> list[dict[str, Tensor]]:
        targets = super()._targets(batch)
        if self.model.roi_heads.has_mask():
            # `check_targets` demands masks, but nothing that is called here uses them.
            targets = [{**target, "masks": target["boxes"]} for target in targets]
        return targets

    def task_losses(self, trace: HeadTrace, batch: Batch) -> tuple[dict[str, Tensor], None]:
        """Compute `loss_classifier`, `loss_box_reg`, `loss_objectness` and `loss_rpn_box_reg`.

        Masks and keypoints have none. Raises KDError if the head ran in eval mode or on another detector's priors,
        because then no proposals were drawn.
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
        """Assign all proposals by IoU, without drawing any at random.

        Boxes that only fill gaps (see `Priors`) have the weight 0. The normaliser is the sum of weights.
        """
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
        positive = real & (counted > 0)
        labels = torch.where(positive, counted - 1, self._num_classes)
        weights = (real & (counted >= 0)).float()
        boxes = torch.stack(
            [
                own[index] if len(own) else torch.zeros_like(proposals[0])
                for own, index in zip(batch.boxes, matches, strict=True)
            ]
        )
        return Assignment(positive, labels, boxes, weights, processes.share(weights.sum(), at_least=1))

    def detections(self, trace: HeadTrace, batch: Batch) -> list[Detections]:
        """Run the detector's own post-processing of boxes."""
        outputs = cast(BoxOutputs, trace.context)
        priors = trace.predictions.priors
        real = [boxes[:count] for boxes, count in zip(priors.boxes, _counts(priors), strict=True)]
        found = self.model.roi_heads.postprocess_detections(
            outputs.class_logits, outputs.box_regression, real, list(batch.sizes)
        )
        images = [dict(zip(("boxes", "scores", "labels"), image, strict=True)) for image in zip(*found, strict=True)]
        return self._detections(images, batch)

    def graph(self) -> nn.Module:
        """The detector of boxes with its own post-processing."""
        return _Graph(self, self._rpn)


class _Graph(Graph):
    """Both stages. Each image has the largest number of proposals; those that only fill gaps have no score."""

    def __init__(self, adapter: FasterRCNNAdapter, rpn: RPNAdapter) -> None:
        super().__init__(adapter)
        self._rpn = rpn
        pooled = self.model.roi_heads.box_roi_pool.featmap_names
        levels = zip(adapter.level_names, adapter.spec.strides, strict=True)
        self._strides = [stride for name, stride in levels if name in pooled]

    def detect(self, features: tuple[Tensor, ...], batch: Batch) -> Detected:
        model = self.model.roi_heads
        (height, width), classes = batch.sizes[0], self.adapter.spec.num_classes
        proposals, real = self._proposals(features, batch)
        count = proposals.shape[1]
        logits, offsets = model.box_predictor(model.box_head(self._pooled(features, proposals)))
        boxes = model.box_coder.decode_single(offsets, proposals.flatten(0, 1)).view(-1, count, classes + 1, 4)
        boxes = clip_to(boxes[:, :, 1:], height, width)
        scores = logits.softmax(-1)[:, 1:].view(-1, count, classes)
        solid = ((boxes[..., 2:] - boxes[..., :2]) >= MIN_SIDE).all(-1)
        scores = scores * ((scores > model.score_thresh) & solid & real[..., None])
        limit = model.detections_per_img
        # Each class has its own boxes, so each is an image of its own to NMS.
        by_class = boxes.transpose(1, 2).flatten(0, 1), scores.transpose(1, 2).reshape(-1, 1, count)
        kept = suppress(*by_class, model.nms_thresh, limit).view(-1, classes, count)
        return best(boxes, kept.transpose(1, 2), limit)

    def _proposals(self, features: tuple[Tensor, ...], batch: Batch) -> tuple[Tensor, Tensor]:
        """Proposals (N, P, 4), and which of them are real (N, P)."""
        rpn = self.model.rpn
        predictions = self._rpn.head(features, batch, stages=()).predictions
        boxes = clip_to(predictions.boxes, *batch.sizes[0])
        sizes = list(predictions.priors.per_level)
        before, after = rpn.pre_nms_top_n(), rpn.post_nms_top_n()
        # The best by logits, as in the library: near 1, scores differ less than float32 can tell.
        levels = torch.split(predictions.logits.flatten(1), sizes, 1)
        scores = torch.cat([at_least_the_best(x - x.amin(1, keepdim=True) + 1, before) for x in levels], 1)
        scores = predictions.logits.flatten(1).sigmoid() * (scores > 0)
        solid = ((boxes[..., 2:] - boxes[..., :2]) >= rpn.min_size).all(-1)
        scores = scores * ((scores >= rpn.score_thresh) & solid)
        kept = torch.cat(
            [
                suppress(own, each[:, None], rpn.nms_thresh, after)[:, 0]
                for own, each in zip(torch.split(boxes, sizes, 1), torch.split(scores, sizes, 1), strict=True)
            ],
            1,
        )
        chosen, scores, _ = best(boxes, kept[..., None], after)
        return chosen, scores > 0

    def _pooled(self, features: tuple[Tensor, ...], proposals: Tensor) -> Tensor:
        """What the box head takes for each proposal (N * P, C, H, W)."""
        pooler = self.model.roi_heads.box_roi_pool
        maps = [x for x, name in zip(features, self.adapter.level_names, strict=True) if name in pooler.featmap_names]
        scales = [1 / stride for stride in self._strides]
        finest, coarsest = (int(math.log2(stride)) for stride in (self._strides[0], self._strides[-1]))
        areas = (proposals[..., 2] - proposals[..., 0]) * (proposals[..., 3] - proposals[..., 1])
        sides = areas.sqrt() / pooler.canonical_scale
        levels = (pooler.canonical_level + sides.log2() + LEVEL_EPS).floor().clamp(finest, coarsest) - finest
        pooled: Tensor = pool(maps, proposals, levels.long(), scales, list(pooler.output_size), pooler.sampling_ratio)
        return pooled


@dataclass(frozen=True)
class _Rows:
    """The real proposals among the N * P of a batch, one after the other.

    Only they go through the box head, because its batch norm, its losses and the statistics of its states must not see
    proposals that fill up.
    """

    boxes: list[Tensor]  # of each image (P_i, 4)
    count: int  # of all images
    shape: tuple[int, int]  # N, P
    index: Tensor | None  # (R,) rows of the real ones; None where all are

    @classmethod
    def of(cls, priors: Priors) -> _Rows:
        images, longest = priors.boxes.shape[:2]
        counts, shape = _counts(priors), (images, longest)
        if min(counts) == longest:
            return cls(list(priors.boxes), sum(counts), shape, None)
        # Without proposals: run the boxes that fill up, and predict nothing.
        run = counts if any(counts) else (longest,) * images
        boxes = [image[:count] for image, count in zip(priors.boxes, run, strict=True)]
        # On the host, where the numbers are known.
        index = torch.tensor(
            [i * longest + j for i, count in enumerate(counts) for j in range(count)], dtype=torch.long
        )
        return cls(boxes, sum(counts), shape, index.to(priors.boxes.device))

    def spread(self, x: Tensor, filler: Tensor) -> Tensor:
        """(R, C) -> (N, P, C), with `filler` (C,) in rows that fill up."""
        if self.index is not None:
            x = filler.repeat(math.prod(self.shape), 1).index_copy(0, self.index, x[: self.count])
        return torch.unflatten(x, 0, self.shape)


def _counts(priors: Priors) -> tuple[int, ...]:
    """The number of each image's proposals that do not fill up: all of them, if their detector did not tell."""
    if isinstance(priors.context, tuple):
        return priors.context
    images, longest = priors.boxes.shape[:2]
    return (longest,) * images


def _filled(proposals: Sequence[Tensor], batch: Batch) -> Priors:
    """Proposals (N, P, 4) of images with different numbers of proposals. These numbers are the context."""
    counts = tuple(len(boxes) for boxes in proposals)
    longest = max(1, *counts)
    height_width = torch.tensor(batch.sizes, device=proposals[0].device, dtype=torch.float32)
    whole = torch.cat([torch.zeros_like(height_width), height_width.flip(-1)], -1)
    boxes = torch.stack(
        [torch.cat([own, image.expand(longest - len(own), 4)]) for own, image in zip(proposals, whole, strict=True)]
    )
    return Priors(boxes, boxes.new_zeros(0), context=counts)
