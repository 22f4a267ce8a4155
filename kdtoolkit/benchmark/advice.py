"""What a user can do where few seeds show too little: one sentence."""

from __future__ import annotations

import math
from statistics import median

from kdtoolkit.benchmark.board import Board
from kdtoolkit.benchmark.stats import Difference, smallest_shown, t_quantile
from kdtoolkit.words import counted

ENOUGH = 5  # seeds; docs/statistics.md says how often 3 and 5 show a gain


def more_seeds(board: Board) -> str:
    """What more seeds would show of the methods that are not told apart from the baseline; empty if there are none.

    The differences that are shown are estimated from how much the differences of these rows vary between seeds.
    """
    rows = [(row, row.versus_baseline) for row in board.rows if row.methods and row.versus_baseline is not None]
    methods = sum(difference.p is not None for _, difference in rows)
    unseen = {row.entry: each for row, each in rows if each.verdict == "not shown" and _varies(each)}
    if not unseen or (pairs := max(each.pairs for each in unseen.values())) >= ENOUGH:
        return ""
    deviation = median(map(_deviation, unseen.values()))
    now, then = (smallest_shown(deviation, count, methods) for count in (pairs, ENOUGH))
    beside = f" and {counted(methods, 'method')}" if methods > 1 else ""
    return (
        f"{', '.join(unseen)} cannot be told apart from the baseline: with {counted(pairs, 'seed')}{beside}, only a "
        f"mean difference of about {now:.1f} AP or more is shown. The same command with `--seeds {ENOUGH}` adds the "
        f"missing cells; then about {then:.1f} AP is enough."
    )


def _varies(difference: Difference) -> bool:
    return difference.pairs > 1 and difference.low != difference.high


def _deviation(difference: Difference) -> float:
    """The standard deviation over seeds that a difference's interval comes from."""
    assert difference.low is not None
    assert difference.high is not None
    return (difference.high - difference.low) / 2 * math.sqrt(difference.pairs) / t_quantile(difference.pairs - 1)
