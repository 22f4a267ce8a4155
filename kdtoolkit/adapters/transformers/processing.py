"""What a published detector of transformers needs done to images: the image processor in its folder or repository."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from kdtoolkit.canvas import scaled
from kdtoolkit.contract import Target
from kdtoolkit.errors import KDError

_BICUBIC = 3  # of Pillow
FILE = "preprocessor_config.json"


class Processing:
    """What one of the library's image processors does: mean and std per channel, for images in [0, 1], and resizing."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        # The library's images are in [0, 255] until it rescales them.
        factor = 255 * processor.rescale_factor if processor.do_rescale else 255
        normalised = bool(processor.do_normalize)
        self.mean = tuple(x / factor for x in _three(processor.image_mean if normalised else 0.0))
        self.std = tuple(x / factor for x in _three(processor.image_std if normalised else 1.0))

    def on_batch(self, images: Tensor) -> Tensor:
        """Resize images (N, 3, H, W) of one size as `resized` does, by a function that exporters can follow."""
        processor = self.processor
        if not processor.do_resize:
            return images
        one = images.new_empty(3, int(images.shape[-2]), int(images.shape[-1]))
        size = processor.resize(one, size=processor.size, resample=processor.resample).shape[-2:]
        mode = "bicubic" if int(processor.resample) == _BICUBIC else "bilinear"
        return F.interpolate(images, size, mode=mode, align_corners=False, antialias=True)

    def resized(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None
    ) -> tuple[Sequence[Tensor], Sequence[Target] | None]:
        """Resize images (3, H, W) as the processor does, with their ground truth."""
        processor = self.processor
        if not processor.do_resize:
            return images, targets
        made = [processor.resize(image, size=processor.size, resample=processor.resample) for image in images]
        if targets is None:
            return made, None
        sizes, originals = ([(x.shape[-2], x.shape[-1]) for x in each] for each in (made, images))
        return made, [
            Target(boxes=scaled(target["boxes"].float().reshape(-1, 4), size, original), labels=target["labels"])
            for target, size, original in zip(targets, sizes, originals, strict=True)
        ]


def published_processing(model: nn.Module, processor: type[Any]) -> Processing | None:
    """The processing of the folder or repository that `model` was loaded from; None if there is none.

    Only files on this machine are looked at. Raises KDError if the file there cannot be read.
    """
    config: Any = model.config
    source = str(config.name_or_path or "")
    found = cached_file(
        source,
        FILE,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    ) if source else None  # fmt: skip
    if found is None:
        return None
    try:
        return Processing(processor.from_pretrained(Path(found).parent, local_files_only=True))
    except Exception as error:  # the library's many ways to complain of a file
        reason = " ".join(str(error).split()).rstrip(".")
        raise KDError(
            f"the image processor of {type(model).__name__} cannot be used ({reason}): correct {found}, or delete it "
            "to use the library's defaults"
        ) from error


def _three(value: Any) -> tuple[float, ...]:
    return tuple(map(float, value)) if isinstance(value, list | tuple) else (float(value),) * 3
