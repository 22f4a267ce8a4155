"""The teacher cache of `kd distill`: what it will take, whether it pays, and what the plan says of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kdtoolkit.data.views import Views, count_views
from kdtoolkit.distiller import Distiller
from kdtoolkit.engine.caching import bytes_of_view, can_cache
from kdtoolkit.engine.config import TrainConfig
from kdtoolkit.words import size
from kdtoolkit.workflow.defaults import Choice
from kdtoolkit.workflow.options import DistillOptions

if TYPE_CHECKING:
    from kdtoolkit.workflow.prepare import Images

COUNTED = 300_000  # images shown; a longer run is counted in its first steps
PAYS_FROM = 2.0  # how often a view is shown, on average, for a cache to be chosen where the user says nothing
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

    Where the user says nothing, a cache on disk is chosen on a CPU, if it finds views again and takes no more than it
    may. There is no line if there is no teacher that could be asked less often.

    `longest`: the longest side of an image as it is shown, in pixels.
    """
    if not can_cache(distiller):
        return None, config
    given = options.teacher_cache
    if given == "off":
        return Choice("off", "you chose it"), config
    if given is None and device.type != "cpu":
        return None, config
    if config.never_repeat:
        never = " and ".join(name.removeprefix("augmentation.") for name in config.never_repeat)
        return Choice("off", f"{never}: images never come again with the same pixels"), config
    if options.teacher_cache_gb is not None:
        config = config.model_copy(update={"teacher_cache_gb": options.teacher_cache_gb})
    views = _views(options, config, images, longest)
    bytes_each = bytes_of_view(distiller, images.train, config, device)
    whole, limit = views.different * bytes_each, config.teacher_cache_gb * 1e9
    found = f"{views.different:,} views of {size(bytes_each)}: {size(whole)}"
    often = f"each is shown {views.repeats:.1f} times"
    if given is None and views.repeats < PAYS_FROM:
        return Choice("off", f"{found}, and {often} on average: too seldom to pay"), config
    if given is None and whole > limit:
        return Choice("off", f"{found}, more than {size(int(limit))} (--teacher-cache-gb)"), config
    chosen = given or "disk"
    room = "" if whole <= limit else f"; the first {size(int(limit))} are kept (--teacher-cache-gb)"
    line = Choice(f"{_PLACES[chosen]}, {found}{room}", f"{often} on average{', you chose it' if given else ''}")
    return line, config.model_copy(update={"teacher_cache": chosen})


def _views(options: DistillOptions, config: TrainConfig, images: Images, longest: int) -> Views:
    """The views of the run. Images without labels count as if they were among the others."""
    files = [*images.train.coco()["images"], *([] if images.unlabelled is None else images.unlabelled.coco()["images"])]
    return count_views(
        [_shown_size(file["height"], file["width"], longest) for file in files],
        batch_size=config.batch_size,
        steps=max(1, min(config.steps, COUNTED // config.batch_size)),
        seed=options.seed,
        augment=config.augmentation,
        input_size=config.input_size,
    )


def _shown_size(height: int, width: int, longest: int) -> tuple[int, int]:
    """The (height, width) of an image that is scaled down to a longest side."""
    factor = min(1.0, longest / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))
