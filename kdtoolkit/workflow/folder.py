"""The folder of a run: which run lies there, and whether a command may go on with it."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kdtoolkit.data.dataset import digest
from kdtoolkit.engine import group
from kdtoolkit.engine.checkpoint import to_bytes
from kdtoolkit.engine.identity import ONLY_SPEED
from kdtoolkit.errors import KDError
from kdtoolkit.lock import hold
from kdtoolkit.models import Detector
from kdtoolkit.workflow.options import RunOptions, read_options
from kdtoolkit.workflow.prepare import Prepared
from kdtoolkit.workflow.report import JSON, Report

RUN_FILE = "run.yaml"
MODEL = "model"
TRAINING, BASELINE = "training", "baseline"
FIRST_WEIGHTS = "the student's first weights"
# Options that may change while a run goes on: none of them changes what it computes, but for rounding. `teacher_cache`
# is not among them: it decides which augmentation is chosen.
_FREE = (
    "device",
    "allow_code",
    "quiet",
    "compare_baseline",
    "allow_weak_teacher",
    "out",
    "teacher_cache_gb",
)

T = TypeVar("T", bound=RunOptions)


def enter(held: ExitStack, options: T) -> tuple[T, Report | None, bool]:
    """Hold the run's folder; the options with what the run that lies there has settled, its report, and if it began.

    Raises KDError if the folder cannot be used, or holds a different run.
    """
    folder = options.out
    assert folder is not None
    hold_folder(held, folder)
    if not (folder / RUN_FILE).exists():
        return options, None, False
    settled, report = read_options(type(options), folder / RUN_FILE), Report.read(folder)
    if not has_checkpoints(folder) and (report is None or report.student is None):
        if (folder / MODEL).exists() or (folder / TRAINING / "student.safetensors").exists():
            raise KDError(
                f"{folder} holds a trained detector, and no {JSON} that says how it was trained: put a copy of {JSON} "
                f"back, or choose a new folder (--out {folder}-2)"
            )
        return options, None, False  # it was stopped before anything was learnt: nothing is lost
    settled = going_on(options, {} if report is None else report.given, settled)
    return settled, report, True


def going_on(options: T, before: dict[str, Any], settled: T) -> T:
    """The options with which a run in their folder goes on.

    `before`: the options that its user gave. `settled`: those of its run file. Raises KDError if `options` are
    different.
    """
    folder = options.out
    assert folder is not None
    if found := _differences(options, before, settled):
        raise KDError(
            f"{folder} holds a run with different options ({', '.join(found)}): choose a new folder (--out "
            f"{folder}-2), or delete that one. `kd {options.command} {folder / RUN_FILE}` goes on with its own options"
        )
    free = {name: getattr(options, name) for name in _FREE if name in type(options).model_fields}
    if settled.with_baseline:
        free["compare_baseline"] = True
    return settled.model_copy(update=free)


def has_checkpoints(folder: Path) -> bool:
    """Whether a stopped training can go on there."""
    return any(any((folder / name / "checkpoints").glob("*")) for name in (TRAINING, BASELINE))


def given(options: RunOptions) -> dict[str, Any]:
    """The options that the user has given, as values that JSON can hold, without those that may change."""
    fields = options.model_dump(mode="json", exclude_unset=True)
    return {name: value for name, value in fields.items() if name not in _FREE}


def made_of(prepared: Prepared) -> dict[str, str]:
    """What decides a run's result beside the options that are given: digests by what they are of."""
    images = prepared.images
    found = {
        "the training images": images.train.fingerprint(),
        "the validation images": images.val.fingerprint(),
        "the settings that kdtoolkit chooses": digest(prepared.config.model_dump(mode="json", exclude={*ONLY_SPEED})),
        FIRST_WEIGHTS: _digest(prepared.student),
    }
    if images.unlabelled is not None:
        found["the images without labels"] = images.unlabelled.fingerprint()
    if prepared.teacher is not None:
        found["the teacher's weights"] = _digest(prepared.teacher)
    return found


def load_best(student: Detector, folder: Path) -> None:
    """Give the student the weights of the best evaluation, in all processes."""
    student.model.load_state_dict(group.from_first(partial(_best, folder)))


def _best(folder: Path) -> dict[str, Tensor]:
    """The weights of the best evaluation, of equal ones the last; of the last step if there was no AP at all."""
    path = folder / "best.safetensors"
    try:
        return load_file(path if path.exists() else folder / "student.safetensors")
    except (OSError, SafetensorError) as error:
        raise KDError(
            f"the trained weights in {folder} cannot be read ({error}): put them back, or choose a new folder by --out"
        ) from error


def hold_folder(held: ExitStack, folder: Path) -> None:
    """Hold a folder. Raises KDError if it holds different files or cannot be written."""
    try:
        if folder.is_dir() and not (folder / RUN_FILE).exists():
            alien = [path.name for path in sorted(folder.iterdir()) if not path.name.startswith(".lock")]
            if alien:
                raise KDError(
                    f"{folder} holds files that are no run of kdtoolkit ({', '.join(alien[:3])}): choose a new folder "
                    "by --out"
                )
        held.enter_context(hold(folder))
    except OSError as error:
        raise KDError(
            f"cannot write the run's folder {folder}: {error.strerror or error}. Choose another folder by --out"
        ) from error


def _differences(options: RunOptions, before: dict[str, Any], settled: RunOptions) -> list[str]:
    """What a command says differently than the run's own, which gave `before`; its run file holds more than that."""
    now, found = given(options), settled.model_dump(mode="json")
    left_out = {name: value for name, value in before.items() if name not in now}
    return [
        f"{name}: {_short(found[name])} there, {_short(value)} now"
        for name, value in now.items()
        if value != found[name]
    ] + [
        f"{name}: {_short(value)} there, left out now"
        for name, value in left_out.items()
        if value != type(options).model_fields[name].default
    ]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _digest(detector: Detector) -> str:
    return sha256(to_bytes(detector.model.state_dict())).hexdigest()
