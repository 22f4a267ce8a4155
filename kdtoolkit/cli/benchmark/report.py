"""`kd benchmark report`: print and write leaderboards from stored results."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kdtoolkit.errors import KDError


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", exists=True, file_okay=False, help="Folders of `kd benchmark run`."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, metavar="FOLDER", help="Where the report goes. Default: the folder of the run."),
    ] = None,
) -> None:
    """Print the leaderboard again from stored results, and write its files: page, Markdown, CSV, JSON, LaTeX.

    Several runs become one report in the folder of --out: a part for each, and a ranking over all of them.
    """
    if len(runs) > 1 and out is None:
        raise KDError("a report of several runs needs a folder of its own: add --out FOLDER")

    folder = out or runs[0]
    _check_writable(folder)

    from rich.console import Console

    from kdtoolkit.benchmark.across import across
    from kdtoolkit.benchmark.report import View, print_across, print_board, write_report

    console = Console()
    views = [View.of(run, pictures=True) for run in runs]
    ranking = across([view.board for view in views]) if len(views) > 1 else None
    for view in views:
        print_board(view.board, console)
    if ranking is not None:
        print_across(ranking, console)
    page = write_report(views, folder, ranking)
    console.print(f"report: {page} (also .md, .csv, .json, .tex)", highlight=False, markup=False, soft_wrap=True)


def _check_writable(folder: Path) -> None:
    """Make the folder if it is missing, before pictures take their time. Raises KDError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KDError(f"cannot make the folder {folder}: {error.strerror}. Choose a different one (--out)") from error
    if not os.access(folder, os.W_OK):
        raise KDError(f"cannot write into {folder}: permission denied. Choose a different folder (--out)")
