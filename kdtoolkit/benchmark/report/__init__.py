"""Boards in all their forms: a page, Markdown, CSV, JSON, LaTeX, and a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdtoolkit.benchmark.across import Across
from kdtoolkit.benchmark.report.html import to_html
from kdtoolkit.benchmark.report.latex import to_latex
from kdtoolkit.benchmark.report.markdown import to_markdown
from kdtoolkit.benchmark.report.numbers import to_csv, to_json
from kdtoolkit.benchmark.report.terminal import print_across, print_board
from kdtoolkit.benchmark.report.view import View
from kdtoolkit.benchmark.store import write_atomic

__all__ = [
    "View",
    "print_across",
    "print_board",
    "to_csv",
    "to_html",
    "to_json",
    "to_latex",
    "to_markdown",
    "write_report",
]


def write_report(views: Sequence[View], folder: Path, across: Across | None = None) -> Path:
    """Write the forms of one board as leaderboard.html, .md, .csv, .json and .tex, of several ones as report.html ...

    Returns the path of the page. Raises StoreError if the folder cannot be written.
    """
    name = "leaderboard" if len(views) == 1 else "report"
    contents = {
        "md": to_markdown(views, across),
        "csv": to_csv(views),
        "json": to_json(views, across),
        "tex": to_latex(views),
        "html": to_html(views, across),
    }
    for ending, content in contents.items():
        write_atomic(folder / f"{name}.{ending}", content.encode())
    return folder / f"{name}.html"
