"""What one image costs a detector: time, arithmetic and parameters."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdtoolkit.contract import Capability, DetectorAdapter
from kdtoolkit.detectors.recorded import RecordedDetector
from kdtoolkit.engine.detect import Runner
from kdtoolkit.engine.hardware import device_name
from kdtoolkit.libraries import adapt

WARM_UP = 2  # images, besides the one whose arithmetic is counted: memory is allocated, kernels are chosen
LEAST, MOST = 5, 20  # images that are timed
SECONDS = 1.5  # after which no further image is timed


class InferenceCost(BaseModel):
    """What one image alone costs a detector, from its pixels on the device to its detections.

    Attributes:
        latency_ms: the median time of an image. On a CPU with one thread it is CPU time, which programs that run beside
            it hardly change; else it is time by the clock.
        latency_iqr_ms: the range of the middle half of the times.
        gflops: billions of floating-point operations of convolutions, matrix products and attention. A multiplication
            and an addition count as two.
        parameters: how many numbers the detector has learnt.
        size: height and width of the image in pixels.
        device: the name of the device.
        threads: how many threads of the CPU it used.
    """

    model_config = ConfigDict(frozen=True)

    latency_ms: float
    latency_iqr_ms: float
    gflops: float
    parameters: int
    size: tuple[int, int]
    device: str
    threads: int


def measure(detector: nn.Module | DetectorAdapter, image: Tensor) -> InferenceCost | None:
    """Measure what one image alone costs a detector, on its device and in float32. It takes two seconds or less.

    `image`: (3, H, W) uint8. The number of detections changes the time, so take an image of the data set.

    None if the detector computes no detections: it is a file of them, or shows features alone.
    """
    if not _detects(detector):
        return None
    runner = Runner.of(detector)
    size = (image.shape[1], image.shape[2])

    def detect() -> None:
        runner([image], [size], ["to be timed"])  # it waits for the detections

    with runner.in_eval_mode():
        with FlopCounterMode(display=False) as counter:
            detect()
        for _ in range(WARM_UP):
            detect()
        taken = _times(detect, _clock(runner.device))
    low, median, high = np.percentile(taken, [25, 50, 75]).tolist()
    return InferenceCost(
        latency_ms=1000 * median,
        latency_iqr_ms=1000 * (high - low),
        gflops=counter.get_total_flops() / 1e9,
        parameters=sum(parameter.numel() for parameter in runner.module.parameters()),
        size=size,
        device=device_name(str(runner.device)),
        threads=torch.get_num_threads(),
    )


def _detects(detector: nn.Module | DetectorAdapter) -> bool:
    module = detector.model if isinstance(detector, DetectorAdapter) else detector
    return not isinstance(module, RecordedDetector) and Capability.PREDICTIONS in adapt(detector).spec.capabilities


def _clock(device: torch.device) -> Callable[[], float]:
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def _times(work: Callable[[], None], clock: Callable[[], float]) -> list[float]:
    """Seconds that each call takes."""
    taken: list[float] = []
    begun = time.perf_counter()
    while len(taken) < LEAST or (len(taken) < MOST and time.perf_counter() - begun < SECONDS):
        start = clock()
        work()
        taken.append(clock() - start)
    return taken
