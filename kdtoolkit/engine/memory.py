"""The memory that a process has used."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


def peak_memory_mb(device: str | torch.device) -> float:
    """Peak memory so far, in MB of 2^20 bytes: tensors on CUDA, else all resident memory of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):  # of this process alone, where ru_maxrss may count what it was forked from
                return int(line.split()[1]) / 2**10
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


class PeakMemory:
    """The peak memory of a training that begins now, without what the process does in between (`paused`).

    A process cannot forget the peak of its resident memory. So on a CPU it has the time before the training too, and
    the peak of the time before the first pause stands for the whole training, whose steps are alike.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: float | None = None  # the peak of the training before the last pause
        self._begin_anew()

    def read(self) -> float:
        """The peak so far, in MB."""
        if self._before is None:
            return peak_memory_mb(self._device)
        return max(self._before, peak_memory_mb(self._device)) if self._device.type == "cuda" else self._before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block whose memory does not count."""
        self._before = self.read()
        yield
        self._begin_anew()

    def _begin_anew(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
