"""`kd benchmark run` and `kd benchmark suites`: run a suite, and list the embedded ones."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdtoolkit.cli._common import DATA_HELP, Device
from kdtoolkit.errors import KDError

if TYPE_CHECKING:
    from rich.console import Console

    from kdtoolkit.benchmark.executor import Executor


class Where(StrEnum):
    """Where cells run."""

    LOCAL = "local"
    RAY = "ray"


class Tracker(StrEnum):
    """What shows curves of running cells."""

    TENSORBOARD = "tensorboard"


@dataclass(frozen=True)
class Seeds:
    """The seeds to run. `are_a_share`: whether they are some of the board's seeds, and not all of them."""

    chosen: range
    are_a_share: bool


def _seeds(text: str) -> Seeds:
    """The seeds that `5` (the first five) or `3-5` (three of them) means. Raises an error of usage."""
    found = re.fullmatch(r"(?:(\d{1,6})-)?(\d{1,6})", text.strip())
    if found is None:
        raise typer.BadParameter(
            f"{text!r} is neither a number of seeds, as 5, nor a range of them, as 3-5, below a million"
        )
    first, last = found[1], int(found[2])
    chosen = range(last) if first is None else range(int(first), last + 1)
    if not chosen:
        raise typer.BadParameter(f"{text!r} has no seed: write 5 for the seeds 0 to 4, or 3-5 for the seeds 3, 4 and 5")
    return Seeds(chosen, first is not None)


def run(
    suite: Annotated[str, typer.Argument(help="An embedded suite (kd benchmark suites) or a YAML file.")] = "quick",
    data: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            metavar="PATH",
            help=f"Run on this data set. {DATA_HELP}",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Where results go: a folder for each suite, and the teachers.")
    ] = Path("runs"),
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Cells at a time. Default: one a core on CPU, 1 on a GPU; on Ray what the cluster has room for."
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="CPU threads of a cell. Default: the cores, divided by --jobs; on Ray 1 on CPU, and on a GPU its "
            "share of its node's cores.",
        ),
    ] = None,
    executor: Annotated[
        Where,
        typer.Option(help="Where cells run: on this machine, or on a Ray cluster (pip install 'kdtoolkit[ray]')."),
    ] = Where.LOCAL,
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="The head of the Ray cluster. Default: the cluster that runs on this machine, or else a new one here.",
        ),
    ] = None,
    device: Annotated[Device, typer.Option(help="Where to train; auto takes a GPU if there is one.")] = Device.AUTO,
    seeds: Annotated[
        Seeds | None,
        typer.Option(
            parser=_seeds,
            metavar="N | FROM-TO",
            help="Number of seeds, instead of the suite's; or a range as 3-5, so that several machines share them out "
            "(kd benchmark merge).",
        ),
    ] = None,
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
    tracker: Annotated[
        Tracker | None,
        typer.Option(help="Write curves for TensorBoard too: tensorboard --logdir OUT/SUITE/tensorboard."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the board and errors alone.")] = False,
) -> None:
    """Train, distil and compare on a leaderboard.

    A teacher, a student alone (the baseline) and a student for each entry of the suite are trained and evaluated.
    Results go to OUT/SUITE, cell by cell. Finished cells are not run again, so an interrupted run continues where it
    was.
    """
    from kdtoolkit.listing import suite_path

    suite_path(suite)  # a name that does not exist is told before torch is imported
    if executor is Where.LOCAL and "torch" not in sys.modules:
        from kdtoolkit.benchmark import cell_server

        cell_server.start()  # it imports torch on a second core, while this process does

    from rich.console import Console

    from kdtoolkit.benchmark.board import build_board
    from kdtoolkit.benchmark.report import print_board
    from kdtoolkit.benchmark.runner import run_suite
    from kdtoolkit.benchmark.runs import seeds_asked_for
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
    root = out / (f"{chosen.name}-{name_of(data)}" if data else chosen.name)
    if seeds is not None:
        count = seeds.chosen.stop
        if seeds.are_a_share:  # the board keeps the seeds that the suite has, and those that the folder has
            count = max(count, chosen.seeds, seeds_asked_for(root))
        chosen = change(chosen, seeds=count)
    console, progress = Console(), Console(quiet=quiet)
    with _executor(executor, ray_address, device, jobs, threads, progress) as place:
        outcome = run_suite(
            chosen,
            root,
            console=progress,
            executor=place,
            only=only or (),
            fresh=fresh,
            any_version=any_version,
            seeds=None if seeds is None else seeds.chosen,
            tensorboard=tracker is Tracker.TENSORBOARD,
        )
    print_board(build_board(root), console)
    files = f"board: {root}/leaderboard.html (also .md, .csv, .json, .tex)"
    console.print(files, highlight=False, markup=False, soft_wrap=True)
    if outcome.interrupted:
        console.print("interrupted: what is finished is kept; the same command goes on from there", style="bold yellow")
        raise typer.Exit(130)
    if outcome.failures:
        for name, reason in outcome.failures.items():
            sys.stderr.write(f"failed: {name}: {reason}\n")
        sys.stderr.write("the same command runs the failed cells again\n")
        raise typer.Exit(1)


@contextmanager
def _executor(
    where: Where, address: str | None, device: Device, jobs: int | None, threads: int | None, console: Console
) -> Iterator[Executor]:
    """Where the cells run. A Ray cluster that was started for them ends with the context. Raises KDError."""
    if where is Where.LOCAL:
        from kdtoolkit.benchmark.workers import Workers
        from kdtoolkit.workflow.detecting import found_device

        if address is not None:
            raise KDError("--ray-address is for cells on a Ray cluster: add --executor ray")
        yield Workers(str(found_device(device.value)), jobs, threads)
        return
    try:
        from kdtoolkit.benchmark.ray_workers import RayWorkers
    except ModuleNotFoundError as error:
        raise KDError("Ray is not installed: pip install 'kdtoolkit[ray]'") from error
    chosen = None if device is Device.AUTO else device.value
    tell = partial(console.print, style="yellow", markup=False, highlight=False, soft_wrap=True)
    with RayWorkers(address, device=chosen, slots=jobs, threads=threads, tell=tell) as workers:
        yield workers


def suites() -> None:
    """List the embedded suites."""
    from rich.console import Console

    from kdtoolkit.listing import print_suites

    print_suites(Console())
