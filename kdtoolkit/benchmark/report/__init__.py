"""The board in all its forms: a page, Markdown, CSV, JSON and a table on the terminal."""

from __future__ import annotations

from pathlib import Path

from kdtoolkit.benchmark.board import Board
from kdtoolkit.benchmark.report.columns import FOOTNOTE, columns_of, table_rows
from kdtoolkit.benchmark.report.html import to_html
from kdtoolkit.benchmark.report.markdown import to_markdown
from kdtoolkit.benchmark.report.numbers import to_csv, to_json
from kdtoolkit.benchmark.report.terminal import print_board
from kdtoolkit.benchmark.store import write_atomic

__all__ = ["print_board", "to_csv", "to_json", "to_markdown", "write_board"]


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
