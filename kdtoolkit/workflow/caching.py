"""The teacher cache of `kd distill`: what it will take, whether it pays, and what the plan says of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kdtoolkit.data import PhotoDataset
from kdtoolkit.data.views import Sizes
from kdtoolkit.distiller import Distiller
from kdtoolkit.engine.caching import can_cache, forecast
from kdtoolkit.engine.config import TrainConfig
from kdtoolkit.teacher_cache import GIGABYTE
from kdtoolkit.words import size
from kdtoolkit.workflow.defaults import Choice
from kdtoolkit.workflow.options import DistillOptions

if TYPE_CHECKING:
    from kdtoolkit.workflow.prepare import Images

_CHOSEN_BY_USER = "you chose it"
_PLACES = {"memory": "in memory", "disk": "on disk"}


def with_cache(
    options: DistillOptions,
    distiller: Distiller,
    config: TrainConfig,
    images: Images,
    longest: int,
    device: torch.device,
) -> tuple[Choice | None, TrainConfig]:
    """The line of the plan about the teacher cache, and the config with what was chosen.

    `auto` is a cache on disk on a CPU, if it finds views again and takes no more than it may. There is no line if there
    is no teacher that could be asked less often.

    `longest`: the longest side of an image as it is shown, in pixels.
    """
    if not can_cache(distiller):
        return None, config
    given, off = options.teacher_cache, config.model_copy(update={"teacher_cache": "off"})
    if given == "off":
        return Choice("off", _CHOSEN_BY_USER), off
    if given == "auto" and device.type != "cpu":
        return None, off
    if config.never_repeat:
        never = " and ".join(name.removeprefix("augmentation.") for name in config.never_repeat)
        return Choice("off", f"{never}: images never come again with the same pixels"), off
    if options.teacher_cache_gb is not None:
        config = config.model_copy(update={"teacher_cache_gb": options.teacher_cache_gb})
    sizes = _shown_sizes(images.train, longest)
    unlabelled = None if images.unlabelled is None else _shown_sizes(images.unlabelled, longest)
    found = forecast(distiller, images.train, config, sizes, unlabelled, seed=options.seed, device=device)
    told = f"{found.views.different:,} views of {size(found.bytes_of_view)}: {size(found.bytes)}"
    if given == "auto" and (reason := found.why_not(config.teacher_cache_gb)):
        return Choice("off", f"{told}; {reason}"), off
    chosen, limit = ("disk" if given == "auto" else given), int(config.teacher_cache_gb * GIGABYTE)
    room = "" if found.bytes <= limit else f"; the first {size(limit)} are kept (--teacher-cache-gb)"
    why = f"each is shown {found.views.repeats:.1f} times on average"
    line = Choice(f"{_PLACES[chosen]}, {told}{room}", why if given == "auto" else f"{_CHOSEN_BY_USER}; {why}")
    return line, config.model_copy(update={"teacher_cache": chosen})


def _shown_sizes(images: PhotoDataset, longest: int) -> Sizes:
    """The sizes of images that are scaled down to a longest side. Nothing is decoded."""
    return [_shown_size(file["height"], file["width"], longest) for file in images.coco()["images"]]


def _shown_size(height: int, width: int, longest: int) -> tuple[int, int]:
    """The (height, width) of an image that is scaled down to a longest side."""
    factor = min(1.0, longest / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))
