"""Two runs side by side: what differs between them and, on the same images, how their rows differ in AP."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdtoolkit.benchmark.cells import teachers
from kdtoolkit.benchmark.runs import Run, names_of_hardware, open_run
from kdtoolkit.benchmark.stats import Difference, Spread, judged_together, paired_difference, spread
from kdtoolkit.benchmark.store import CellResult
from kdtoolkit.benchmark.suite import TEACHER


@dataclass(frozen=True)
class RowPair:
    """A row that both runs have: its AP in each, and the difference, the second run's minus the first's.

    `difference` pairs trainings of the same seed, and is judged together with those of the remaining rows. It is None
    if no seed is in both runs, or if the runs cannot be compared. Where the runs differ in student, data or versions,
    a seed gives them no noise in common: the interval is then right, and no narrower than that of unpaired trainings.
    """

    row: str
    first: Spread | None
    second: Spread | None
    difference: Difference | None


@dataclass(frozen=True)
class RunPair:
    """Two runs. `differences`: what differs, by name, as each of the runs has it. `rows`: the rows that both have.

    `refusal`: why their APs must not be subtracted; empty if they may.
    """

    first: Path
    second: Path
    differences: dict[str, tuple[str, str]]
    rows: tuple[RowPair, ...]
    refusal: str


def compare_runs(first: Path, second: Path) -> RunPair:
    """Compare two runs. Raises KDError if one of the folders holds no run."""
    runs = open_run(first), open_run(second)
    teacher_of = teachers([result for run in runs for result in run.results])
    facts = [dict(_facts(run)) | {"teacher": _distinct(map(teacher_of, run.results))} for run in runs]
    names = dict.fromkeys([*facts[0], *facts[1]])
    pairs = {name: (facts[0].get(name, "-"), facts[1].get(name, "-")) for name in names}
    refusal = _refusal(*runs)
    return RunPair(
        first,
        second,
        {name: pair for name, pair in pairs.items() if pair[0] != pair[1]},
        _judged(_rows(*runs, comparable=not refusal)),
        refusal,
    )


def _refusal(first: Run, second: Run) -> str:
    images = [{result.fingerprints.get("val_data", "") for result in run.results} for run in (first, second)]
    for run, found in zip((first, second), images, strict=True):
        if not run.results:
            return f"{run.root} has no results"
        if "" in found:
            return f"results of {run.root} do not say on which images they were evaluated, since they are too old"
    if images[0] != images[1]:
        return "the runs were evaluated on different images, so their APs cannot be subtracted"
    counted = [{result.key_parts.get("max_detections", "") for result in run.results} for run in (first, second)]
    if counted[0] != counted[1]:
        return "the runs count different numbers of detections (max_detections), so their APs cannot be subtracted"
    return ""


def _rows(first: Run, second: Run, *, comparable: bool) -> Iterator[RowPair]:
    def cells(run: Run, row: str) -> Sequence[CellResult]:
        if row == TEACHER:
            return [run.cells.teacher] if run.cells.teacher else []
        return run.cells.rows[row]

    for row in (TEACHER, *(row for row in first.rows if row in second.rows)):
        found = cells(first, row), cells(second, row)
        if all(found):
            one, two = ({r.seed: ap for r in results if (ap := r.evaluation["ap"]) is not None} for results in found)
            difference = paired_difference(two, one) if comparable else None
            yield RowPair(row, spread(one.values()), spread(two.values()), difference)


def _judged(rows: Iterable[RowPair]) -> tuple[RowPair, ...]:
    """The same rows, with differences that are judged together."""
    found = list(rows)
    judged = judged_together({row.row: row.difference for row in found if row.difference is not None})
    return tuple(replace(row, difference=judged.get(row.row)) for row in found)


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    """What may differ between two runs, by name."""
    results = run.results
    students = [result for result in results if result.entry != TEACHER]
    yield "suite", run.suite.name
    yield "rows", ", ".join(run.rows)
    yield "seeds", _distinct(str(seed) for seed in sorted({result.seed for result in students}))
    yield "images", _distinct(result.data for result in students)
    for name in ("val_data", "train_data", "unlabelled"):
        yield name, _distinct(result.fingerprints.get(name, "") for result in students)
    yield from _options("teacher", [run.cells.teacher] if run.cells.teacher else [])
    yield from _options("student", run.cells.rows[run.rows[0]])
    for row in run.rows:
        yield f"methods of {row}", _distinct(_methods(result) for result in run.cells.rows[row])
        yield f"steps of {row}", _distinct(str(result.steps) for result in run.cells.rows[row])
    for name in dict.fromkeys(name for result in results for name in result.versions):
        yield f"{name}", _distinct(result.versions.get(name, "") for result in results)
    yield "hardware", "; ".join(names_of_hardware(results))


def _methods(result: CellResult) -> str:
    return result.key_parts.get("methods", "")


def _options(role: str, results: Iterable[CellResult]) -> Iterator[tuple[str, str]]:
    """Every option of a detector and of its training by its place, such as `student train.lr`."""
    sections = [json.loads(text) for result in results if (text := result.key_parts.get("detector"))]
    for name in dict.fromkeys(name for section in sections for name in _flat(section)):
        yield f"{role} {name}", _distinct(str(_flat(section).get(name, "-")) for section in sections)


def _flat(section: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in section.items():
        found |= _flat(value, f"{above}{name}.") if isinstance(value, dict) and value else {above + name: value}
    return found


def _distinct(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(value for value in values if value)) or "-"
