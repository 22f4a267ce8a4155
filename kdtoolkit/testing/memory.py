"""Measures the memory that a piece of code allocates for tensors. It works without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """The largest number of bytes that tensors made by `run` need at one time, beyond what was there before.

    On a CPU each allocation of torch is recorded and they are added up, so the number does not depend on the machine's
    load. It leaves out what libraries such as oneDNN allocate by themselves. What `run` returns counts as its own.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    assert recorded.profiler is not None
    results = recorded.profiler.kineto_results
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
