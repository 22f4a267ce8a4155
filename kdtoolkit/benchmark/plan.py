"""What a run consists of: the task of every cell, and which of them are done, out of date or still to do."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from kdtoolkit.benchmark.cell import Task, build_detector, shared_classes, stretched
from kdtoolkit.benchmark.datasets import DataSets
from kdtoolkit.benchmark.equal_time import STRETCH_SLACK, relative_costs
from kdtoolkit.benchmark.executor import Hardware
from kdtoolkit.benchmark.keys import cell_parts, difference, in_precision, key_of, package_digest, same_settings
from kdtoolkit.benchmark.store import CellResult, Store, are_whole, intact_result, set_aside, usable_result
from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME, TEACHER, TWICE, DetectorSection, Suite
from kdtoolkit.data import DetectionDataset
from kdtoolkit.data.dataset import own_ids
from kdtoolkit.data.opening import open_all
from kdtoolkit.data.recorded import attach, check_images
from kdtoolkit.detectors.recorded import RecordedDetector
from kdtoolkit.distiller import Distiller
from kdtoolkit.engine.inputs import check_unlabelled
from kdtoolkit.engine.mixture import unlabelled_steps
from kdtoolkit.engine.scoring import MAX_DETECTIONS
from kdtoolkit.errors import KDError
from kdtoolkit.inherit import inherit
from kdtoolkit.libraries import adapt
from kdtoolkit.method_use import MethodUse


@dataclass(frozen=True)
class Fingerprints:
    """Digests of the data sets; empty if there are no images without labels."""

    teacher_data: str
    student_data: str
    val_data: str
    unlabelled: str


class Plan:
    """The tasks of one run of a suite.

    `store`: the folder of the run. `device`: `cpu` or `cuda`. `threads`: how many threads each cell uses. `hardware`:
    what cells are computed on, if that is not this machine. `any_version`: whether results of different source code,
    libraries and hardware are kept. `seeds`: which of the suite's seeds to run; None means all. `tensorboard`: whether
    cells write curves for TensorBoard.
    """

    def __init__(
        self,
        suite: Suite,
        store: Store,
        sets: DataSets,
        *,
        device: str,
        threads: int,
        hardware: Hardware | None = None,
        any_version: bool = False,
        seeds: range | None = None,
        tensorboard: bool = False,
    ) -> None:
        self.suite = suite
        self.store = store
        self.device = device
        self.hardware = hardware or Hardware.here(device)
        self.threads = threads
        self.any_version = any_version
        self.seeds = range(suite.seeds) if seeds is None else range(seeds.start, min(seeds.stop, suite.seeds))
        self._tensorboard = store.tensorboard.absolute() if tensorboard else None
        self._teacher_section = _on(self.hardware, suite.teacher)
        self._student_section = _on(self.hardware, suite.student)
        self._data = Fingerprints(
            sets.teacher.fingerprint(),
            sets.student.fingerprint(),
            sets.val.fingerprint(),
            "" if sets.unlabelled is None else sets.unlabelled.fingerprint(),
        )
        self._teacher = self._plan_teacher()

    def teacher_task(self) -> Task:
        """The teacher's task. Its result and weights are stored under its key, for all runs."""
        return self._teacher

    def _plan_teacher(self) -> Task:
        section = self._teacher_section
        data = f"{self._data.teacher_data} {self._data.val_data}"
        steps = 0 if section.train is None else section.train.steps
        parts = self._parts(section, (), 0, steps, data, None) | self._class_map | self._max_detections
        stored = self._earlier_teacher(parts) if self.any_version else None
        return Task(
            entry=TEACHER,
            seed=0,
            detector=section,
            data=self.suite.data,
            pictures=self.store.pictures,
            result=self.store.teacher_path(key_of(parts) if stored is None else stored.key),
            parts=parts,
            device=self.device,
            threads=self.threads,
            source=package_digest(),
            suite=self.suite.name,
            fingerprints={"train_data": self._data.teacher_data, "val_data": self._data.val_data},
            class_map=self.suite.class_map,
            tracked_in=self._tensorboard and self._tensorboard / TEACHER,
        )

    def _earlier_teacher(self, parts: dict[str, str]) -> CellResult | None:
        """The stored teacher with the same settings: the one that has taught this run so far, or else the latest."""
        paths = [self.store.teacher_copy, *self.store.teachers.glob("*.json")]
        found = [
            result
            for result in map(intact_result, paths)
            if result is not None
            and same_settings(result.key_parts, parts, any_precision=_is_auto(self.suite.teacher))
            and are_whole(self.store.teacher_path(result.key).with_suffix(".pt"))
        ]
        own = intact_result(self.store.teacher_copy)
        return max(found, key=lambda result: (result == own, result.date), default=None)

    @property
    def _class_map(self) -> dict[str, str]:
        """What the class map adds to the parts of a key."""
        return {"class_map": json.dumps(self.suite.class_map, sort_keys=True)} if self.suite.class_map else {}

    @property
    def _max_detections(self) -> dict[str, str]:
        """What the number of detections that count adds to the parts of a key, where it is not COCO's."""
        limit = self.suite.data.max_detections
        return {} if limit == MAX_DETECTIONS else {"max_detections": str(limit)}

    @property
    def teacher_cache(self) -> Path | None:
        """The folder in which all cells keep what the teacher shows; None if the suite asks for no cache on disk."""
        train = self._student_section.train
        assert train is not None  # a student's section has it
        on_disk = train.teacher_cache in ("auto", "disk")
        return self.store.teacher_cache(self.teacher_task().result.stem) if on_disk else None

    def cell(self, row: str, seed: int, stretch: float = 1.0) -> Task:
        """The task of a row and seed."""
        section, methods, teacher = self._student_section, self.suite.methods(row), self.teacher_task()
        data = f"{self._data.student_data} {self._data.val_data}"
        assert section.train is not None  # a student's section has it
        steps = stretched(section.train.steps, stretch)
        scale, init = self.suite.teacher_scale, self.suite.init
        has_teacher = bool(methods) or init is not None
        unlabelled = self._data.unlabelled if methods else ""
        taught_by = teacher.result.stem if scale == 1 else f"{teacher.result.stem}, images scaled by {scale}"
        return Task(
            entry=row,
            seed=seed,
            detector=section,
            data=self.suite.data,
            pictures=self.store.pictures,
            result=self.store.result_path(row, seed),
            parts=self._parts(section, methods, seed, steps, data, taught_by if has_teacher else None)
            | self._max_detections
            | (self._class_map if has_teacher else {})
            | ({"init": init} if init is not None else {})
            | ({"unlabelled": unlabelled} if unlabelled else {}),
            device=self.device,
            threads=self.threads,
            source=package_digest(),
            suite=self.suite.name,
            fingerprints={
                "train_data": self._data.student_data,
                "val_data": self._data.val_data,
                **({"unlabelled": unlabelled} if unlabelled else {}),
            },
            methods=methods,
            teacher_detector=self._teacher_section if has_teacher else None,
            teacher_weights=teacher.weights if has_teacher else None,
            inherits=init is not None,
            halts=self.suite.plateau and row == BASELINE,
            curve=self.suite.curve,
            probe=self.suite.probe,
            class_map=self.suite.class_map,
            teacher_cache=self.teacher_cache if methods else None,
            tracked_in=self._tensorboard and self._tensorboard / row / f"seed{seed}",
            stretch=stretch,
            teacher_scale=scale,
        )

    def _parts(
        self,
        section: DetectorSection,
        methods: tuple[MethodUse, ...],
        seed: int,
        steps: int,
        data: str,
        teacher: str | None,
    ) -> dict[str, str]:
        return cell_parts(
            section,
            methods,
            seed=seed,
            steps=steps,
            data=data,
            teacher=teacher,
            device=self.hardware.device_name,
            threads=self.threads,
        )

    def complete(self, rows: Iterable[str], *, long_baselines: bool = True) -> bool:
        """Whether the teacher and all cells of these rows are done and up to date.

        `long_baselines`: also the baselines with longer schedules: at equal time, and with twice the steps. A cell
        whose training still has its folder is not done: the run was killed before it deleted the folder.
        """

        def done(tasks: Iterable[Task]) -> bool:
            return all(self.result(task) is not None and not task.run_folder.exists() for task in tasks)

        if not done([self.teacher_task(), *self.cells(rows)]):
            return False
        if not long_baselines:
            return True
        if not done(self.twice()):
            return False
        found = self.stretch()
        return found is None or done(self.cells([EQUAL_TIME], found[1]))

    def cells(self, rows: Iterable[str], stretch: float = 1.0) -> list[Task]:
        """The tasks of these rows: all of the first seed, then all of the next. Rows can then be compared early."""
        names = list(rows)
        return [self.cell(row, seed, stretch) for seed in self.seeds for row in names]

    def twice(self) -> list[Task]:
        """The tasks of the baseline with twice the steps; empty if the suite does not ask for it."""
        return self.cells([TWICE], 2.0) if self.suite.plateau else []

    def result(self, task: Task) -> CellResult | None:
        """The stored result of a task; None unless it is up to date, and its weights are complete."""
        return usable_result(task.result, lambda found: not self._out_of_date(found, task))

    def _out_of_date(self, found: CellResult, task: Task) -> str:
        """Why a stored result is not that of its task, in words; empty if it is.

        A teacher that was trained again under the same key may have other weights, on a GPU above all. Results of
        format 1 do not know the weights that taught them.
        """
        if self.any_version:
            section = self.suite.teacher if task.entry == TEACHER else self.suite.student
            is_same = same_settings(found.key_parts, task.parts, any_precision=_is_auto(section))
        else:
            is_same = found.key == key_of(task.parts)
        if not is_same:
            return difference(found.key_parts, task.parts)
        if task.teacher_weights is None or not (taught_by := found.fingerprints.get("teacher")):
            return ""
        teacher = intact_result(self._teacher.result)
        weights = None if teacher is None else teacher.fingerprints.get("teacher")
        return "its teacher was trained again and has other weights" if weights and weights != taught_by else ""

    def measured(self, row: str) -> list[CellResult]:
        """The stored results of a row, also results of an earlier version of the suite."""
        found = (intact_result(self.store.result_path(row, seed)) for seed in range(self.suite.seeds))
        return [result for result in found if result is not None]

    def set_aside_unusable(self) -> dict[str, str]:
        """Set aside the results that are damaged or out of date. Returns the reasons, by the cells' names."""
        reasons = {}
        stretches = {result.seed: result.stretch for result in self.measured(EQUAL_TIME)}
        rows = [BASELINE, *self.suite.entries]
        tasks = [self.teacher_task(), *(self.cell(row, seed) for seed in range(self.suite.seeds) for row in rows)]
        tasks += [self.cell(TWICE, seed, 2.0) for seed in range(self.suite.seeds)]
        tasks += [self.cell(EQUAL_TIME, seed, stretches.get(seed, 1.0)) for seed in range(self.suite.seeds)]
        for task in tasks:
            if reason := self.why_unusable(task):
                reasons[task.name] = f"{reason}; its old result is kept as {set_aside(task.result).name}"
        return reasons

    def why_unusable(self, task: Task) -> str | None:
        """Why a stored result cannot be used; None if it can, or if there is none."""
        old = intact_result(task.result)
        if old is None:
            return f"is trained again, since {task.result} is damaged" if task.result.exists() else None
        if reason := self._out_of_date(old, task):
            return f"is out of date ({reason})"
        return None if are_whole(task.weights) else f"is trained again, since {task.weights} is missing or damaged"

    def stretch(self) -> tuple[str, float] | None:
        """The slowest entry, and the factor by which to stretch the baseline's schedule so that it takes as long.

        None if no cost was measured beside the baseline's. The factor of a stored row is kept unless the factor needed
        now is more than 5 % larger.
        """
        costs = relative_costs({row: self.measured(row) for row in (BASELINE, TWICE, *self.suite.entries)})
        if not costs:
            return None
        slowest = max(costs, key=lambda row: costs[row])
        stored = max((result.stretch for result in self.measured(EQUAL_TIME)), default=0.0)
        return slowest, costs[slowest] if costs[slowest] > stored * STRETCH_SLACK else stored


def check_methods(suite: Suite, sets: DataSets, rows: Iterable[str]) -> Distiller:
    """Build every detector and the pairs of these rows once, before anything is trained.

    Returns the distiller of the last row; without such rows, one of the student alone.

    Raises KDError that names the section or entry of the suite.
    """
    names = sets.student.class_names
    num_classes = len(names)
    where = "teacher"
    try:
        opened = build_detector(suite.teacher, names, 0, own_ids(sets.student))
        _check_recorded(opened.model, suite, sets)
        if opened.trained and suite.teacher.train is not None:
            raise KDError(
                f"{opened.weights} is for the classes of the data already, so the teacher is not trained: delete its "
                "`train`"
            )
        class_map = shared_classes(suite.teacher, opened, names, suite.class_map)
        teacher = opened.model
        where = "student"
        student = build_detector(suite.student, names, 0).model
        for where, detector in (("teacher", teacher), ("student", student)):
            if where == "teacher" and suite.teacher.train is None:
                continue  # it has the classes of its weights
            if (known := adapt(detector).spec.num_classes) != num_classes:
                raise KDError(
                    f"model {getattr(suite, where).model!r} has {known} classes, and the data has {num_classes}"
                )
        if suite.init is not None:
            where = "init"
            inherit(student, teacher, class_map)
        distiller = Distiller(None, student)
        for where in (row for row in suite.entries if row in rows):
            methods = [use.build() for use in suite.entries[where]]
            distiller = Distiller(teacher, student, methods, teacher_scale=suite.teacher_scale, class_map=class_map)
            if sets.unlabelled is not None:
                check_unlabelled(distiller, sets.unlabelled)
                distiller.run_steps = suite.student.train.steps
                unlabelled_steps(distiller, suite.student.train, sets.student, sets.unlabelled)
    except KDError as error:
        raise KDError(f"suite {suite.name}, {where}: {error}") from error
    return distiller


def _check_recorded(teacher: nn.Module, suite: Suite, sets: DataSets) -> None:
    """Check the images of a teacher that is a file of detections. Raises KDError."""
    if not isinstance(teacher, RecordedDetector):
        return
    if (root := suite.data.root) is not None:
        parts: dict[str, DetectionDataset] = {**open_all(root)}
        if sets.unlabelled is not None:
            parts["the images without labels"] = sets.unlabelled
        check_images(teacher.file, parts, dict)
    for images in filter(None, (sets.student, sets.unlabelled)):
        attach(images, teacher.file)


def _on(hardware: Hardware, section: DetectorSection) -> DetectorSection:
    """The section with the precision that `auto` means on this hardware."""
    return in_precision(section, hardware.precision) if _is_auto(section) else section


def _is_auto(section: DetectorSection) -> bool:
    """Whether the hardware chooses the precision."""
    return section.train is not None and section.train.precision == "auto"
