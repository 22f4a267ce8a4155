from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from kdtoolkit.benchmark.improvement import probability_of_improvement

values = st.lists(st.integers(0, 9).map(float), min_size=2, max_size=6)


def seeds(values, first=0):
    return dict(enumerate(values, first))


@settings(deadline=None)  # the first interval of a size takes longer
@given(values, values)
def test_of_different_seeds_the_probability_is_the_share_of_mann_and_whitneys_u(ours, theirs):
    found = probability_of_improvement(seeds(ours), seeds(theirs, 100))
    assert found.value == pytest.approx(mannwhitneyu(ours, theirs).statistic / (len(ours) * len(theirs)))
    assert found.low <= found.value <= found.high


@settings(deadline=None)  # the first interval of a size takes longer
@given(values, values, st.integers(0, 6))
def test_the_opposite_question_has_the_opposite_answer(ours, theirs, first):
    one = probability_of_improvement(seeds(ours), seeds(theirs, first))
    two = probability_of_improvement(seeds(theirs, first), seeds(ours))
    assert (one.value, one.low, one.high) == pytest.approx((1 - two.value, 1 - two.high, 1 - two.low), abs=1e-6)
    assert one.low <= one.value <= one.high


@pytest.mark.parametrize(("xs", "ys"), [(3, 3), (5, 5), (4, 6)])
def test_the_interval_excludes_one_half_where_the_exact_rank_test_rejects(xs, ys):
    for places in combinations(range(xs + ys), xs):
        ours = [float(place) for place in places]
        theirs = [float(place) for place in range(xs + ys) if place not in places]
        found = probability_of_improvement(seeds(ours), seeds(theirs, 100))
        rejected = mannwhitneyu(ours, theirs, method="exact").pvalue < 0.05
        assert (found.low > 0.5 or found.high < 0.5) == rejected


def test_by_hand_two_of_each():
    # X wins all four pairs if the two largest are of X: with odds r that is 2r/(2r + 2) * r/(r + 2). It is 0.025 at the
    # lower end: r^2 = 0.025 (r + 1)(r + 2), so r = (0.075 + sqrt(0.075^2 + 4 * 0.975 * 0.05)) / (2 * 0.975).
    odds = (0.075 + (0.075**2 + 4 * 0.975 * 0.05) ** 0.5) / (2 * 0.975)
    found = probability_of_improvement({0: 3.0, 1: 4.0}, {0: 1.0, 1: 2.0})
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(odds / (1 + odds), abs=1e-6)


def test_pairs_of_the_same_seed_do_not_count():
    # Each seed's own pair is won, and 3 of the 6 pairs of different seeds.
    found = probability_of_improvement({0: 1.1, 1: 2.1, 2: 3.1}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert found.value == 0.5
    # The interval is not narrower than that of all 9 pairs, of which 6 are won.
    all_pairs = probability_of_improvement({3: 1.1, 4: 2.1, 5: 3.1}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert all_pairs.value == pytest.approx(6 / 9)
    assert (found.low < all_pairs.low, found.high) == (True, all_pairs.high)


def test_fewer_than_two_seeds_show_nothing():
    assert probability_of_improvement({}, {0: 1.0}) is None
    assert probability_of_improvement({0: 2.0}, {0: 1.0}) is None
    assert probability_of_improvement({0: 2.0}, {0: 1.0, 1: 3.0}) is None


@pytest.mark.parametrize(("shift", "truth"), [(0.0, 0.5), (1.190, 0.80)])  # of normal values: P = Phi(shift / sqrt(2))
def test_the_interval_covers_at_three_seeds(shift, truth):
    rng = np.random.default_rng(0)
    found = [
        probability_of_improvement(seeds(rng.normal(shift, 1, 3)), seeds(rng.normal(0, 1, 3))) for _ in range(1000)
    ]
    assert np.mean([each.low <= truth <= each.high for each in found]) >= 0.95


@pytest.mark.parametrize("count", [3, 10])
def test_a_strong_effect_of_the_seed_biases_nothing(count):
    rng = np.random.default_rng(count)
    found = []
    for _ in range(1000):
        seed = rng.normal(0, 1, count)
        ours, theirs = seed + 0.3 + rng.normal(0, 0.1, count), seed + rng.normal(0, 0.1, count)
        found.append(probability_of_improvement(seeds(ours), seeds(theirs)))
    truth = 0.5836  # Phi(0.3 / sqrt(2 * (1 + 0.01)))
    values = [each.value for each in found]
    assert np.mean(values) == pytest.approx(truth, abs=4 * np.std(values) / 1000**0.5)
    assert np.mean([each.low <= truth <= each.high for each in found]) >= 0.95
