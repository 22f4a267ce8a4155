"""The command line `kd`: parses, calls, prints."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from kdtoolkit.errors import KDError

T = TypeVar("T")

app = typer.Typer(
    help="Knowledge distillation for object detectors: benchmark methods head-to-head.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
benchmark = typer.Typer(help="Compare methods on a leaderboard.", no_args_is_help=True)
app.add_typer(benchmark, name="benchmark")


class Device(StrEnum):
    """Where to train."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def main() -> None:
    """Entry point: a mistake of the user is one line on stderr and exit code 2, never a traceback."""
    try:
        app()
    except KDError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kdtoolkit {version('kdtoolkit')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@benchmark.command("run")
def run_command(
    suite: Annotated[str, typer.Argument(help="An embedded suite (kd benchmark suites) or a YAML file.")] = "quick",
    data: Annotated[
        Path | None,
        typer.Option(help="Run on this folder in COCO format: annotations/train.json, annotations/val.json, images/."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where results go: a folder for each suite, and the teachers.")] = Path(
        "runs"
    ),
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
) -> None:
    """Train teacher, baseline and methods, and compare them on a leaderboard.

    Results land in OUT/SUITE as they come; what is done is not run again, so an interrupted run goes on where it was.

    Examples:
      kd benchmark run

      kd benchmark run photos --data my_photos --seeds 5

      kd benchmark run my_suite.yaml --only CrossKD --only PKD --jobs 2
    """
    from kdtoolkit.benchmark.board import build_board
    from kdtoolkit.benchmark.report import print_board
    from kdtoolkit.benchmark.runner import run_suite
    from kdtoolkit.benchmark.suite import change, load_suite

    chosen = load_suite(suite)
    changes = {
        "root": data.resolve() if data else None,
        "image_size": image_size,
        "on_bad": "skip" if skip_bad else None,
    }
    chosen = change(chosen, data={name: value for name, value in changes.items() if value is not None})
    chosen = change(chosen, seeds=seeds or chosen.seeds)
    root = out / (f"{chosen.name}-{data.resolve().name}" if data else chosen.name)
    console = Console()
    outcome = run_suite(chosen, root, console=console, jobs=jobs, device=_device(device), only=only or (), fresh=fresh)
    print_board(build_board(root), console)
    place = f"board: {root}/leaderboard.html (also .md, .csv, .json)"
    console.print(place, highlight=False, markup=False, soft_wrap=True)
    if outcome.interrupted:
        console.print("interrupted: what is finished is kept; the same command goes on from there", style="bold yellow")
        raise typer.Exit(130)
    if outcome.failures:
        for name, reason in outcome.failures.items():
            sys.stderr.write(f"failed: {name}: {reason}\n")
        sys.stderr.write("the same command runs the failed cells again\n")
        raise typer.Exit(1)


@benchmark.command("report")
def report_command(
    run_dir: Annotated[Path, typer.Argument(help="A folder that `kd benchmark run` has made.")],
) -> None:
    """Write the leaderboard again from stored results, and print it.

    Example:
      kd benchmark report runs/quick
    """
    from kdtoolkit.benchmark.board import build_board
    from kdtoolkit.benchmark.report import print_board, write_board

    board = build_board(run_dir)
    write_board(board, run_dir)
    print_board(board, Console())


@benchmark.command("suites")
def suites_command() -> None:
    """List the embedded suites."""
    from kdtoolkit.benchmark.suite import embedded_suites, load_suite

    table = Table("suite", "takes about", "seeds", "what it is", box=None)
    for name in embedded_suites():
        suite = load_suite(name)
        table.add_row(name, f"{suite.expected_minutes:g} min", str(suite.seeds), suite.description)
    Console().print(table)


@app.command("methods")
def methods_command(
    name: Annotated[str | None, typer.Argument(help="Show this method alone, with its arguments and defaults.")] = None,
) -> None:
    """List the distillation methods, or explain one.

    Examples:
      kd methods

      kd methods CrossKD
    """
    from kdtoolkit.inspect import default_arguments, print_method
    from kdtoolkit.methods import all_methods
    from kdtoolkit.options import did_you_mean

    known = all_methods()
    if name is not None:
        names = {each.lower(): each for each in known}
        if name.lower() not in names:
            raise KDError(f"unknown method '{name}'{did_you_mean(name, known)}; there are {', '.join(known)}")
        print_method(known[names[name.lower()]], Console())
        return
    table = Table("method", "needs", "loss terms", "defaults", "paper", box=None)
    for each, method in known.items():
        defaults = ", ".join(f"{parameter}={value!r}" for parameter, value in default_arguments(method).items())
        table.add_row(each, ", ".join(sorted(method.needs)), ", ".join(method.terms), defaults, method.paper)
    Console().print(table)


@app.command("adapters")
def adapters_command(
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Run every method on every ordered pair of families: tiny random models.")
    ] = False,
    method: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="With --matrix: this method only; repeat for more.")
    ] = None,
    family: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="With --matrix: this family only; repeat for more.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="With --matrix: write the tables, with all reasons, into this file too.")
    ] = None,
) -> None:
    """List the detector families that installed libraries bring, or run all methods on all pairs of them.

    Examples:
      kd adapters

      kd adapters --matrix --method CrossKD
    """
    from kdtoolkit.contract import adapt
    from kdtoolkit.matrix import families, print_matrix, run_matrix, to_markdown
    from kdtoolkit.methods import all_methods

    console = Console()
    if not matrix and (method or family or markdown):
        raise KDError("--method, --family and --markdown go with --matrix")
    known = families()
    if not matrix:
        table = Table("family", "adapter", "predicts at", "shows", box=None)
        for name, example in known.items():
            adapter = adapt(example(3))
            table.add_row(
                name, type(adapter).__name__, adapter.spec.priors, ", ".join(sorted(adapter.spec.capabilities))
            )
        console.print(table)
        return
    methods = _chosen(all_methods(), method, "method")
    found = run_matrix(_chosen(known, family, "family"), methods, console=console)
    print_matrix(found, console)
    for name in methods if method else ():
        print_matrix(found, console, name)
    if markdown is not None:
        try:
            markdown.write_text(to_markdown(found), encoding="utf-8")
        except OSError as error:
            raise KDError(f"cannot write {markdown}: {error.strerror}") from error


@app.command("inspect")
def inspect_command(
    model: Annotated[
        str,
        typer.Argument(
            help="kdtoolkit/gfl?backbone=resnet18, torchvision/fcos_resnet50_fpn, hf/PATH-OR-NAME, "
            "ultralytics/yolo11n, or package.module:callable for one of your own.",
        ),
    ],
    classes: Annotated[int, typer.Option(min=1, help="Number of classes, without background.")] = 80,
    weights: Annotated[
        Path | None, typer.Option(help="Load this file (.safetensors, or .pth with a state dict) into it.")
    ] = None,
    image_size: Annotated[int, typer.Option(min=32, help="Side of the image to measure on, in pixels.")] = 256,
) -> None:
    """Show a detector as the toolkit sees it: levels, stages, priors, capabilities, methods that apply, sizes.

    Examples:
      kd inspect torchvision/fasterrcnn_resnet50_fpn --classes 3

      kd inspect "kdtoolkit/gfl?backbone=resnet18&bins=9" --image-size 512
    """
    from kdtoolkit.inspect import inspect_detector, print_inspection
    from kdtoolkit.models import build_model, load_weights

    built = build_model(model, classes)
    if weights is not None:
        load_weights(built, weights)
    print_inspection(inspect_detector(built, image_size), Console())


def _chosen(known: Mapping[str, T], names: list[str] | None, what: str) -> dict[str, T]:
    """Those of `known` that are named; all of them where none is. Raises KDError for an unknown name."""
    from kdtoolkit.options import did_you_mean

    for name in names or ():
        if name not in known:
            raise KDError(f"unknown {what} '{name}'{did_you_mean(name, known)}; there are {', '.join(known)}")
    return {name: known[name] for name in names or known}


def _device(device: Device) -> str:
    import torch

    available = torch.cuda.is_available()
    if device is Device.CUDA and not available:
        raise KDError("there is no CUDA device: use --device cpu, or install a torch build with CUDA")
    return "cpu" if device is Device.CPU or not available else "cuda"
