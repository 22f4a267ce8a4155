"""What users hand to `train` and `evaluate`, checked before anything runs: one sentence instead of a late error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

from kdtoolkit.contract import DetectorSpec, Method
from kdtoolkit.data import DetectionDataset
from kdtoolkit.data.dataset import check_is_dataset
from kdtoolkit.data.recorded import attach
from kdtoolkit.detectors.recorded import RecordedDetector
from kdtoolkit.distiller import Distiller
from kdtoolkit.engine.config import TrainConfig
from kdtoolkit.errors import KDError


def check_arguments(distiller: object, config: object) -> None:
    """Check what `train` is called with.

    Raises KDError if a type is wrong, if the student is frozen, if a method's schedule is longer than the run, or if a
    method's share is to be held in a compiled step.
    """
    if not isinstance(distiller, Distiller):
        raise KDError(
            f"train takes a Distiller, not a {type(distiller).__name__}: write Distiller(teacher, student, methods) "
            "or, to train alone, Distiller(None, student)"
        )
    if not isinstance(config, TrainConfig):
        raise KDError(f"config is a {type(config).__name__}; it must be a TrainConfig, as in TrainConfig(steps=1000)")
    check_trainable(distiller.student)
    for method in distiller.methods:
        if isinstance(method, Method) and (reason := method.schedule.why_too_long(config.steps)):
            raise KDError(f"{type(method).__name__}: {reason}")
        if isinstance(method, Method) and method.held is not None and config.compile:
            raise KDError(
                f"{type(method).__name__}: a share cannot be held with compile, because torch.compile gives no "
                "gradients of single losses: leave share or compile out"
            )


def beside_teacher(distiller: Distiller, dataset: DetectionDataset) -> DetectionDataset:
    """The data set; with the teacher's detections beside its labels, if the teacher is a file of them.

    Raises KDError if the file is not of these images.
    """
    teacher = None if distiller.teacher_adapter is None else distiller.teacher_adapter.model
    if not isinstance(teacher, RecordedDetector) or not distiller.methods:
        return dataset
    return attach(dataset, teacher.file)


@contextmanager
def single_values_told() -> Iterator[None]:
    """Turn the error of a normalisation layer that sees one number per channel into a KDError."""
    try:
        yield
    except ValueError as error:
        if "Expected more than 1" not in str(error):
            raise
        raise KDError(
            "batch norm sees a single number per channel, because one image is shown at a time and a level of the "
            "detector has one cell. Use a larger batch_size, at least 2 images for each process and each part of "
            "accumulation, or larger images"
        ) from error


def check_trainable(student: nn.Module) -> None:
    """Raise KDError if no parameter of the student is trained."""
    if not any(p.requires_grad for p in student.parameters()):
        raise KDError(
            "the student has nothing to train: all its parameters are frozen. Call student.requires_grad_(True), and "
            "name fewer parts in the config's `frozen`"
        )


def check_dataset(dataset: DetectionDataset, spec: DetectorSpec | None) -> None:
    """Check the data set of a training or an evaluation.

    Raises KDError if it is no DetectionDataset, is empty, or has a different number of classes than the detector.
    """
    check_is_dataset(dataset)
    if not len(dataset):
        raise KDError(f"{dataset} has no images: add some")
    count = len(dataset.class_names)
    if spec is not None and spec.num_classes != count:
        raise KDError(
            f"{spec.name} has {spec.num_classes} classes, the data set {count}: labels would not agree. Build the "
            f"detector for {count} classes, or choose the data set's classes: open_dataset(..., class_names=[...])"
        )


def check_unlabelled(distiller: Distiller, unlabelled: DetectionDataset) -> None:
    """Check a data set without labels. Raises KDError if it is empty, or if no method can teach by its images."""
    check_is_dataset(unlabelled)
    if not len(unlabelled):
        raise KDError(f"{unlabelled} has no images: add some")
    if reason := distiller.why_not_unlabelled():
        raise KDError(f"there are images without labels ({unlabelled}), and {reason}")


def resolve_device(model: nn.Module, device: str | torch.device | None) -> torch.device:
    """The device that a model lies on, which `device` names if it is given.

    Raises KDError where the model lies elsewhere.
    """
    lies = next((x.device for x in chain(model.parameters(), model.buffers())), torch.device("cpu"))
    if device is not None:
        try:
            asked = torch.device(device)
        except (RuntimeError, TypeError):
            raise KDError(f"device={device!r} is no device: write 'cpu', 'cuda' or 'cuda:1'") from None
        if asked.type != lies.type or asked.index not in (None, lies.index):
            raise KDError(f"device is {asked}, and the model lies on {lies}: move it there first, model.to('{asked}')")
    return lies


def check_on_device(distiller: Distiller, device: torch.device) -> None:
    """Raise KDError if the teacher or a method lies on a different device than the student."""
    teacher = distiller.teacher_adapter
    parts = [] if teacher is None else [("the teacher", teacher.model)]
    for name, part in (*parts, *((type(method).__name__, method) for method in distiller.methods)):
        for tensor in chain(part.parameters(), part.buffers()):
            if tensor.device != device:
                raise KDError(
                    f"the student lies on {device}, and {name} on {tensor.device}: move all of them together, "
                    f"distiller.to('{device}')"
                )
