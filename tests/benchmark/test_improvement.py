from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from kdtoolkit.benchmark.improvement import probability_of_improvement

values = st.lists(st.integers(0, 9).map(float), min_size=2, max_size=6)


@given(values, values)
def test_the_probability_is_the_share_of_mann_and_whitneys_u(ours, theirs):
    found = probability_of_improvement(ours, theirs)
    assert found.value == pytest.approx(mannwhitneyu(ours, theirs).statistic / (len(ours) * len(theirs)))
    assert found.low <= found.value <= found.high


@given(values, values)
def test_the_opposite_question_has_the_opposite_answer(ours, theirs):
    one, two = probability_of_improvement(ours, theirs), probability_of_improvement(theirs, ours)
    assert (one.value, one.low, one.high) == pytest.approx((1 - two.value, 1 - two.high, 1 - two.low), abs=1e-6)


@pytest.mark.parametrize(("xs", "ys"), [(3, 3), (5, 5), (4, 6)])
def test_the_interval_excludes_one_half_where_the_exact_rank_test_rejects(xs, ys):
    for places in combinations(range(xs + ys), xs):
        ours = [float(place) for place in places]
        theirs = [float(place) for place in range(xs + ys) if place not in places]
        found = probability_of_improvement(ours, theirs)
        rejected = mannwhitneyu(ours, theirs, method="exact").pvalue < 0.05
        assert (found.low > 0.5 or found.high < 0.5) == rejected


def test_by_hand_two_of_each():
    # X wins all four pairs if the two largest are of X: with odds r that is 2r/(2r + 2) * r/(r + 2). It is 0.025 at the
    # lower end: r^2 = 0.025 (r + 1)(r + 2), so r = (0.075 + sqrt(0.075^2 + 4 * 0.975 * 0.05)) / (2 * 0.975).
    odds = (0.075 + (0.075**2 + 4 * 0.975 * 0.05) ** 0.5) / (2 * 0.975)
    found = probability_of_improvement([3.0, 4.0], [1.0, 2.0])
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(odds / (1 + odds), abs=1e-6)


def test_few_values():
    assert probability_of_improvement([], [1.0]) is None
    found = probability_of_improvement([2.0], [1.0, 3.0])
    assert (found.value, found.low, found.high) == (0.5, None, None)


def test_the_interval_covers_at_three_seeds():
    rng = np.random.default_rng(0)
    for shift, truth in ((0.0, 0.5), (1.190, 0.80)):  # of normal values: P = Phi(shift / sqrt(2))
        found = [probability_of_improvement(rng.normal(shift, 1, 3), rng.normal(0, 1, 3)) for _ in range(1000)]
        assert np.mean([each.low <= truth <= each.high for each in found]) >= 0.95
