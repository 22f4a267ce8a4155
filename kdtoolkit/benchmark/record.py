"""What is stored about the cells of a run, in words: the table of all cells, and the record of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kdtoolkit.benchmark.board import METRICS
from kdtoolkit.benchmark.detections_file import detections_path, read_detections
from kdtoolkit.benchmark.runs import Run
from kdtoolkit.benchmark.store import CachedTeacher, CellResult, are_whole, intact_result, read_result
from kdtoolkit.benchmark.suite import TEACHER
from kdtoolkit.errors import KDError
from kdtoolkit.options import did_you_mean
from kdtoolkit.words import counted, duration
from kdtoolkit.yaml_text import dump


def cell_path(run: Run, row: str, seed: int) -> Path:
    """The file of a cell's result. Raises KDError for a row that the run does not have."""
    rows = [*run.rows, TEACHER]
    if row not in rows:
        raise KDError(f"{run.root} has no row '{row}'{did_you_mean(row, rows)}; it has {', '.join(rows)}")
    return run.store.teacher_copy if row == TEACHER else run.store.result_path(row, seed)


def state(run: Run, row: str, seed: int) -> str:
    """How far a cell is: its AP, or `not run`, `failed`, `damaged` or `left out`."""
    path = cell_path(run, row, seed)
    found = intact_result(path)
    if found is not None:
        counts = (found.entry, found.seed) == (row, seed) and found in run.results
        return percent(found.evaluation["ap"]) if counts else "left out"
    if path.exists():
        return "damaged"
    return "failed" if path.with_suffix(".error").exists() else "not run"


def open_cell(run: Run, row: str, seed: int) -> CellResult:
    """The stored result of a cell. Raises KDError that says why there is none."""
    path = cell_path(run, row, seed)
    result = read_result(path)
    if result is not None:
        return result
    error = path.with_suffix(".error")
    if error.exists():
        raise KDError(f"{row}, seed {seed} of {run.root} has failed: {error.read_text('utf-8').splitlines()[0]}")
    done = ", ".join(str(result.seed) for result in run.cells.rows.get(row, [])) or "none"
    raise KDError(f"{row} of {run.root} has no result for seed {seed}; seeds with a result: {done}")


def record(path: Path, result: CellResult) -> dict[str, str]:
    """All that is stored about a cell, by name. `path`: the file of its result."""
    return {name: text for name, text in _facts(path, result) if text}


def settings_text(result: CellResult) -> str:
    """The resolved configuration of a cell as YAML; empty for results of earlier versions."""
    return dump(result.settings, width=100) if result.settings else ""


def percent(value: float | None) -> str:
    """`31.2`, or `undefined`."""
    return "undefined" if value is None else f"{value:.1f}"


def _facts(path: Path, result: CellResult) -> Iterator[tuple[str, str]]:
    yield "cell", result.name
    yield "suite", result.suite
    metrics = (f"{words} {percent(result.evaluation.get(name))}" for name, words in METRICS.items())
    yield "accuracy", ", ".join(metrics)
    yield "classes", ", ".join(f"{name} {percent(ap)}" for name, ap in result.per_class.items())
    yield (
        "while training",
        ", ".join(f"step {row['step']:.0f} AP {percent(row['ap'])}" for row in result.evaluations if "ap" in row),
    )
    yield "gradients", "; ".join(_gradients(result))
    if result.steps:
        longer = "" if result.stretch == 1 else f", the schedule times {result.stretch:.2f}"
        yield "training", f"{result.steps} steps in {duration(result.train_seconds)}{longer}"
        cost = "not measured" if result.cost_ms is None else f"{result.cost_ms:.0f} ms a step"
        yield "cost", f"{cost}, median by the clock {result.step_ms:.0f} ms, memory {result.peak_memory_mb:.0f} MB"
        yield "computed", str(result.computed)
        if result.cached is not None:
            yield "teacher cache", _cached(result.cached)
        yield "losses", "; ".join(_losses(result))
    else:
        yield "training", "none: the detector is used as it is"
    if (one := result.inference) is not None:
        yield (
            "inference",
            f"{one.latency_ms:.1f} ms (middle half {one.latency_iqr_ms:.1f} ms wide), {one.gflops:.3g} GFLOPs for an "
            f"image of {one.size[1]}x{one.size[0]} on {one.device}, {counted(one.threads, 'thread')}",
        )
    yield "parameters", f"{result.parameters:,}"
    yield "from the teacher", result.inherited
    yield "warnings", "; ".join(result.warnings)
    yield "data", result.data
    yield "fingerprints", ", ".join(f"{name} {digest}" for name, digest in result.fingerprints.items())
    yield "teacher's key", result.teacher_key
    yield "hardware", result.hardware
    yield "versions", ", ".join(f"{name} {version}" for name, version in result.versions.items())
    yield "date", result.date
    yield "key", result.key
    yield "files", ", ".join(_files(path, result))
    yield "format", str(result.format)


def _cached(found: CachedTeacher) -> str:
    """How a cell used its teacher cache."""
    return (
        f"{found.hits} images found, {found.misses} asked about, of {found.views} different ones; a pass over one "
        f"costs {1000 * found.seconds_of_view:.1f} ms, so cells that ran before saved it "
        f"{duration(found.seconds_spared)}"
    )


def _losses(result: CellResult) -> Iterator[str]:
    """The first and the last value of every number that was logged in each step."""
    if not result.history:
        return
    first, last = result.history[0], result.history[-1]
    for name in (name for name in first if name != "step" and name in last):
        yield f"{name} {first[name]:.3g} -> {last[name]:.3g}"


def _files(path: Path, result: CellResult) -> Iterator[str]:
    yield str(path)
    if are_whole(weights := path.with_suffix(".pt")):
        yield str(weights)
    found = read_detections(detections_path(path), result)
    yield "no detections" if found is None else f"{detections_path(path)} ({counted(len(found.scores), 'detection')})"


def _gradients(result: CellResult) -> Iterator[str]:
    """What the probe found by step: each cosine with the task's gradient, and the method's share."""
    for row in result.evaluations:
        cosines = {name.partition("/")[2]: value for name, value in row.items() if name.startswith("conflict/")}
        told = []
        for name, cosine in cosines.items():
            share = row.get(f"share/{name}")
            of_both = "" if share is None else f", share {100 * share:.0f} %"
            told.append(f"{name} cosine {'unknown' if cosine is None else f'{cosine:+.2f}'}{of_both}")
        if told:
            yield f"step {row['step']:.0f} {', '.join(told)}"
