"""How to repeat one row of a board: a suite of that row alone, and the command that runs it."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdtoolkit.benchmark.keys import in_precision
from kdtoolkit.benchmark.store import CellResult
from kdtoolkit.benchmark.suite import TEACHER, DetectorSection, Suite
from kdtoolkit.method_use import MethodUse
from kdtoolkit.models import is_code
from kdtoolkit.yaml_text import dump


def command(suite: Suite, row: str, results: Sequence[CellResult]) -> str:
    """The command that repeats a row. Its file has the text of `configuration`.

    `results`: the row's, at least one.
    """
    words = ["kd", "benchmark", "run", f"{_name(suite, row)}.yaml"]
    devices = {"cpu" if result.device == "cpu" else "cuda" for result in results}
    if len(devices) == 1:
        words += ["--device", *devices]
    if any(is_code(section.model) for section in (suite.teacher, suite.student)):
        words.append("--allow-code")
    return shlex.join(words)


def configuration(suite: Suite, row: str, results: Sequence[CellResult], teacher: CellResult | None) -> str:
    """A suite of one row as YAML, with all defaults written out.

    Relative paths count from the file's folder, and it names files and data sets without their folders: they have to
    lie beside it. `results`: the row's, at least one. `teacher`: the teacher's, if there is one.
    """
    student = suite.student
    if results[0].stretch != 1:  # a baseline with a longer schedule
        longer = student.train.model_copy(update={"steps": results[0].steps})
        student = student.model_copy(update={"train": longer})
    alone = suite.model_copy(
        update={
            "name": _name(suite, row),
            "seeds": max(result.seed for result in results) + 1,
            "teacher": suite.teacher if teacher is None else _resolved(suite.teacher, teacher),
            "student": student if row == TEACHER else _resolved(student, results[0]),
            "plateau": False,  # it would run a further row
            "entries": {row: suite.entries[row]} if row in suite.entries else {},
        }
    )
    fields = _beside(alone.model_dump(mode="json"))
    text = dump(fields)
    versions = ", ".join(f"{name} {version}" for name, version in results[0].versions.items())
    comments = [f"{row}, run with {versions}", *(_defaults(use) for use in suite.methods(row))]
    return "".join(f"# {comment}\n" for comment in comments) + text


def _name(suite: Suite, row: str) -> str:
    return f"{suite.name}-{row}"


def _resolved(section: DetectorSection, result: CellResult) -> DetectorSection:
    """The section with the precision that `auto` meant."""
    precision = result.key_parts.get("precision")
    return section if precision is None else in_precision(section, precision)


def _beside(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a suite with the names alone of files and folders."""

    def name(value: Any) -> Any:
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

    for part in ("data", "teacher", "student"):
        fields[part] = {key: name(value) for key, value in fields[part].items()}
    for part in ("teacher", "student"):
        args = fields[part]["args"]
        fields[part]["args"] = {key: name(value) if key == "pretrained" else value for key, value in args.items()}
    return fields


def _defaults(use: MethodUse) -> str:
    """A method with all its arguments, also those that the suite leaves to their defaults."""
    parameters = inspect.signature(use.factory).parameters.values()
    values = {each.name: each.default for each in parameters if each.default is not each.empty} | use.args
    return f"{use.name}: " + (", ".join(f"{name}={value}" for name, value in values.items()) or "no arguments")
