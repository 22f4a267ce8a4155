"""The columns of a board as texts, for people. `numbers` has the values."""

from __future__ import annotations

from collections.abc import Callable

from kdtoolkit.benchmark.board import Board, Row
from kdtoolkit.benchmark.stats import Difference, Spread
from kdtoolkit.words import duration

FOOTNOTE = (
    "AP in percent: mean ± standard deviation over seeds. In brackets: the 95 % t-interval of a difference, taken seed "
    "by seed. Each interval stands alone: of twenty, one is expected to miss the true difference by chance. The claims "
    "are corrected for the number of entries by Holm's procedure, at equal steps and at equal time. "
    "Gap: how much of the way from the baseline's AP to the teacher's the row has gone."
)


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


def gap_text(row: Row) -> str:
    """`62 %`, or `-` if undefined."""
    return "-" if row.gap_recovered is None else f"{100 * row.gap_recovered:.0f} %"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "entry": lambda row: row.entry,
    "AP": lambda row: spread_text(row.metrics["ap"]),
    "vs baseline": lambda row: difference_text(row.versus_baseline),
    "vs equal time": lambda row: difference_text(row.versus_equal_time),
    "gap": gap_text,
    "AP50": lambda row: mean_text(row.metrics["ap50"]),
    "AP75": lambda row: mean_text(row.metrics["ap75"]),
    "AP S / M / L": lambda row: " / ".join(
        mean_text(row.metrics[f"ap_{size}"]) for size in ("small", "medium", "large")
    ),
    "seeds": lambda row: str(len(row.seeds)),
    "steps": lambda row: f"{row.steps:.0f}",
    "ms/step": lambda row: "-" if row.step_ms is None else f"{row.step_ms:.0f}",
    "train time": lambda row: "-" if row.train_seconds is None else duration(row.train_seconds),
    "memory": lambda row: "-" if row.peak_memory_mb is None else f"{row.peak_memory_mb:.0f} MB",
    "parameters": lambda row: f"{row.parameters:,}",
}
INIT = "init"  # a column of boards whose students start from the teacher's weights


def table_rows(board: Board) -> list[Row]:
    """The teacher's row, then the rows of students, highest AP first."""
    return [*([board.teacher] if board.teacher else []), *board.rows]


def columns_of(board: Board) -> dict[str, Callable[[Row], str]]:
    """The columns of a board: their names, and what makes a row's text."""
    if not any(row.init for row in board.rows):
        return COLUMNS
    return {**COLUMNS, INIT: lambda row: row.init or "-"}
