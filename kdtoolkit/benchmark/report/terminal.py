"""The board as a table on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdtoolkit.benchmark.board import Board
from kdtoolkit.benchmark.report.columns import INIT, columns_of, table_rows

WIDE = 170  # characters that all columns need
NARROW = ("entry", "AP", "vs baseline", "gap", "AP50", "ms/step")  # columns for 80 characters; the claims say the rest


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
