"""`kd benchmark report`: print and write the leaderboard of stored results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
    """Print and write the leaderboard again, from stored results.

    Several runs become one report: a part for each, and a ranking over all of them. It needs --out.
    """
    from rich.console import Console

    from kdtoolkit.benchmark.report import View, print_board, write_report
    from kdtoolkit.errors import KDError

    if len(runs) > 1 and out is None:
        raise KDError("a report of several runs needs a folder of its own: add --out FOLDER")
    console = Console()
    views = [View.of(run) for run in runs]
    for view in views:
        print_board(view.board, console)
    page = write_report(views, out or runs[0])
    console.print(f"report: {page} (also .md, .csv, .json, .tex)", highlight=False, markup=False, soft_wrap=True)
