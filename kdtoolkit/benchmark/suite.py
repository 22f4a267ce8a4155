"""A suite says what is compared: a teacher, a student, and methods. The whole suite is checked before anything runs."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails

from kdtoolkit.contract import Method
from kdtoolkit.distiller import TEACHER_SCALES
from kdtoolkit.engine.config import TrainConfig
from kdtoolkit.errors import KDError
from kdtoolkit.methods import all_methods, published_settings
from kdtoolkit.models import is_code
from kdtoolkit.options import check_options, did_you_mean

BASELINE = "baseline"
EQUAL_TIME = "baseline (equal time)"
TEACHER = "teacher"
_FOLDER_NAME = r"^\w[\w+().,= -]*$"  # names become folders


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataSection(_Section):
    """Which images a suite uses.

    `root`: a data set in COCO's, YOLO's or VOC's format; None draws procedural images. `teacher_images`,
    `student_images`, `val_images`: how many images; None means all of them. `image_size`: in pixels, the side of a
    procedural image, or the longest side of a photo (larger photos are scaled down). `on_bad`: whether bad images and
    annotations are an error ("error") or are left out ("skip").
    """

    root: Path | None = None
    image_size: int = Field(96, ge=32)
    teacher_images: int | None = Field(None, gt=0)
    student_images: int | None = Field(None, gt=0)
    val_images: int | None = Field(None, gt=0)
    on_bad: Literal["error", "skip"] = "error"
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _procedural_is_endless(self) -> DataSection:
        if self.root is None:
            counts = ("teacher_images", "student_images", "val_images")
            if missing := [name for name in counts if getattr(self, name) is None]:
                raise ValueError(
                    f"procedural data needs {', '.join(missing)}: write how many images to draw, or name a `root`"
                )
        return self


class DetectorSection(_Section):
    """A detector, given by the name and arguments that `build_model` takes, and how it is trained."""

    model: str
    args: dict[str, Any] = {}
    train: TrainConfig


class _Extras(_Section):
    """The arguments that all methods have in common: the arguments of `Method.scheduled` and `Method.at_strides`."""

    warmup: int | None = Field(None, ge=0)
    decay: int | None = Field(None, ge=0)
    stop: int | None = Field(None, ge=0)
    start: int | None = Field(None, ge=0)
    every: int | None = Field(None, ge=1)
    strides: tuple[int, ...] | None = None

    def extend(self, method: Method) -> Method:
        """Give a method its schedule and its levels."""
        if schedule := self.model_dump(exclude={"strides"}, exclude_none=True):
            method.scheduled(**schedule)
        return method.at_strides(*self.strides) if self.strides else method


class MethodUse(_Section):
    """A method with its arguments. In YAML it is `CrossKD` or, with arguments, `{FGD: {foreground_weight: 0.001}}`.

    Published settings for certain detectors have their own names, such as `CrossKD.for_fcos`. All methods also take
    `warmup`, `decay` and `stop`, in steps, and `strides`, the levels that the method is applied to.
    """

    name: str
    args: dict[str, Any]

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> dict[str, Any]:
        name, args = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else (value, {})
        if not isinstance(name, str) or not isinstance(args, dict):
            raise ValueError("write a method as `CrossKD` or, with arguments, as `{FGD: {foreground_weight: 0.001}}`")
        methods = _factories()
        if name not in methods:
            raise ValueError(f"unknown method '{name}'{did_you_mean(name, methods)}; there are {', '.join(methods)}")
        own, extras = _split(args)
        allowed = [*inspect.signature(methods[name]).parameters, *_Extras.model_fields]
        if any(isinstance(key, bool) for key in own):
            raise ValueError(f"{name}: YAML reads the key `on` as true, and `off` as false. Write it in quotes: 'on'")
        if unknown := [_unknown_key(str(key), allowed) for key in own if key not in allowed]:
            raise ValueError("; ".join(f"{name}: {problem}" for problem in unknown))
        try:
            own = check_options(name, methods[name], {key: _number(value) for key, value in own.items()})
            method = methods[name](**own)
        except KDError as error:
            raise ValueError(str(error)) from None
        try:
            checked = _Extras.model_validate(extras)
            checked.extend(method)
        except ValidationError as error:
            reasons = [f"{name}: {reason(_Extras, problem)}" for problem in error.errors()]
            raise ValueError("; ".join(reasons)) from None
        except KDError as error:
            raise ValueError(f"{name}: {error}") from None
        return {"name": name, "args": own | checked.model_dump(exclude_unset=True)}

    @model_serializer
    def _write(self) -> str | dict[str, Any]:
        return {self.name: self.args} if self.args else self.name

    @property
    def method(self) -> type[Method]:
        """The method's class."""
        return all_methods()[self.name.partition(".")[0]]

    def build(self) -> Method:
        """The method, ready for a Distiller."""
        own, extras = _split(self.args)
        return _Extras(**extras).extend(_factories()[self.name](**own))


class Suite(_Section):
    """What is compared: one student, trained alone (the row `baseline`) and with the methods of each entry.

    `teacher_scale`: size of the images that the teacher sees while it teaches, relative to the student's.
    """

    name: str = Field(pattern=_FOLDER_NAME)
    description: str
    expected_minutes: float = Field(gt=0)
    seeds: int = Field(3, ge=1)
    data: DataSection
    teacher: DetectorSection
    student: DetectorSection
    teacher_scale: float = 1.0
    entries: dict[typing.Annotated[str, Field(pattern=_FOLDER_NAME)], tuple[MethodUse, ...]]

    @field_validator("teacher_scale")
    @classmethod
    def _check_scale(cls, scale: float) -> float:
        if scale not in TEACHER_SCALES:
            raise ValueError(f"teacher_scale is {scale}: it must be 1, 0.5 or 0.25")
        return scale

    @field_validator("entries")
    @classmethod
    def _check_entries(
        cls, entries: dict[str, tuple[MethodUse, ...]], info: ValidationInfo
    ) -> dict[str, tuple[MethodUse, ...]]:
        student: DetectorSection | None = info.data.get("student")  # None if it has a fault of its own
        names = [BASELINE, EQUAL_TIME, TEACHER]
        for name, methods in entries.items():
            if name.lower() in names:  # some systems take names of folders that differ in case for the same
                raise ValueError(f"entry '{name}' has the same name as another row: rename it")
            if not methods:
                raise ValueError(f"entry '{name}' has no methods: delete it (the baseline is always run), or name some")
            names.append(name.lower())
            for use in methods:
                if student and (reason := use.build().schedule.why_too_long(student.train.steps)):
                    raise ValueError(f"entry '{name}': {use.name}: {reason}")
        return entries

    def methods(self, row: str) -> tuple[MethodUse, ...]:
        """The methods of a row. The two baselines and the teacher have none."""
        return self.entries.get(row, ())

    def to_yaml(self) -> str:
        """The suite as YAML, which `load_suite` can read."""
        fields = self.model_dump(mode="json", exclude_unset=True)
        return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=120)


def change(suite: Suite, data: Mapping[str, Any] | None = None, **fields: Any) -> Suite:
    """A copy of the suite with some fields changed, checked again. `data`: fields to change in the data section."""
    raw = suite.model_dump(exclude_unset=True)
    raw["data"].update(data or {})
    return Suite.model_validate({**raw, **fields})


def check_runs_no_code(suite: Suite) -> None:
    """Raises KDError if the suite names a module to import as a model, which would run whatever the module contains."""
    for role, section in (("teacher", suite.teacher), ("student", suite.student)):
        if is_code(section.model):
            raise KDError(
                f"the {role} of suite {suite.name!r} is {section.model!r}, which imports a Python module and so runs "
                "its code: read the module, then run the same command with --allow-code"
            )


def _factories() -> dict[str, Callable[..., Method]]:
    """Everything that builds a method, by name: the classes, and their published settings."""
    methods = all_methods()
    settings = [published_settings(method) for method in methods.values()]
    return {**methods, **{name: build for each in settings for name, build in each.items()}}


def _split(args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split arguments into the method's own and the fields of `_Extras`."""
    extras = {name: args[name] for name in _Extras.model_fields if name in args}
    return {name: value for name, value in args.items() if name not in extras}, extras


def _number(value: Any) -> Any:
    """The number, if YAML reads a number as text, as it does with 1e-3."""
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


def _unknown_key(key: str, allowed: Sequence[str]) -> str:
    return f"unknown key '{key}'{did_you_mean(key, allowed)}; allowed: {', '.join(allowed) or 'none'}"


def reason(section: type[BaseModel], error: ErrorDetails) -> str:
    """An error of a section in words."""
    key = str(error["loc"][-1]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        return _unknown_key(key, list(section.model_fields))
    if error["type"] == "missing":
        return f"key '{key}' is missing"
    if error["type"] == "value_error":
        return error["msg"].removeprefix("Value error, ")
    return f"{key} = {error['input']!r}: {error['msg'][:1].lower()}{error['msg'][1:]}"
