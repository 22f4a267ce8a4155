"""`kd eval`, `kd predict` and `kd pseudo-label`: what a trained detector finds, and how good it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kdtoolkit.cli._common import DATA_HELP
from kdtoolkit.errors import KDError, printable
from kdtoolkit.words import counted

SHOWN_FILES = 20  # of those that could not be read

Model = Annotated[
    str,
    typer.Argument(
        help="The trained detector: a run's folder, best.pt of Ultralytics, a folder of save_pretrained, a name "
        "such as torchvision/fcos_resnet50_fpn with --weights, or a file of detections (.json)."
    ),
]
Images = Annotated[Path, typer.Argument(help="An image, or a folder of images.")]
Data = Annotated[Path, typer.Option(help=DATA_HELP)]
Weights = Annotated[
    str | None, typer.Option(help="A file of weights, or pretrained. Default: those that belong to the model.")
]
ClassMap = Annotated[
    list[str] | None,
    typer.Option(metavar="OURS=THEIRS", help="A class of the data, and the detector's name for it; repeat for more."),
]
ClassesAsIn = Annotated[
    Path | None, typer.Option(metavar="PATH", help="A data set with the detector's classes, if it does not know them.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time.")]
ImageSize = Annotated[
    int | None,
    typer.Option(
        help="Longest side of images in pixels; larger ones are scaled down. Default: as the detector was trained."
    ),
]
DeviceName = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1; auto takes a GPU if there is one.")]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave bad images and annotations of --data out, instead of stopping.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors alone.")]


class Format(StrEnum):
    """A format to write."""

    COCO = "coco"
    YOLO = "yolo"


def evaluate(
    model: Model,
    data: Data,
    split: Annotated[str, typer.Option(help="train, val or test; all, if the data come in one part.")] = "val",
    weights: Weights = None,
    class_map: ClassMap = None,
    classes_as_in: ClassesAsIn = None,
    image_size: ImageSize = None,
    batch_size: BatchSize = 8,
    max_detections: Annotated[
        int, typer.Option(min=1, help="Detections of an image and class that count: COCO's 100, or LVIS's 300.")
    ] = 100,
    device: DeviceName = "auto",
    skip_bad: SkipBad = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Measure a detector's AP and speed on a data set.

    COCO's AP of all classes and of each, and the time for one image.
    If the detector has different classes than the data, equal names are compared. What is left out is said.
    """
    check_there(data)
    renamed = read_class_map(class_map)

    from rich.console import Console

    from kdtoolkit.cli._common import progress_bar
    from kdtoolkit.workflow.evaluate import evaluate as run
    from kdtoolkit.workflow.evaluate import print_evaluated

    with progress_bar("evaluating") as progress:
        found = run(
            model,
            data,
            split=split,
            weights=weights,
            class_map=renamed,
            classes_as_in=classes_as_in,
            image_size=image_size,
            batch_size=batch_size,
            max_detections=max_detections,
            device=device,
            skip_bad=skip_bad,
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
    else:
        print_evaluated(found, Console())


def predict(
    model: Model,
    images: Images,
    out: Annotated[Path, typer.Option(file_okay=False, help="The folder to write into.")] = Path("predicted"),
    score: Annotated[float, typer.Option(help="Detections with a lower score are left out.")] = 0.3,
    format: Annotated[
        Format, typer.Option(help="coco: predictions.json. yolo: a text file for each image, with scores.")
    ] = Format.COCO,
    pictures: Annotated[bool, typer.Option(help="Write pictures with the detections drawn.")] = True,
    weights: Weights = None,
    classes_as_in: ClassesAsIn = None,
    image_size: ImageSize = None,
    batch_size: BatchSize = 1,
    device: DeviceName = "auto",
    quiet: Quiet = False,
) -> None:
    """Detect on images: files, and pictures with boxes.

    The pictures have drawn boxes, names of classes and scores.
    Images that cannot be read are named and left out; then the exit code is 1.
    """
    check_there(images)

    from kdtoolkit.cli._common import progress_bar
    from kdtoolkit.workflow.predict import predict as run

    with progress_bar("detecting") as progress:
        found = run(
            model,
            images,
            out=out,
            score=score,
            format=format.value,
            pictures=pictures,
            weights=weights,
            classes_as_in=classes_as_in,
            image_size=image_size,
            batch_size=batch_size,
            device=device,
            progress=progress,
        )
    if not quiet:
        say_all(f"note: {note}" for note in found.notes)
        shown = counted(len(found.images), "image")
        say_all([f"{found.detections} detections with a score of {score:g} or more on {shown}"])
        say_all(f"written: {path}" for path in found.written)
    tell_skipped([f"{path}: {reason}" for path, reason in found.skipped.items()])


def pseudo_label(
    model: Model,
    images: Images,
    data: Annotated[Path, typer.Option(help="Labelled images on which scores are chosen; labels get its classes.")],
    out: Annotated[Path, typer.Option(file_okay=False, help="A new folder.")] = Path("pseudo-labels"),
    score: Annotated[
        float | None, typer.Option(help="Lowest score of a label, instead of one for each class by F1.")
    ] = None,
    format: Annotated[Format, typer.Option(help="The format to write.")] = Format.COCO,
    split: Annotated[str, typer.Option(help="Which images of --data: train, val or test.")] = "val",
    weights: Weights = None,
    class_map: ClassMap = None,
    classes_as_in: ClassesAsIn = None,
    image_size: ImageSize = None,
    batch_size: BatchSize = 1,
    device: DeviceName = "auto",
    skip_bad: SkipBad = False,
    quiet: Quiet = False,
) -> None:
    """Label images by a teacher's detections.

    The result is a data set in COCO's or YOLO's format.
    The score that a detection needs is chosen for each class on labelled images: the one at which F1, the harmonic mean
    of precision and recall, is largest. OUT/report.md says the scores, and how good they are.
    """
    check_there(images)
    check_there(data)
    renamed = read_class_map(class_map)

    from kdtoolkit.cli._common import progress_bar
    from kdtoolkit.workflow.pseudo_label import pseudo_label as run

    with progress_bar("detecting") as progress:
        found = run(
            model,
            images,
            data,
            out=out,
            score=score,
            format=format.value,
            split=split,
            weights=weights,
            class_map=renamed,
            classes_as_in=classes_as_in,
            image_size=image_size,
            batch_size=batch_size,
            device=device,
            skip_bad=skip_bad,
            progress=progress,
        )
    if not quiet:
        typer.echo(printable(found.to_markdown()))
        say_all([f"{out}: {found.images} images, {sum(found.boxes.values())} boxes"])
    tell_skipped([f"{path}: {reason}" for path, reason in found.skipped.items()])


def check_there(path: Path) -> None:
    """Raises KDError if there is no such file or folder. This is told before torch is imported."""
    if not path.exists():
        raise KDError(f"there is no file or folder {path}; correct the path")


def read_class_map(pairs: Sequence[str] | None) -> dict[str, str]:
    """The pairs OURS=THEIRS as a mapping. Raises KDError if one has no such form, or if a class occurs twice."""
    found: dict[str, str] = {}
    for pair in pairs or ():
        ours, equals, theirs = pair.partition("=")
        if not (ours and equals and theirs):
            raise KDError(f"--class-map {pair}: write OURS=THEIRS, the data's name of a class and the detector's")
        if ours in found:
            raise KDError(f"--class-map names {ours} twice; a class of the data has one name in the detector")
        found[ours] = theirs
    return found


def say_all(lines: Iterable[str]) -> None:
    """Print lines that may hold file names."""
    for line in lines:
        typer.echo(printable(line))


def tell_skipped(lines: Sequence[str]) -> None:
    """Name the files that could not be read on stderr, and end with exit code 1; nothing if there is none."""
    if not lines:
        return
    for line in lines[:SHOWN_FILES]:
        sys.stderr.write(f"left out: {printable(line)}\n")
    if len(lines) > SHOWN_FILES:
        sys.stderr.write(f"and {len(lines) - SHOWN_FILES} more\n")
    sys.stderr.write(f"{len(lines)} images could not be read\n" if len(lines) > 1 else "1 image could not be read\n")
    raise typer.Exit(1)
