"""`kd data`: check a data set before training, convert it, look at it."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kdtoolkit.cli._common import DATA_HELP, examples, help_alone
from kdtoolkit.errors import printable

app = typer.Typer(help="Check, convert and show data sets in COCO, Ultralytics YOLO and Pascal VOC format.")

DataPath = Annotated[Path, typer.Argument(exists=True, help=DATA_HELP)]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave bad images and annotations out, instead of stopping.")]


class Target(StrEnum):
    """A format to write."""

    COCO = "coco"
    YOLO = "yolo"
    VOC = "voc"


@app.callback(invoke_without_command=True)
def _group(context: typer.Context) -> None:
    help_alone(context)


@app.command("check", epilog=examples("kd data check birds", "kd data check birds --image-size 320 --json"))
def check(
    path: DataPath,
    image_size: Annotated[int, typer.Option(min=32, help="Longest side of images in training, in pixels.")] = 640,
    stride: Annotated[int, typer.Option(min=1, help="Finest stride of the detector: smaller boxes are told.")] = 8,
    queries: Annotated[int, typer.Option(min=1, help="Queries of a DETR-like detector: fuller images are told.")] = 300,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """List every fault of a data set, statistics, and what may go wrong in training.

    All splits are read and all images decoded. Of data that come in one part, a fifth is val. The exit code is 1 if
    training would refuse the data.
    """
    from rich.console import Console

    from kdtoolkit.cli._common import progress_bar
    from kdtoolkit.data.tools.check import check as run
    from kdtoolkit.data.tools.check import print_report

    with progress_bar("looking at images") as progress:
        report = run(path, image_size=image_size, stride=stride, queries=queries, progress=progress)
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))  # ASCII: file names may be no UTF-8
    else:
        print_report(report, Console())
    if not report.is_good:
        raise typer.Exit(1)


@app.command("convert", epilog=examples("kd data convert birds birds_yolo --to yolo"))
def convert(
    source: DataPath,
    target: Annotated[Path, typer.Argument(help="A new folder.")],
    to: Annotated[Target, typer.Option(help="The format to write.")],
    skip_bad: SkipBad = False,
) -> None:
    """Write a data set in a different format.

    Images are copied as they are. kd names what the new format has no place for.
    """
    from kdtoolkit.cli._common import progress_bar
    from kdtoolkit.data.tools.convert import convert as run

    with progress_bar("looking at images") as progress:
        outcome = run(source, target, to.value, on_bad="skip" if skip_bad else "error", progress=progress)
    typer.echo(printable(f"{target}: {outcome.images} images, {outcome.boxes} boxes"))
    for loss in outcome.losses:
        typer.echo(f"lost: {loss}")


@app.command("show", epilog=examples("kd data show birds", "kd data show birds --split val --count 50 --out seen"))
def show(
    path: DataPath,
    out: Annotated[Path, typer.Option(file_okay=False, help="The folder for the pictures.")] = Path("shown"),
    split: Annotated[str, typer.Option(help="train, val or test; all, if the data come in one part.")] = "train",
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the images.")] = 0,
    image_size: Annotated[int, typer.Option(min=32, help="Longest side of images in training, in pixels.")] = 1024,
    skip_bad: SkipBad = False,
) -> None:
    """Write pictures with the boxes that training gets."""
    from kdtoolkit.cli._common import progress_bar
    from kdtoolkit.data import open_dataset
    from kdtoolkit.data.tools.show import show as run

    with progress_bar("looking at images") as progress:
        dataset = open_dataset(
            path, split, max_size=image_size, on_bad="skip" if skip_bad else "error", progress=progress
        )
    written = run(dataset, out, count=count, seed=seed)
    typer.echo(printable(f"{out}: {len(written)} pictures of {dataset}"))
