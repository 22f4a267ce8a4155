"""One ranking over several boards: mean ranks, and the difference in them that several data sets can show."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AcrossRow:
    """One row over all boards. `aps`, `ranks`: its mean AP and its rank on each board; equal APs share a mean rank."""

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
