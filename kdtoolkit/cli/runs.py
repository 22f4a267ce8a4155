"""`kd train`, `kd distill`, `kd probe` and `kd tune`.

Their options are the fields of the classes in `workflow/options.py`.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer

from kdtoolkit.cli.detect import read_class_map
from kdtoolkit.errors import KDError
from kdtoolkit.workflow.options import DistillOptions, ProbeOptions, RunOptions, TrainOptions, TuneOptions

_ONLY_IN_FILES = ("train",)
_REPEATED = {"method": "NAME", "class_map": "OURS=THEIRS"}
_PATHS = ("data", "out", "unlabelled")


def train_command() -> Callable[..., None]:
    """The function of `kd train`, with a parameter for each option."""
    return _command(
        TrainOptions,
        _run,
        "Train a detector on your images, with settings that suit them.\n\n"
        "Before it starts it prints what it will do and why. The result is a folder with the detector in its own "
        "library's format, a report, and the run file that does it again. A run that was stopped goes on when the same "
        "command is given again.",
    )


def distill_command() -> Callable[..., None]:
    """The function of `kd distill`, with a parameter for each option."""
    return _command(
        DistillOptions,
        _distill,
        "Train a small detector with the help of a large one.\n\n"
        "Before it starts it prints what it will do and why, and measures the teacher on your validation images. The "
        "result is a folder with the student in its own library's format, a report, and the run file that does it "
        "again. A run that was stopped goes on when the same command is given again.",
    )


def probe_command() -> Callable[..., None]:
    """The function of `kd probe`, with a parameter for each option."""
    as_json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
    return _command(
        ProbeOptions,
        _probe,
        "Measure what each loss of a distillation does to the student, before it is trained.\n\n"
        "How large is the gradient of each method beside that of the student's own loss, and does it point in the same "
        "direction? Says which method drowns the task, does nothing or pulls against the task, and proposes weights. "
        "Takes the options or the run file of `kd distill`, and writes nothing. Exit code 1: a method is not as it "
        "should be; 0: all are.",
        inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, annotation=as_json, default=False),
    )


def tune_command() -> Callable[..., None]:
    """The function of `kd tune`, with a parameter for each option."""
    return _command(
        TuneOptions,
        _tune,
        "Find the methods, weights and schedule that suit a pair and your images.\n\n"
        "Many trials train for a few steps on a part of the training images, and the best of them go on. The best of "
        "all is then trained with fresh seeds beside the next one and beside no teacher. It is called a winner only "
        "if it is better than no teacher after the same number of steps, and the next one is not better. Takes the "
        "options or the run file of `kd distill`, and writes a run file for it. A search that was stopped goes on when "
        "the same command is given again. Needs kdtoolkit[tune].",
    )


def _run(options: RunOptions) -> None:
    from kdtoolkit.workflow.runs import run  # imports torch

    run(options)


def _distill(options: RunOptions) -> None:
    from kdtoolkit.workflow.calls import distilled

    assert isinstance(options, DistillOptions)
    distilled(options)


def _tune(options: RunOptions) -> None:
    from kdtoolkit.tuning.runs import run

    assert isinstance(options, TuneOptions)
    run(options)


def _probe(options: RunOptions, *, as_json: bool) -> None:
    from kdtoolkit.workflow.probe import run, to_json

    assert isinstance(options, ProbeOptions)
    found = run(options, quiet=as_json or options.quiet)
    if as_json:
        typer.echo(json.dumps(to_json(found), indent=2))
    else:
        typer.echo("\n".join(found.lines()))
    raise typer.Exit(0 if found.fine else 1)


def _command(
    kind: type[RunOptions], run: Callable[..., None], doc: str, *extras: inspect.Parameter
) -> Callable[..., None]:
    """The function of a command: it checks the options and hands them to `run`, with the `extras` by name."""

    def call(run_file: Path | None, **words: Any) -> None:
        from kdtoolkit.workflow.options import check_options

        further = {extra.name: words.pop(extra.name) for extra in extras}
        # An option that is not there is None, False or an empty list; 0 is a value.
        given = {name: value for name, value in words.items() if value not in (None, []) and value is not False}
        if "class_map" in given:
            given["class_map"] = read_class_map(given["class_map"])
        options = check_options(kind, given, file=run_file, dashes=True)

        try:
            run(options, **further)
        except KDError:
            if os.environ.get("RANK", "0") != "0":  # of several processes, the first one tells
                raise typer.Exit(2) from None
            raise

    file = Annotated[
        Path | None, typer.Argument(help="A run file (YAML); options beside it come first.", metavar="[RUN.YAML]")
    ]
    parameters = [inspect.Parameter("run_file", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=file, default=None)]
    parameters += [_parameter(kind, name) for name in _ordered(kind) if name not in _ONLY_IN_FILES]
    parameters += extras
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {each.name: each.annotation for each in parameters}
    call.__doc__ = doc
    return call


def _ordered(kind: type[RunOptions]) -> list[str]:
    """The options: first those that are needed, and the command's own before those of both commands."""
    return sorted(
        kind.model_fields, key=lambda name: (not kind.model_fields[name].is_required(), name in RunOptions.model_fields)
    )


def _parameter(kind: type[RunOptions], name: str) -> inspect.Parameter:
    """The parameter of the command for an option. Its value is checked later, with all others."""
    field = kind.model_fields[name]
    description, hidden = field.description or "", field.description is None
    help_text = f"{description[:1].upper()}{description[1:]}."
    hint: Any
    default: Any = None
    if field.annotation is bool:
        hint, default = bool, False
        option = typer.Option(f"--{name.replace('_', '-')}", help=help_text, hidden=hidden)
    elif name in _REPEATED or get_origin(field.annotation) is tuple:
        hint = list[str] | None
        option = typer.Option(
            metavar=_REPEATED.get(name, name.rpartition("_")[2].upper()), help=f"{help_text} Repeat it for more."
        )
    else:
        if field.annotation in (int, int | None):
            hint = int | None
        elif field.annotation in (float, float | None):
            hint = float | None
        else:
            hint = Path | None if name in _PATHS else str | None
        option = typer.Option(help=help_text, show_default=False, metavar=None, hidden=hidden)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[hint, option], default=default)
