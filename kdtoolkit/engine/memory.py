"""The memory that a process has used."""

from __future__ import annotations

import sys
from contextlib import suppress
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
