"""`kd export`: a trained detector as a file that runs without kdtoolkit and PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdtoolkit.cli._common import DATA_HELP
from kdtoolkit.cli.detect import Model, SkipBad, Weights, check_there, say_all


def export(
    model: Model,
    format: Annotated[str, typer.Option(help="The format to write: onnx.")] = "onnx",
    out: Annotated[
        Path | None, typer.Option(help="The file to write. Default: the model's name, ending in .onnx.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help=f"The check and --int8 use images of this data set. {DATA_HELP}")
    ] = None,
    split: Annotated[str, typer.Option(help="Which part of --data: train, val or test.")] = "val",
    images: Annotated[Path | None, typer.Option(help="A folder of images for the check, instead of --data.")] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Longest side of images in pixels. Default: as the detector was trained, or 640."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time, where the file has one batch size.")] = 1,
    fixed: Annotated[
        bool, typer.Option("--fixed", help="One batch size and one image size, --image-size x --image-size.")
    ] = False,
    opset: Annotated[int, typer.Option(help="Version of ONNX's operators, 18 or higher.")] = 18,
    int8: Annotated[
        bool, typer.Option("--int8", help="Also write a file quantised to int8, and measure AP and time of both.")
    ] = False,
    weights: Weights = None,
    skip_bad: SkipBad = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors alone.")] = False,
) -> None:
    """Export a detector as ONNX, with its post-processing inside.

    The file's detections are compared with PyTorch's on images before it gets its name. docs/export.md shows how to use
    it with onnxruntime alone.
    """
    for path in (data, images):
        if path is not None:
            check_there(path)

    from kdtoolkit.deploy import export as run

    done = run(
        model,
        format=format,
        out=out,
        data=data,
        split=split,
        images=images,
        image_size=image_size,
        batch_size=batch_size,
        fixed=fixed,
        opset=opset,
        int8=int8,
        weights=weights,
        skip_bad=skip_bad,
        say=(lambda line: None) if quiet else (lambda line: say_all([f"{line} ..."])),
    )
    if quiet:
        return
    say_all(f"note: {note}" for note in done.notes)
    say_all([f"checked on {done.images}", str(done.check), f"written: {done.file} ({done.free})"])
    if done.int8 is not None:
        say_all([f"written: {done.int8.file} (int8)", *done.int8.lines()])
