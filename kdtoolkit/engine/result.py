"""What a training run says while it goes on, and at its end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean


@dataclass(frozen=True)
class Progress:
    """Where a run is: `losses` are means since the last report, `seconds` the training time so far.

    `warnings`: one line for each loss term that has taught the student nothing so far, for each part of the student
    that has died, for each method whose share is not held, and for each checkpoint that was damaged or could not be
    written.
    """

    step: int
    steps: int
    losses: dict[str, float]
    seconds: float
    warnings: tuple[str, ...] = ()
    evaluated: tuple[tuple[int, float | None], ...] = ()


@dataclass(frozen=True)
class CacheUse:
    """How a run used its teacher cache.

    `hits`: how many of the images shown needed no pass of the teacher. `misses`: how many needed one. Both are counted
    over all starts of the run, in the first process. `bytes`: the size of the cache at the end.
    """

    hits: int
    misses: int
    bytes: int


@dataclass(frozen=True)
class TrainResult:
    """What a run cost and how it went.

    `history` has about 100 points of step, lr, every loss term and every metric of the methods (means). `metrics` has
    the mean of each metric over the run, by name. `warnings`: the warnings of `Progress` about the training, for the
    whole run. `notices`: its warnings about the folder. `evaluations` have step and average precisions. `probes` have
    step and, for each method, `conflict/METHOD`, the cosine of its gradient with the task's, and `share/METHOD`, its
    share of both gradients with the weights that it has in this step; None if a loss was not finite. `conflict/task`
    is the cosine between the task's gradients of two batches, to compare with.

    `seconds` is training time over all starts of the run, `cpu_seconds` the process's CPU time in it, over all its
    threads (None if an earlier version, which did not measure it, began the run); `step_ms` the median step of this
    start, 0 if it had none. `peak_memory_mb`: of this start's training. Evaluations and probes count in none of these.
    `cache`: None if the run had no teacher cache.
    """

    steps: int
    seconds: float
    step_ms: float
    cpu_seconds: float | None = 0.0
    peak_memory_mb: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    evaluations: list[dict[str, float | None]] = field(default_factory=list)
    probes: list[dict[str, float | None]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    cache: CacheUse | None = None


def mean_metrics(names: Iterable[str], history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over a run: over the points of its history, which are means of about as many steps each.

    A metric that no point has is left out.
    """
    found = {name: [point[name] for point in history if name in point] for name in names}
    return {name: fmean(values) for name, values in found.items() if values}
