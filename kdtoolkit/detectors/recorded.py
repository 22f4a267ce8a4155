"""A detector that is a file: it ran at an earlier time, perhaps in a different framework, and left its detections."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from kdtoolkit.data.detections import DetectionFile


class RecordedDetector(nn.Module):
    """The detections of a file in the place of a detector. It has no weights, and knows only the images of its file.

    Args:
        file: the detections, read and checked. Its digest is the state of the module, so that equal states are equal
            detections.
    """

    digest: Tensor

    def __init__(self, file: DetectionFile) -> None:
        super().__init__()
        self.file = file
        self.register_buffer("digest", torch.tensor([*bytes.fromhex(file.digest)], dtype=torch.uint8))

    @property
    def path(self) -> Path:
        """The file."""
        return self.file.path

    @property
    def class_names(self) -> Sequence[str]:
        """The detector's classes, label 0 first."""
        return self.file.class_names
