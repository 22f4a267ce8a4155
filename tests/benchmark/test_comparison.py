"""Comparisons of whole boards, by simulation where chance decides. benchmarks/statistics/simulate.py runs more."""

import numpy as np
import pytest

from kdtoolkit.benchmark.comparison import compare
from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME, TWICE

APS = {
    BASELINE: {0: 20.0, 1: 22.0, 2: 21.0},
    "PKD": {0: 22.0, 1: 24.2, 2: 22.8},  # +2.0, +2.2, +1.8
    "CrossKD": {0: 25.0, 1: 21.5, 2: 25.5},  # +5.0, -0.5, +4.5
    EQUAL_TIME: {0: 22.5, 1: 24.5, 2: 23.5},
    TWICE: {},
}


def test_the_entries_are_judged_together_and_each_baseline_alone():
    rows = compare(APS, 31.0).rows
    pkd, crosskd = rows["PKD"], rows["CrossKD"]
    assert pkd.versus_baseline.p_holm == pytest.approx(2 * pkd.versus_baseline.p)
    assert crosskd.versus_baseline.p_holm == pytest.approx(1.5 * crosskd.versus_baseline.p)
    assert rows[EQUAL_TIME].versus_baseline.p_holm is None
    assert rows[EQUAL_TIME].versus_equal_time is None
    assert rows[BASELINE].versus_baseline is None
    assert rows[BASELINE].versus_equal_time is None
    assert rows[TWICE].versus_baseline is None


def test_gap_and_probability_of_improvement():
    pkd = compare(APS, 31.0).rows["PKD"]
    assert pkd.gap_recovered == pytest.approx(0.2)  # 2 of the 10 points from 21 to 31
    assert pkd.gap_interval[0] < 0.2 < pkd.gap_interval[1]
    assert pkd.p_improvement.value == pytest.approx(5.5 / 6)  # 22 of PKD equals 22 of the baseline
    assert compare(APS, None).rows["PKD"].gap_recovered is None
    assert compare(APS, 20.0).rows["PKD"].gap_interval is None


def test_only_rows_of_equal_steps_are_ranked():
    found = compare(APS, 31.0)
    assert set(found.pairs) == {BASELINE, "PKD", "CrossKD"}
    # PKD is 17 standard errors above the baseline: p = 0.0033, times 3 pairs 0.010.
    ranks = {row: (each.rank.low, each.rank.high) for row, each in found.rows.items() if each.rank is not None}
    assert ranks == {BASELINE: (2, 3), "PKD": (1, 2), "CrossKD": (1, 3)}


def test_one_seed_has_no_ranks():
    found = compare({row: {0: 20.0} for row in (BASELINE, "PKD")}, 31.0)
    assert found.rows["PKD"].rank is None
    assert found.pairs["PKD"][BASELINE].p is None


def boards(count, seeds, entries, *, gains=None, seed=0):
    """Simulated boards: each seed makes all rows better or worse, and each row has noise of its own."""
    rng = np.random.default_rng(seed)
    gains = np.zeros(entries + 1) if gains is None else np.array([0.0, *gains])
    names = [BASELINE, *(f"entry {i}" for i in range(entries))]
    for _ in range(count):
        aps = 30 + gains[:, None] + rng.normal(0, 1, seeds) + rng.normal(0, 1, (entries + 1, seeds))
        yield {name: dict(enumerate(row.tolist())) for name, row in zip(names, aps, strict=True)}


@pytest.mark.parametrize("seeds", [3, 5, pytest.param(10, marks=pytest.mark.slow)])
def test_without_a_true_difference_intervals_cover_zero_and_false_alarms_are_rare(seeds):
    found = [compare(aps, None) for aps in boards(400, seeds, 4, seed=seeds)]
    first = [each.rows["entry 0"].versus_baseline for each in found]
    assert 0.92 <= np.mean([each.low <= 0 <= each.high for each in first]) <= 0.98
    verdicts = [[row.versus_baseline.verdict for row in each.rows.values() if row.versus_baseline] for each in found]
    assert np.mean([set(each) != {"not shown"} for each in verdicts]) <= 0.08
    ranks = [[row.rank for row in each.rows.values()] for each in found]
    assert np.mean([all(rank.low == 1 for rank in each) for each in ranks]) >= 0.92


def test_ranges_of_ranks_hold_the_true_ranks_and_tell_far_rows_apart():
    found = [compare(aps, None) for aps in boards(200, 5, 3, gains=[30.0, 31.0, -30.0])]
    truth = {BASELINE: 3, "entry 0": 2, "entry 1": 1, "entry 2": 4}
    covered = [
        all(each.rows[row].rank.low <= rank <= each.rows[row].rank.high for row, rank in truth.items())
        for each in found
    ]
    assert np.mean(covered) >= 0.92
    assert np.mean([each.rows["entry 2"].rank.low == 4 for each in found]) > 0.95
