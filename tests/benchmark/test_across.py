from itertools import permutations, product

import numpy as np
import pytest
from scipy.stats import friedmanchisquare

from kdtoolkit.benchmark.across import across, critical_difference, friedman_p
from kdtoolkit.benchmark.board import Board, Row
from kdtoolkit.benchmark.stats import spread
from kdtoolkit.errors import KDError


def board(title, aps, *, data="", methods=None, unranked=(), seeds=1):
    """A board that has APs alone: nothing else counts across boards. `aps`: of seed 0, or by seed."""
    by_seed = {entry: ap if isinstance(ap, dict) else {0: ap} for entry, ap in aps.items()}
    rows = [
        Row(
            entry,
            (methods or {}).get(entry, entry),
            tuple(own),
            {"ap": spread(own.values())},
            None,
            None,
            None,
            1,
            None,
            None,
            None,
            1,
            aps=own,
        )
        for entry, own in by_seed.items()
    ]
    pairs = {entry: {} for entry in aps if entry not in unranked}
    return Board(title, "", {"data": data or title}, tuple(rows), None, (), (), pairs, seeds=seeds)


def test_by_hand():
    found = across(
        [
            board("cells", {"a": 30.0, "b": 20.0, "c": 10.0}),
            board("cards", {"b": 25.0, "c": 20.0, "a": 25.0}),
            board("chess", {"a": 9.0, "b": 3.0, "c": 5.0}),
        ]
    )
    assert found.boards == ("cells", "cards", "chess")
    assert [(row.entry, row.aps, row.ranks) for row in found.rows] == [
        ("a", (30.0, 25.0, 9.0), (1, 1.5, 1)),
        ("b", (20.0, 25.0, 3.0), (2, 1.5, 3)),
        ("c", (10.0, 20.0, 5.0), (3, 3, 2)),
    ]
    assert [row.mean_rank for row in found.rows] == pytest.approx([3.5 / 3, 6.5 / 3, 8 / 3])
    # Of the 216 permutations of the ranks on each board, 48 have rank sums that are as far apart.
    assert found.friedman_p == pytest.approx(48 / 216, abs=0.02)
    assert found.critical_difference == pytest.approx(2.343 * (3 * 4 / 18) ** 0.5, abs=1e-3)
    assert found.groups == (("a", "b", "c"),)
    assert found.notes == (
        "3 data sets show large differences only: mean ranks that differ by less than 1.91 may be chance",
    )


@pytest.mark.parametrize(
    ("rows", "quantile"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (6, 2.850), (10, 3.164)]
)
def test_the_critical_difference_has_the_quantiles_of_demsars_table(rows, quantile):
    assert critical_difference(rows, 14) == pytest.approx(quantile * (rows * (rows + 1) / (6 * 14)) ** 0.5, abs=2e-3)


def test_friedmans_p_is_that_of_all_permutations():
    aps = np.array([[30.0, 20.0, 10.0, 5.0], [25.0, 26.0, 20.0, 21.0], [9.0, 3.0, 5.0, 1.0]])
    statistic = friedmanchisquare(*aps.T).statistic
    every = [
        friedmanchisquare(*np.array(rows).T).statistic
        for rows in product(permutations(range(4)), repeat=2)
        for rows in [((0, 1, 2, 3), *rows)]
    ]
    assert friedman_p(aps) == pytest.approx(np.mean(np.array(every) >= statistic - 1e-9), abs=0.02)


def test_friedmans_p_is_that_of_chi_squared_for_many_boards():
    aps = np.random.default_rng(0).normal(size=(60, 5))
    aps[:, 0] += 0.5
    assert friedman_p(aps) == pytest.approx(friedmanchisquare(*aps.T).pvalue, abs=0.02)


def test_rows_that_differ_clearly_are_in_different_groups():
    aps = {"a": 40.0, "b": 30.0, "c": 20.0, "d": 10.0}  # mean ranks 1, 2, 3, 4; the least difference is 1.48
    found = across([board(str(i), aps) for i in range(10)])
    assert found.critical_difference == pytest.approx(1.483, abs=1e-3)
    assert found.groups == (("a", "b"), ("b", "c"), ("c", "d"))
    assert found.notes == ()
    far = across([board(str(i), {"a": 40.0, "b": 30.0}) for i in range(10)])
    assert (far.friedman_p, far.groups) == (None, ())


def test_two_data_sets_are_told_to_show_nothing():
    found = across([board(name, {"a": 3.0, "b": 2.0, "c": 1.0}) for name in ("cells", "cards")])
    assert found.notes == (
        "2 data sets cannot tell any of 3 rows apart, whatever the APs are: mean ranks differ by 2 at most, and a "
        "difference below 2.34 may be chance",
    )


def test_rows_without_an_equal_are_left_out_and_named():
    one = board(
        "cells", {"a": 3.0, "b": 2.0, "baseline (equal time)": 9.0, "c": 1.0}, unranked=["baseline (equal time)"]
    )
    two = board(
        "cards", {"a": 3.0, "b": 2.0, "baseline (equal time)": 9.0, "d": 5.0}, unranked=["baseline (equal time)"]
    )
    found = across([one, two])
    assert [(row.entry, row.ranks) for row in found.rows] == [("a", (1, 1)), ("b", (2, 2))]
    assert "rows that not all boards have are left out: c, d" in found.notes


def test_boards_of_the_same_data_are_named():
    found = across([board(title, {"a": 3.0, "b": b}, data="cells") for title, b in (("one", 2.0), ("two", 2.5))])
    assert "some boards have the same data" in found.notes[-1]


def test_rows_are_ranked_by_the_seeds_that_all_of_them_have():
    # Seed 1 is easy. By the means of what each row has, b would be above a on the first board.
    cells = board("cells", {"a": {0: 20.0, 1: 30.0}, "b": {1: 29.0}, "c": {1: 1.0}}, seeds=2)
    cards = board("cards", {"a": {0: 3.0, 1: 3.0}, "b": {0: 2.0, 1: 2.0}, "c": {0: 1.0, 1: 1.0}}, seeds=2)
    found = across([cells, cards])
    assert [(row.entry, row.aps, row.ranks) for row in found.rows] == [
        ("a", (30.0, 3.0), (1, 1)),
        ("b", (29.0, 2.0), (2, 2)),
        ("c", (1.0, 1.0), (3, 3)),
    ]
    assert found.notes[-1] == (
        "cells is unfinished: its ranks are of 1 of 2 seeds, those that all ranked rows have (1)"
    )
    assert not any("cards" in note for note in found.notes)


def test_a_board_that_lacks_a_seed_of_every_row_is_unfinished_too():
    found = across([board("cells", {"a": 2.0, "b": 1.0}, seeds=3), board("cards", {"a": 2.0, "b": 1.0})])
    assert any(note.startswith("cells is unfinished: its ranks are of 1 of 3 seeds") for note in found.notes)


def test_equal_rows_are_no_error():
    found = across([board(name, {"a": 2.0, "b": 2.0, "c": 2.0}) for name in ("cells", "cards")])
    assert (found.friedman_p, found.groups) == (1.0, (("a", "b", "c"),))


def test_boards_that_cannot_be_ranked_together_are_refused():
    cells = board("cells", {"a": 3.0, "b": 2.0})
    with pytest.raises(KDError, match="cells and a copy are the same board: name each run once"):
        across([cells, board("a copy", {"a": 3.0, "b": 2.0}, data="cells")])
    with pytest.raises(KDError, match="cells: the rows a, b have no seed in common: finish the run"):
        across([board("cells", {"a": {0: 3.0}, "b": {1: 2.0}}), board("cards", {"a": 3.0, "b": 2.0})])
    with pytest.raises(KDError, match="needs two boards or more"):
        across([cells])
    with pytest.raises(KDError, match="cells, cards have fewer than two rows in common"):
        across([cells, board("cards", {"a": 3.0, "c": 2.0})])
    with pytest.raises(KDError, match=r"entry 'b' differs between the boards \(cells: b; cards: b\(weight=2\)\)"):
        across([cells, board("cards", {"a": 3.0, "b": 2.0}, methods={"b": "b(weight=2)"})])


@pytest.mark.parametrize(("boards", "rows"), [(4, 3), (5, 6), (10, 4)])
def test_without_a_true_difference_false_alarms_are_rare(boards, rows):
    rng = np.random.default_rng(boards)
    sets = rng.normal(size=(1000, boards, rows))
    means = np.argsort(np.argsort(-sets, axis=2), axis=2).mean(axis=1)
    assert np.mean(np.ptp(means, axis=1) >= critical_difference(rows, boards)) <= 0.065
    assert np.mean([friedman_p(aps) < 0.05 for aps in sets[:150]]) <= 0.1
