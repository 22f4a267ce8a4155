"""A run's teacher cache: opened for the time of the run; how many bytes a view takes, and how much time it saves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kdtoolkit.contract import Capability, Method, PriorKind, Target
from kdtoolkit.data import DetectionDataset
from kdtoolkit.data.recorded import Carrier
from kdtoolkit.data.resize import with_boxes
from kdtoolkit.data.views import Sizes, Views, sizes_of
from kdtoolkit.distiller import Distiller
from kdtoolkit.engine.arithmetic import Arithmetic
from kdtoolkit.engine.config import TrainConfig
from kdtoolkit.engine.mixture import views_of_run
from kdtoolkit.errors import KDError
from kdtoolkit.modes import in_eval_mode
from kdtoolkit.teacher_cache import GIGABYTE, TeacherCache
from kdtoolkit.tf32 import tensor_float32
from kdtoolkit.words import size

_COUNTED = 300_000  # images shown; a longer run is counted in its first steps
_PAYS_FROM = 4.0  # how often a view is shown, on average: alone, an image may cost four times its share of a batch
_UNBOUNDED = 1e6  # gigabytes
_TIMED = 3  # passes of the teacher whose median counts
_TRIED = 50  # steps at which the methods at work are looked at


def can_cache(distiller: Distiller) -> bool:
    """Whether a run has a teacher whose passes a cache can keep: one that methods use, and no file of detections."""
    teacher = distiller.teacher_adapter
    return teacher is not None and len(distiller.methods) > 0 and teacher.spec.priors is not PriorKind.DETECTIONS


@dataclass(frozen=True)
class Forecast:
    """What a teacher cache would do in a run: the views that the run shows, and how many bytes each takes."""

    views: Views
    bytes_of_view: int

    @property
    def bytes(self) -> int:
        """What all views take."""
        return self.views.different * self.bytes_of_view

    def why_not(self, gigabytes: float) -> str | None:
        """Why a cache of this size does not pay, in words; None if it does."""
        if self.views.repeats < _PAYS_FROM:
            return f"a view is shown {self.views.repeats:.1f} times on average: too seldom to pay"
        return None if self.bytes <= gigabytes * GIGABYTE else f"more than {size(int(gigabytes * GIGABYTE))}"


def forecast(
    distiller: Distiller,
    dataset: DetectionDataset,
    config: TrainConfig,
    sizes: Sizes,
    unlabelled: Sizes | None,
    *,
    seed: int,
    device: torch.device,
) -> Forecast:
    """Count the views of a run, and measure what one of them takes. No option may be on that never repeats a view.

    `sizes`, `unlabelled`: those of the images with labels, and of those without.
    """
    views = views_of_run(distiller, config, sizes, unlabelled, seed=seed, most=_COUNTED)
    return Forecast(views, bytes_of_view(distiller, dataset, config, device))


def resolve_cache(
    distiller: Distiller,
    dataset: DetectionDataset,
    unlabelled: DetectionDataset | None,
    config: TrainConfig,
    *,
    seed: int,
    device: torch.device,
    has_folder: bool,
) -> TrainConfig:
    """The config with what `auto` means for its teacher cache. The images must be in memory."""
    if config.teacher_cache != "auto":
        return config
    chosen = "off"
    if has_folder and device.type == "cpu" and can_cache(distiller) and not config.never_repeat:
        others = None if unlabelled is None else sizes_of(unlabelled)
        found = forecast(distiller, dataset, config, sizes_of(dataset), others, seed=seed, device=device)
        chosen = "off" if found.why_not(config.teacher_cache_gb) else "disk"
    return config.model_copy(update={"teacher_cache": chosen})


@contextmanager
def teacher_cache(distiller: Distiller, config: TrainConfig, folder: Path | None) -> Iterator[TeacherCache | None]:
    """The cache that a distiller uses in a block: its own if it has one, else the config's.

    `folder`: where a cache on disk lies. Gives None if nothing is kept. Raises KDError if a cache on disk has none.
    """
    if distiller.teacher_cache is not None or config.teacher_cache == "off" or not can_cache(distiller):
        yield distiller.teacher_cache if can_cache(distiller) else None
        return
    most, precision = config.teacher_cache_gb, config.teacher_cache_precision
    if config.teacher_cache == "memory":
        cache = TeacherCache.in_memory(most, precision)
    elif folder is not None:
        cache = TeacherCache.on_disk(folder, most, precision)
    else:
        raise KDError(
            "teacher_cache is disk, and the run has no folder to keep it in: name one, "
            "train(..., folder=RunFolder(path)), or write teacher_cache: memory"
        )
    with with_cache(distiller, cache):
        yield cache


@contextmanager
def with_cache(distiller: Distiller, cache: TeacherCache | None) -> Iterator[None]:
    """A block in which a distiller uses `cache` in place of its own; with None its teacher computes everything."""
    own, distiller.teacher_cache = distiller.teacher_cache, cache
    try:
        yield
    finally:
        distiller.teacher_cache = own


def bytes_of_view(distiller: Distiller, dataset: DetectionDataset, config: TrainConfig, device: torch.device) -> int:
    """How many bytes a teacher cache takes for one view, measured on the first image of a data set.

    The step that counts is one in which most of the methods work. The distiller and its models stay as they are.
    """
    every = range(0, config.steps, max(1, config.steps // _TRIED))
    calls = distiller.calls
    cache = TeacherCache.in_memory(_UNBOUNDED, config.teacher_cache_precision)
    images, targets = _first(dataset, config, device)
    arithmetic = Arithmetic.of_config(distiller, config, device)
    try:
        distiller.calls = distiller.accumulation * max(every, key=lambda step: len(distiller.active(step)))
        with in_eval_mode(distiller), torch.no_grad(), arithmetic.forward_pass(), with_cache(distiller, cache):
            distiller(images, targets)
    finally:
        distiller.calls = calls
    return cache.bytes


def seconds_of_view(
    distiller: Distiller, dataset: DetectionDataset, config: TrainConfig, device: torch.device
) -> float:
    """What the teacher's pass over one image costs, as a cache makes it: on a CPU CPU time, on a GPU time by the clock.

    The median of some passes over the first image of a data set, computed as the run computes them. The head runs if a
    method takes more than features.
    """
    images, targets = _first(dataset, config, device)
    teacher = distiller.seen[1]
    with_head = any(isinstance(each, Method) and each.needs - {Capability.FEATURES} for each in distiller.methods)
    on_cpu = device.type == "cpu"
    found = []
    arithmetic = Arithmetic.of_config(distiller, config, device)
    with torch.no_grad(), tensor_float32(config.tf32), arithmetic.forward_pass():
        like = distiller.student_adapter.prepare(images, targets)
        for _ in range(1 + _TIMED):
            begun = time.process_time() if on_cpu else time.perf_counter()
            batch = distiller.teacher_batch(images, targets, like)
            features = teacher.features(batch)
            if with_head:
                teacher.head(features, batch, stages=frozenset())
            if not on_cpu:
                torch.cuda.synchronize(device)
            found.append((time.process_time() if on_cpu else time.perf_counter()) - begun)
    return statistics.median(found[1:])


def _first(dataset: DetectionDataset, config: TrainConfig, device: torch.device) -> tuple[list[Tensor], list[Target]]:
    """The first image of a data set as evaluation shows it, and its ground truth."""
    image, sample = dataset[0]
    shown = image if config.input_size is None else config.input_size.apply(image)
    target = with_boxes(Carrier.unchanged(sample), image, shown)
    return [shown.to(device).float().div_(255)], [target]
