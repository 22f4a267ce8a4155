"""Cells of several machines in one folder. What does not belong together is refused before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdtoolkit.benchmark.cells import SHARED, teachers
from kdtoolkit.benchmark.detections_file import detections_path, read_ground_truth
from kdtoolkit.benchmark.keys import same_settings
from kdtoolkit.benchmark.runs import Run, open_run
from kdtoolkit.benchmark.store import CellResult, Store, discard, set_aside, write_atomic
from kdtoolkit.benchmark.suite import EQUAL_TIME, TEACHER, Suite, change
from kdtoolkit.errors import KDError


@dataclass(frozen=True)
class Merged:
    """What a merged folder got: the numbers of cells that are new in it and that several runs had, with equal results.

    `left_out`: one sentence for each result that is damaged, or of different data or a different teacher than its run.
    """

    new: int
    twice: int
    left_out: tuple[str, ...]


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
    store = Store(out)
    new = 0
    with store.lock():
        for (row, seed), (run, _) in chosen.items():
            if run.root.resolve() != out.resolve():
                new += 1
                place = store.result_path(row, seed)
                if place.exists():  # it was left out: damaged, or of different data or a different teacher
                    set_aside(place)
                _copy(run.store.result_path(row, seed), place)
        _copy_teacher(runs, store)
        _copy_ground_truth(runs, store)
        write_atomic(store.suite_path, suite.to_yaml().encode())
    return Merged(new, twice, tuple(words for run in runs for words in run.cells.left_out))


def _check_shared(runs: Sequence[Run]) -> None:
    """Check that runs have data and teacher in common. Raises KDError that names two that do not."""
    teacher_of = teachers([result for run in runs for result in run.results])
    seen: dict[str, tuple[str, Run]] = {}
    for run in runs:
        for result in run.results:
            found = {**result.fingerprints, "teacher": teacher_of(result)}
            for name in SHARED:
                identity = found.get(name, "")
                if not identity or (result.entry == TEACHER and name == "train_data"):
                    continue
                first, where = seen.setdefault(name, (identity, run))
                if first != identity:
                    raise KDError(
                        f"{run.root} cannot be merged with {where.root}: its cells were {SHARED[name]} ({identity} "
                        f"instead of {first}). {_ADVICE[name]}"
                    )


_DATA = "Copy the data of one machine to the rest, and run again"
_ADVICE = {
    "val_data": _DATA,
    "train_data": _DATA,
    "unlabelled": _DATA,
    "teacher": "Copy the folder `teachers` of the first machine to the second, and run there with --any-version",
}


def _joined(runs: Sequence[Run]) -> Suite:
    """The first run's suite, with the entries and seeds of all. Raises KDError if settings differ."""
    first = runs[0]
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

    Raises KDError if the settings of a row differ between runs, or the results of a cell.
    """
    chosen: dict[tuple[str, int], tuple[Run, CellResult]] = {}
    rows: dict[str, tuple[Run, CellResult]] = {}
    unequal: list[str] = []
    twice = 0
    for run in runs:
        automatic = run.suite.student.train.precision == "auto"
        for result in (result for results in run.cells.rows.values() for result in results):
            where, first = rows.setdefault(result.entry, (run, result))
            if not same_settings(_settings(first), _settings(result), any_precision=automatic):
                raise KDError(
                    f"{run.root} cannot be merged with {where.root}: row '{result.entry}' was trained with different "
                    f"settings. `kd benchmark compare {where.root} {run.root}` lists them"
                )
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


def _settings(result: CellResult) -> dict[str, str]:
    """What the cells of a row have in common. The teacher is compared by its weights, and equal time is not equal."""
    apart = {"seed": "", "teacher": ""} | ({"steps": ""} if result.entry == EQUAL_TIME else {})
    return {**result.key_parts, **apart}


def _equal(one: CellResult, two: CellResult) -> bool:
    """Whether two results of a cell are equal in all but times, hardware and versions."""
    names = ("evaluation", "per_class", "steps", "history")
    return all(getattr(one, name) == getattr(two, name) for name in names)


def _ap(result: CellResult) -> str:
    ap = result.evaluation["ap"]
    return "undefined" if ap is None else f"{ap:.2f}"


def _copy(result: Path, to: Path) -> None:
    """Copy a result with its weights and detections. The result comes last, so that it never lacks them."""
    for path, place in (
        (result.with_suffix(".pt"), to.with_suffix(".pt")),
        (detections_path(result), detections_path(to)),
        (result, to),
    ):
        if path.exists():
            write_atomic(place, path.read_bytes())
        else:
            discard(place)  # that of an earlier result


def _copy_teacher(runs: Sequence[Run], store: Store) -> None:
    """Copy the teacher: its result into the folder, and its weights beside it, where runs that go on look for them."""
    run = next((run for run in runs if run.cells.teacher is not None), None)
    if run is None or run.cells.teacher is None:
        return
    key = run.cells.teacher.key
    if run.root.resolve() != store.root.resolve():
        _copy(run.store.teacher_copy, store.teacher_copy)
    if run.store.teacher_path(key).exists() and not store.teacher_path(key).exists():
        _copy(run.store.teacher_path(key), store.teacher_path(key))


def _copy_ground_truth(runs: Sequence[Run], store: Store) -> None:
    if read_ground_truth(store.ground_truth_path) is not None:
        return
    for run in runs:
        if run.store.ground_truth_path.exists():
            write_atomic(store.ground_truth_path, run.store.ground_truth_path.read_bytes())
            return
