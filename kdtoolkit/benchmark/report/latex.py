"""The board as a LaTeX table, for papers."""

from __future__ import annotations

from collections.abc import Sequence

from kdtoolkit.benchmark.board import Board, Row
from kdtoolkit.benchmark.report.columns import COLUMNS, table_rows
from kdtoolkit.benchmark.report.view import View

SHOWN = ("AP", "vs baseline", "vs equal time", "gap", "AP50", "AP75")
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
}


def escaped(text: str) -> str:
    """The text with LaTeX's special characters escaped."""
    return "".join(_SPECIAL.get(letter, letter) for letter in text)


def to_latex(views: Sequence[View]) -> str:
    """A table for each board, with the rules of the package booktabs. Rows that may be the best are bold."""
    lines = [r"% needs \usepackage{booktabs}"]
    for view in views:
        lines += ["", *_table(view.board)]
    return "\n".join([*lines, ""])


def _table(board: Board) -> list[str]:
    shown = [column for column in COLUMNS if column.name in SHOWN]
    head = " & ".join(["", *(escaped(column.name) for column in shown)])
    caption = (
        rf"{escaped(f'{board.title}: {board.description}')}. AP in percent, mean $\pm$ standard deviation over seeds. "
        r"Differences are paired by seed; in brackets their 95\,\% intervals."
    )
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{caption}}}",
        rf"\begin{{tabular}}{{l{'r' * len(shown)}}}",
        r"\toprule",
        rf"{head} \\",
        r"\midrule",
    ]
    for row in table_rows(board):
        cells = [escaped(row.entry), *(_number(column.text(row)) for column in shown)]
        lines.append(" & ".join(_bold(cells, row)) + r" \\")
        if row is board.teacher:
            lines.append(r"\midrule")
    return [*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]


def _bold(cells: list[str], row: Row) -> list[str]:
    """The cells, with name and AP in bold if the row may be the best."""
    if row.rank is None or row.rank.low > 1:
        return cells
    return [rf"\textbf{{{cell}}}" if place < 2 else cell for place, cell in enumerate(cells)]


def _number(text: str) -> str:
    return "--" if text == "-" else escaped(text).replace("+", "$+$").replace("-", "$-$")
