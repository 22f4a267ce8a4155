import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdtoolkit.benchmark.stats import gap_recovered, paired_difference, spread

aps = st.floats(0, 100)


def test_paired_difference_by_hand():
    # Differences 1, 2, 3: mean 2, std 1, half width 4.303 / sqrt(3).
    found = paired_difference({0: 11.0, 1: 22.0, 2: 33.0}, {0: 10.0, 1: 20.0, 2: 30.0})
    assert found.mean == pytest.approx(2)
    assert found.low == pytest.approx(2 - 4.303 / math.sqrt(3))
    assert found.high == pytest.approx(2 + 4.303 / math.sqrt(3))
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
