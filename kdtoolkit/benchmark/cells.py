"""The cells of a run that can be compared: they are intact, of the same data and of the same teacher."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from kdtoolkit.benchmark.store import CellResult, Store, intact_result
from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME, TEACHER, TWICE, Suite

# What cells of one board share, and how a cell that does not is told.
SHARED = {
    "val_data": "evaluated on different images",
    "train_data": "trained on different images",
    "unlabelled": "trained on different images without labels",
    "teacher": "taught by a different teacher",
}


@dataclass(frozen=True)
class Cells:
    """The results of a run.

    `rows`: the results of each row, lowest seed first; a row without results has an empty list. `teacher`: the
    teacher's result, if it is there. `left_out`: one sentence for each stored result that is in neither, and why.
    """

    rows: dict[str, list[CellResult]]
    teacher: CellResult | None
    left_out: tuple[str, ...]


def rows_of(suite: Suite) -> tuple[str, ...]:
    """The names of all rows of students that a suite may have."""
    return BASELINE, *suite.entries, EQUAL_TIME, TWICE


def read_cells(store: Store, suite: Suite) -> Cells:
    """Read a run's results. Those that are damaged or cannot be compared with the rest are left out, and named.

    Raises KDError if a newer version of kdtoolkit has written one of them.
    """
    left_out: list[str] = []
    paths = {TEACHER: store.teacher_copy}
    paths |= {
        f"{row}, seed {seed}": store.result_path(row, seed) for row in rows_of(suite) for seed in range(suite.seeds)
    }
    found: list[CellResult] = []
    for name, path in paths.items():
        if (result := intact_result(path)) is not None:
            found.append(result)
        elif path.exists():
            left_out.append(f"{name} is left out, since {path} is damaged: `kd benchmark run` trains the cell again")
    kept, reasons = check_same(found)
    rows = {row: [result for result in kept if result.entry == row] for row in rows_of(suite)}
    teacher = next((result for result in kept if result.entry == TEACHER), None)
    return Cells(rows, teacher, (*left_out, *reasons))


def check_same(cells: Iterable[CellResult]) -> tuple[list[CellResult], list[str]]:
    """The cells that have data and teacher in common, and a sentence about each group of the remaining ones.

    What most students have in common counts; of two groups of the same size the one with the latest cell. The teacher
    itself must have been evaluated on the same images, and be the one that taught the students.
    """
    kept = list(cells)
    teacher_of = teachers(kept)
    reasons: list[str] = []

    def identity(cell: CellResult, name: str) -> str:
        return teacher_of(cell) if name == "teacher" else cell.fingerprints.get(name, "")

    for name, told in SHARED.items():
        groups: dict[str, list[CellResult]] = defaultdict(list)
        for cell in kept:
            if cell.entry != TEACHER and (found := identity(cell, name)):
                groups[found].append(cell)
        if not groups:
            continue
        common = max(groups, key=lambda found: (len(groups[found]), max(cell.date for cell in groups[found])))
        for found, group in groups.items():
            if found != common:
                names = "; ".join(cell.name for cell in group)
                are = "is left out: it was" if len(group) == 1 else "are left out: they were"
                reasons.append(f"{names} {are} {told} ({found}; most cells: {common})")
        kept = [cell for cell in kept if cell.entry == TEACHER or identity(cell, name) in ("", common)]
        for cell in [cell for cell in kept if cell.entry == TEACHER and name in ("val_data", "teacher")]:
            if (found := identity(cell, name)) not in ("", common):
                wrong = told if name == "val_data" else "not the one that taught the students"
                reasons.append(f"the teacher is left out: it was {wrong} ({found}; the students': {common})")
                kept.remove(cell)
    return kept, reasons


def teachers(cells: Sequence[CellResult]) -> Callable[[CellResult], str]:
    """A function that gives the identity of the teacher that a cell had or is; empty for a cell without teacher.

    It is the digest of the teacher's weights. Results of format 1 know the teacher's key alone: it stands for the
    weights of the cells with the same key, if they all have the same ones.
    """
    contents: dict[str, set[str]] = defaultdict(set)
    for cell in cells:
        if content := cell.fingerprints.get("teacher"):
            contents[cell.teacher_key].add(content)
    known: Mapping[str, str] = {key: next(iter(found)) for key, found in contents.items() if len(found) == 1}
    return lambda cell: cell.fingerprints.get("teacher") or known.get(cell.teacher_key, cell.teacher_key)
