"""Statistics of a leaderboard: spreads over seeds, paired differences, verdicts. All are pure functions of numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from kdtoolkit.students_t import t95

Verdict = Literal["holds", "not shown", "hurts"]


@dataclass(frozen=True)
class Spread:
    """Mean over seeds, and the unbiased standard deviation: None for a single seed."""

    mean: float
    std: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """A mean difference over pairs, and its 95 % interval `low` to `high`: None for a single pair.

    `p`: two-sided p of the paired t-test; None for a single pair. `p_holm`: p, corrected for the number of differences
    that are judged together; None where the difference is judged alone. `over`: what the interval is about. "seeds":
    further seeds. "images": further images for the one seed that there is.
    """

    mean: float
    low: float | None
    high: float | None
    pairs: int
    p: float | None = None
    p_holm: float | None = None
    over: Literal["seeds", "images"] = "seeds"

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


@dataclass(frozen=True)
class Probability:
    """A probability in [0, 1], and its 95 % interval: None for a single seed."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class RankRange:
    """The ranks that a row may have, 1 for the best: `low` to `high`."""

    low: int
    high: int


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
