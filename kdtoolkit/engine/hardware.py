"""What a training runs on, in words."""

from __future__ import annotations

import os
import platform

import torch

from kdtoolkit.engine.processor import processor_name


def machine() -> str:
    """Processor, number of cores and operating system, in words."""
    return f"{processor_name()}, {cores()} cores, {platform.system()}"


def device_name(device: str) -> str:
    """The name of a device: `cpu`, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
