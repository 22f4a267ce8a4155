"""`kdtoolkit.train` and `kdtoolkit.distill`: the commands as functions, with the same words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from kdtoolkit.workflow.options import DistillOptions, TrainOptions, check_options
from kdtoolkit.workflow.report import Report
from kdtoolkit.workflow.runs import run


def train(
    model: str | Path,
    data: str | Path,
    *,
    weights: str | Path | None = None,
    out: str | Path | None = None,
    image_size: int | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    device: str | None = None,
    skip_bad: bool | None = None,
    allow_code: bool | None = None,
    quiet: bool | None = None,
    train: Mapping[str, Any] | None = None,
) -> Report:
    """Train a detector, as `kd train` does, and return what was found out.

    The arguments are the options of `kd train`; None lets it choose. docs/distill.md explains them. Raises KDError.
    """
    return run(check_options(TrainOptions, given_words(locals())))


def distill(
    teacher: str | Path,
    student: str | Path,
    data: str | Path,
    *,
    teacher_weights: str | Path | None = None,
    student_weights: str | Path | None = None,
    method: Literal["auto"] | str | Sequence[str | Mapping[str, Mapping[str, Any]]] | None = None,
    teacher_scale: float | None = None,
    class_map: Mapping[str, str] | None = None,
    init: Literal["teacher"] | None = None,
    unlabelled: str | Path | None = None,
    teacher_cache: Literal["auto", "off", "memory", "disk"] | None = None,
    teacher_cache_gb: float | None = None,
    compare_baseline: bool | None = None,
    budget: str | None = None,
    allow_weak_teacher: bool | None = None,
    out: str | Path | None = None,
    image_size: int | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    device: str | None = None,
    skip_bad: bool | None = None,
    allow_code: bool | None = None,
    quiet: bool | None = None,
    train: Mapping[str, Any] | None = None,
) -> Report:
    """Train a student with the help of a teacher, as `kd distill` does, and return what was found out.

    The arguments are the options of `kd distill`; None lets it choose. docs/distill.md explains them. Raises KDError.
    """
    return distilled(check_options(DistillOptions, given_words(locals())))


def distilled(options: DistillOptions) -> Report:
    """Distil as the options say; with a budget, search first. Raises KDError."""
    if options.budget is None:
        return run(options)
    from kdtoolkit.tuning.spend import spend  # it rests on this package, and needs Optuna

    return spend(options)


def given_words(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are not None, with paths as text where a name may stand too."""
    names = {"model", "teacher", "student", "weights", "teacher_weights", "student_weights"}
    return {name: str(value) if name in names else value for name, value in arguments.items() if value is not None}
