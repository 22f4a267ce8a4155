"""The command line `kd`: parses, calls, prints.

Nothing here imports torch before a command needs it: help, lists and most errors come at once.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from kdtoolkit.errors import KDError
from kdtoolkit.options import did_you_mean

T = TypeVar("T")

app = typer.Typer(
    help="Knowledge distillation for object detectors: train with it, and compare methods head-to-head.",
    epilog="Start with `kd benchmark run`. `kd COMMAND --help` explains a command and shows examples.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
benchmark = typer.Typer(help="Compare methods on a leaderboard.")
app.add_typer(benchmark, name="benchmark")

# What typer raises for wrong arguments; the class itself has no public name.
_UsageError: Any = typer.BadParameter.__mro__[1]


class Device(StrEnum):
    """Where to train."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def main() -> None:
    """Entry point: a mistake of the user is one error on stderr and exit code 2, never a traceback."""
    try:
        sys.exit(app(prog_name="kd", standalone_mode=False))
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "kd"
        message = " ".join(error.format_message().replace("Value error, ", "").split())
        sys.stderr.write(f"error: {message} (see `{command} --help`)\n")
        sys.exit(2)
    except KDError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"kdtoolkit {version('kdtoolkit')}")
        raise typer.Exit


def _help_alone(context: typer.Context) -> None:
    """A group of commands without one of them shows what there is."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


def _examples(*commands: str) -> str:
    return "\n".join(["\b", "Examples:", *(f"  {command}" for command in commands)])


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    _help_alone(context)


@benchmark.callback(invoke_without_command=True)
def _benchmark(context: typer.Context) -> None:
    _help_alone(context)


@benchmark.command(
    "run",
    epilog=_examples(
        "kd benchmark run",
        "kd benchmark run photos --data my_photos --seeds 5",
        "kd benchmark run my_suite.yaml --only CrossKD --only PKD --jobs 2",
    ),
)
def run_command(
    suite: Annotated[str, typer.Argument(help="An embedded suite (kd benchmark suites) or a YAML file.")] = "quick",
    data: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Run on this folder in COCO format: annotations/train.json, annotations/val.json, images/.",
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
) -> None:
    """Train, distil and compare on a leaderboard.

    A teacher, a student alone (the baseline) and a student for each entry of the suite are trained and evaluated.
    Results land in OUT/SUITE as they come. What is done is not run again, so an interrupted run goes on where it was.
    """
    from kdtoolkit.listing import suite_path

    suite_path(suite)  # a name that does not exist is told before torch is imported

    from rich.console import Console

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


@benchmark.command("report", epilog=_examples("kd benchmark report runs/quick"))
def report_command(
    run_dir: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="A folder that `kd benchmark run` has made.")
    ],
) -> None:
    """Print the leaderboard again, from stored results.

    Its files in RUN_DIR are written again too.
    """
    from rich.console import Console

    from kdtoolkit.benchmark.board import build_board
    from kdtoolkit.benchmark.report import print_board, write_board

    board = build_board(run_dir)
    write_board(board, run_dir)
    print_board(board, Console())


@benchmark.command("suites")
def suites_command() -> None:
    """List the embedded suites."""
    from rich.console import Console

    from kdtoolkit.listing import print_suites

    print_suites(Console())


@app.command("methods", epilog=_examples("kd methods", "kd methods CrossKD"))
def methods_command(
    name: Annotated[str | None, typer.Argument(help="Show this method alone, with its arguments and defaults.")] = None,
) -> None:
    """List the distillation methods, or explain one."""
    from rich.console import Console

    from kdtoolkit.listing import all_method_facts, print_method, print_methods

    known = all_method_facts()
    if name is None:
        print_methods(known, Console())
        return
    name = {each.lower(): each for each in known}.get(name.lower(), name)
    _check_known([name], known, "method")
    print_method(known[name], Console())


@app.command("adapters", epilog=_examples("kd adapters", "kd adapters --matrix --method CrossKD"))
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
        Path | None,
        typer.Option(dir_okay=False, help="With --matrix: write the tables, with all reasons, into this file too."),
    ] = None,
) -> None:
    """List detector families, or run all methods on all pairs.

    The families are those that our adapters, installed libraries and other packages bring.
    """
    if not matrix and (method or family or markdown):
        raise KDError("--method, --family and --markdown go with --matrix")
    if markdown is not None and not markdown.absolute().parent.is_dir():
        raise KDError(f"cannot write {markdown}: there is no folder {markdown.parent}")
    from rich.console import Console

    from kdtoolkit.listing import all_method_facts

    _check_known(method or (), all_method_facts(), "method")

    from kdtoolkit.inspect import print_families
    from kdtoolkit.matrix import families, print_matrix, run_matrix, to_markdown
    from kdtoolkit.methods import all_methods

    console = Console()
    known = families()
    if not matrix:
        print_families(known, console)
        return
    _check_known(family or (), known, "family")
    methods = _chosen(all_methods(), method)
    found = run_matrix(_chosen(known, family), methods, console=console)
    print_matrix(found, console)
    for name in methods if method else ():
        print_matrix(found, console, name)
    if markdown is not None:
        try:
            markdown.write_text(to_markdown(found), encoding="utf-8")
        except OSError as error:
            raise KDError(f"cannot write {markdown}: {error.strerror}") from error


@app.command(
    "inspect",
    epilog=_examples(
        "kd inspect torchvision/fasterrcnn_resnet50_fpn --classes 3",
        'kd inspect "kdtoolkit/gfl?backbone=resnet18&bins=9" --image-size 512',
        "kd inspect kdtoolkit/fcos --teacher kdtoolkit/gfl",
    ),
)
def inspect_command(
    model: Annotated[
        str,
        typer.Argument(
            help="The detector, or the student of a pair: kdtoolkit/gfl?backbone=resnet18, "
            "torchvision/fcos_resnet50_fpn, hf/PATH-OR-NAME, ultralytics/yolo11n, or package.module:callable for one "
            "of your own.",
        ),
    ],
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Show the pair: which methods work with this teacher, and why not the rest."
        ),
    ] = None,
    classes: Annotated[int, typer.Option(min=1, help="Number of classes, without background.")] = 80,
    weights: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Load this file (.safetensors, or .pth with a state dict) into the detector.",
        ),
    ] = None,
    teacher_weights: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Load this file into the teacher.")
    ] = None,
    image_size: Annotated[int, typer.Option(min=32, help="Side of the image to measure on, in pixels.")] = 256,
) -> None:
    """Show a detector, or what works between student and teacher.

    One detector: levels, stages, priors, capabilities and sizes as the toolkit sees them, and the methods that apply.
    With --teacher: both side by side, which methods work between them, and why the others do not.
    """
    if teacher is None and teacher_weights is not None:
        raise KDError("--teacher-weights goes with --teacher")
    from rich.console import Console

    from kdtoolkit.inspect import inspect_detector, print_inspection, print_pair
    from kdtoolkit.models import build_model
    from kdtoolkit.weights import load_weights

    found = []
    for name, file in ((model, weights), (teacher, teacher_weights)):
        if name is not None:
            built = build_model(name, classes)
            if file is not None:
                load_weights(built, file)
            found.append(inspect_detector(built, image_size))
    if teacher is None:
        print_inspection(found[0], Console())
    else:
        print_pair(found[0], found[1], Console())


def _check_known(names: Collection[str], known: Collection[str], what: str) -> None:
    """Raises KDError for the first name that is not among the known ones."""
    for name in names:
        if name not in known:
            raise KDError(f"unknown {what} '{name}'{did_you_mean(name, known)}; there are {', '.join(known)}")


def _chosen(known: Mapping[str, T], names: Collection[str] | None) -> dict[str, T]:
    """Those of `known` that are named; all of them where none is."""
    return {name: known[name] for name in names or known}


def _device(device: Device) -> str:
    import torch

    available = torch.cuda.is_available()
    if device is Device.CUDA and not available:
        raise KDError("there is no CUDA device: use --device cpu, or install a torch build with CUDA")
    return "cpu" if device is Device.CPU or not available else "cuda"
