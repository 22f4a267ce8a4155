"""What users hand to `train` and `evaluate`, checked before anything runs: one sentence instead of a late error."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn

from kdtoolkit.contract import DetectorSpec
from kdtoolkit.data import DetectionDataset
from kdtoolkit.data.dataset import check_is_dataset
from kdtoolkit.errors import KDError


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
