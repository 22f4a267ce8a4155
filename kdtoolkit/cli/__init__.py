"""The command line `kd`: it parses, calls and prints. Each file of this package holds one group of commands.

Nothing here imports torch before a command needs it, so that help, lists and most errors come at once.
"""

from __future__ import annotations

import errno
import sys
from typing import Annotated, Any

import typer

from kdtoolkit.cli import benchmark, data, detect, export, models, runs
from kdtoolkit.cli._common import examples, help_alone
from kdtoolkit.errors import KDError, printable

app = typer.Typer(
    help="Knowledge distillation for object detectors: train with it, and compare methods head-to-head.",
    epilog="Start with `kd data check`, `kd train` and `kd distill` on your images. `kd COMMAND --help` explains a "
    "command and shows examples.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(
    "train",
    epilog=examples(
        "kd train --model ultralytics/yolo11m --data birds/data.yaml",
        "kd train --model torchvision/fcos?backbone=resnet18 --data birds --image-size 320",
    ),
)(runs.train_command())
app.command(
    "distill",
    epilog=examples(
        "kd distill --teacher runs/train-birds --student ultralytics/yolo11n --data birds",
        "kd distill --teacher best.pt --student kdtoolkit/gfl --data birds --method CrossKD",
        "kd distill runs/distill-birds/run.yaml --seed 1 --out runs/distill-birds-1",
    ),
)(runs.distill_command())
app.command(
    "probe",
    epilog=examples(
        "kd probe --teacher runs/train-birds --student ultralytics/yolo11n --data birds --method CrossKD --method PKD",
        "kd probe runs/distill-birds/run.yaml --share 0.05",
    ),
)(runs.probe_command())
app.command(
    "tune",
    epilog=examples(
        "kd tune --teacher runs/train-birds --student ultralytics/yolo11n --data birds --budget 8h",
        "kd tune --teacher best.pt --student kdtoolkit/gfl --data birds --method CrossKD --method PKD --share 0.5",
        "kd tune runs/distill-birds/run.yaml --seeds 5",
    ),
)(runs.tune_command())
app.command(
    "eval",
    epilog=examples(
        "kd eval runs/distill-birds --data birds",
        "kd eval torchvision/fcos_resnet50_fpn --weights COCO_V1 --data birds --class-map owl=bird --json",
    ),
)(detect.evaluate)
app.command(
    "predict",
    epilog=examples("kd predict runs/distill-birds photos", "kd predict best.pt photo.jpg --out seen --score 0.5"),
)(detect.predict)
app.command(
    "pseudo-label",
    epilog=examples("kd pseudo-label runs/train-birds more_photos --data birds --out birds_more"),
)(detect.pseudo_label)
app.command(
    "export",
    epilog=examples(
        "kd export runs/distill-birds --data birds",
        "kd export best.pt --images photos --out birds.onnx --fixed --image-size 416",
        "kd export runs/distill-birds --data birds --int8",
    ),
)(export.export)
app.add_typer(benchmark.app, name="benchmark")
app.add_typer(data.app, name="data")
app.command("methods", epilog=examples("kd methods", "kd methods CrossKD"))(models.methods)
app.command("adapters", epilog=examples("kd adapters", "kd adapters --matrix --method CrossKD"))(models.adapters)
app.command(
    "inspect",
    epilog=examples(
        "kd inspect torchvision/fasterrcnn_resnet50_fpn --classes 3",
        'kd inspect "kdtoolkit/gfl?backbone=resnet18&bins=9" --image-size 512',
        "kd inspect kdtoolkit/fcos --teacher kdtoolkit/gfl",
    ),
)(models.inspect)

# What typer raises for wrong arguments; the class itself has no public name.
_UsageError: Any = typer.BadParameter.__mro__[1]
# What is wrong with a path that was named, where nobody else tells it.
_OF_PATHS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)


def main() -> None:
    """Entry point: a mistake of the user is one error on stderr and exit code 2, never a traceback."""
    try:
        sys.exit(app(prog_name="kd", standalone_mode=False))
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "kd"
        message = " ".join(error.format_message().replace("Value error, ", "").split())
        sys.stderr.write(f"error: {printable(message)} (see `{command} --help`)\n")
        sys.exit(2)
    except KDError as error:
        sys.stderr.write(f"error: {printable(str(error))}\n")
        sys.exit(2)
    except OSError as error:
        if error.errno not in _OF_PATHS or error.filename is None:
            raise
        sys.stderr.write(
            f"error: {printable(str(error.filename))}: {error.strerror}; correct the path, or its permissions\n"
        )
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"kdtoolkit {version('kdtoolkit')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    help_alone(context)
