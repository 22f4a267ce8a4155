"""Quantiles of Student's t, for means of few values."""

from __future__ import annotations

# Two-sided 95 % quantiles of Student's t, by degrees of freedom. A number between two entries takes the smaller entry:
# the interval is then a little wider than it needs to be.
_T95 = {
    **dict(enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228), start=1)),
    **dict(enumerate((2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086), start=11)),
    **{25: 2.060, 30: 2.042, 40: 2.021, 60: 2.000, 120: 1.980},
}


def t95(degrees: int) -> float:
    """Two-sided 95 % quantile of Student's t with this many degrees of freedom, at least 1."""
    return _T95[max(known for known in _T95 if known <= degrees)]
