"""Cells of several machines in one folder. What does not belong together is refused before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kdtoolkit.benchmark.alike import SHARED, shared_by, teachers, unlike
from kdtoolkit.benchmark.detections_file import detections_path, read_ground_truth
from kdtoolkit.benchmark.runs import Run, open_run
from kdtoolkit.benchmark.store import CellResult, DamagedError, Store, discard, set_aside, write_atomic
from kdtoolkit.benchmark.suite import Suite, change
from kdtoolkit.errors import KDError


@dataclass(frozen=True)
class Merged:
    """What a merged folder got: the numbers of cells that are new in it and that several runs had, with equal results.

    `left_out`: one sentence for each result that does not belong to its run, or is damaged. `kept_aside`: one sentence
    for each result of the folder that was left out and had to make room; it is kept beside the new one.
    """

    new: int
    twice: int
    left_out: tuple[str, ...]
    kept_aside: tuple[str, ...] = ()


def merge(out: Path, folders: Sequence[Path]) -> Merged:
    """Copy the cells of several runs into one folder, which `out` names. If it holds a run, its cells stay.

    The runs may have different rows and seeds. Raises KDError if they differ in data, teacher or settings, or if two of
    them have different results for the same cell.
    """
    known = {folder.resolve(): folder for folder in ([out] if Store(out).suite_path.is_file() else [])}
    known |= {folder.resolve(): folder for folder in folders}
    runs = [open_run(folder) for folder in known.values()]
    _check_shared(runs)
    suite = _joined(runs)
    chosen, twice = _chosen(runs)
    truth = _ground_truth(runs)
    store = Store(out)
    new = 0
    kept_aside: list[str] = []

    def copy(source: Path, place: Path) -> None:
        if place.exists():  # it was left out
            kept_aside.append(f"{place} did not belong to its run: it is kept as {set_aside(place).name}")
        _copy(source, place)

    with store.lock():
        for (row, seed), (run, _) in chosen.items():
            if run.root.resolve() != out.resolve():
                new += 1
                copy(run.store.result_path(row, seed), store.result_path(row, seed))
        if (taught := next((run for run in runs if run.cells.teacher is not None), None)) is not None:
            if taught.root.resolve() != out.resolve():
                copy(taught.store.teacher_copy, store.teacher_copy)
            _copy_teacher_weights(taught, store)
        if truth is not None:
            write_atomic(store.ground_truth_path, truth)
        write_atomic(store.suite_path, suite.to_yaml().encode())
    return Merged(new, twice, tuple(words for run in runs for words in run.cells.left_out), tuple(kept_aside))


def _check_shared(runs: Sequence[Run]) -> None:
    """Check that the cells of all runs can be compared. Raises KDError that names two runs and what differs."""
    teacher_of = teachers([result for run in runs for result in run.results])
    automatic = all(run.suite.student.train.precision == "auto" for run in runs)
    seen: dict[tuple[str, str], tuple[str, Run]] = {}
    for run in runs:
        for result in run.results:
            for name, found in shared_by(result, teacher_of, any_precision=automatic).items():
                row = result.entry if name == "row" else ""
                common, where = seen.setdefault((name, row), (found, run))
                if common != found:
                    raise KDError(
                        f"{run.root} cannot be merged with {where.root}: {result.name} was {SHARED[name]} "
                        f"({unlike(found, common)}). {_ADVICE.get(name, _RUN_AGAIN)}"
                    )


_DATA = "Copy the data of one machine to the rest, and run again"
_RUN_AGAIN = "Run one of them again with the suite of the other"
_ADVICE = {
    "val_data": _DATA,
    "train_data": _DATA,
    "unlabelled": _DATA,
    "teacher": "Copy the folder `teachers` of the first machine to the second, and run there with --any-version",
}


def _joined(runs: Sequence[Run]) -> Suite:
    """The first run's suite, with the entries and seeds of all. Raises KDError if settings differ."""
    first = runs[0]
    for run in runs[1:]:
        for name in ("teacher_scale", "init", "class_map"):
            one, two = getattr(first.suite, name), getattr(run.suite, name)
            if one != two:
                raise KDError(
                    f"{run.root} cannot be merged with {first.root}: {name} of its suite is {two} instead of {one}. "
                    f"{_RUN_AGAIN}"
                )
    entries = dict(first.suite.entries)
    where = dict.fromkeys(entries, first)
    for run in runs[1:]:
        for name, methods in run.suite.entries.items():
            if entries.setdefault(name, methods) != methods:
                raise KDError(
                    f"{run.root} cannot be merged with {where[name].root}: entry '{name}' has different methods in the "
                    "two suites. Rename it in one of them, and run it again"
                )
            where.setdefault(name, run)
    return change(first.suite, entries=entries, seeds=max(run.suite.seeds for run in runs))


def _chosen(runs: Sequence[Run]) -> tuple[dict[tuple[str, int], tuple[Run, CellResult]], int]:
    """Each cell with the run that it is taken from, and how many cells several runs have.

    Raises KDError if runs have different results for a cell.
    """
    chosen: dict[tuple[str, int], tuple[Run, CellResult]] = {}
    unequal: list[str] = []
    twice = 0
    for run in runs:
        for result in (result for results in run.cells.rows.values() for result in results):
            cell = result.entry, result.seed
            kept, known = chosen.setdefault(cell, (run, result))
            if known is result:
                continue
            twice += 1
            if not _equal(known, result):
                unequal.append(f"{result.name} (AP {_ap(known)} in {kept.root}, {_ap(result)} in {run.root})")
    if unequal:
        raise KDError(
            f"the runs have different results for the same cells: {'; '.join(unequal)}. Delete one of the two results, "
            "or let the machines run different seeds (--seeds 0-2 and --seeds 3-5)"
        )
    return chosen, twice


def _equal(one: CellResult, two: CellResult) -> bool:
    """Whether two results of a cell are equal in all but times, hardware and versions."""
    names = ("evaluation", "per_class", "steps", "history")
    return all(getattr(one, name) == getattr(two, name) for name in names)


def _ap(result: CellResult) -> str:
    ap = result.evaluation["ap"]
    return "undefined" if ap is None else f"{ap:.2f}"


def _copy(result: Path, to: Path) -> None:
    """Copy a result with its weights and detections. The result comes last, so that it never lacks them.

    Why its cell failed before is deleted.
    """
    for path, place in (
        (result.with_suffix(".pt"), to.with_suffix(".pt")),
        (detections_path(result), detections_path(to)),
        (result, to),
    ):
        if path.exists():
            write_atomic(place, path.read_bytes())
        else:
            discard(place)  # that of an earlier result
    discard(to.with_suffix(".error"))


def _copy_teacher_weights(run: Run, store: Store) -> None:
    """Copy the teacher's result and weights beside the folder, where runs that go on look for them."""
    assert run.cells.teacher is not None  # the caller has checked it
    key = run.cells.teacher.key
    if run.store.teacher_path(key).exists() and not store.teacher_path(key).exists():
        _copy(run.store.teacher_path(key), store.teacher_path(key))


def _ground_truth(runs: Sequence[Run]) -> bytes | None:
    """The first run's ground truth that is intact and of the images that the cells were evaluated on, as its file."""
    images = {result.fingerprints.get("val_data", "") for run in runs for result in run.results}
    for run in runs:
        with suppress(DamagedError):
            truth = read_ground_truth(run.store.ground_truth_path)
            if truth is not None and truth.fingerprint in images:
                return run.store.ground_truth_path.read_bytes()
    return None
