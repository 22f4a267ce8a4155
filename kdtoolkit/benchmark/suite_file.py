"""Reading a suite from YAML, with errors that name the line."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from kdtoolkit.benchmark.suite import Suite, change, reason
from kdtoolkit.errors import KDError
from kdtoolkit.listing import SUITES, suite_path


def load_suite(name_or_path: str) -> Suite:
    """Read an embedded suite or a YAML file. Raises KDError that names file and line, and says what is allowed."""
    path = suite_path(name_or_path)
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KDError(f"cannot read suite file {path}: {error}") from error
    suite = parse_suite(text, path.name if path.parent == SUITES else str(path))
    root = suite.data.root
    return suite if root is None else change(suite, data={"root": (path.parent / root).resolve()})


def parse_suite(text: str, source: str) -> Suite:
    """Read a suite from YAML text. `source` is its name in errors. Raises KDError with one line for each error."""
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


def _explain(error: ErrorDetails) -> str:
    section = _model_at(error["loc"][:-1])
    where = ".".join(
        map(str, error["loc"] if error["type"] not in ("extra_forbidden", "missing") else error["loc"][:-1])
    )
    return (f"{where}: " if where else "") + reason(section, error)


def _model_at(loc: Sequence[int | str]) -> type[BaseModel]:
    """The section of the schema that an error is in."""
    model: type[BaseModel] = Suite
    for part in loc:
        field = model.model_fields.get(str(part))
        if field is None or not (inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel)):
            break
        model = field.annotation
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
