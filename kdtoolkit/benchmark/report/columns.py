"""The columns of a board as texts, for people. `numbers` has the values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kdtoolkit.benchmark.board import Board, Row
from kdtoolkit.benchmark.stats import Difference, Probability, RankRange, Spread
from kdtoolkit.words import duration

FOOTNOTE = (
    "AP in percent: mean ± standard deviation over seeds. In brackets: the 95 % t-interval of a difference, taken seed "
    "by seed. Each interval stands alone: of twenty, one is expected to miss the true difference by chance. The claims "
    "are corrected for the number of entries by Holm's procedure, at equal steps and at equal time. On a board with "
    "one seed, intervals are over images, if the detections are stored: they show what different images for evaluation "
    "would change. "
    "Gap: how much of the way from the baseline's AP to the teacher's the row has gone."
)


@dataclass(frozen=True)
class Column:
    """A column of the board.

    `text`: a row's text. `value`: what rows are sorted by; None comes last. `main`: whether the page shows the column
    before its reader asks for all. `meaning`: what the column says, in one sentence.
    """

    name: str
    text: Callable[[Row], str]
    value: Callable[[Row], float | str | None]
    meaning: str
    main: bool = True


def spread_text(spread: Spread | None) -> str:
    """`31.2 ± 0.4`; `31.2` for one seed; `-` if undefined."""
    if spread is None:
        return "-"
    return f"{spread.mean:.1f}" if spread.std is None else f"{spread.mean:.1f} ± {spread.std:.1f}"


def mean_text(spread: Spread | None) -> str:
    """`31.2`, or `-` if undefined."""
    return "-" if spread is None else f"{spread.mean:.1f}"


def difference_text(difference: Difference | None) -> str:
    """`+1.2 [+0.3, +2.1]`; `+1.2` for one pair of seeds; `-` if there is none."""
    return "-" if difference is None else difference.text


def rank_text(rank: RankRange | None) -> str:
    """`1`; `1-3` if the row may have any of these ranks; `-` if it is not ranked."""
    if rank is None:
        return "-"
    return f"{rank.low}" if rank.low == rank.high else f"{rank.low}-{rank.high}"


def p_text(difference: Difference | None) -> str:
    """The corrected p: `0.030`, `< 0.001`, or `-` if there is none."""
    if difference is None or difference.p_holm is None:
        return "-"
    return "< 0.001" if difference.p_holm < 0.001 else f"{difference.p_holm:.3f}"


def gap_text(row: Row) -> str:
    """`62 % [40, 84]`, `62 %` without an interval, or `-` if undefined."""
    if row.gap_recovered is None:
        return "-"
    share = f"{100 * row.gap_recovered:.0f} %"
    if row.gap_interval is None:
        return share
    low, high = row.gap_interval
    return f"{share} [{100 * low:.0f}, {100 * high:.0f}]"


def probability_text(found: Probability | None) -> str:
    """`89 % [60, 100]`, or `-` if undefined."""
    if found is None:
        return "-"
    return f"{100 * found.value:.0f} % [{100 * found.low:.0f}, {100 * found.high:.0f}]"


def _metric(name: str) -> Callable[[Row], float | None]:
    return lambda row: None if (found := row.metrics[name]) is None else found.mean


COLUMNS = (
    Column("entry", lambda row: row.entry, lambda row: row.entry.lower(), "the row: a baseline, or methods"),
    Column(
        "rank",
        lambda row: rank_text(row.rank),
        lambda row: None if row.rank is None else row.rank.low + row.rank.high / 1000,
        "the ranks that the row may have, 1 for the best: several where rows cannot be told apart",
    ),
    Column("AP", lambda row: spread_text(row.metrics["ap"]), _metric("ap"), "COCO's AP in percent, ± the deviation"),
    Column(
        "vs baseline",
        lambda row: difference_text(row.versus_baseline),
        lambda row: None if row.versus_baseline is None else row.versus_baseline.mean,
        "difference in AP from the baseline with the same number of steps, with its 95 % interval",
    ),
    Column(
        "vs equal time",
        lambda row: difference_text(row.versus_equal_time),
        lambda row: None if row.versus_equal_time is None else row.versus_equal_time.mean,
        "difference in AP from the baseline that got as much time, with its 95 % interval",
    ),
    Column("gap", gap_text, lambda row: row.gap_recovered, "share of the way from the baseline's AP to the teacher's"),
    Column(
        "P(better)",
        lambda row: probability_text(row.p_improvement),
        lambda row: None if row.p_improvement is None else row.p_improvement.value,
        "probability that one training of the row has a higher AP than one of the baseline with a different seed",
        main=False,
    ),
    Column("AP50", lambda row: mean_text(row.metrics["ap50"]), _metric("ap50"), "AP at an IoU of 0.5"),
    Column("AP75", lambda row: mean_text(row.metrics["ap75"]), _metric("ap75"), "AP at an IoU of 0.75"),
    Column(
        "AP S / M / L",
        lambda row: " / ".join(mean_text(row.metrics[f"ap_{size}"]) for size in ("small", "medium", "large")),
        _metric("ap_small"),
        "AP of small, medium and large objects",
        main=False,
    ),
    Column("seeds", lambda row: str(len(row.seeds)), lambda row: len(row.seeds), "trainings of the row", main=False),
    Column("steps", lambda row: f"{row.steps:.0f}", lambda row: row.steps, "steps of a training", main=False),
    Column(
        "ms/step",
        lambda row: "-" if row.step_ms is None else f"{row.step_ms:.0f}",
        lambda row: row.step_ms,
        "what a step of training costs",
    ),
    Column(
        "train time",
        lambda row: "-" if row.train_seconds is None else duration(row.train_seconds),
        lambda row: row.train_seconds,
        "the whole training by the clock",
    ),
    Column(
        "memory",
        lambda row: "-" if row.peak_memory_mb is None else f"{row.peak_memory_mb:.0f} MB",
        lambda row: row.peak_memory_mb,
        "the peak of memory until the end of training",
        main=False,
    ),
    Column("parameters", lambda row: f"{row.parameters:,}", lambda row: row.parameters, "of the detector", main=False),
)
INIT = Column(
    "init",
    lambda row: row.init or "-",
    lambda row: row.init or None,
    "whose weights the student started from",
    main=False,
)


def table_rows(board: Board) -> list[Row]:
    """The teacher's row, then the rows of students, highest AP first."""
    return [*([board.teacher] if board.teacher else []), *board.rows]


def columns_of(board: Board) -> tuple[Column, ...]:
    """The columns of a board: `init` only where students start from the teacher's weights."""
    return (*COLUMNS, INIT) if any(row.init for row in board.rows) else COLUMNS
