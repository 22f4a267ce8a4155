import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp, ttest_rel

from kdtoolkit.benchmark.stats import (
    Difference,
    RankRange,
    all_pairs,
    gap_interval,
    gap_recovered,
    holm,
    judged_together,
    p_text,
    paired_difference,
    rank_ranges,
    reverse,
    spread,
    t_quantile,
)

aps = st.floats(0, 100)


def test_paired_difference_by_hand():
    # Differences 1, 2, 3: mean 2, std 1, half width 4.3027 / sqrt(3).
    found = paired_difference({0: 11.0, 1: 22.0, 2: 33.0}, {0: 10.0, 1: 20.0, 2: 30.0})
    assert found.mean == pytest.approx(2)
    assert found.low == pytest.approx(2 - 4.30265 / math.sqrt(3), abs=1e-5)
    assert found.high == pytest.approx(2 + 4.30265 / math.sqrt(3), abs=1e-5)
    assert found.pairs == 3
    assert found.verdict == "not shown"


def test_pairs_are_by_seed_and_only_of_seeds_both_have():
    found = paired_difference({0: 5.0, 2: 9.0, 3: 1.0}, {2: 8.0, 0: 3.0, 7: 50.0})
    assert (found.mean, found.pairs) == (1.5, 2)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([3.0, 3.1, 2.9], "holds"),
        ([3.0, 0.1, 0.0], "not shown"),
        ([-3.0, 1.0, 1.0], "not shown"),
        ([-2.0, 1.98, -0.01], "not shown"),  # -0.01 is as little shown as +0.01
        ([2.0, -1.98, 0.01], "not shown"),
        ([-3.0, -3.1, -2.9], "hurts"),
        ([0.0, 0.0, 0.0], "not shown"),
        ([5.0], "not shown"),  # one seed shows nothing
        ([-5.0], "not shown"),
    ],
)
def test_verdicts(values, verdict):
    zero = dict.fromkeys(range(len(values)), 0.0)
    assert paired_difference(dict(enumerate(values)), zero).verdict == verdict


@given(st.lists(st.tuples(aps, aps), min_size=2, max_size=40), st.floats(-10, 10))
def test_difference_is_antisymmetric_and_ignores_what_both_share(pairs, shift):
    ours = {seed: a + shift for seed, (a, _) in enumerate(pairs)}
    theirs = {seed: b + shift for seed, (_, b) in enumerate(pairs)}
    one, other = paired_difference(ours, theirs), paired_difference(theirs, ours)
    assert one.mean == pytest.approx(statistics.fmean(a - b for a, b in pairs), abs=1e-9)
    if one.low is None:  # no spread
        assert (one.p, other.low, other.p) == (None, None, None)
    else:
        assert (one.low, one.high) == (pytest.approx(-other.high), pytest.approx(-other.low))
        assert one.low <= one.mean <= one.high
    assert {one.verdict, other.verdict} in ({"holds", "hurts"}, {"not shown"})


@given(st.lists(st.one_of(st.none(), aps), max_size=8))
def test_spread_of_what_is_defined(values):
    defined = [value for value in values if value is not None]
    found = spread(values)
    if not defined:
        assert found is None
        return
    mean = sum(defined) / len(defined)
    assert found.mean == pytest.approx(mean)
    if len(defined) == 1:
        assert found.std is None
    else:
        assert found.std == pytest.approx(
            math.sqrt(sum((v - mean) ** 2 for v in defined) / (len(defined) - 1)), abs=1e-9
        )


def test_gap():
    assert gap_recovered(25, 20, 30) == 0.5
    assert gap_recovered(15, 20, 30) == -0.5
    assert gap_recovered(25, 20, 20) is None
    assert gap_recovered(25, 20, 10) is None


def by_seed(values):
    return dict(enumerate(values))


@given(st.lists(st.tuples(aps, aps), min_size=2, max_size=12))
def test_p_and_interval_are_those_of_the_paired_t_test(pairs):
    ours, theirs = np.array(pairs).T
    if np.std(ours - theirs) < 1e-3:
        return
    found = paired_difference(by_seed(ours.tolist()), by_seed(theirs.tolist()))
    expected = ttest_rel(ours, theirs)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(interval.low, abs=1e-6), pytest.approx(interval.high, abs=1e-6))


def test_differences_without_any_spread():
    assert paired_difference({0: 2.0, 1: 3.0}, {0: 2.0, 1: 3.0}).p == 1
    level = paired_difference({0: 4.1, 1: 5.1}, {0: 2.0, 1: 3.0})  # not the same float, 2.0999999999999996 and 2.1
    assert (level.mean, level.pairs) == (pytest.approx(2.1), 2)
    assert (level.low, level.high, level.p, level.verdict) == (None, None, None, "not shown")
    assert paired_difference({0: 4.0}, {0: 2.0}).p is None


@pytest.mark.parametrize(("degrees", "expected"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (120, 1.980)])
def test_quantiles_of_students_t_are_those_of_printed_tables(degrees, expected):
    assert t_quantile(degrees) == pytest.approx(expected, abs=5e-4)


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.04: times 4, 3, 2, 1 they are 0.04, 0.06, 0.06, 0.04, and none is below one before it.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_rejects_as_its_step_down_procedure_does(ps):
    rejected = set()
    for place, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        if (len(ps) - place) * ps[index] >= 0.05:
            break
        rejected.add(index)
    corrected = holm(ps)
    assert {index for index, p in enumerate(corrected) if p < 0.05} == rejected
    assert all(p <= adjusted <= 1 for p, adjusted in zip(ps, corrected, strict=True))


def test_a_difference_that_alone_holds_is_not_shown_among_many():
    alone = paired_difference(by_seed([1.0, 1.3, 0.9, 1.6]), dict.fromkeys(range(4), 0.0))
    assert (alone.verdict, alone.p_holm) == ("holds", None)
    far = Difference(5.0, 4.9, 5.1, 4, p=1e-6)
    weak = [Difference(0.1, -1.0, 1.2, 4, p=0.8) for _ in range(10)]
    found = judged_together(
        {"this": alone, "far": far, "one seed": Difference(9.0, None, None, 1), **dict(enumerate(weak))}
    )
    # Twelve differences have a p. They are 24 tests, and one has a smaller p. The test of one direction has half of p.
    assert found["this"].p_holm == pytest.approx(23 * alone.p / 2)
    assert found["this"].verdict == "not shown"
    assert found["far"].verdict == "holds"
    assert (found["one seed"].p_holm, found["one seed"].verdict) == (None, "not shown")


def test_the_direction_of_each_difference_is_a_test_of_its_own():
    found = judged_together({p: Difference(-1.0, -2.0, 0.0, 3, p=p) for p in (0.01, 0.019, 0.9)})
    # One-sided 0.005, 0.0095, 0.45 and 0.55, 0.9905, 0.995: times 6, 5 and 4. Holm's p of three tests would be 0.038.
    assert [each.p_holm for each in found.values()] == pytest.approx([0.03, 0.0475, 1.0])
    assert judged_together({"alone": Difference(1.0, 0.0, 2.0, 3, p=0.03)})["alone"].p_holm == 0.03


def test_all_pairs_are_there_both_ways_and_judged_together():
    rows = {"a": by_seed([5.0, 6.0, 7.0]), "b": by_seed([1.0, 2.1, 2.9]), "c": {2: 4.0}, "d": {7: 1.0}}
    found = all_pairs(rows)
    assert {row: set(others) for row, others in found.items()} == {
        "a": {"b", "c"},
        "b": {"a", "c"},
        "c": {"a", "b"},
        "d": set(),
    }
    assert found["a"]["b"] == reverse(found["b"]["a"])
    assert found["a"]["b"].p_holm == found["a"]["b"].p  # the only pair with a p
    assert found["b"]["a"].mean == -4.0
    assert found["a"]["c"].p is None


def test_ranks_by_hand():
    def pair(mean, p_holm):
        return Difference(mean, 0.0, 0.0, 3, p=0.0, p_holm=p_holm)

    above, level = pair(1.0, 0.01), pair(1.0, 0.2)
    pairs = {
        "a": {"b": level, "c": above, "d": above},
        "b": {"a": reverse(level), "c": level, "d": above},
        "c": {"a": reverse(above), "b": reverse(level), "d": level},
        "d": {"a": reverse(above), "b": reverse(above), "c": reverse(level)},
    }
    assert rank_ranges(pairs) == {
        "a": RankRange(1, 2),
        "b": RankRange(1, 3),
        "c": RankRange(2, 4),
        "d": RankRange(3, 4),
    }


def test_the_interval_of_the_gap_is_where_a_t_test_does_not_reject():
    values, baseline, teacher = [24.0, 25.5, 23.1, 24.9], [20.0, 22.0, 21.0, 20.5], 31.0
    low, high = gap_interval(by_seed(values), by_seed(baseline), teacher)
    share = gap_recovered(statistics.fmean(values), statistics.fmean(baseline), teacher)
    assert low < share < high
    for end in (low, high):
        rest = [x - b - end * (teacher - b) for x, b in zip(values, baseline, strict=True)]
        assert ttest_1samp(rest, 0).pvalue == pytest.approx(0.05)


def test_an_interval_of_the_gap_that_has_no_end_is_none():
    baseline = by_seed([20.0, 30.0, 25.0])
    values = by_seed([22.0, 31.0, 27.0])
    assert gap_interval(values, baseline, 26.0) is None  # the baseline is not clearly below the teacher
    assert gap_interval(values, baseline, 10.0) is None
    assert gap_interval({0: 22.0}, baseline, 60.0) is None
    assert gap_interval(by_seed([22.1, 23.1]), by_seed([20.0, 21.0]), 60.0) is not None  # equal gains, unequal gaps
    assert gap_interval(by_seed([22.1, 22.1]), by_seed([20.0, 20.0]), 60.0) is None  # no spread at all
    low, high = gap_interval(values, baseline, 60.0)
    assert 0 < low < high < 1


def test_p_in_words():
    assert (p_text(0.0344), p_text(0.0004), p_text(1.0)) == ("0.034", "below 0.001", "1.000")
