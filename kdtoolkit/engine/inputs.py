"""What users hand to `train` and `evaluate`, checked before anything runs: one sentence instead of a late error."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn

from kdtoolkit.contract import DetectorSpec
from kdtoolkit.data import DetectionDataset
from kdtoolkit.errors import KDError


def check_dataset(dataset: object, spec: DetectorSpec | None) -> None:
    """Raises KDError where it is no data set of kdtoolkit, is empty, or has other classes than the detector."""
    if not isinstance(dataset, DetectionDataset):
        raise KDError(
            f"the data set is a {type(dataset).__name__}; it must be a DetectionDataset, such as "
            "CocoDetection(folder, 'train') or a class of your own derived from kdtoolkit.data.DetectionDataset"
        )
    if not len(dataset):
        raise KDError(f"{dataset} has no images")
    count = len(dataset.class_names)
    if spec is not None and spec.num_classes != count:
        raise KDError(
            f"{spec.name} has {spec.num_classes} classes, the data set {count} ({', '.join(dataset.class_names[:5])}"
            f"{', ...' if count > 5 else ''}): build the detector for {count} classes, or choose those of the data set "
            "by class_names"
        )


def resolve_device(model: nn.Module, device: str | torch.device | None) -> torch.device:
    """The device that a model lies on, which `device` names if it is given.

    Raises KDError where the model lies elsewhere, and where its weights are not float32.
    """
    tensors = [x for x in chain(model.parameters(), model.buffers()) if x.is_floating_point()]
    lies = tensors[0].device if tensors else torch.device("cpu")
    if device is not None:
        try:
            asked = torch.device(device)
        except (RuntimeError, TypeError):
            raise KDError(f"device={device!r} is no device: write 'cpu', 'cuda' or 'cuda:1'") from None
        if asked.type != lies.type or asked.index not in (None, lies.index):
            raise KDError(f"device is {asked}, and the model lies on {lies}: move it there first, model.to('{asked}')")
    if other := {x.dtype for x in tensors} - {torch.float32}:
        raise KDError(
            f"the model's weights are {', '.join(sorted(map(str, other)))}: make them float32 by model.float(), and "
            "compute in lower precision by precision='bfloat16'"
        )
    return lies
