"""A suite: one YAML file that says what is compared. Checked before anything runs; errors name the line."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails

from kdtoolkit.contract import Method
from kdtoolkit.engine.config import TrainConfig
from kdtoolkit.errors import KDError
from kdtoolkit.listing import SUITES, suite_path
from kdtoolkit.methods import all_methods, published_settings
from kdtoolkit.options import check_options, did_you_mean

BASELINE = "baseline"
EQUAL_TIME = "baseline (equal time)"
TEACHER = "teacher"
_FOLDER_NAME = r"^\w[\w+().,= -]*$"  # names become folders


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataSection(_Section):
    """Which images. Without `root` they are drawn.

    `root`: a data set in COCO's, YOLO's or VOC's format, as `open_dataset` takes it. `teacher_images`,
    `student_images`, `val_images`: how many of its images to use; None means all. `image_size`: side of drawn images,
    in pixels; photos are scaled down if their longer side is larger. `on_bad`: whether bad images and annotations are
    an error, or left out.
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
                raise ValueError(f"procedural data needs {', '.join(missing)}: there is no 'all' of it")
        return self


class DetectorSection(_Section):
    """A detector, by the name and arguments of `build_model`, and how it is trained."""

    model: str
    args: dict[str, Any] = {}
    train: TrainConfig


class _Extras(_Section):
    """What every method takes besides its own arguments: `Method.scheduled` and `Method.at_strides`."""

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
    """A method and what is changed of its defaults; in YAML `CrossKD` or `{FGD: {foreground_weight: 0.001}}`.

    Published settings for other detectors have names of their own, such as `CrossKD.for_fcos`.

    Besides its own arguments each takes those of its weights' schedule, `warmup`, `decay` and `stop`, in steps, and
    `strides`, the levels that it is applied to.
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
            raise ValueError(
                f"{name}: YAML takes the key `on` for true, and `off` for false: write it in quotes, as 'on'"
            )
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
            reasons = [f"{name}: {_reason(_Extras, problem)}" for problem in error.errors()]
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
    """What is compared: a teacher, and a student alone (`baseline`, always there) and by each entry's methods."""

    name: str = Field(pattern=_FOLDER_NAME)
    description: str
    expected_minutes: float = Field(gt=0)
    seeds: int = Field(3, ge=1)
    data: DataSection
    teacher: DetectorSection
    student: DetectorSection
    entries: dict[typing.Annotated[str, Field(pattern=_FOLDER_NAME)], tuple[MethodUse, ...]]

    @field_validator("entries")
    @classmethod
    def _names_differ(cls, entries: dict[str, tuple[MethodUse, ...]]) -> dict[str, tuple[MethodUse, ...]]:
        names = [BASELINE, EQUAL_TIME, TEACHER]
        for name, methods in entries.items():
            if name.lower() in names:  # folders of some systems do not tell case apart
                raise ValueError(f"entry '{name}' has the name of another row")
            if not methods:
                raise ValueError(f"entry '{name}' has no methods; the baseline is there without being listed")
            names.append(name.lower())
        return entries

    def methods(self, row: str) -> tuple[MethodUse, ...]:
        """Methods of a row; none for the baseline rows and the teacher."""
        return self.entries.get(row, ())

    def to_yaml(self) -> str:
        """The suite as a file that `load_suite` reads back."""
        fields = self.model_dump(mode="json", exclude_unset=True)
        return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=120)


def load_suite(name_or_path: str) -> Suite:
    """Read an embedded suite or a YAML file. Raises KDError naming file, line and what is allowed."""
    path = suite_path(name_or_path)
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KDError(f"cannot read suite file {path}: {error}") from error
    suite = parse_suite(text, path.name if path.parent == SUITES else str(path))
    root = suite.data.root
    return suite if root is None else change(suite, data={"root": (path.parent / root).resolve()})


def parse_suite(text: str, source: str) -> Suite:
    """Check a suite's YAML text; `source` names it in errors. Raises KDError with one line an error."""
    try:
        tree = yaml.compose(text, yaml.SafeLoader)
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise KDError(f"{source}{where}: not YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(tree, yaml.MappingNode):
        raise KDError(f"{source}, line 1: a suite is a mapping with the keys {', '.join(Suite.model_fields)}")
    problems = list(_duplicates(tree))
    try:
        suite = Suite.model_validate(raw)
    except ValidationError as error:
        problems += [(_line(tree, item["loc"]), _explain(item)) for item in error.errors()]
    if problems:
        raise KDError("\n".join(f"{source}, line {line}: {message}" for line, message in sorted(problems)))
    return suite


def change(suite: Suite, data: Mapping[str, Any] | None = None, **fields: Any) -> Suite:
    """A copy with other fields, and other fields of its data section; checked again."""
    raw = suite.model_dump(exclude_unset=True)
    raw["data"].update(data or {})
    return Suite.model_validate({**raw, **fields})


def _factories() -> dict[str, Callable[..., Method]]:
    """All that makes a method, by name: classes, and their published settings."""
    methods = all_methods()
    settings = [published_settings(method) for method in methods.values()]
    return {**methods, **{name: make for each in settings for name, make in each.items()}}


def _split(args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A method's own arguments, and those that every method takes."""
    extras = {name: args[name] for name in _Extras.model_fields if name in args}
    return {name: value for name, value in args.items() if name not in extras}, extras


def _number(value: Any) -> Any:
    """A number where YAML takes one for text: 1e-3 without a point."""
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


def _explain(error: ErrorDetails) -> str:
    section = _model_at(error["loc"][:-1])
    where = ".".join(
        map(str, error["loc"] if error["type"] not in ("extra_forbidden", "missing") else error["loc"][:-1])
    )
    return (f"{where}: " if where else "") + _reason(section, error)


def _unknown_key(key: str, allowed: Sequence[str]) -> str:
    return f"unknown key '{key}'{did_you_mean(key, allowed)}; allowed: {', '.join(allowed) or 'none'}"


def _reason(section: type[BaseModel], error: ErrorDetails) -> str:
    key = str(error["loc"][-1]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        return _unknown_key(key, list(section.model_fields))
    if error["type"] == "missing":
        return f"key '{key}' is missing"
    if error["type"] == "value_error":
        return error["msg"].removeprefix("Value error, ")
    return f"{key} = {error['input']!r}: {error['msg'][:1].lower()}{error['msg'][1:]}"


def _model_at(loc: Sequence[int | str]) -> type[BaseModel]:
    """The section of the schema in which an error lies."""
    model: type[BaseModel] = Suite
    for part in loc:
        field = model.model_fields.get(str(part))
        if field is None or not (inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel)):
            break
        model = field.annotation
    return model


def _line(node: yaml.Node, loc: Sequence[int | str]) -> int:
    """Line, from 1, of the key or item at `loc`, or of the last one on the way that the file has."""
    line = node.start_mark.line
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            found = [(item, item) for item in node.value[part : part + 1]]
        else:
            found = []
        if not found:
            break
        line, node = found[0][0].start_mark.line, found[0][1]
    return int(line) + 1


def _duplicates(node: yaml.Node) -> Iterator[tuple[int, str]]:
    """Keys written twice: YAML would silently take the last."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                yield key.start_mark.line + 1, f"key '{key.value}' is there twice"
            seen.add(key.value)
            yield from _duplicates(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _duplicates(item)
