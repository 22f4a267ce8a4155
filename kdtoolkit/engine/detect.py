"""Runs a detector on images: in eval mode, without autograd, with detections in pixels of the original images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from kdtoolkit.contract import Capability, Detections, DetectorAdapter, DetectorSpec
from kdtoolkit.engine.inputs import resolve_device
from kdtoolkit.engine.precision import autocast_type, resolve_precision
from kdtoolkit.engine.scoring import Found
from kdtoolkit.errors import KDError, UnknownDetectorError
from kdtoolkit.libraries import adapt
from kdtoolkit.modes import in_eval_mode

Precision = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Runner:
    """A detector that is ready to run on a device, in a precision.

    `spec`: the detector's facts, if an adapter tells them. `first_label`: the label that the detector gives to its
    first class. `num_classes`: how many classes the data has; a label beyond them is an error. None takes all labels.
    """

    module: nn.Module
    spec: DetectorSpec | None
    device: torch.device
    precision: Literal["float32", "bfloat16", "float16"]
    first_label: int
    _detect: Callable[[Sequence[Tensor]], Sequence[Detections]]
    num_classes: int | None = None

    @staticmethod
    def of(
        model: nn.Module | DetectorAdapter,
        *,
        labels_from: Literal[0, 1] | None = None,
        device: str | torch.device | None = None,
        precision: Precision = "float32",
        like: DetectorAdapter | None = None,
    ) -> Runner:
        """Prepare a detector, or an adapter of one; the arguments are those of `evaluate`. Raises KDError."""
        if not isinstance(model, nn.Module | DetectorAdapter):
            raise KDError(f"the model must be a detector, an nn.Module, or an adapter of one; it is {model!r}")
        module, detect, spec = _detector(model, labels_from, like)
        if spec is not None and Capability.PREDICTIONS not in spec.capabilities:
            raise KDError(f"{spec.name} shows features alone, so it detects nothing: it can only teach (`kd distill`)")
        found = resolve_device(module, device)
        return Runner(module, spec, found, resolve_precision(precision, found), labels_from or 0, detect)

    @contextmanager
    def in_eval_mode(self) -> Iterator[None]:
        """Put the detector into eval mode; afterwards each of its modules has the mode that it had."""
        with in_eval_mode(self.module):
            yield

    def __call__(
        self, images: Sequence[Tensor], original_sizes: Sequence[tuple[int, int]], names: Sequence[object]
    ) -> Found:
        """Detect on one batch of images (3, H, W) uint8.

        In the result, `images` are places in the batch, `classes` are labels from 0, and boxes are in pixels of
        `original_sizes` (height, width). Raises KDError that gives an image's name if a box or score of it is not
        finite, or a label is wrong.
        """
        floats = [image.to(self.device).float().div_(255) for image in images]
        autocast = torch.autocast(self.device.type, autocast_type(self.precision), self.precision != "float32")
        with torch.no_grad(), autocast:
            outputs = self._detect(floats)
        where = np.repeat(np.arange(len(images)), [len(output["scores"]) for output in outputs])
        boxes, scores = (torch.cat([output[name] for output in outputs]).float().cpu() for name in ("boxes", "scores"))
        labels = torch.cat([output["labels"] for output in outputs]).cpu().numpy().astype(np.int64) - self.first_label
        for what, tensor in (("boxes", boxes.reshape(-1, 4)), ("scores", scores[:, None])):
            if len(bad := where[~tensor.isfinite().all(1).numpy()]):
                raise KDError(
                    f"the detector gives {what} that are NaN or infinite on image {names[bad[0]]}: its weights are "
                    "broken. Train it again with a lower learning rate, or evaluate in float32."
                )
        if self.num_classes is not None and len(bad := np.flatnonzero((labels < 0) | (labels >= self.num_classes))):
            raise KDError(
                f"the detector gives the label {labels[bad[0]] + self.first_label} on image {names[where[bad[0]]]}; "
                f"the data set has labels {self.first_label} to {self.num_classes - 1 + self.first_label}. Build it "
                f"for {self.num_classes} classes, or correct labels_from."
            )
        scales = [
            (size[1] / image.shape[2], size[0] / image.shape[1])
            for size, image in zip(original_sizes, images, strict=True)
        ]
        corners = boxes.numpy().astype(np.float64) * np.tile(np.array(scales), 2)[where]
        xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
        return Found(where, labels, xywh, scores.numpy().astype(np.float64))


def _detector(
    model: nn.Module | DetectorAdapter, labels_from: int | None, like: DetectorAdapter | None
) -> tuple[nn.Module, Callable[[Sequence[Tensor]], Sequence[Detections]], DetectorSpec | None]:
    """The module that detects, how it is called, and the detector's facts where an adapter tells them."""
    if labels_from is not None:
        if labels_from not in (0, 1) or isinstance(model, DetectorAdapter):
            raise KDError(f"labels_from must be 0 or 1, and only for plain modules; it is {labels_from!r}")
        return model, partial(_detect_plainly, model), None
    try:
        adapter = adapt(model)
    except UnknownDetectorError:
        assert isinstance(model, nn.Module)  # adapters are known
        return model, partial(_detect_plainly, model), None
    except KDError as error:
        raise KDError(
            f"{str(error).rstrip('.')}. A module that itself returns boxes, scores and labels as torchvision's "
            "detectors do can be evaluated as it is: evaluate(..., labels_from=1) if label 0 is background, "
            "labels_from=0 if 0 is the first class"
        ) from error

    def detect(images: Sequence[Tensor]) -> list[Detections]:
        if like is None:
            batch = adapter.prepare(images)
        else:
            with in_eval_mode(like.model):  # in train mode some detectors draw a size
                batch = adapter.prepare(images, like=like.prepare(images))
        return adapter.detections(adapter.head(adapter.features(batch), batch), batch)

    return adapter.model, detect, adapter.spec


def _detect_plainly(model: nn.Module, images: Sequence[Tensor]) -> Sequence[Detections]:
    outputs = model(images)
    keys = Detections.__required_keys__
    if (
        not isinstance(outputs, Sequence)
        or len(outputs) != len(images)
        or not all(isinstance(output, Mapping) and keys <= output.keys() for output in outputs)
    ):
        raise KDError(
            f"{type(model).__name__} must return a list with a dict of boxes, scores and labels for each image, as "
            f"torchvision's detectors do in eval mode; it returned a {type(outputs).__name__}"
        )
    return outputs
