"""The baseline at equal time: by what factor its schedule is stretched, and for which methods that is too little."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from kdtoolkit.benchmark.store import CellResult, Computed
from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME, TWICE

STRETCH_SLACK = 1.05  # the stored row of equal time is kept until it would have to be longer by more than this factor


def relative_costs(cells: Mapping[str, Sequence[CellResult]]) -> dict[str, float]:
    """What a step of each method costs, in steps of the baseline: at least 1, since a schedule is never shortened.

    Only costs on the same hardware, of steps that were computed alike, are compared. A row's cells with a teacher cache
    and its cells without one count apart. The largest factor counts. A method whose cost was not measured beside the
    baseline's is left out. Where the baseline's cost was not measured (earlier versions did not measure
    CPU time), the baseline with twice the steps stands in for it.
    """
    found: dict[str, float] = {}
    for alike in {(result.hardware, result.computed) for results in cells.values() for result in results}:
        costs = {
            (row, cached): cost
            for row, results in cells.items()
            for cached in (False, True)
            if (cost := _cost(result for result in results if _group(result) == (*alike, cached)))
        }
        plain = costs.get((BASELINE, False), costs.get((TWICE, False)))
        if plain is not None:
            for (row, _), cost in costs.items():
                if row not in (BASELINE, TWICE, EQUAL_TIME):
                    found[row] = max(found.get(row, 1.0), cost / plain)
    return found


def warnings(cells: Mapping[str, Sequence[CellResult]]) -> Iterable[str]:
    """A sentence about the methods for which the baseline at equal time may be too short, and one if it is."""
    costs = relative_costs(cells)
    methods = [row for row, results in cells.items() if results and row not in (BASELINE, TWICE, EQUAL_TIME)]
    if cells[BASELINE] and (unknown := [row for row in methods if row not in costs]):
        yield (
            f"the time of {', '.join(unknown)} was not measured beside the baseline's, so the baseline at equal time "
            "may be too short for a fair comparison. `--fresh`, with `--only` for the baseline and each of these rows, "
            "runs them again, and measures them on the same hardware and computed alike"
        )
    if len({result.steps for result in cells[EQUAL_TIME]}) > 1:
        told = ", ".join(f"seed {result.seed}: {result.steps} steps" for result in cells[EQUAL_TIME])
        yield (
            f"the seeds of the baseline at equal time have schedules of different lengths ({told}), as where machines "
            "chose their own. `kd benchmark run --any-version` with the same suite trains the shorter ones again"
        )
    stretch = min((result.stretch for result in cells[EQUAL_TIME]), default=None)
    short = [row for row in methods if stretch is not None and costs.get(row, 0.0) > stretch * STRETCH_SLACK]
    if short:
        told = ", ".join(f"{row} costs {costs[row]:.2f} plain steps" for row in short)
        yield (
            f"the baseline at equal time is too short, since its schedule is stretched by {stretch:.2f}, and a step of "
            f"{told}. `kd benchmark run` with the same suite runs it again"
        )


def _group(result: CellResult) -> tuple[str, Computed, bool]:
    return result.hardware, result.computed, result.cached is not None


def _cost(results: Iterable[CellResult]) -> float | None:
    """The mean cost of a step; None if it was not measured."""
    known = [cost for result in results if (cost := result.cost_per_step)]
    return statistics.fmean(known) if known else None
