"""The adapter of kdtoolkit's own dense detectors (kdtoolkit/detectors)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtoolkit.adapters.recorded import RecordedAdapter
from kdtoolkit.build import construct
from kdtoolkit.contract import (
    Assignment,
    Batch,
    ClassRows,
    Detections,
    DetectorAdapter,
    DetectorSpec,
    HeadOutputs,
    HeadTrace,
    Predictions,
    Priors,
    Stage,
    State,
    Target,
    keep_states,
)
from kdtoolkit.detectors import ATSS, FCOS, GFL, RetinaNet
from kdtoolkit.detectors.dense import MAX_CANDIDATES, PADDING, DenseDetector
from kdtoolkit.errors import KDError
from kdtoolkit.graph import Detected, at_least_the_best, best, clip_to, pad, suppress
from kdtoolkit.options import did_you_mean


class DenseAdapter(DetectorAdapter):
    """Adapter of DenseDetector. Stage 0 is the pyramid; stage i is the state of both towers after block i."""

    model: DenseDetector

    def __init__(self, model: DenseDetector) -> None:
        super().__init__(model)

    @classmethod
    def examples(cls) -> Mapping[str, Callable[[int], nn.Module]]:
        """Build the four detectors, narrow and shallow."""
        return {kind.__name__: partial(_tiny, kind) for kind in (GFL, ATSS, FCOS, RetinaNet)}

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether `model` is a DenseDetector."""
        return isinstance(model, DenseDetector)

    def describe(self) -> DetectorSpec:
        """Describe the detector."""
        model = self.model
        stages = tuple(
            Stage(
                name=f"block {i}" if i else "pyramid",
                channels=dict.fromkeys(
                    model.towers, (model.head_channels if i else model.neck_channels,) * len(model.strides)
                ),
                activation=F.relu if i else None,
            )
            for i in range(model.head_blocks + 1)
        )
        return DetectorSpec(
            name=type(model).__name__,
            num_classes=model.num_classes,
            strides=model.strides,
            channels=(model.neck_channels,) * len(model.strides),
            priors=model.kind,
            priors_per_cell=(model.priors_per_cell,) * len(model.strides),
            stages=stages,
            bins=tuple(map(float, range(model.bins))),
        )

    @property
    def assigner(self) -> object:
        """The settings of the detector's assigner."""
        return self.model.assigner

    @property
    def class_layers(self) -> Mapping[str, ClassRows]:
        """The predictor of classes, for each prior of a cell."""
        return {"predictors.cls": ClassRows()}

    def prepare(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None, like: Batch | None = None
    ) -> Batch:
        """Normalise and pad the images."""
        return self.model.prepare(images, targets, like)

    def features(self, batch: Batch) -> tuple[Tensor, ...]:
        """Run backbone and pyramid."""
        return self.model.features(batch.images)

    def head(
        self,
        features: tuple[Tensor, ...],
        batch: Batch,
        priors: Priors | None = None,
        stages: Collection[int] | None = None,
    ) -> HeadTrace:
        """Run towers and predictors."""
        states, last = keep_states(self.model.walk_towers(self.model.entry(features)), stages)
        return HeadTrace(states, self.model.predict(last))

    def resume(self, state: State, stage: int, trace: HeadTrace) -> Predictions:
        """Run the rest of the towers, then the predictors. `trace` is not needed."""
        _, last = keep_states(self.model.walk_towers(state, stage), ())
        return self.model.predict(last)

    def rebuild(self, outputs: HeadOutputs, batch: Batch) -> HeadTrace:
        """Make a pass again from its predictions."""
        model = self.model
        priors = model.priors(outputs.grid)
        return HeadTrace(
            outputs.states, Predictions(outputs.logits, outputs.regression, priors, model.decode, outputs.quality)
        )

    def task_losses(self, trace: HeadTrace, batch: Batch) -> tuple[dict[str, Tensor], Assignment]:
        """Compute the detector's own losses."""
        assignment = self.assign(trace, batch)
        return self.model.losses(trace.predictions, assignment), assignment

    def assign(self, trace: HeadTrace, batch: Batch) -> Assignment:
        """Assign by the detector's own rule."""
        return self.model.assign(trace.predictions, batch)

    def detections(self, trace: HeadTrace, batch: Batch) -> list[Detections]:
        """Run the detector's own post-processing."""
        return self.model.postprocess(trace.predictions, batch)

    def graph(self) -> nn.Module:
        """The detector with its own post-processing."""
        return _Graph(self)


class _Graph(nn.Module):
    """`DenseDetector.forward` on a batch of images of one size, by tensors alone."""

    def __init__(self, adapter: DenseAdapter) -> None:
        super().__init__()
        self.model = adapter.model
        self._adapter = adapter

    def forward(self, images: Tensor) -> Detected:
        model, (height, width) = self.model, images.shape[-2:]
        canvas = pad((images - model.image_mean) / model.image_std, PADDING, False, 0.0)
        batch = Batch(canvas, ((height, width),), (), ())
        predictions = self._adapter.head(self._adapter.features(batch), batch, stages=()).predictions
        boxes = clip_to(predictions.boxes, height, width)
        scores = predictions.probabilities
        scores = scores * (scores > model.score_threshold)
        levels = torch.split(scores, list(predictions.priors.per_level), 1)
        scores = torch.cat([at_least_the_best(x.flatten(1), MAX_CANDIDATES).view_as(x) for x in levels], 1)
        if predictions.quality is not None:
            scores = scores * predictions.quality.sigmoid()[..., None]
        scores = scores * ((boxes[..., 2:] - boxes[..., :2]) > 0).all(-1, keepdim=True)
        kept = suppress(boxes, scores.transpose(1, 2), model.nms_iou, model.detections_per_image)
        return best(boxes, kept.transpose(1, 2), model.detections_per_image)


def _tiny(kind: Callable[..., DenseDetector], num_classes: int) -> DenseDetector:
    return kind(
        num_classes,
        backbone="resnet10t",
        backbone_args={"channels": (8, 8, 16, 16), "stem_width": 4},
        neck_channels=16,
        head_channels=16,
        head_blocks=2,
        head_groups=4,
    )


ADAPTERS: tuple[type[DetectorAdapter], ...] = (DenseAdapter, RecordedAdapter)

_MODELS: Mapping[str, type[DenseDetector]] = {"gfl": GFL, "atss": ATSS, "fcos": FCOS, "retinanet": RetinaNet}


def build_model(name: str, num_classes: int, args: Mapping[str, object]) -> nn.Module:
    """Build gfl, atss, fcos or retinanet.

    Raises KDError if there is no detector of that name, or if it does not take such arguments.
    """
    if name not in _MODELS:
        known = ", ".join(f"kdtoolkit/{model}" for model in _MODELS)
        raise KDError(f"unknown model 'kdtoolkit/{name}'{did_you_mean(name, _MODELS)}: write one of {known}")
    return construct(_MODELS[name], f"kdtoolkit/{name}", num_classes, args)


def open_published(name: str, args: Mapping[str, object], weights: str | None) -> None:
    """Raise KDError if `weights` are asked for by name: kdtoolkit publishes none."""
    if weights is not None:
        raise KDError(
            f"kdtoolkit publishes no weights {weights!r} of {name}: name a file, or take ImageNet weights of the "
            f"backbone with kdtoolkit/{name}?pretrained=true"
        )
