"""`kd train` and `kd distill`: from a data set to a trained detector, in a folder from which a stopped run goes on."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdtoolkit.data import DetectionDataset
from kdtoolkit.data.opening import name_of
from kdtoolkit.distiller import Distiller
from kdtoolkit.engine import group
from kdtoolkit.engine.folder import TEACHER_CACHE
from kdtoolkit.errors import KDError, printable
from kdtoolkit.models import Detector, save_detector
from kdtoolkit.workflow.batch import with_memory
from kdtoolkit.workflow.card import card
from kdtoolkit.workflow.defaults import Choice
from kdtoolkit.workflow.detecting import found_device
from kdtoolkit.workflow.display import Clock, Display
from kdtoolkit.workflow.folder import (
    BASELINE,
    FIRST_WEIGHTS,
    MODEL,
    RUN_FILE,
    TRAINING,
    enter,
    given,
    has_checkpoints,
    load_best,
    made_of,
)
from kdtoolkit.workflow.measuring import check_teacher, evaluated, in_words, measured_teacher
from kdtoolkit.workflow.options import DistillOptions, RunOptions, TrainOptions
from kdtoolkit.workflow.prepare import Prepared, prepare
from kdtoolkit.workflow.report import Report, Trained, print_report, write_file
from kdtoolkit.workflow.training import train_in


def run(options: RunOptions, reasons: Mapping[str, str] | None = None) -> Report:
    """Train as the options say, in the folder that they name, and return what was found out.

    The same options go on with a run that was stopped, and show the results of one that is finished. Several processes
    that torchrun started train as one.

    `reasons`: by the names of the plan, why an option has its value where the user did not choose it.

    Raises KDError if something in the options or the data is wrong, if the folder holds a different run, if the teacher
    is bad on this data, or if the memory is too small.
    """
    device = _device(options.device)
    folder = options.out or Path("runs", f"{options.command}-{name_of(options.data)}").absolute()
    options = options.model_copy(update={"out": folder})
    first = group.rank() == 0
    console = Console(quiet=not first or options.quiet)
    # Warnings and results are also printed if `quiet` is set.
    loud = Console(quiet=not first)
    more = f", with a new folder by --out (the checkpoints in {folder} are of this batch size)"
    with (
        interruptible(folder, partial(has_checkpoints, folder)),
        with_memory(more),
        ExitStack() as held,
        Display(console, loud) as display,
    ):
        words = given(options)
        options, report, began = group.from_first(partial(enter, held, options))
        if report is not None and report.finished and (report.baseline is not None or not options.with_baseline):
            _warn_of_changes(report, options, display)  # in all processes, because they prepare together
            loud.print(f"{folder} holds this run, finished. Its results:", markup=False, highlight=False)
            print_report(report, loud)
            return report
        if report is None:
            console.print(printable(_title(options)), style="bold", markup=False, highlight=False, soft_wrap=True)
        prepared = prepare(options, device, display.counting)
        why = {name: replace(prepared.plan[name], why=reason) for name, reason in (reasons or {}).items()}
        prepared = replace(prepared, plan=prepared.plan | why)
        if began:
            display.line(f"{folder} holds this run, and it goes on from its last checkpoint")
        else:
            print_plan(prepared.plan, console)
        for note in prepared.notes:
            display.line(f"note: {note}")
        report = group.from_first(partial(_begin, prepared, report, words))
        report = _before(prepared, report, device, display)
        report = _train(prepared, report, device, display)
        if prepared.options.with_baseline:
            report = _baseline(prepared, report, device, display)
        report = report.model_copy(update={"finished": True})
        group.from_first(partial(_finish, report))
    print_report(report, loud)
    return report


def print_plan(plan: dict[str, Choice], console: Console) -> None:
    """Print what a run will do, and why."""
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(ratio=3, overflow="fold")
    table.add_column(ratio=2, style="dim", overflow="fold")
    for name, choice in plan.items():
        # As text: words in brackets, as a folder may have them, are no markup.
        table.add_row(name, Text(printable(str(choice.value))), Text(printable(choice.why)))
    console.print()
    console.print(table)
    console.print()


def _device(name: str) -> torch.device:
    """Join the other processes; the device of this one. Raises KDError if there is no such device."""
    return group.join(None if name == "auto" else str(found_device(name)))


def _title(options: RunOptions) -> str:
    if isinstance(options, DistillOptions):
        return f"kd distill: {options.student} learns from {options.teacher}"
    assert isinstance(options, TrainOptions)
    return f"kd train: {options.model}"


def _begin(prepared: Prepared, report: Report | None, words: dict[str, Any]) -> Report:
    """Write the run's settings and the report, as far as it is known. Raises KDError if the run was of different data.

    `report`: the one of the run that goes on; None if it begins. `words`: the options that the user gave.
    """
    options, now = prepared.options, made_of(prepared)
    folder = options.out
    assert folder is not None
    if report is None:
        plan = {name: f"{choice.value} ({choice.why})" for name, choice in prepared.plan.items()}
        title = _title(options)
        report = Report(command=options.command, title=title, folder=folder, plan=plan, given=words, made_of=now)
    elif changed := [
        what
        for what in report.changed(now)
        # Only the training without teacher begins with them once more.
        if what != FIRST_WEIGHTS or (options.with_baseline and report.baseline is None)
    ]:
        raise KDError(
            f"{' and '.join(changed)} changed since the run in {folder} began: put back what was there, or choose a "
            f"new folder (--out {folder}-2)"
        )
    write_file(folder / RUN_FILE, prepared.run_file.to_yaml().encode())
    report.write()
    return report


def _warn_of_changes(report: Report, options: RunOptions, display: Display) -> None:
    """Warn if a finished run was of different images or weights than those that its options name now."""
    try:
        changed = report.changed(made_of(prepare(options, torch.device("cpu"), display.counting)))
    except KDError as error:
        display.warn(f"whether images and weights are still those of this run cannot be checked: {error}")
        return
    if changed:
        display.warn(
            f"{' and '.join(changed)} changed since this run: the results are of what was there before. A new --out "
            "trains on what is there now"
        )


def _before(prepared: Prepared, report: Report, device: torch.device, display: Display) -> Report:
    """Measure the teacher, and the student if it can detect already. Raises KDError if the teacher is bad."""
    teacher = prepared.teacher
    if teacher is not None and report.teacher is None:
        report = report.model_copy(update={"teacher": measured_teacher(prepared, device, display)})
    if prepared.student.trained and report.before is None:
        found = evaluated(prepared, prepared.student, device, display, "the student before training")
        report = report.model_copy(update={"before": found})
        display.line(f"before training the {'student' if prepared.teacher else 'model'} has {in_words(found)}")
    group.from_first(report.write)
    if report.teacher is not None and not report.student:
        check_teacher(prepared, report.teacher, report.before, device, display)
    return report


def _train(prepared: Prepared, report: Report, device: torch.device, display: Display) -> Report:
    """Train, keep the best weights, and save the detector."""
    if report.model is not None:
        return report
    if report.student is None:
        trained = _trained(prepared, prepared.student, prepared.distiller, TRAINING, report, device, display)
        report = report.model_copy(update={"student": trained})
    else:
        load_best(prepared.student, report.folder / TRAINING)
    return group.from_first(partial(_save, prepared, report))


def _baseline(prepared: Prepared, report: Report, device: torch.device, display: Display) -> Report:
    """Train the same student without teacher: the same seed, images and steps."""
    if report.baseline is not None:
        return report
    assert prepared.untouched is not None
    alone = Distiller(None, prepared.untouched.model.to(device))
    trained = _trained(prepared, prepared.untouched, alone, BASELINE, report, device, display)
    report = report.model_copy(update={"baseline": trained})
    group.from_first(report.write)
    return report


def _trained(
    prepared: Prepared,
    student: Detector,
    distiller: Distiller,
    name: str,
    report: Report,
    device: torch.device,
    display: Display,
) -> Trained:
    """One training; the student then has its best weights."""
    another = name == TRAINING and prepared.options.with_baseline and report.baseline is None
    clock = Clock(prepared.config.steps, prepared.evaluations, display.evaluation_seconds)
    result = train_in(
        report.folder / name,
        prepared,
        distiller,
        device,
        evaluations=prepared.evaluations,
        report=display.training("training" if name == TRAINING else "training without teacher", clock, another=another),
    )
    warnings = (*result.warnings, *result.notices)
    for warning in warnings:
        display.warn(warning)
    load_best(student, report.folder / name)
    found = evaluated(prepared, student, device, display, "the trained detector")
    best = max(reversed(result.evaluations), key=lambda row: row["eval/ap"] or 0.0)  # of equal ones the last
    return Trained(
        evaluation=found,
        best_step=int(best["step"] or 0),
        steps=result.steps,
        seconds=result.seconds,
        warnings=warnings,
        metrics=result.metrics,
        cache=result.cache,
    )


def _save(prepared: Prepared, report: Report) -> Report:
    """Save the detector with its model card, and write the report."""
    options, teacher = prepared.options, prepared.teacher
    assert report.student is not None
    folder = report.folder / MODEL
    detector = replace(
        prepared.student,
        class_names=prepared.images.train.class_names,
        weights=f"{options.command} on {name_of(options.data)}, {report.student.evaluation.ap or 0:.1f} AP",
        trained=True,
        notes=(),
        image_size=options.image_size,
    )
    saved = save_detector(detector, folder)
    role = "detector" if teacher is None else "student"
    scores = {"teacher": report.teacher, f"{role} before training": report.before, role: report.student.evaluation}
    images: dict[str, DetectionDataset] = {"training": prepared.images.train, "validation": prepared.images.val}
    if prepared.images.unlabelled is not None:
        images["training without labels"] = prepared.images.unlabelled
    text = card(
        title=report.folder.name,
        student=detector.name,
        class_names=prepared.images.train.class_names,
        data=options.data,
        datasets=images,
        scores=scores,
        student_weights=prepared.student.weights,
        teacher=None if teacher is None else teacher.name,
        teacher_weights="" if teacher is None else teacher.weights,
        methods=[str(use) for use in prepared.methods],
        schedule={
            "image size": f"{options.image_size} px",
            "steps": prepared.config.steps,
            "batch size": prepared.config.batch_size,
            "learning rate": prepared.config.lr,
            "seed": options.seed,
        },
        how_to_open=saved.how_to_open,
        command=report.repeat,
    )
    write_file(folder / "README.md", text.encode())
    report = report.model_copy(update={"model": folder, "how_to_open": saved.how_to_open})
    report.write()
    return report


def _finish(report: Report) -> None:
    """Write the report, and delete the checkpoints and the teacher cache: they take many times the detector's space."""
    report.write()
    for name in (f"{TRAINING}/checkpoints", f"{BASELINE}/checkpoints", TEACHER_CACHE):
        shutil.rmtree(report.folder / name, ignore_errors=True)


@contextmanager
def interruptible(folder: Path, kept: Callable[[], bool]) -> Iterator[None]:
    """Say after Ctrl-C how the run goes on. `kept`: whether there is something that it can go on from."""
    try:
        yield
    except KeyboardInterrupt:
        if group.rank() == 0:
            what = "goes on from the last checkpoint" if kept() else "starts again, because there was no checkpoint yet"
            sys.stderr.write(f"interrupted: the same command {what} ({folder})\n")
        raise
