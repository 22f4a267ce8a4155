"""The cells of a run that can be compared: they are intact, of the same data, teacher and settings."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from kdtoolkit.benchmark.alike import SHARED, shared_by, teachers, unlike
from kdtoolkit.benchmark.detections_file import read_ground_truth
from kdtoolkit.benchmark.store import CellResult, DamagedError, Store, cell_name, intact_result
from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME, TEACHER, TWICE, Suite
from kdtoolkit.words import counted

_RESULT = re.compile(r"seed(\d+)")


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

    Raises KDError if one of them cannot be read, or if a newer version of kdtoolkit has written it.
    """
    left_out: list[str] = []
    places = {(TEACHER, 0): store.teacher_copy}
    places |= {(row, seed): store.result_path(row, seed) for row in rows_of(suite) for seed in range(suite.seeds)}
    found: list[CellResult] = []
    for (row, seed), path in places.items():
        name = cell_name(row, seed)
        if (result := intact_result(path)) is None:
            if path.exists():
                left_out.append(
                    f"{name} is left out, since {path} is damaged: `kd benchmark run` trains the cell again"
                )
        elif (result.entry, result.seed) != (row, seed):
            left_out.append(f"{name} is left out, since {path} holds the result of a different cell ({result.name})")
        else:
            found.append(result)
    if others := [name for name in _stored(store) if name not in places]:
        are = "is left out, since" if len(others) == 1 else "are left out, since"
        names = "; ".join(cell_name(*other) for other in others)
        left_out.append(
            f"{names} {are} {store.suite_path} asks for {counted(suite.seeds, 'seed')} of {', '.join(rows_of(suite))}: "
            "`kd benchmark run` with such rows and more --seeds takes finished cells in again"
        )
    differ = len({result.fingerprints.get("val_data") for result in found}) > 1
    val_data = _true_val_data(store) if differ else ""  # the file may be large
    kept, reasons = check_same(found, val_data=val_data, any_precision=suite.student.train.precision == "auto")
    rows = {row: [result for result in kept if result.entry == row] for row in rows_of(suite)}
    teacher = next((result for result in kept if result.entry == TEACHER), None)
    return Cells(rows, teacher, (*left_out, *reasons))


def check_same(
    cells: Iterable[CellResult], *, val_data: str = "", any_precision: bool = False
) -> tuple[list[CellResult], list[str]]:
    """The cells that can be compared (`alike.SHARED`), and a sentence about each group of the remaining ones.

    The stored teacher decides who must have taught the students, and `val_data`, the fingerprint of the stored ground
    truth, on which images they must have been evaluated. Where no student agrees with them, or they are not there, what
    most students have in common counts; of two groups of the same size the one with the latest cell. The teacher itself
    must have been evaluated like the students, and be the one that taught them. `any_precision`: whether the hardware
    chooses the precision.
    """
    kept = list(cells)
    teacher_of = teachers(kept)
    teacher = next((cell for cell in kept if cell.entry == TEACHER), None)
    witnesses = {"val_data": val_data, "teacher": teacher_of(teacher) if teacher is not None else ""}
    reasons: list[str] = []
    traits = {id(cell): shared_by(cell, teacher_of, any_precision=any_precision) for cell in kept}
    for name, told in SHARED.items():
        families: dict[str, dict[str, list[CellResult]]] = defaultdict(lambda: defaultdict(list))
        for cell in kept:
            if cell is not teacher and name in traits[id(cell)]:
                families[cell.entry if name == "row" else ""][traits[id(cell)][name]].append(cell)
        for groups in families.values():
            common, why = _common(groups, witnesses.get(name, ""))
            wrong = {found: group for found, group in groups.items() if found != common}
            for found, group in wrong.items():
                names = "; ".join(cell.name for cell in group)
                are = "is left out: it was" if len(group) == 1 else "are left out: they were"
                reasons.append(f"{names} {are} {told} ({unlike(found, common)}, {why})")
            gone = {id(cell) for group in wrong.values() for cell in group}
            if teacher is not None and (own := traits[id(teacher)].get(name, common)) != common:
                was = "not the one that taught the students" if name == "teacher" else told
                reasons.append(f"the teacher is left out: it was {was} ({unlike(own, common)})")
                gone.add(id(teacher))
                teacher = None
            kept = [cell for cell in kept if id(cell) not in gone]
    return kept, reasons


def _common(groups: Mapping[str, Sequence[CellResult]], witness: str) -> tuple[str, str]:
    """What cells should have in common, and why, in words. `groups`: the cells by what they have."""
    if witness and witness in groups:
        return witness, "as the stored ground truth and teacher.json have it"
    common = max(groups, key=lambda found: (len(groups[found]), max(cell.date for cell in groups[found])))
    is_most = 2 * len(groups[common]) > sum(map(len, groups.values()))
    return common, "as most cells have it" if is_most else "as the latest cells have it"


def _stored(store: Store) -> list[tuple[str, int]]:
    """Row and seed of each result in a run's folder, by its place."""
    paths = sorted(store.root.glob("cells/*/seed*.json"))
    return [(path.parent.name, int(found[1])) for path in paths if (found := _RESULT.fullmatch(path.stem))]


def _true_val_data(store: Store) -> str:
    """The fingerprint of the stored ground truth; empty if it is missing or damaged."""
    with suppress(DamagedError):
        if (truth := read_ground_truth(store.ground_truth_path)) is not None:
            return truth.fingerprint
    return ""
