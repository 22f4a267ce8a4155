"""What more seeds would show."""

import io

import pytest
from rich.console import Console

from kdtoolkit.benchmark.advice import more_seeds
from kdtoolkit.benchmark.board import build_board
from kdtoolkit.benchmark.report import print_board
from kdtoolkit.benchmark.stats import judged_together, paired_difference, smallest_shown
from kdtoolkit.benchmark.suite import BASELINE
from tests.benchmark.test_report import make_run


@pytest.mark.parametrize(("pairs", "together"), [(2, 1), (3, 5), (5, 5)])
def test_the_smallest_difference_that_is_shown_is_where_the_verdict_changes(pairs, together):
    noise = [(-1) ** place * 0.3 * (1 + place) for place in range(pairs)]
    mean = sum(noise) / pairs
    deviation = (sum((each - mean) ** 2 for each in noise) / (pairs - 1)) ** 0.5
    least = smallest_shown(deviation, pairs, together)
    for factor, verdict in ((0.999, "not shown"), (1.001, "holds")):
        values = {seed: each - mean + factor * least for seed, each in enumerate(noise)}
        found = {0: paired_difference(values, dict.fromkeys(values, 0.0))}
        found |= {place: paired_difference({0: 0.5, 1: -0.4}, {0: 0.0, 1: 0.0}) for place in range(1, together)}
        assert judged_together(found)[0].verdict == verdict


def printed(board):
    console = Console(file=io.StringIO(), width=100)
    print_board(board, console)
    return " ".join(console.file.getvalue().split())


def test_a_board_with_few_seeds_says_what_more_would_show(tmp_path):
    board = build_board(make_run(tmp_path))
    # Differences of +5.0, -0.5 and +4.5 deviate by 3.04. Of two methods the first is judged at 1.25 % on each side,
    # where Student's t is 6.21 for 3 seeds and 3.50 for 5: 6.21 * 3.04 / sqrt(3) and 3.50 * 3.04 / sqrt(5).
    assert more_seeds(board) == (
        "CrossKD+PKD cannot be told apart from the baseline: with 3 seeds and 2 methods, only a mean difference of "
        "about 10.9 AP or more is shown. The same command with `--seeds 5` adds the missing cells; then about 4.8 AP "
        "is enough."
    )
    assert more_seeds(board) in printed(board)


@pytest.mark.parametrize(
    ("aps", "seeds"),
    [
        ({BASELINE: [20, 22, 21], "PKD": [22.0, 24.2, 22.8]}, 3),  # it is shown
        ({BASELINE: [20] * 5, "PKD": [25, 20, 15, 22, 21]}, 5),
        ({BASELINE: [20], "PKD": [25]}, 1),
        ({BASELINE: [20, 22], "PKD": [20, 22]}, 2),  # nothing says how large chance is
        ({BASELINE: [20, 22]}, 2),
    ],
)
def test_all_further_boards_say_nothing(tmp_path, aps, seeds):
    board = build_board(make_run(tmp_path, aps, seeds=seeds))
    assert more_seeds(board) == ""
    assert "cells; then about" not in printed(board)
