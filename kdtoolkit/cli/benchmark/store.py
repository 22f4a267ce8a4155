"""`kd benchmark list`, `show`, `compare`, `merge`: look at stored results, and bring those of machines together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", exists=True, file_okay=False, help="A folder that `kd benchmark run` has made.")
]


def list_runs(
    runs: Annotated[
        Path, typer.Argument(metavar="RUNS", exists=True, file_okay=False, help="A folder with runs in it.")
    ] = Path("runs"),
) -> None:
    """List all runs in a folder: how far they are, when and where they ran, and how large they are."""
    from rich.console import Console

    from kdtoolkit.benchmark.report.store import print_runs

    print_runs(runs, Console())


def show(
    run: RunFolder,
    row: Annotated[
        str | None, typer.Argument(metavar="ROW", help="A row of the board, such as PKD or teacher.")
    ] = None,
    seed: Annotated[int | None, typer.Argument(metavar="SEED", min=0, help="A seed of the row.")] = None,
) -> None:
    """Show what a run holds or, with ROW, all that is stored about the cells of a row."""
    from rich.console import Console

    from kdtoolkit.benchmark.report.store import print_records, print_states
    from kdtoolkit.benchmark.runs import open_run

    found = open_run(run)
    if row is None:
        print_states(found, Console())
    else:
        print_records(found, row, seed, Console())


def compare(first: RunFolder, second: RunFolder) -> None:
    """Compare two runs: what differs, and how the rows that both have differ in AP.

    The differences are the second run's AP minus the first's, seed by seed, with a 95 % interval. What is said of a row
    is corrected for the number of rows. Runs that were evaluated on different images are not subtracted.
    """
    from rich.console import Console

    from kdtoolkit.benchmark.report.store import print_comparison
    from kdtoolkit.benchmark.run_pair import compare_runs

    print_comparison(compare_runs(first, second), Console())


def merge(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", file_okay=False, help="The folder to fill. A run in it keeps its cells.")
    ],
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", exists=True, file_okay=False, help="The runs to copy cells from.")
    ],
) -> None:
    """Copy the cells of several runs, perhaps of several machines, into one folder, and print its board.

    The runs must have the same data, teacher and settings; their rows and seeds may differ. What does not fit is
    refused before anything is written.
    """
    from rich.console import Console
    from rich.text import Text

    from kdtoolkit.benchmark.merge import merge as merge_runs
    from kdtoolkit.benchmark.report import View, print_board, write_report
    from kdtoolkit.words import counted

    merged = merge_runs(out, runs)
    view = View.of(out)
    write_report([view], out)
    console = Console()
    print_board(view.board, console)
    for words in merged.left_out:
        console.print(Text(f"WARNING  {words}", style="bold red"), soft_wrap=True)
    twice = f"; {counted(merged.twice, 'cell')} with equal results were kept once" if merged.twice else ""
    console.print(Text(f"{out}: {counted(merged.new, 'new cell')}{twice}"), soft_wrap=True)
    console.print(Text("`kd benchmark run --any-version` with the same suite goes on in this folder"), soft_wrap=True)
