"""`kdtoolkit.tune`: the command as a function, with the same words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from kdtoolkit.tuning.report import TuneReport
from kdtoolkit.tuning.runs import run
from kdtoolkit.workflow.calls import given_words
from kdtoolkit.workflow.options import TuneOptions, check_options


def tune(
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
    budget: str | None = None,
    trials: int | None = None,
    reduction: int | None = None,
    share: Sequence[float] | None = None,
    stop: Sequence[float] | None = None,
    holdout: float | None = None,
    seeds: int | None = None,
    confirm_data: Sequence[str | Path] | None = None,
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
) -> TuneReport:
    """Search for the methods, weights and schedule that suit a pair and its data, as `kd tune` does.

    The arguments are the options of `kd tune`; None lets it choose. docs/tune.md explains them. Raises KDError.
    """
    return run(check_options(TuneOptions, given_words(locals())))
