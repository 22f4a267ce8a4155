"""The factor of equal time, from made-up costs."""

import pytest

from kdtoolkit.benchmark import equal_time
from kdtoolkit.benchmark.equal_time import relative_costs
from kdtoolkit.benchmark.store import CachedTeacher, Computed
from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME, TWICE
from tests.benchmark._suite import made_up


def measured(row, *seconds, **changes):
    """Results of a row with this CPU time for their 100 steps."""
    return [made_up(row, seed, 20.0, cpu_seconds=found, **changes) for seed, found in enumerate(seconds)]


def test_costs_are_means_in_steps_of_the_baseline():
    cells = {BASELINE: measured(BASELINE, 1.0, 3.0), "a": measured("a", 3.0), "b": measured("b", 4.0, 6.0), "c": []}
    assert relative_costs(cells) == pytest.approx({"a": 1.5, "b": 2.5})
    assert relative_costs(cells | {BASELINE: measured(BASELINE, 8.0)}) == {"a": 1.0, "b": 1.0}  # never shortened
    assert relative_costs(cells | {BASELINE: []}) == {}


def test_the_baseline_with_twice_the_steps_stands_in_for_a_baseline_without_costs():
    cells = {BASELINE: measured(BASELINE, None), TWICE: measured(TWICE, 4.0, steps=200), "a": measured("a", 3.0)}
    assert relative_costs(cells) == pytest.approx({"a": 1.5})
    assert relative_costs(cells | {BASELINE: measured(BASELINE, 1.0)}) == pytest.approx({"a": 3.0})


def test_costs_are_compared_between_cells_that_were_computed_alike():
    fast, half = Computed(precision="float32", channels_last=True, winograd=True), Computed(precision="bfloat16")
    old = {BASELINE: measured(BASELINE, 2.0), EQUAL_TIME: measured(EQUAL_TIME, 3.0, stretch=1.5), TWICE: []}
    cells = old | {
        "a": measured("a", 3.0),
        "b": measured("b", 2.5, computed=fast),
        "c": measured("c", 1, computed=half),
    }
    assert relative_costs(cells) == pytest.approx({"a": 1.5})
    (unknown,) = equal_time.warnings(cells)
    assert "the time of b, c was not measured beside the baseline's" in unknown
    both = {BASELINE: [*old[BASELINE], *measured(BASELINE, 1.0, computed=fast)]}
    assert relative_costs(cells | both) == pytest.approx({"a": 1.5, "b": 2.5})


def test_of_cells_with_a_live_teacher_and_with_a_cache_the_dearer_ones_count():
    kept = CachedTeacher(hits=9, misses=1, views=1, seconds_of_view=0.1)
    row = [*measured("a", 5.0), *measured("a", 3.0, cached=kept)]
    assert relative_costs({BASELINE: measured(BASELINE, 2.0), "a": row}) == pytest.approx({"a": 2.5})
    assert relative_costs({BASELINE: measured(BASELINE, 2.0), "a": row[1:]}) == pytest.approx({"a": 1.5})


def test_rows_that_the_factor_does_not_cover_are_named():
    cells = {BASELINE: measured(BASELINE, 10.0), EQUAL_TIME: measured(EQUAL_TIME, 12.0, stretch=1.2), TWICE: []}
    covered = cells | {"a": measured("a", 12.5), "empty": []}
    assert list(equal_time.warnings(covered)) == []
    old, far = {"b": measured("b", None)}, {"c": measured("c", 9.0, machine="another machine")}
    (unknown,) = equal_time.warnings(covered | old | far)
    assert "the time of b, c was not measured beside the baseline's" in unknown
    (short,) = equal_time.warnings(covered | {"d": measured("d", 15.0)})
    assert "is stretched by 1.20, and a step of d costs 1.50 plain steps" in short
    assert list(equal_time.warnings(old | {BASELINE: [], EQUAL_TIME: []})) == []  # the baselines are not done yet
