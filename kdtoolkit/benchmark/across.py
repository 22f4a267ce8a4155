"""One ranking over several boards: mean ranks, and the difference in them that several data sets can show.

The statistics are those of Demsar, Statistical comparisons of classifiers over multiple data sets, JMLR 2006. Each
board counts once, with each row's mean AP over the seeds that all ranked rows of the board have.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from kdtoolkit.benchmark.board import Board, Row
from kdtoolkit.benchmark.stats import LEVEL
from kdtoolkit.errors import KDError
from kdtoolkit.words import counted

_PERMUTATIONS = 9_999


@dataclass(frozen=True)
class AcrossRow:
    """One row over all boards. `aps`, `ranks`: its mean AP and its rank on each board; equal APs share a mean rank.

    The mean is over the seeds that all ranked rows of the board have, so that no row is ranked by easier seeds.
    """

    entry: str
    methods: str
    aps: tuple[float, ...]
    ranks: tuple[float, ...]
    mean_rank: float


@dataclass(frozen=True)
class Across:
    """A ranking over several boards.

    `boards`: their titles. `rows`: the rows that all boards have, by mean rank, the best first. `friedman_p`: the p of
    Friedman's test that all rows are equally good; None for two rows. `critical_difference`: two rows whose mean ranks
    differ by less cannot be told apart. `groups`: rows that cannot be told apart, by the names of their entries; a row
    may be in several groups. `notes`: sentences about what the numbers can and cannot show.
    """

    boards: tuple[str, ...]
    rows: tuple[AcrossRow, ...]
    friedman_p: float | None
    critical_difference: float
    groups: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def across(boards: Sequence[Board]) -> Across:
    """Rank the rows that all boards have: the baseline and the entries, which have equal steps on each board.

    Raises KDError for fewer than two boards, for the same board twice, for fewer than two rows that all boards have, if
    an entry has different methods on different boards, and if the rows of a board have no seed in common.
    """
    if len(boards) < 2:
        raise KDError("a ranking over data sets needs two boards or more: name the folders of several runs")
    for one, two in combinations(boards, 2):
        if (one.facts, one.rows) == (two.facts, two.rows):
            raise KDError(f"{one.title} and {two.title} are the same board: name each run once")
    ranked = [{row.entry: row for row in _ranked(board)} for board in boards]
    names = [name for name in ranked[0] if all(name in rows for rows in ranked)]
    if len(names) < 2:
        raise KDError(
            f"the boards {_listed(boards)} have fewer than two rows in common: run entries of the same name on each"
        )
    for name in names:
        if len({rows[name].methods for rows in ranked}) > 1:
            told = "; ".join(f"{board.title}: {rows[name].methods}" for board, rows in zip(boards, ranked, strict=True))
            raise KDError(f"entry '{name}' differs between the boards ({told}): rename it in one of the suites")
    seeds = [_shared(board, [rows[name] for name in names]) for board, rows in zip(boards, ranked, strict=True)]
    aps = np.array(  # (boards, rows)
        [
            [fmean(rows[name].aps[seed] for seed in common) for name in names]
            for rows, common in zip(ranked, seeds, strict=True)
        ]
    )
    from scipy.stats import rankdata  # imported late: it takes half a second, and single boards do without

    ranks = rankdata(-aps, axis=1)
    found = [
        AcrossRow(
            entry=name,
            methods=ranked[0][name].methods,
            aps=tuple(aps[:, place].tolist()),
            ranks=tuple(ranks[:, place].tolist()),
            mean_rank=float(ranks[:, place].mean()),
        )
        for place, name in enumerate(names)
    ]
    found.sort(key=lambda row: row.mean_rank)
    least = critical_difference(len(names), len(boards))
    return Across(
        boards=tuple(board.title for board in boards),
        rows=tuple(found),
        friedman_p=friedman_p(aps),
        critical_difference=least,
        groups=tuple(_groups(found, least)),
        notes=(*_notes(boards, ranked, names, least), *_unfinished(boards, ranked, names, seeds)),
    )


def friedman_p(aps: NDArray[np.float64]) -> float | None:
    """The p of Friedman's test that all rows are equally good, from APs (boards, rows); None for two rows.

    It assumes that the boards are independent of each other. p is the share of permutations of the ranks on each board
    whose mean ranks are as far apart, of 10,000 random ones. `scipy.stats.friedmanchisquare` takes chi-squared instead,
    which few boards do not follow: of four boards with three equal rows it rejects 7 %. Source: Friedman, The use of
    ranks to avoid the assumption of normality, JASA 1937.
    """
    from scipy.stats import rankdata

    if aps.shape[1] < 3:
        return None
    ranks = rankdata(aps, axis=1)
    drawn = np.random.default_rng(0).permuted(np.broadcast_to(ranks, (_PERMUTATIONS, *ranks.shape)), axis=2)
    far, observed = ((each.sum(axis=-2) ** 2).sum(axis=-1) for each in (drawn, ranks))
    return float(1 + np.count_nonzero(far >= observed - 1e-9)) / (1 + _PERMUTATIONS)


def critical_difference(rows: int, boards: int) -> float:
    """The smallest difference of two mean ranks that Nemenyi's test takes for a true one.

    If all rows are equally good, one of all pairs differs by that much with a probability of 5 % or less. Source:
    Nemenyi, Distribution-free multiple comparisons, Princeton 1963, as in Demsar 2006.
    """
    from scipy.stats import studentized_range

    quantile = float(studentized_range.ppf(1 - LEVEL, rows, math.inf)) / math.sqrt(2)
    return quantile * math.sqrt(rows * (rows + 1) / (6 * boards))


def _ranked(board: Board) -> Iterable[Row]:
    """The rows of a board that can be ranked beside each other."""
    return (row for row in board.rows if row.entry in board.pairs)


def _shared(board: Board, rows: Sequence[Row]) -> list[int]:
    """The seeds that all of these rows have, lowest first. Raises KDError if there is none."""
    common = sorted(set.intersection(*(set(row.aps) for row in rows)))
    if not common:
        told = ", ".join(row.entry for row in rows)
        raise KDError(f"{board.title}: the rows {told} have no seed in common: finish the run with `kd benchmark run`")
    return common


def _unfinished(
    boards: Sequence[Board], ranked: Sequence[dict[str, Row]], names: Sequence[str], seeds: Sequence[list[int]]
) -> Iterable[str]:
    for board, rows, common in zip(boards, ranked, seeds, strict=True):
        asked = max(board.seeds, len({seed for name in names for seed in rows[name].aps}))
        if len(common) < asked:
            have = ", ".join(map(str, common))
            yield (
                f"{board.title} is unfinished: its ranks are of {len(common)} of {counted(asked, 'seed')}, those that "
                f"all ranked rows have ({have})"
            )


def _groups(rows: Sequence[AcrossRow], least: float) -> Iterable[tuple[str, ...]]:
    """The largest runs of rows, sorted by mean rank, whose first and last differ by less than `least`."""
    end = 0
    for start, row in enumerate(rows):
        far = start
        while far < len(rows) and rows[far].mean_rank - row.mean_rank < least:
            far += 1
        if far > end and far - start > 1:
            yield tuple(each.entry for each in rows[start:far])
        end = max(end, far)


def _notes(
    boards: Sequence[Board], ranked: Sequence[dict[str, Row]], names: Sequence[str], least: float
) -> Iterable[str]:
    count, rows = counted(len(boards), "data set"), counted(len(names), "row")
    if least >= len(names) - 1:
        yield (
            f"{count} cannot tell any of {rows} apart, whatever the APs are: mean ranks differ by "
            f"{len(names) - 1} at most, and a difference below {least:.2f} may be chance"
        )
    elif len(boards) < 10:
        yield f"{count} show large differences only: mean ranks that differ by less than {least:.2f} may be chance"
    if left := dict.fromkeys(name for rows in ranked for name in rows if name not in names):
        yield f"rows that not all boards have are left out: {', '.join(left)}"
    data = [board.facts["data"] for board in boards]
    if len(set(data)) < len(data):
        yield (
            "some boards have the same data, but the test takes each board for an independent data set: p and the "
            "critical difference are too small"
        )


def _listed(boards: Sequence[Board]) -> str:
    return ", ".join(board.title for board in boards)
