"""The probability that one training of a method has a higher AP than one of the baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
from numpy.typing import NDArray

from kdtoolkit.benchmark.stats import LEVEL, Probability

_ENDS = (-20.0, 20.0)  # of the logarithm of the odds: a probability of 2e-9 and of 1 - 2e-9


def probability_of_improvement(values: Mapping[int, float], reference: Mapping[int, float]) -> Probability | None:
    """P(X > Y) of a training X of one row and a training Y of another with a different seed. Equal values count half.

    `values` and `reference`: the number that each row has for a seed. None if a row has fewer than two seeds.

    The value is the share of pairs of trainings in which X is higher, as in Agarwal et al., Deep reinforcement learning
    at the edge of the statistical precipice, NeurIPS 2021. Their trainings are independent. Here two trainings of the
    same seed have first weights and the order of images in common, so pairs of the same seed are left out.

    Agarwal et al. take a bootstrap over seeds for the interval. With 3 seeds such an interval misses the truth about
    half of the time (docs/results/statistics.md), so the interval here inverts the exact rank test instead: it holds
    all probabilities at which what was seen, or more, has a probability of at least 2.5 % on either side. It assumes
    that X is distributed as the largest of r values like Y, for some r (Lehmann, The power of rank tests, Annals of
    Mathematical Statistics 1953; r need not be a whole number). For rows of equal distribution this is no assumption.
    If one row is far noisier, the interval is too narrow. Seeds that make both rows better or worse make it too wide.
    """
    if min(len(values), len(reference)) < 2:
        return None
    higher, lower = (np.array(list(row.values()), np.float64) for row in (values, reference))
    points = (np.sign(higher[:, None] - lower[None, :]) + 1) / 2  # of X in each pair: 1, 0.5 or 0
    seeds, others = (np.array(list(row)) for row in (values, reference))
    value = float(points[seeds[:, None] != others[None, :]].mean())
    # The exact test is one of all pairs. The interval holds the one that belongs to `value` as well.
    wins = float(points.sum()), round(value * points.size, 6)
    low, _ = _interval(higher.size, lower.size, min(wins))
    _, high = _interval(higher.size, lower.size, max(wins))
    return Probability(value, low, high)


@cache
def _interval(xs: int, ys: int, wins: float) -> tuple[float, float]:
    """All P(X > Y) that the exact test does not reject, if X won this many of xs * ys pairs."""
    # A half win counts as none for the lower end and as one for the upper end: the wider interval.
    least, most = math.floor(wins), math.ceil(wins)
    low = 0.0 if least == 0 else _root(lambda odds: _wins(xs, ys, odds)[least:].sum())
    high = 1.0 if most == xs * ys else _root(lambda odds: _wins(xs, ys, odds)[: most + 1].sum())
    return low, high


def _root(tail: Callable[[float], float]) -> float:
    """The P(X > Y) at which a tail of the number of wins has a probability of 2.5 %. `tail`: of the odds of X > Y."""
    from scipy.optimize import brentq  # imported late: a run begins without it

    log = brentq(lambda log: tail(math.exp(log)) - LEVEL / 2, *_ENDS)
    return 1 / (1 + math.exp(-log))


def _wins(xs: int, ys: int, odds: float) -> NDArray[np.float64]:
    """How likely X wins 0, 1, ... xs * ys pairs, if P(X > Y) : P(Y > X) = odds, under Lehmann's alternatives.

    The values are taken away one by one, the largest first. With a of X and b of Y left, it is one of X with
    probability a * odds / (a * odds + b) (Savage, Annals of Mathematical Statistics 1956), and it wins against all b.
    """
    none = np.eye(1, xs * ys + 1)[0]
    found = {(a, b): none for a in range(xs + 1) for b in range(ys + 1) if a == 0 or b == 0}
    for a in range(1, xs + 1):
        for b in range(1, ys + 1):
            first = a * odds / (a * odds + b)
            found[a, b] = first * np.roll(found[a - 1, b], b) + (1 - first) * found[a, b - 1]
    wins: NDArray[np.float64] = found[xs, ys]
    return wins
