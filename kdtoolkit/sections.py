"""Options in sections, which pydantic checks: read from YAML, with errors in words that name the line."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Annotated, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from kdtoolkit.errors import KDError
from kdtoolkit.options import did_you_mean
from kdtoolkit.yaml_text import Loader, load

T = TypeVar("T", bound=BaseModel)
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""What torch's generators take, with room for seeds that are counted from it."""


class Section(BaseModel):
    """Options that belong together. Unknown names and numbers that are not finite are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def parse(kind: type[T], text: str, source: str, what: str) -> T:
    """Read a section from YAML text.

    `source` is the file's name in errors, `what` the kind of file ("a suite"). Raises KDError with one line for each
    error.
    """
    try:
        tree, raw = yaml.compose(text, Loader), load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise KDError(f"{source}{where}: not YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(tree, yaml.MappingNode):
        raise KDError(f"{source}, line 1: {what} is a mapping with the keys {', '.join(kind.model_fields)}")
    problems = list(_duplicates(tree))
    found: T | None = None
    try:
        found = kind.model_validate(raw)
    except ValidationError as error:
        problems += [(_line(tree, item["loc"]), explain(kind, item)) for item in error.errors()]
    if found is None or problems:
        raise KDError("\n".join(f"{source}, line {line}: {message}" for line, message in sorted(problems)))
    return found


def reason(section: type[BaseModel], error: ErrorDetails) -> str:
    """An error of a section in words."""
    key = str(error["loc"][-1]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        return unknown_key(key, list(section.model_fields))
    if error["type"] == "missing":
        return f"key '{key}' is missing"
    if error["type"] == "value_error":
        return error["msg"].removeprefix("Value error, ")
    return f"{key} = {error['input']!r}: {error['msg'][:1].lower()}{error['msg'][1:]}"


def unknown_key(key: str, allowed: Sequence[str]) -> str:
    """An unknown key in words, with the key that was perhaps meant."""
    return f"unknown key '{key}'{did_you_mean(key, allowed)}; allowed: {', '.join(allowed) or 'none'}"


def explain(kind: type[BaseModel], error: ErrorDetails) -> str:
    """An error in words, with the place in the section where it is."""
    section = _model_at(kind, error["loc"][:-1])
    where = ".".join(
        map(str, error["loc"] if error["type"] not in ("extra_forbidden", "missing") else error["loc"][:-1])
    )
    return (f"{where}: " if where else "") + reason(section, error)


def _model_at(kind: type[BaseModel], loc: Sequence[int | str]) -> type[BaseModel]:
    """The section of the schema that an error is in."""
    model = kind
    for part in loc:
        field = model.model_fields.get(str(part))
        kinds = () if field is None else (field.annotation, *get_args(field.annotation))  # TrainConfig | None
        sections = [kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, BaseModel)]
        if not sections:
            break
        model = sections[0]
    return model


def _line(node: yaml.Node, loc: Sequence[int | str]) -> int:
    """The line, counted from 1, of the key or item at `loc`; if the file lacks it, of the nearest one above it."""
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
    """Keys that are written twice. YAML would take the last one without a word."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                yield key.start_mark.line + 1, f"key '{key.value}' is written twice"
            seen.add(key.value)
            yield from _duplicates(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _duplicates(item)
