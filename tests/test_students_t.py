import math

import pytest

from kdtoolkit.students_t import t95


@pytest.mark.parametrize(
    ("degrees", "expected"), [(1, 12.706), (2, 4.303), (9, 2.262), (20, 2.086), (22, 2.086), (35, 2.042), (500, 1.980)]
)
def test_t_quantiles_and_the_wider_one_in_between(degrees, expected):
    assert t95(degrees) == expected


def _t_density(x, n):
    scale = math.lgamma((n + 1) / 2) - math.lgamma(n / 2)
    return math.exp(scale) / math.sqrt(n * math.pi) * (1 + x * x / n) ** (-(n + 1) / 2)


@pytest.mark.parametrize("degrees", [*range(1, 21), 25, 30, 40, 60, 120])
def test_t_quantiles_hold_95_percent_of_the_density(degrees):
    steps, limit = 20_000, t95(degrees)
    width = 2 * limit / steps
    mass = sum(_t_density(-limit + (i + 0.5) * width, degrees) for i in range(steps)) * width
    assert mass == pytest.approx(0.95, abs=1e-4)
