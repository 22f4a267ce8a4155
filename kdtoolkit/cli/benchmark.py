"""`kd benchmark`: run a suite, print its leaderboard."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kdtoolkit.cli._common import Device, device_name, examples, help_alone

app = typer.Typer(help="Compare methods on a leaderboard.")


@app.callback(invoke_without_command=True)
def _group(context: typer.Context) -> None:
    help_alone(context)


@app.command(
    "run",
    epilog=examples(
        "kd benchmark run",
        "kd benchmark run photos --data my_photos --seeds 5",
        "kd benchmark run my_suite.yaml --only CrossKD --only PKD --jobs 2",
    ),
)
def run(
    suite: Annotated[str, typer.Argument(help="An embedded suite (kd benchmark suites) or a YAML file.")] = "quick",
    data: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            metavar="PATH",
            help="Run on this data set: a folder in COCO, Ultralytics YOLO or Pascal VOC format, or a YOLO YAML file.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Where results go: a folder for each suite, and the teachers.")
    ] = Path("runs"),
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Cells at a time. Default: one a core on CPU, 1 on a GPU.")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where to train; auto takes a GPU if there is one.")] = Device.AUTO,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds, instead of the suite's.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Run only this entry and the baseline; repeat for more.")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=32, help="Image size in pixels, instead of the suite's; of photos the longest side."),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad images and annotations of --data out, instead of stopping.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run again what is done already.")] = False,
    any_version: Annotated[
        bool,
        typer.Option(
            "--any-version",
            help="Keep finished cells with the same settings, even if kdtoolkit, its libraries or the hardware have "
            "changed since. Results that are older than this option are run again.",
        ),
    ] = False,
    allow_code: Annotated[
        bool,
        typer.Option(
            "--allow-code", help="Import the Python modules that the suite names as models: package:callable."
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the board and errors alone.")] = False,
) -> None:
    """Train, distil and compare on a leaderboard.

    A teacher, a student alone (the baseline) and a student for each entry of the suite are trained and evaluated.
    Results go to OUT/SUITE, cell by cell. Finished cells are not run again, so an interrupted run continues where it
    was.
    """
    from kdtoolkit.listing import suite_path

    suite_path(suite)  # a name that does not exist is told before torch is imported

    from rich.console import Console

    from kdtoolkit.benchmark.board import build_board
    from kdtoolkit.benchmark.report import print_board
    from kdtoolkit.benchmark.runner import run_suite
    from kdtoolkit.benchmark.suite import change, check_runs_no_code
    from kdtoolkit.benchmark.suite_file import load_suite
    from kdtoolkit.data.opening import name_of

    chosen = load_suite(suite)
    if not allow_code:
        check_runs_no_code(chosen)
    changes = {
        "root": data.resolve() if data else None,
        "image_size": image_size,
        "on_bad": "skip" if skip_bad else None,
    }
    chosen = change(chosen, data={name: value for name, value in changes.items() if value is not None})
    chosen = change(chosen, seeds=seeds or chosen.seeds)
    root = out / (f"{chosen.name}-{name_of(data)}" if data else chosen.name)
    console = Console()
    outcome = run_suite(
        chosen,
        root,
        console=Console(quiet=quiet),
        jobs=jobs,
        device=device_name(device),
        only=only or (),
        fresh=fresh,
        any_version=any_version,
    )
    print_board(build_board(root), console)
    place = f"board: {root}/leaderboard.html (also .md, .csv, .json, .tex)"
    console.print(place, highlight=False, markup=False, soft_wrap=True)
    if outcome.interrupted:
        console.print("interrupted: what is finished is kept; the same command goes on from there", style="bold yellow")
        raise typer.Exit(130)
    if outcome.failures:
        for name, reason in outcome.failures.items():
            sys.stderr.write(f"failed: {name}: {reason}\n")
        sys.stderr.write("the same command runs the failed cells again\n")
        raise typer.Exit(1)


@app.command(
    "report", epilog=examples("kd benchmark report runs/quick", "kd benchmark report runs/a runs/b --out runs/both")
)
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


@app.command("suites")
def suites() -> None:
    """List the embedded suites."""
    from rich.console import Console

    from kdtoolkit.listing import print_suites

    print_suites(Console())
