"""The board as Markdown, as CSV, as JSON and as a table on the terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdtoolkit.benchmark.board import METRICS, Board, Row
from kdtoolkit.benchmark.html import to_html
from kdtoolkit.benchmark.stats import Difference, Spread
from kdtoolkit.benchmark.store import write_atomic
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
WIDE = 170  # characters that all columns need
NARROW = ("entry", "AP", "vs baseline", "gap", "AP50", "ms/step")  # columns for 80 characters; the claims say the rest


def table_rows(board: Board) -> list[Row]:
    """The teacher's row, then the rows of students, highest AP first."""
    return [*([board.teacher] if board.teacher else []), *board.rows]


def columns_of(board: Board) -> dict[str, Callable[[Row], str]]:
    """The columns of a board: their names, and what makes a row's text."""
    if not any(row.init for row in board.rows):
        return COLUMNS
    return {**COLUMNS, INIT: lambda row: row.init or "-"}


def write_board(board: Board, folder: Path) -> None:
    """Write leaderboard.md, .csv, .json and .html. Raises StoreError if the folder cannot be written."""
    columns = columns_of(board)
    rows = [(row, [text(row) for text in list(columns.values())[1:]]) for row in table_rows(board)]
    contents = {
        "md": to_markdown(board),
        "csv": to_csv(board),
        "json": to_json(board),
        "html": to_html(board, list(columns), rows, FOOTNOTE),
    }
    for ending, content in contents.items():
        write_atomic(folder / f"leaderboard.{ending}", content.encode())


def to_json(board: Board) -> str:
    """The whole board as JSON. Rows have `init` only where students start from the teacher's weights."""
    fields = asdict(board)
    if INIT not in columns_of(board):
        for row in filter(None, (fields["teacher"], *fields["rows"])):
            del row["init"]
    return json.dumps(fields, indent=1, ensure_ascii=False)


def to_markdown(board: Board) -> str:
    """The board as Markdown."""
    lines = [f"# {board.title}", "", board.description, ""]
    lines += [f"> **Warning:** {warning}\n" for warning in board.warnings]
    columns = columns_of(board)
    lines += [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    for row in table_rows(board):
        lines.append("| " + " | ".join(text(row).replace("|", "\\|") for text in columns.values()) + " |")
    lines += ["", FOOTNOTE, "", "## Claims", ""]
    lines += [f"- {claim.text}" for claim in board.claims] or ["None yet."]
    lines += ["", "## Settings", "", *(f"- {name}: {value}" for name, value in board.facts.items())]
    methods = [f"- {row.entry}: {row.methods}" for row in board.rows if row.methods]
    return "\n".join([*lines, *(["", "## Entries", "", *methods] if methods else []), ""])


def to_csv(board: Board) -> str:
    """The board's rows as CSV: one column for each number, empty if undefined."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    differences = ("versus_baseline", "versus_equal_time")
    scalars = ("gap_recovered", "steps", "step_ms", "train_seconds", "peak_memory_mb", "parameters")
    header = ["entry", "methods", "seeds", *(f"{name}_{part}" for name in METRICS for part in ("mean", "std"))]
    inits = [INIT] if INIT in columns_of(board) else []
    header += [f"{name}_{part}" for name in differences for part in ("mean", "low", "high")]
    writer.writerow([*header, *scalars, *inits])
    for row in table_rows(board):
        spreads = [row.metrics[name] for name in METRICS]
        values = [value for spread in spreads for value in ((spread.mean, spread.std) if spread else (None, None))]
        for difference in (row.versus_baseline, row.versus_equal_time):
            values += (difference.mean, difference.low, difference.high) if difference else (None, None, None)
        values += [getattr(row, name) for name in scalars]
        cells = ("" if value is None else f"{value:.6g}" for value in values)
        writer.writerow([row.entry, row.methods, len(row.seeds), *cells, *(row.init for _ in inits)])
    return buffer.getvalue()


def print_board(board: Board, console: Console) -> None:
    """Print table, claims and warnings. A narrow terminal gets few columns; the files have all of them."""
    columns = columns_of(board)
    names = tuple(columns) if console.width >= WIDE else (*NARROW, *([INIT] if INIT in columns else []))
    title = Text(f"{board.title}: {board.description}", style="table.title")
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("entry", overflow="fold")
    for name in names[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in table_rows(board):
        style = "bold" if row.methods else "dim" if row is board.teacher else ""
        table.add_row(*(Text(columns[name](row)) for name in names), style=style)
    console.print(table)
    colours = {"holds": "green", "not shown": "yellow", "hurts": "red"}
    for claim in board.claims:
        console.print(Text(claim.text, style=colours[claim.verdict]))
    for warning in board.warnings:
        console.print(Text(f"WARNING  {warning}", style="bold red"))
