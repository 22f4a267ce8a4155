"""What lies behind a board: curves, errors, costs, how to repeat each row, and what the board does not show."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from kdtoolkit.benchmark.limits import limits_of
from kdtoolkit.benchmark.repeating import command, configuration
from kdtoolkit.benchmark.runs import Run
from kdtoolkit.benchmark.store import CellResult
from kdtoolkit.benchmark.suite import TEACHER
from kdtoolkit.engine.breakdown import Breakdown, mean_breakdown

POINTS = 150  # of a curve, at most


class Curve(BaseModel):
    """How a number went while a row's students were trained.

    `steps` are the steps of training. At each of them, `mean` is the mean over the row's seeds. `low` and `high` are
    the smallest and the largest value of a seed. A seed with fewer than two values does not
    count. A step at which one of the remaining seeds has no value is left out, so that all points are means over the
    same seeds.
    """

    model_config = ConfigDict(frozen=True)

    steps: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


class RowCost(BaseModel):
    """What a row costs. A value is None if it is not known.

    `train_seconds`, `step_ms`: of training, means over the row's seeds as on the board. `latency_ms`, `gflops`: of one
    image alone. All students are one detector, so `latency_ms` is the median over all cells of students; it is None if
    they were timed on different hardware. `parameters`: of the detector.
    """

    model_config = ConfigDict(frozen=True)

    train_seconds: float | None
    step_ms: float | None
    latency_ms: float | None
    gflops: float | None
    parameters: int | None


class Details(BaseModel):
    """What lies behind a board. The keys are the board's rows, and "teacher".

    Attributes:
        curves: for each row, curves by the name of what they show: loss terms and metrics of methods such as
            "pkd/feature", "lr", "eval/ap" and "eval/ap50" in percent, and, where the suite has a probe,
            "conflict/METHOD" and "share/METHOD". Each has from 2 to 150 points.
        breakdown: for each row, means over its seeds. Rows of earlier versions have none.
        costs: for each row, what training and one image cost.
        commands: for each row, the command that repeats it; the file that it names holds the row's `settings`.
        settings: for each row, a suite of that row alone as YAML, with all defaults written out.
        limits: what the board does not show, one sentence each.
    """

    model_config = ConfigDict(frozen=True)

    curves: dict[str, dict[str, Curve]]
    breakdown: dict[str, Breakdown]
    costs: dict[str, RowCost]
    commands: dict[str, str]
    settings: dict[str, str]
    limits: tuple[str, ...]


def details(run: Run) -> Details:
    """What lies behind the board of a run, from its stored results. Nothing is trained or evaluated."""
    suite, cells = run.suite, run.cells
    rows = {row: results for row, results in cells.rows.items() if results}
    if cells.teacher is not None:
        rows[TEACHER] = [cells.teacher]
    latency = _latency([result for row, results in rows.items() if row != TEACHER for result in results])
    broken_down = {row: [each.breakdown for each in results if each.breakdown] for row, results in rows.items()}
    return Details(
        curves={row: _curves(results) for row, results in rows.items()},
        breakdown={row: mean_breakdown(parts) for row, parts in broken_down.items() if parts},
        costs={row: _cost(results, _latency(results) if row == TEACHER else latency) for row, results in rows.items()},
        commands={row: command(suite, row, results) for row, results in rows.items()},
        settings={row: configuration(suite, row, results, cells.teacher) for row, results in rows.items()},
        limits=tuple(limits_of(suite, cells)),
    )


def _curves(results: Sequence[CellResult]) -> dict[str, Curve]:
    """A row's curves by term. Numbers that are not finite are left out."""
    found: dict[str, list[dict[float, float]]] = defaultdict(list)  # for each name, the values of each seed by step
    for result in results:
        own: dict[str, dict[float, float]] = defaultdict(dict)
        points: list[Mapping[str, float | None]] = [*result.history, *map(_named, result.evaluations)]
        for point in points:
            for name, value in point.items():
                if name != "step" and value is not None and math.isfinite(value):
                    own[name][point["step"] or 0] = value
        for name, values in own.items():
            if len(values) > 1:
                found[name].append(values)
    shared = {name: set.intersection(*map(set, seeds)) for name, seeds in found.items()}
    return {
        name: _curve({step: [values[step] for values in seeds] for step in shared[name]})
        for name, seeds in found.items()
        if len(shared[name]) > 1
    }


def _named(evaluation: Mapping[str, float | None]) -> dict[str, float | None]:
    return {f"eval/{name}" if name.startswith("ap") else name: value for name, value in evaluation.items()}


def _curve(values: Mapping[float, list[float]]) -> Curve:
    steps = sorted(values)
    kept = [steps[round(place * (len(steps) - 1) / (POINTS - 1))] for place in range(POINTS)]
    steps = steps if len(steps) <= POINTS else kept

    def over_seeds(summary: Callable[[list[float]], float]) -> tuple[float, ...]:
        return tuple(float(f"{summary(values[step]):.5g}") for step in steps)  # a page has thousands of them

    return Curve(steps=tuple(steps), mean=over_seeds(statistics.fmean), low=over_seeds(min), high=over_seeds(max))


def _cost(results: Sequence[CellResult], latency: float | None) -> RowCost:
    alike = len({(result.hardware, result.way) for result in results}) == 1

    def mean(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known and alike else None

    inference = next((result.inference for result in results if result.inference), None)
    return RowCost(
        train_seconds=mean(result.train_seconds for result in results),
        step_ms=mean(result.cost_ms for result in results),
        latency_ms=latency,
        gflops=None if inference is None else inference.gflops,
        parameters=results[0].parameters,
    )


def _latency(results: Sequence[CellResult]) -> float | None:
    timed = [result for result in results if result.inference is not None]
    if len({result.hardware for result in timed}) != 1:
        return None
    return statistics.median(result.inference.latency_ms for result in timed if result.inference)
