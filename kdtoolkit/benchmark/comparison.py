"""How the rows of a board compare, from each row's AP for a seed. Which file they come from plays no part."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from kdtoolkit.benchmark.improvement import probability_of_improvement
from kdtoolkit.benchmark.stats import (
    LEVEL,
    Difference,
    Probability,
    RankRange,
    all_pairs,
    gap_interval,
    gap_recovered,
    judged_together,
    paired_difference,
    rank_ranges,
)
from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME, TEACHER, TWICE
from kdtoolkit.engine.scoring import Floats

APs = Mapping[str, Mapping[int, float]]  # of each row, by seed


@dataclass(frozen=True)
class Compared:
    """What is known about one row beside the others. `board.Row` says what the fields are."""

    versus_baseline: Difference | None = None
    versus_equal_time: Difference | None = None
    gap_recovered: float | None = None
    gap_interval: tuple[float, float] | None = None
    p_improvement: Probability | None = None
    rank: RankRange | None = None


@dataclass(frozen=True)
class Comparison:
    """All comparisons of a board. `pairs`: as `Board.pairs`."""

    rows: dict[str, Compared] = field(default_factory=dict)
    pairs: dict[str, dict[str, Difference]] = field(default_factory=dict)


def compare(aps: APs, teacher: float | None, over_images: Mapping[str, Floats] | None = None) -> Comparison:
    """Compare all rows.

    `aps`: of the baselines and the entries; rows may lack seeds. `teacher`: the teacher's AP. `over_images`: for rows
    with one seed, and the teacher, their APs on samples of the images; intervals are then over images.

    Three families of tests are corrected by Holm's procedure, each on its own: the entries against the baseline, the
    entries against the baseline at equal time, and all pairs of rows with equal steps, which the ranks come from.
    """
    pairs = all_pairs({row: found for row, found in aps.items() if row not in (EQUAL_TIME, TWICE) and found})
    are_told_apart = any(difference.p is not None for found in pairs.values() for difference in found.values())
    ranks = rank_ranges(pairs) if are_told_apart else {}
    versus_baseline, versus_equal_time = (_versus(aps, reference) for reference in (BASELINE, EQUAL_TIME))
    baseline = aps.get(BASELINE, {})
    rows = {
        row: Compared(
            versus_baseline=versus_baseline.get(row),
            versus_equal_time=None if row == BASELINE else versus_equal_time.get(row),
            gap_recovered=None if row == BASELINE else _gap(found, baseline, teacher),
            gap_interval=None if row == BASELINE or teacher is None else gap_interval(found, baseline, teacher),
            p_improvement=None if row == BASELINE else probability_of_improvement(found, baseline),
            rank=ranks.get(row),
        )
        for row, found in aps.items()
    }
    comparison = Comparison(rows, pairs)
    return _with_images(comparison, over_images) if over_images else comparison


def _versus(aps: APs, reference: str) -> dict[str, Difference]:
    """The difference of each row from a reference. Entries are judged together, each of the baselines alone."""
    found = {
        row: difference
        for row, values in aps.items()
        if row != reference and (difference := paired_difference(values, aps.get(reference, {}))) is not None
    }
    entries = {row: each for row, each in found.items() if row not in (BASELINE, EQUAL_TIME, TWICE)}
    return found | judged_together(entries)


def _gap(values: Mapping[int, float], baseline: Mapping[int, float], teacher: float | None) -> float | None:
    """The share of the gap over the seeds that both rows have."""
    shared = values.keys() & baseline.keys()
    if teacher is None or not shared:
        return None
    own, reference = (statistics.fmean(row[seed] for seed in shared) for row in (values, baseline))
    return gap_recovered(own, reference, teacher)


def _with_images(comparison: Comparison, samples: Mapping[str, Floats]) -> Comparison:
    """The same comparison, with intervals over images where a difference is of one seed."""

    def sampled(row: str, difference: Difference | None, reference: str) -> Difference | None:
        if difference is None or difference.p is not None or row not in samples or reference not in samples:
            return difference
        low, high = _middle(samples[row] - samples[reference])
        return replace(difference, low=low, high=high, over="images")

    def gap(row: str, interval: tuple[float, float] | None) -> tuple[float, float] | None:
        if row == BASELINE or not {row, BASELINE, TEACHER} <= samples.keys():
            return interval
        whole = samples[TEACHER] - samples[BASELINE]
        return _middle((samples[row] - samples[BASELINE]) / whole) if (whole > 0).all() else None

    rows = {
        row: replace(
            each,
            versus_baseline=sampled(row, each.versus_baseline, BASELINE),
            versus_equal_time=sampled(row, each.versus_equal_time, EQUAL_TIME),
            gap_interval=gap(row, each.gap_interval),
        )
        for row, each in comparison.rows.items()
    }
    pairs = {
        one: {two: found for two, each in others.items() if (found := sampled(one, each, two)) is not None}
        for one, others in comparison.pairs.items()
    }
    return Comparison(rows, pairs)


def _middle(values: Floats) -> tuple[float, float]:
    """Where the middle 95 % of the values lie."""
    low, high = np.nanquantile(values, (LEVEL / 2, 1 - LEVEL / 2))
    return float(low), float(high)
