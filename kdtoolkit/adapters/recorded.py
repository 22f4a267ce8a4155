"""The adapter of a detector that is a file of detections (kdtoolkit/detectors/recorded.py).

Its predictions are the final boxes of the file, with the probabilities of all classes. There is no network, so there
are no features, no hidden states and no losses.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from kdtoolkit.canvas import Layout, lay_out, scaled
from kdtoolkit.compatibility import why_no_student
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
    Target,
)
from kdtoolkit.detectors.recorded import RecordedDetector
from kdtoolkit.errors import KDError

LEAST_PROBABILITY = 1e-7  # logits of 0 and 1 would be infinite


class RecordedAdapter(DetectorAdapter):
    """Adapter of RecordedDetector. The detections come with the batch: `Batch.recorded`."""

    model: RecordedDetector

    def __init__(self, model: RecordedDetector) -> None:
        super().__init__(model)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether `model` is a RecordedDetector."""
        return isinstance(model, RecordedDetector)

    def describe(self) -> DetectorSpec:
        """Describe the file: it shows predictions alone."""
        return DetectorSpec(
            name=self.model.path.name,
            num_classes=len(self.model.class_names),
            strides=(),
            channels=(),
            priors=PriorKind.DETECTIONS,
            prior_form="final boxes",
        )

    def prepare(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None, like: Batch | None = None
    ) -> Batch:
        """Put the images on a canvas, which decides in which pixels the boxes are."""
        return lay_out(images, targets, Layout.padded(images, 1) if like is None else Layout.of(like))

    def features(self, batch: Batch) -> tuple[Tensor, ...]:
        """None: a file of detections has no levels."""
        return ()

    def head(
        self,
        features: tuple[Tensor, ...],
        batch: Batch,
        priors: Priors | None = None,
        stages: Collection[int] | None = None,
    ) -> HeadTrace:
        """The batch's recorded detections, as predictions. Images with fewer ones get empty boxes of probability 0.

        Raises KDError if the batch has none.
        """
        if not batch.recorded:
            raise KDError(
                f"{self.model.path} is a file of detections, so it knows nothing of images that come without them: let "
                "the data carry the detections, attach(dataset, file) of kdtoolkit.data. `kd distill` and "
                "suites do so"
            )
        most = max(1, *(len(each["boxes"]) for each in batch.recorded))
        boxes, probabilities = (
            torch.stack([_filled(each["boxes"], most) for each in batch.recorded]),
            torch.stack([_filled(each["probabilities"], most) for each in batch.recorded]),
        )
        predictions = Predictions(
            logits=torch.logit(probabilities, LEAST_PROBABILITY),
            regression=boxes,
            priors=Priors(boxes, boxes.new_zeros(0)),
            decode=_as_they_are,
        )
        return HeadTrace((), predictions)

    def task_losses(self, trace: HeadTrace, batch: Batch) -> tuple[dict[str, Tensor], Assignment | None]:
        """Raises KDError: a file has no losses."""
        raise KDError(why_no_student(self.spec) or "")

    def detections(self, trace: HeadTrace, batch: Batch) -> list[Detections]:
        """The recorded boxes, each with its best class, in pixels of the original images."""
        predictions, found = trace.predictions, []
        scores, labels = predictions.probabilities.max(-1)
        for i, recorded in enumerate(batch.recorded):
            order = scores[i, : len(recorded["boxes"])].argsort(descending=True, stable=True)
            boxes = scaled(predictions.regression[i, order], batch.original_sizes[i], batch.sizes[i])
            found.append(Detections(boxes=boxes, scores=scores[i, order], labels=labels[i, order]))
        return found


def _filled(rows: Tensor, count: int) -> Tensor:
    """The rows (D, X) with zeros after them, (count, X)."""
    return torch.cat([rows, rows.new_zeros(count - len(rows), rows.shape[1])])


def _as_they_are(regression: Tensor, priors: Priors) -> Tensor:
    """Boxes that need no decoding."""
    return regression
