"""Boards as tables on the terminal. What users wrote is never read as markup."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdtoolkit.benchmark.across import Across
from kdtoolkit.benchmark.advice import more_seeds
from kdtoolkit.benchmark.board import Board
from kdtoolkit.benchmark.report.columns import Column, columns_of, table_rows

FIRST = ("entry", "AP", "vs baseline", "rank", "gap", "AP50", "vs equal time", "ms/step", "init")  # if space is scarce
ENTRY = 21  # characters that a name gets before others columns get theirs; longer ones are folded
SPACE = 2  # characters between columns


def print_board(board: Board, console: Console) -> None:
    """Print table, claims, what more seeds would show, and warnings.

    A narrow terminal gets few columns; the files have all of them.
    """
    title = Text(f"{board.title}: {board.description}", style="table.title")
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1, 0, 0))
    shown = _fitting(board, console.width)
    table.add_column("entry", overflow="fold")
    for column in shown[1:]:
        table.add_column(column.name, justify="right", no_wrap=True)
    for row in table_rows(board):
        style = "bold" if row.methods else "dim" if row is board.teacher else ""
        table.add_row(*(Text(column.text(row)) for column in shown), style=style)
    console.print(table)
    if board.summary:
        console.print(Text(board.summary, style="bold"))
    colours = {"holds": "green", "not shown": "yellow", "hurts": "red"}
    for claim in board.claims:
        console.print(Text(claim.text, style=colours[claim.verdict]))
    if advice := more_seeds(board):
        console.print(Text(advice))
    for warning in board.warnings:
        console.print(Text(f"WARNING  {warning}", style="bold red"))


def print_across(across: Across, console: Console) -> None:
    """Print the ranking over several boards."""
    title = Text("over all data sets: AP, and in brackets the rank", style="table.title")
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("entry", overflow="fold")
    table.add_column("mean rank", justify="right", no_wrap=True)
    for name in across.boards:
        table.add_column(Text(name), justify="right", overflow="fold")
    for row in across.rows:
        cells = (f"{ap:.1f} ({rank:g})" for ap, rank in zip(row.aps, row.ranks, strict=True))
        table.add_row(Text(row.entry), f"{row.mean_rank:.2f}", *cells)
    console.print(table)
    for group in across.groups:
        console.print(Text(f"cannot be told apart: {', '.join(group)}", style="yellow"))
    for note in across.notes:
        console.print(Text(note))


def _fitting(board: Board, width: int) -> list[Column]:
    """The columns that fit into a width, the most important ones first, in the board's order."""
    columns = columns_of(board)
    order = sorted(columns, key=lambda column: FIRST.index(column.name) if column.name in FIRST else len(FIRST))
    left, names = width - SPACE, set()
    for column in order:
        own = max(len(text) for text in (column.name, *map(column.text, table_rows(board))))
        left -= (min(own, ENTRY) if column.name == "entry" else own) + SPACE
        if left < 0:
            break
        names.add(column.name)
    return [column for column in columns if column.name in names]
