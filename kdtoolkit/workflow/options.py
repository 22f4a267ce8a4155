"""The options of `kd train`, `kd distill`, `kd probe` and `kd tune`, for the command line, for run files and in Python.

Nothing here imports torch before options are checked, so that help comes at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from kdtoolkit.errors import KDError
from kdtoolkit.sections import Section, Seed, explain, parse, reason
from kdtoolkit.words import seconds_of
from kdtoolkit.yaml_text import dump, split_name, with_arguments

DATA = (
    "a folder in COCO, YOLO or Pascal VOC format, also as Roboflow, CVAT or Label Studio export it; or a YOLO YAML "
    "file, or a COCO JSON file"
)
"""What a data set may be, in words."""


class RunOptions(Section):
    """What both commands take. None means that the command chooses, and says why."""

    command: ClassVar[str]

    data: Path = Field(description=f"the images: {DATA}")
    out: Path | None = Field(
        None, description="the run's folder; default: the command and the data, as in runs/train-birds"
    )
    image_size: int | None = Field(
        None,
        ge=32,
        description="longest side of the images in pixels; default: that of the teacher or of the weights, or 640",
    )
    epochs: float | None = Field(
        None, gt=0, description="how often each image is shown; default: by the number of images and the weights"
    )
    steps: int | None = Field(None, gt=0, description="optimiser steps, instead of epochs")
    batch_size: int | None = Field(
        None,
        gt=0,
        description="images a step; default: 8 on a CPU and for each of several processes, else as many as the GPU's "
        "memory takes, up to 16",
    )
    lr: float | None = Field(None, gt=0, description="peak learning rate; default: by the weights and the library")
    seed: Seed = Field(0, description="decides all that is random")
    device: str = Field("auto", description="where to train: auto (a GPU if there is one), cpu, cuda or cuda:1")
    skip_bad: bool = Field(False, description="leave bad images and annotations out, instead of stopping")
    allow_code: bool = Field(False, description="import the Python module of a model named package.module:callable")
    quiet: bool = Field(False, description="print warnings, errors and the result alone")
    train: dict[str, Any] = Field(
        default={},
        description="further options of training (docs/training.md), as in {ema: 0, augmentation: {flip: 0}}",
    )

    @field_validator("train")
    @classmethod
    def _check_train(cls, train: dict[str, Any]) -> dict[str, Any]:
        if repeated := sorted(train.keys() & cls.model_fields.keys()):
            raise ValueError(
                f"train: {repeated[0]} is an option of its own: write {repeated[0]} beside `train`, not in it"
            )
        if train.get("input_size") is not None:
            raise ValueError(
                "train: input_size is for training in Python and for suites: this command evaluates and saves the "
                "detector at image_size. Leave input_size out; augmentation: {zoom: [0.67, 1.5]} shows objects at "
                "sizes that vary"
            )
        return _checked_training(train)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("epochs and steps are two ways to say how long to train: leave one of them out")
        return self

    @model_validator(mode="after")
    def _batch_has_parts(self) -> Self:
        parts = self.train.get("accumulation", 1)
        if self.batch_size is not None and self.batch_size % parts:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of train.accumulation ({parts}): each step splits "
                "its batch into that number of parts"
            )
        return self

    @property
    def models(self) -> dict[str, str]:
        """The names of the detectors, by role."""
        raise NotImplementedError

    @property
    def with_baseline(self) -> bool:
        """Whether the same student is also trained without teacher."""
        return False

    @classmethod
    def heading(cls) -> str:
        """The first line of a run file that kdtoolkit writes."""
        return f"# kd {cls.command} run.yaml --out NEW-FOLDER does this again.\n"

    def to_yaml(self) -> str:
        """The options as YAML, which `read_options` can read."""
        fields = self.model_dump(mode="json", exclude_unset=True, exclude={"quiet", "allow_code"})
        return self.heading() + _ABOUT_THE_REST + dump(fields, width=100)


class TrainOptions(RunOptions):
    """The options of `kd train`."""

    command = "train"

    model: str = Field(
        description="the detector: ultralytics/yolo11n, torchvision/fcos?backbone=resnet18, a folder, a file"
    )
    weights: str | None = Field(
        None, description="what it begins with: a file, pretrained, or none; default: pretrained if they can be had"
    )

    @model_validator(mode="after")
    def _has_no_teacher(self) -> Self:
        if self.train.get("teacher_cache", "off") != "off":
            raise ValueError("train: teacher_cache: only a student with a teacher has one: leave teacher_cache out")
        return self

    @property
    def models(self) -> dict[str, str]:
        """The name of the detector."""
        return {"model": self.model}


class DistillOptions(RunOptions):
    """The options of `kd distill`."""

    command = "distill"

    teacher: str = Field(
        description="the trained detector: a run, a file of weights, a name, or a file of detections (.json)"
    )
    student: str = Field(description="the detector to train: ultralytics/yolo11n or torchvision/fcos?backbone=resnet18")
    teacher_weights: str | None = Field(
        None, description="the teacher's weights, if `teacher` is a name: a file, or pretrained"
    )
    student_weights: str | None = Field(
        None,
        description="what the student begins with: a file, pretrained, or none; default: pretrained if they can be had",
    )
    method: Literal["auto"] | tuple[Any, ...] = Field(
        default="auto",
        description='how to distil: CrossKD, "PKD?weight=6" ...; default: auto, which chooses by what the pair allows',
    )
    teacher_scale: float | None = Field(
        None,
        description="size of the teacher's images beside the student's: 1, 0.5 or 0.25; default: 1, or what fits the "
        "strides of a teacher that shows features alone",
    )
    class_map: dict[str, str] = Field(
        default={}, description="a class of the data and the teacher's name for it; equal names need none"
    )
    init: Literal["teacher"] | None = Field(
        None, description="`teacher`: the student begins with the teacher's weights wherever they fit"
    )
    unlabelled: Path | None = Field(
        None, description="a folder of images without labels, from which the student learns by the methods alone"
    )
    teacher_cache: Literal["auto", "off", "memory", "disk"] = Field(
        "auto",
        description="keep what the teacher computes for each image, and reuse it in later epochs: off, memory or disk "
        "(docs/teacher_cache.md); default: auto, which is disk where that pays on a CPU",
    )
    teacher_cache_gb: float | None = Field(
        None, gt=0, description="the most that the teacher cache takes, in 10^9 bytes; default: 4"
    )
    compare_baseline: bool = Field(False, description="also train the same student without the teacher, to compare")
    budget: str | None = Field(
        None,
        description="time to spend, such as 4h or 90m: a third of it on a search for method, weights and schedule, the "
        "rest on training with the best of them",
    )
    allow_weak_teacher: bool = Field(False, description="go on with a teacher that is bad on this data")

    @field_validator("teacher_scale")
    @classmethod
    def _check_scale(cls, scale: float | None) -> float | None:
        if scale not in (None, 1.0, 0.5, 0.25):
            raise ValueError(f"teacher_scale is {scale:g}: it must be 1, 0.5 or 0.25")
        return scale

    @field_validator("method", mode="before")
    @classmethod
    def _read_methods(cls, value: Any) -> Any:
        from kdtoolkit.method_use import MethodUse  # imports torch

        if value == "auto" or (isinstance(value, list | tuple) and list(value) == ["auto"]):
            return "auto"
        uses = value if isinstance(value, list | tuple) else [value]
        if not uses:
            raise ValueError("method: name at least one method, or auto")
        if "auto" in uses:
            raise ValueError("method: auto chooses all methods itself: leave the others out, or leave auto out")
        found = []
        for use in uses:
            try:
                found.append(use if isinstance(use, MethodUse) else MethodUse.model_validate(use))
            except ValidationError as error:
                raise ValueError("; ".join(explain(MethodUse, each) for each in error.errors())) from None
        return tuple(found)

    @field_validator("budget")
    @classmethod
    def _check_budget(cls, budget: str | None) -> str | None:
        if budget is not None:
            try:
                seconds_of(budget)
            except ValueError as error:
                raise ValueError(f"budget: {error}") from None
        return budget

    @model_validator(mode="after")
    def _cache_finds_views_again(self) -> Self:
        if self.teacher_cache in ("memory", "disk"):
            _checked_training({**self.train, "teacher_cache": self.teacher_cache})
        return self

    @model_validator(mode="after")
    def _budget_decides_the_length(self) -> Self:
        if self.budget is not None and (self.epochs is not None or self.steps is not None):
            raise ValueError("budget decides how long to train: leave epochs and steps out, or leave budget out")
        return self

    @property
    def models(self) -> dict[str, str]:
        """The names of the detectors."""
        return {"teacher": self.teacher, "student": self.student}

    @property
    def with_baseline(self) -> bool:
        """Whether the same student is also trained without teacher."""
        return self.compare_baseline


class ProbeOptions(DistillOptions):
    """The options of `kd probe`: those of `kd distill`, so that its commands and run files can be probed, and more."""

    command = "probe"

    share: float = Field(0.1, gt=0, lt=1, description="the share of the gradient that weights are proposed for")
    batches: int = Field(4, gt=0, description="batches that are measured; more are slower and more exact")
    after: int | None = Field(
        None,
        ge=0,
        description="steps that the student is trained alone before; default: 50, or 0 if its weights can detect",
    )
    # Commands and run files of `kd distill` have them, and a probe needs none. Help does not show what has no
    # description.
    out: Path | None = None
    compare_baseline: bool = False
    budget: str | None = None
    allow_weak_teacher: bool = False
    teacher_cache: Literal["auto", "off", "memory", "disk"] = "auto"
    teacher_cache_gb: float | None = None


class TuneOptions(DistillOptions):
    """The options of `kd tune`: those of `kd distill`, of which `method` names what is tried, and more."""

    command = "tune"

    method: Literal["auto"] | tuple[Any, ...] = Field(
        default="auto",
        description='what to try: CrossKD, "PKD?weight=6" ...: each alone, and all of them together; default: auto, '
        "which tries all that work for the pair",
    )
    budget: str | None = Field(
        None,
        description="time to spend, such as 4h or 90m, on the search and its confirmation; it decides how many steps a "
        "training has",
    )
    trials: int | None = Field(
        None, gt=0, description="settings that are tried; default: twice as many as methods, and at least 9"
    )
    reduction: int = Field(3, ge=2, description="one of so many trials goes on in each round of the search")
    share: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.1, 0.3, 0.6, 0.8),
        description="a share of the gradient to try beside the methods' own weights; default: 0.1, 0.3, 0.6 and 0.8",
    )
    stop: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.5, 0.8),
        description="a share of the run after which methods end, to try beside the whole run; default: 0.5 and 0.8",
    )
    holdout: float = Field(
        0.2, gt=0, lt=1, description="share of the training images that the search evaluates on instead; default: 0.2"
    )
    seeds: int = Field(
        3,
        ge=0,
        le=1000,
        description="fresh seeds that confirm the best trial against the next one and against no teacher; 0: no "
        "confirmation; default: 3",
    )
    confirm_data: tuple[Path, ...] = Field(
        (),
        description="further data with the same classes for the confirmation to evaluate on: its test split, or else "
        "val",
    )
    # The confirmation always compares with the training without teacher.
    compare_baseline: bool = False

    @property
    def with_baseline(self) -> bool:
        """Whether the same student is also trained without teacher."""
        return True


T = TypeVar("T", bound=RunOptions)

_ABOUT_THE_REST = (
    "# What is not written here is chosen as docs/distill.md says; report.md has what was chosen, and why.\n"
)

_PATHS = ("data", "out", "unlabelled", "confirm_data")
_NAMES_OR_PATHS = ("model", "teacher", "student", "weights", "teacher_weights", "student_weights")


def read_options(kind: type[T], path: Path) -> T:
    """Read a run file. Paths in it are relative to its folder. Raises KDError that names the line."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KDError(f"cannot read the run file {path}: {getattr(error, 'strerror', None) or error}") from error
    for other in (TrainOptions, DistillOptions, TuneOptions):
        if not issubclass(kind, other) and text.startswith(other.heading()):
            raise KDError(f"{path} is of `kd {other.command}`, not of `kd {kind.command}`")
    return _with_absolute_paths(parse(kind, text, str(path), f"a run file of `kd {kind.command}`"), path.parent)


def check_options(kind: type[T], words: Mapping[str, Any], *, file: Path | None = None, dashes: bool = False) -> T:
    """Options from a command line or a call, on top of those of a run file.

    `dashes`: whether messages write an option as `--image-size`. Raises KDError with one line for each wrong option.
    """
    # A file must not allow its own code.
    base = {} if file is None else read_options(kind, file).model_dump(exclude_unset=True, exclude={"allow_code"})
    if "epochs" in words or "steps" in words:  # one of them replaces the file's, whichever that was
        base = {name: value for name, value in base.items() if name not in ("epochs", "steps")}
    try:
        options = kind.model_validate({**base, **words})
    except ValidationError as error:
        raise KDError("\n".join(_said(kind, each, dashes) for each in error.errors())) from None
    return _with_absolute_paths(options, Path())


def _checked_training(train: Mapping[str, Any]) -> dict[str, Any]:
    """Options of TrainConfig with the values that it takes: 2 for "2". Raises ValueError that names the wrong ones."""
    from kdtoolkit.engine.config import TrainConfig  # imports torch

    try:
        config = TrainConfig.model_validate({**train, "steps": 1, "batch_size": train.get("accumulation", 1)})
    except ValidationError as error:
        raise ValueError("; ".join(f"train: {explain(TrainConfig, each)}" for each in error.errors())) from None
    return config.model_dump(mode="json", include={*train}, exclude_unset=True)


def _said(kind: type[RunOptions], error: ErrorDetails, dashes: bool) -> str:
    name = str(error["loc"][0]) if error["loc"] else ""
    option = f"--{name.replace('_', '-')}" if dashes else name
    if error["type"] == "missing":
        return f"{option} is missing: kd {kind.command} needs it"
    if error["type"] == "value_error" or not name:
        return reason(kind, error)
    if name not in kind.model_fields:
        return explain(kind, error)
    return f"{option} {error['input']!r}: {error['msg'][:1].lower()}{error['msg'][1:]}"


def _with_absolute_paths(options: T, folder: Path) -> T:
    """The options with paths that hold from every working directory."""
    changes: dict[str, Any] = {}
    for name in options.model_fields_set & {*_PATHS, *_NAMES_OR_PATHS}:
        value = getattr(options, name)
        if value is None:
            continue
        if isinstance(value, tuple):
            changes[name] = tuple(_absolute(folder / each) for each in value)
            continue
        place = _absolute(folder / value)
        if name in _PATHS:
            changes[name] = place
        elif os.path.exists(place):
            changes[name] = str(place)
        elif "pretrained=" in value:  # all else is the name of a model, or a word
            path, args = split_name(value)
            weights = args.get("pretrained")
            if isinstance(weights, str) and os.path.exists(file := _absolute(folder / weights)):
                changes[name] = with_arguments(path, args | {"pretrained": str(file)})
    return options.model_copy(update=changes)


def _absolute(path: Path) -> Path:
    return Path(os.path.normpath(path.absolute()))
