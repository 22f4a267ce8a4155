"""Reading a suite from YAML, with errors that name the line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdtoolkit.benchmark.suite import DetectorSection, Suite, change
from kdtoolkit.errors import KDError
from kdtoolkit.listing import SUITES, suite_path
from kdtoolkit.models import is_place
from kdtoolkit.sections import parse
from kdtoolkit.yaml_text import split_name


def load_suite(name_or_path: str) -> Suite:
    """Read an embedded suite or a YAML file. Raises KDError that names file and line, and says what is allowed."""
    path = suite_path(name_or_path)
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KDError(f"cannot read suite file {path}: {error}") from error
    suite = parse_suite(text, path.name if path.parent == SUITES else str(path))
    places = {"root": suite.data.root, "unlabelled": suite.data.unlabelled}
    data = {name: (path.parent / place).resolve() for name, place in places.items() if place is not None}
    return change(
        suite, data=data, teacher=_located(suite.teacher, path.parent), student=_located(suite.student, path.parent)
    )


def _located(section: DetectorSection, folder: Path) -> dict[str, Any]:
    """A detector's section with absolute paths. Relative ones count from the suite file's folder."""
    fields = section.model_dump(exclude_unset=True)

    def place(name: object) -> object:
        return str((folder / name).resolve()) if isinstance(name, str) and is_place(name, folder) else name

    if "?" in section.model and "pretrained" in (named := split_name(section.model, section.args))[1]:
        fields["model"], fields["args"] = named
    if "args" in fields and "pretrained" in fields["args"]:
        fields["args"] = {**fields["args"], "pretrained": place(fields["args"]["pretrained"])}
    return {**fields, **{key: place(fields[key]) for key in ("model", "weights") if key in fields}}


def parse_suite(text: str, source: str) -> Suite:
    """Read a suite from YAML text. `source` is its name in errors. Raises KDError with one line for each error."""
    return parse(Suite, text, source, "a suite")
