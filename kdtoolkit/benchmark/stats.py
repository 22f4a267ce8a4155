"""Statistics of a leaderboard: spreads over seeds, paired differences, verdicts. All are pure functions of numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

# Two-sided 95 % quantiles of Student's t, by degrees of freedom. A number between two entries takes the smaller entry:
# the interval is then a little wider than it needs to be.
_T95 = {
    **dict(enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228), start=1)),
    **dict(enumerate((2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086), start=11)),
    **{25: 2.060, 30: 2.042, 40: 2.021, 60: 2.000, 120: 1.980},
}

Verdict = Literal["holds", "not shown", "hurts"]


@dataclass(frozen=True)
class Spread:
    """Mean over seeds, and the unbiased standard deviation: None for a single seed."""

    mean: float
    std: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """Mean difference over pairs, and its 95 % t-interval `low` to `high`: None for a single pair."""

    mean: float
    low: float | None
    high: float | None
    pairs: int

    @property
    def text(self) -> str:
        """`+1.2 [+0.3, +2.1]`; `+1.2` for one pair."""
        mean = f"{self.mean:+.1f}"
        return mean if self.low is None else f"{mean} [{self.low:+.1f}, {self.high:+.1f}]"

    @property
    def verdict(self) -> Verdict:
        """What the difference shows: "holds" if the interval lies above 0, "hurts" if below 0, else "not shown"."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "not shown"
        return "holds" if self.low > 0 else "hurts"


def t95(degrees: int) -> float:
    """Two-sided 95 % quantile of Student's t with this many degrees of freedom, at least 1."""
    return _T95[max(known for known in _T95 if known <= degrees)]


def spread(values: Iterable[float | None]) -> Spread | None:
    """Spread of the values that are not None; None if there are no such values."""
    defined = [value for value in values if value is not None]
    if not defined:
        return None
    std = statistics.stdev(defined) if len(defined) > 1 else None
    return Spread(statistics.fmean(defined), std, len(defined))


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Difference of two rows over the seeds that both have; None if they have no seed in common.

    `values` and `reference`: the number that each row has for a seed.
    """
    pairs = [values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())]
    found = spread(pairs)
    if found is None:
        return None
    if found.std is None:
        return Difference(found.mean, None, None, found.count)
    half = t95(found.count - 1) * found.std / math.sqrt(found.count)
    return Difference(found.mean, found.mean - half, found.mean + half, found.count)


def gap_recovered(value: float, baseline: float, teacher: float) -> float | None:
    """How much of the way from baseline to teacher `value` has gone: 1 is all of it.

    None if the teacher is not above the baseline.
    """
    return (value - baseline) / (teacher - baseline) if teacher > baseline else None
