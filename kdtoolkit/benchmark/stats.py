"""Statistics of a board: spreads over seeds, paired differences, Holm's correction, ranks, the share of the gap.

All are pure functions of numbers. docs/statistics.md says what each assumes, and docs/results/statistics.md shows by
simulation how often each is right.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, TypeVar

from scipy.special import stdtr, stdtrit

LEVEL = 0.05  # of all tests; intervals hold the rest, 95 %
_ROUNDING = 1e-9  # APs that differ by less are equal

Verdict = Literal["holds", "not shown", "hurts"]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Spread:
    """Mean over seeds, and the unbiased standard deviation: None for a single seed."""

    mean: float
    std: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """A mean difference over pairs, and its 95 % interval `low` to `high`.

    `p`: two-sided p of the paired t-test. Interval and p are None for a single pair, and where all pairs differ by the
    same number, since they then do not show how large chance is. `p_holm`: p, corrected for the number of differences
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
        """`+1.2 [+0.3, +2.1]`; `+1.2 [+0.3, +2.1] (images)` if the interval is over images; `+1.2` without interval."""
        mean = f"{self.mean:+.1f}"
        over = " (images)" if self.over == "images" else ""
        return mean if self.low is None else f"{mean} [{self.low:+.1f}, {self.high:+.1f}]{over}"

    @property
    def verdict(self) -> Verdict:
        """What the difference shows: "holds" if it is above 0, "hurts" if below 0, "not shown" if chance explains it.

        The corrected p decides, or `p` where the difference is judged alone. One seed shows nothing.
        """
        p = self.p if self.p_holm is None else self.p_holm
        if p is None or p >= LEVEL:
            return "not shown"
        return "holds" if self.mean > 0 else "hurts"


@dataclass(frozen=True)
class Probability:
    """A probability in [0, 1], and its 95 % interval."""

    value: float
    low: float
    high: float


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

    `values` and `reference`: the number that each row has for a seed. The interval and p are those of the paired t-test
    ("Student", The probable error of a mean, Biometrika 1908). It assumes that the differences of different seeds are
    independent and normally distributed. If all are equal there is neither, and p is 1 if all are 0.
    """
    pairs = [values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())]
    found = spread(pairs)
    if found is None:
        return None
    if found.std is not None and max(map(abs, pairs)) < _ROUNDING:
        return Difference(0.0, 0.0, 0.0, found.count, 1.0)
    if found.std is None or found.std < _ROUNDING:
        return Difference(found.mean, None, None, found.count)
    error = found.std / math.sqrt(found.count)
    half = t_quantile(found.count - 1) * error
    p = 2 * float(stdtr(found.count - 1, -abs(found.mean) / error))
    return Difference(found.mean, found.mean - half, found.mean + half, found.count, p)


def p_text(p: float) -> str:
    """`0.034`; `below 0.001`."""
    return "below 0.001" if p < 0.001 else f"{p:.3f}"


@cache
def t_quantile(degrees: int) -> float:
    """The two-sided 95 % quantile of Student's t with this many degrees of freedom, at least 1."""
    return float(stdtrit(degrees, 1 - LEVEL / 2))


def smallest_shown(deviation: float, pairs: int, together: int) -> float:
    """The smallest mean difference over so many pairs, at least 2, that is shown whatever the others are.

    `deviation`: the standard deviation of the pairs' differences. `together`: how many differences are judged together.
    """
    return float(stdtrit(pairs - 1, 1 - LEVEL / 2 / together)) * deviation / math.sqrt(pairs)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's corrected p of each test: below 5 % in all tests together with at most 5 % of false alarms.

    That is, if p_holm < 0.05 counts as shown, the probability of even one false alarm is at most 5 %, however the tests
    depend on each other. Source: Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of
    Statistics 1979.
    """
    corrected = [0.0] * len(ps)
    largest = 0.0
    for place, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - place) * ps[index]))
        corrected[index] = largest
    return corrected


def judged_together(differences: Mapping[Key, Difference]) -> dict[Key, Difference]:
    """The same differences, with `p_holm` over all of them. Those without p stay as they are and do not count.

    Each difference is two tests, that it is not above 0 and that it is not below 0, and Holm's procedure corrects all
    of them together. So with a probability of 95 % or more each difference that is shown has the direction that it is
    said to have, however the tests depend on each other. A difference that is judged alone keeps its p.
    """
    ps = {key: difference.p for key, difference in differences.items() if difference.p is not None}
    seen, opposite = [p / 2 for p in ps.values()], [1 - p / 2 for p in ps.values()]
    corrected = dict(zip(ps, holm(seen + opposite), strict=False))  # of the direction that was seen
    return {key: replace(difference, p_holm=corrected.get(key)) for key, difference in differences.items()}


def all_pairs(values: Mapping[str, Mapping[int, float]]) -> dict[str, dict[str, Difference]]:
    """The difference of each row from each other row, judged together. `values`: each row's number for a seed.

    `found[a][b]` is row a minus row b. Rows without a common seed have no difference.
    """
    names = list(values)
    halves = {
        (one, two): difference
        for place, one in enumerate(names)
        for two in names[place + 1 :]
        if (difference := paired_difference(values[one], values[two])) is not None
    }
    found: dict[str, dict[str, Difference]] = {name: {} for name in names}
    for (one, two), difference in judged_together(halves).items():
        found[one][two], found[two][one] = difference, reverse(difference)
    return found


def reverse(difference: Difference) -> Difference:
    """The difference of b and a, from that of a and b."""
    low, high = (None if bound is None else -bound for bound in (difference.high, difference.low))
    return replace(difference, mean=-difference.mean, low=low, high=high)


def rank_ranges(pairs: Mapping[str, Mapping[str, Difference]]) -> dict[str, RankRange]:
    """The ranks that each row may have, from the differences of all pairs of rows, judged together.

    A row's best possible rank counts the rows that are shown to be above it, and its worst possible rank leaves out
    those that are shown to be below. If no direction is wrong, all true ranks lie in these ranges, and
    `judged_together` makes a wrong one no likelier than 5 %. Source: Mogstad, Romano, Shaikh, Wilhelm, Inference for
    ranks, Review of Economic Studies 2024, section 3.
    """
    found = {}
    for row, differences in pairs.items():
        verdicts = [difference.verdict for difference in differences.values()]
        found[row] = RankRange(1 + verdicts.count("hurts"), len(pairs) - verdicts.count("holds"))
    return found


def gap_recovered(value: float, baseline: float, teacher: float) -> float | None:
    """How much of the way from baseline to teacher `value` has gone: 1 is all of it.

    None if the teacher is not above the baseline.
    """
    return (value - baseline) / (teacher - baseline) if teacher > baseline else None


def gap_interval(
    values: Mapping[int, float], baseline: Mapping[int, float], teacher: float
) -> tuple[float, float] | None:
    """The 95 % interval of `gap_recovered` over the seeds that both rows have, by Fieller's theorem.

    It is the set of shares g at which a paired t-test does not reject that `values - baseline` is on average
    g * (teacher - baseline). It assumes what `paired_difference` assumes, and takes the teacher's AP as given. None for
    fewer than two seeds, where all seeds have the same share, and where that set has no end: the baseline is then not
    clearly below the teacher. Source: Fieller, Some problems in interval estimation, Journal of the Royal Statistical
    Society B 1954.
    """
    seeds = sorted(values.keys() & baseline.keys())
    if len(seeds) < 2:
        return None
    gains = [values[seed] - baseline[seed] for seed in seeds]
    gaps = [teacher - baseline[seed] for seed in seeds]
    gain, gap = statistics.fmean(gains), statistics.fmean(gaps)
    weight = t_quantile(len(seeds) - 1) ** 2 / len(seeds)
    # The t-test does not reject where square * g^2 - 2 * linear * g + constant <= 0.
    square = gap**2 - weight * statistics.variance(gaps)
    linear = gain * gap - weight * statistics.covariance(gains, gaps)
    constant = gain**2 - weight * statistics.variance(gains)
    if gap <= 0 or square <= 0:
        return None
    shares = [one / whole if whole else math.inf for one, whole in zip(gains, gaps, strict=True)]
    if max(shares) - min(shares) < _ROUNDING:
        return None
    root = math.sqrt(max(linear**2 - square * constant, 0.0))
    return (linear - root) / square, (linear + root) / square
