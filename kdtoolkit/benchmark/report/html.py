"""The board as one HTML page. It has no script, loads nothing, and is light or dark like the reader's system."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

from kdtoolkit.benchmark.board import Board, Row


def to_html(board: Board, columns: Sequence[str], rows: Sequence[tuple[Row, Sequence[str]]], footnote: str) -> str:
    """The board as a page.

    `columns`: the table's headings; the first is "entry". `rows`: each row with the texts of all other columns.
    """
    environment = Environment(
        loader=PackageLoader("kdtoolkit.benchmark.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    entries = {row.entry: row.methods for row in board.rows if row.methods}
    template = environment.get_template("page.html")
    return template.render(board=board, columns=columns, rows=rows, footnote=footnote, entries=entries)
