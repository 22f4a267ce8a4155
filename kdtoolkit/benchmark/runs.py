"""The runs below a folder: what they compare, how far they are, where and when they ran."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kdtoolkit.benchmark.cells import Cells, read_cells, rows_of
from kdtoolkit.benchmark.store import CellResult, Store
from kdtoolkit.benchmark.suite import EQUAL_TIME, TWICE, Suite
from kdtoolkit.benchmark.suite_file import load_suite
from kdtoolkit.errors import KDError
from kdtoolkit.files import walk


@dataclass(frozen=True)
class Run:
    """A run's folder with its suite and its cells."""

    root: Path
    suite: Suite
    cells: Cells

    @property
    def store(self) -> Store:
        """Where the files of the run are."""
        return Store(self.root)

    @property
    def results(self) -> list[CellResult]:
        """All results that can be compared: the teacher's, then the students' row by row."""
        teacher = [self.cells.teacher] if self.cells.teacher else []
        return [*teacher, *(result for results in self.cells.rows.values() for result in results)]

    @property
    def rows(self) -> list[str]:
        """The rows that the suite asks for, and those of the baselines with longer schedules that have results."""
        longer = (EQUAL_TIME, TWICE)
        return [row for row in rows_of(self.suite) if row not in longer or self.cells.rows[row]]

    @property
    def seeds_done(self) -> str:
        """How many seeds are done, in words: `3 of 3`, or `1 to 3 of 4` if that differs between rows."""
        done = [len(self.cells.rows[row]) for row in self.rows if row not in (EQUAL_TIME, TWICE)]
        low, high = min(done), max(done)
        return f"{low if low == high else f'{low} to {high}'} of {self.suite.seeds}"

    @property
    def size(self) -> int:
        """Bytes on the disk, without the teachers and pictures that runs share."""
        return sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())


def open_run(root: Path) -> Run:
    """Read a run's folder. Raises KDError if it holds no run, or if its suite or results cannot be read."""
    store = Store(root)
    if not store.suite_path.is_file():
        raise KDError(
            f"{root} is not a folder of `kd benchmark run`: it has no suite.yaml. Name a suite's folder, as runs/quick"
        )
    suite = load_suite(str(store.suite_path))
    return Run(root, suite, read_cells(store, suite))


def seeds_asked_for(root: Path) -> int:
    """How many seeds the suite in a run's folder asks for; 0 if there is none, or one that this version cannot read."""
    with suppress(KDError):
        return load_suite(str(Store(root).suite_path)).seeds
    return 0


def find_runs(folder: Path) -> list[Path]:
    """The folders of all runs in `folder`, in order; `folder` itself if it is one. Raises KDError if there is none."""
    found = [folder] if _is_run(folder) else sorted(path.parent for path in walk(folder) if path.name == "suite.yaml")
    runs = [path for path in found if _is_run(path)]
    if not runs:
        raise KDError(f"there is no run of `kd benchmark run` in {folder}: name the folder that its --out named")
    return runs


def names_of_hardware(results: Iterable[CellResult]) -> list[str]:
    """What cells were measured on, each hardware once."""
    return list(dict.fromkeys(result.hardware for result in results))


def _is_run(folder: Path) -> bool:
    """Whether a folder holds a run; one with a suite alone may be anything."""
    store = Store(folder)
    begun = (store.teacher_copy, store.status_path, folder / "cells")
    return store.suite_path.is_file() and any(path.exists() for path in begun)
