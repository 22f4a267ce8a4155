"""Reading a suite from YAML, with errors that name the line."""

from __future__ import annotations

from kdtoolkit.benchmark.suite import Suite, change
from kdtoolkit.errors import KDError
from kdtoolkit.listing import SUITES, suite_path
from kdtoolkit.sections import parse


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
    return parse(Suite, text, source, "a suite")
