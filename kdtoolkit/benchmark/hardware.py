"""What a cell runs on."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path

import torch


def machine() -> str:
    """Processor, number of cores and operating system, in words."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {cores()} cores, {platform.system()}"


def device_name(device: str) -> str:
    """What a cell runs on: `cpu`, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
