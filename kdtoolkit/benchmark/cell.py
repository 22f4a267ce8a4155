"""One cell of a board, a row with one seed: build data and models, train, evaluate, store the result."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdtoolkit.benchmark.datasets import DataSets, load_data
from kdtoolkit.benchmark.detections_file import GroundTruth, detections_path, write_detections
from kdtoolkit.benchmark.keys import digest_of, key_of, package_of
from kdtoolkit.benchmark.store import (
    FORMAT,
    CachedTeacher,
    CellResult,
    Computed,
    StoreError,
    discard,
    discard_runs,
    holding,
    usable_result,
    write_result,
    write_weights,
)
from kdtoolkit.benchmark.suite import TEACHER, DataSection, DetectorSection
from kdtoolkit.classes import ClassMap
from kdtoolkit.compatibility import why_no_student
from kdtoolkit.data import DetectionDataset
from kdtoolkit.data.dataset import own_ids
from kdtoolkit.data.views import sizes_of
from kdtoolkit.distiller import Distiller
from kdtoolkit.engine.arithmetic import Arithmetic
from kdtoolkit.engine.breakdown import breakdown
from kdtoolkit.engine.caching import seconds_of_view
from kdtoolkit.engine.config import TrainConfig
from kdtoolkit.engine.evaluate import METRICS, Evaluation, evaluate, why_not_measured
from kdtoolkit.engine.folder import RunFolder
from kdtoolkit.engine.hardware import device_name, machine
from kdtoolkit.engine.inference_cost import InferenceCost, measure
from kdtoolkit.engine.measuring import equal_shares
from kdtoolkit.engine.memory import peak_memory_mb
from kdtoolkit.engine.mixture import views_of_run
from kdtoolkit.engine.result import TrainResult
from kdtoolkit.engine.scoring import Found
from kdtoolkit.engine.train import Progress, Validation, train
from kdtoolkit.errors import KDError, NonFiniteLossError, UnwritableError
from kdtoolkit.inherit import inherit
from kdtoolkit.libraries import adapt
from kdtoolkit.method_use import MethodUse
from kdtoolkit.models import Detector, UnknownClassesError, can_detect, check_classes, open_detector
from kdtoolkit.winograd import gains

SAVE_SECONDS = 30.0  # between two checkpoints of a training


@dataclass(frozen=True, eq=False)
class Task:
    """What one cell has to do.

    `detector`: what it trains, the student or the teacher. `parts`: everything that its key is computed from.
    `result`: the path of its result. `teacher_weights`: the path of the teacher's weights. `pictures`: the folder of
    drawn pictures and decoded photos. `source`: a digest of kdtoolkit's source code. `suite`: the name of the suite.
    `fingerprints`: digests of the content of its data sets, by name. `inherits`: whether the student starts from the
    teacher's weights. `halts`: whether to evaluate after four fifths of the steps too. `curve`, `probe`: after how many
    equal shares of the steps to evaluate the student, and to probe its methods. `class_map`: the teacher's name for a
    class of the data, where the names differ. `teacher_cache`: the folder of a teacher cache on disk, if it has one.
    `tracked_in`: where curves for TensorBoard go; None writes none.
    `original`: the task as the run planned it, if its files were moved to a different machine.
    """

    entry: str
    seed: int
    detector: DetectorSection
    data: DataSection
    pictures: Path
    result: Path
    parts: dict[str, str]
    device: str
    threads: int
    source: str
    suite: str
    fingerprints: Mapping[str, str]
    methods: tuple[MethodUse, ...] = ()
    teacher_detector: DetectorSection | None = None
    teacher_weights: Path | None = None
    stretch: float = 1.0
    teacher_scale: float = 1.0
    inherits: bool = False
    halts: bool = False
    curve: int = 0
    probe: int = 0
    class_map: Mapping[str, str] = field(default_factory=dict)
    teacher_cache: Path | None = None
    tracked_in: Path | None = None
    original: Task | None = None

    @property
    def name(self) -> str:
        """The cell's name in messages."""
        return self.entry if self.entry == TEACHER else f"{self.entry}, seed {self.seed}"

    @property
    def weights(self) -> Path:
        """The path of the weights that it trains, beside its result."""
        return self.result.with_suffix(".pt")

    @property
    def run_folder(self) -> Path:
        """The folder of the training until its result is stored.

        Its name stands for the key and for the steps of evaluations and probes. If these have changed, an unfinished
        training begins again, so that its curves are complete. The last step is left out: a training that goes on
        reaches it anyway, with curves for TensorBoard or without.
        """
        evaluated_at = tuple(step for step in self.evaluated_at if step != self.steps)
        measured = {"evaluated": str(evaluated_at), "probed": str(self.probed_at)}
        key = key_of(self.parts | (measured if evaluated_at or self.probed_at else {}))
        return self.result.with_suffix(f".{key}.run")

    @property
    def lock_folder(self) -> Path:
        """The folder that a run holds while it works on a teacher. All runs of an output folder share teachers."""
        return self.result.with_suffix(".lock")

    @property
    def steps(self) -> int:
        """Training steps, rounded up if the schedule is stretched; 0 for a teacher that is used as it is."""
        return 0 if self.detector.train is None else stretched(self.detector.train.steps, self.stretch)

    @property
    def evaluated_at(self) -> tuple[int, ...]:
        """The steps after which the student is evaluated by its training.

        The last step is one of them only for the curves of TensorBoard. Every cell is evaluated after its training too.
        """
        steps = {*equal_shares(self.steps, self.curve), *([four_fifths(self.steps)] if self.halts else [])} - {0}
        return tuple(sorted(steps - {self.steps} if self.tracked_in is None else steps | {self.steps}))

    @property
    def probed_at(self) -> tuple[int, ...]:
        """The steps after which its methods are probed."""
        return equal_shares(self.steps, self.probe) if self.methods else ()

    @property
    def settings(self) -> dict[str, Any]:
        """All that repeats the cell, as values that JSON can hold."""
        teacher: dict[str, Any] = {}
        if self.teacher_detector is not None:
            teacher = {
                "teacher": self.teacher_detector.model_dump(mode="json"),
                "teacher_scale": self.teacher_scale,
                "init": TEACHER if self.inherits else None,
            }
        return {
            "detector": self.detector.model_dump(mode="json"),
            "methods": [use.model_dump(mode="json") for use in self.methods],
            "data": self.data.model_dump(mode="json"),
            "seed": self.seed,
            "steps": self.steps,
            **teacher,
            **({"class_map": dict(self.class_map)} if self.class_map else {}),
        }


@dataclass(frozen=True)
class Report:
    """What a cell reports while it runs.

    `phase`: the cell's current work, in words. `seconds`: time spent on training so far. `notice`: a line for the log.
    `evaluated`: step and AP of each evaluation so far.
    """

    phase: str
    step: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    notice: str = ""
    evaluated: tuple[tuple[int, float | None], ...] = ()

    @property
    def by_method(self) -> dict[str, float]:
        """The losses of the task and of each method: their terms together."""
        sums: dict[str, float] = {}
        for name, value in self.losses.items():
            owner = name.partition("/")[0]
            sums[owner] = sums.get(owner, 0.0) + value
        return sums

    @property
    def step_ms(self) -> float | None:
        """The mean training step so far, in milliseconds; None before the first one."""
        return 1000 * self.seconds / self.step if self.step and self.seconds else None


@dataclass(frozen=True)
class Failure:
    """Why a cell failed.

    `details`: the traceback, if the error was unexpected. `fatal`: every other cell would fail too. `died`: its process
    ended without an error, as when it is killed.
    """

    message: str
    details: str = ""
    fatal: bool = False
    died: bool = False


def stretched(steps: int, stretch: float) -> int:
    """How many steps a stretched schedule has, rounded up."""
    return math.ceil(round(steps * stretch, 6))


def four_fifths(steps: int) -> int:
    """The step after which four fifths of a schedule are done; never the last one."""
    return min(math.ceil(4 * steps / 5), steps - 1)


def build_detector(
    section: DetectorSection, class_names: Sequence[str], seed: int, categories: Mapping[int, str] | None = None
) -> Detector:
    """Open the detector. Weights that it has no others for are drawn from `seed`.

    A teacher that is used as it is keeps its own classes (`shared_classes`). `categories`: the data's classes by their
    ids, for a teacher that is a file of detections. Raises KDError if it cannot be opened, or cannot detect.
    """
    torch.manual_seed(seed)
    classes = None if section.train is None else class_names
    lacking = f"{section.model!r} has random weights: give it `weights`, or `train` to train it"
    try:
        detector = open_detector(
            section.model, class_names=classes, weights=section.weights, args=section.args, categories=categories
        )
    except UnknownClassesError as error:
        raise KDError(lacking) from error
    if section.train is None and not detector.trained:
        raise KDError(lacking)
    if section.train is not None and (reason := why_no_student(adapt(detector.model).spec)):
        raise KDError(f"{section.model!r} cannot be trained: {reason}. A teacher that can only teach has no `train`")
    return detector


def shared_classes(
    section: DetectorSection, detector: Detector, class_names: Sequence[str], given: Mapping[str, str]
) -> ClassMap | None:
    """The classes that the data shares with a teacher; None if the teacher has the classes of the data, in its order.

    `given`: the teacher's name for a class of the data, where the names differ. Raises KDError if no class is shared.
    """
    if section.train is not None:
        return None
    if not can_detect(detector):
        if given:
            raise KDError(f"{section.model!r} shows features alone and has no classes: delete class_map")
        return None
    if detector.class_names is None:
        check_classes(detector, class_names)
        return None
    found = ClassMap.by_name(class_names, detector.class_names, given)
    return None if found.is_identity(len(class_names), len(detector.class_names)) else found


def run(task: Task, report: Callable[[Report], None]) -> None:
    """Run a cell and store what it measured. Raises KDError if it cannot run.

    Several runs may need the same teacher at the same time. One of them trains it, and the others wait for its result.
    """
    if task.entry != TEACHER:
        _run(task, report)
        return

    def waiting(holder: str) -> None:
        report(Report("waiting", notice=f"teacher: waits for {holder}, which trains the same teacher"))

    with holding(task.lock_folder, waiting):
        if usable_result(task.result, lambda found: found.key == key_of(task.parts)) is None:
            _run(task, report)


def _run(task: Task, report: Callable[[Report], None]) -> None:
    torch.set_num_threads(task.threads)
    report(Report("reading data"))
    sets = load_data(task.data, task.pictures)
    images = sets.teacher if task.entry == TEACHER else sets.student
    names = images.class_names
    ids = own_ids(images)
    detector = build_detector(task.detector, names, task.seed, ids)
    student, teacher, inherited = detector.model.to(task.device), None, ""
    taught_by: dict[str, str] = {}
    class_map = shared_classes(task.detector, detector, names, task.class_map)
    if task.teacher_detector is not None:
        assert task.teacher_weights is not None  # every task with a teacher has both
        opened = build_detector(task.teacher_detector, names, 0, ids)
        teacher = opened.model
        state = torch.load(task.teacher_weights, weights_only=True)
        teacher.load_state_dict(state)
        taught_by = {"teacher": digest_of(state)}
        teacher.to(task.device)
        class_map = shared_classes(task.teacher_detector, opened, names, task.class_map)
        if task.inherits:
            inherited = inherit(student, teacher, class_map).describe()

    if task.steps == 0:
        trained, cached, computed = TrainResult(0, 0.0, 0.0), None, Computed(precision="float32")
    else:
        distiller = Distiller(
            teacher if task.methods else None,
            student,
            [use.build() for use in task.methods],
            teacher_scale=task.teacher_scale,
            class_map=class_map,
        )
        trained = _train(task, distiller, images, sets, report)
        cached = _cached(task, distiller, images, sets, trained)
        computed = _computed(task, distiller)
    memory = trained.peak_memory_mb or peak_memory_mb(task.device)

    def evaluating(done: int, total: int) -> None:
        report(Report(f"evaluating {done}/{total}", trained.steps, warnings=tuple(trained.warnings)))

    evaluating(0, len(sets.val))
    evaluation: Evaluation | None = None
    detections: list[Found] = []
    notices = [] if (reason := why_not_measured(student, sets.val)) is None else [f"the AP is unknown: {reason}"]
    if not notices:
        evaluation = evaluate(
            student,
            sets.val,
            device=task.device,
            input_size=None if task.detector.train is None else task.detector.train.input_size,
            class_map=class_map if task.entry == TEACHER else None,
            max_detections=task.data.max_detections,
            progress=evaluating,
            keep=detections.append,
        )
    report(Report("timing", trained.steps, warnings=tuple(trained.warnings)))
    cost = _cost(task, student, sets.val)
    if task.entry == TEACHER:
        taught_by = {"teacher": digest_of(student.state_dict())}
    result = CellResult(
        entry=task.entry,
        seed=task.seed,
        key=key_of(task.parts),
        key_parts=task.parts,
        data=sets.description,
        evaluation={name: getattr(evaluation, name, None) for name in METRICS},
        per_class={} if evaluation is None else evaluation.per_class,
        ap_at_four_fifths=_ap_at(four_fifths(trained.steps), trained) if task.halts else None,
        steps=trained.steps,
        stretch=task.stretch,
        train_seconds=trained.seconds,
        cpu_seconds=trained.cpu_seconds,
        step_ms=trained.step_ms,
        peak_memory_mb=memory,
        parameters=sum(parameter.numel() for parameter in student.parameters()),
        history=trained.history,
        evaluations=_points(trained, evaluation),
        inherited=inherited,
        warnings=[*trained.warnings, *notices],
        versions={
            name: version(name)
            for name in dict.fromkeys(("kdtoolkit", "torch", "torchvision", "timm", package_of(task.detector.model)))
        }
        | {"python": platform.python_version(), "source": task.source},
        machine=machine(),
        device=device_name(task.device),
        threads=task.threads,
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        format=FORMAT,
        suite=task.suite,
        settings=(task.original or task).settings,
        fingerprints={**task.fingerprints, **taught_by},
        inference=cost,
        cached=cached,
        computed=computed,
    )
    if detections:
        truth = GroundTruth(task.fingerprints["val_data"], sets.val.in_memory().coco())
        parts = breakdown(*truth.of(result, detections[0]), max_detections=task.data.max_detections)
        result = result.model_copy(update={"breakdown": parts})
    report(Report("storing", trained.steps))
    write_weights(task.weights, student)  # before the result, so that no result lacks its weights
    if detections:
        write_detections(detections_path(task.result), detections[0], result)
    else:
        discard(detections_path(task.result))  # those of an earlier training
    write_result(task.result, result)
    discard_runs(task.result)


def _cost(task: Task, detector: nn.Module, images: DetectionDataset) -> InferenceCost | None:
    """What the first of the images costs the detector, at the size at which it is evaluated."""
    image, _ = images[0]
    size = None if task.detector.train is None else task.detector.train.input_size
    return measure(detector, image if size is None else size.apply(image))


def _config(task: Task) -> TrainConfig:
    """How the task trains."""
    assert task.detector.train is not None  # a task without it has no steps
    return task.detector.train.model_copy(update={"steps": task.steps})


def _train(
    task: Task,
    distiller: Distiller,
    images: DetectionDataset,
    sets: DataSets,
    report: Callable[[Report], None],
) -> TrainResult:
    """Train the student. Raises KDError if it cannot be trained, and StoreError if its folder cannot be written."""

    def training(progress: Progress) -> None:
        report(
            Report(
                "training",
                progress.step,
                progress.losses,
                progress.seconds,
                progress.warnings,
                evaluated=progress.evaluated,
            )
        )

    config = _config(task)
    validation = Validation(sets.val, at=task.evaluated_at, max_detections=task.data.max_detections)
    trackers = () if task.tracked_in is None else ("tensorboard",)
    folder = RunFolder(
        task.run_folder,
        save_seconds=SAVE_SECONDS,
        trackers=trackers,
        tracked_in=task.tracked_in,
        teacher_cache=task.teacher_cache,
    )
    discard_runs(task.result, but=folder.path)
    try:
        return train(
            distiller,
            images,
            config,
            seed=task.seed,
            device=task.device,
            folder=folder,
            validation=validation if task.evaluated_at else None,
            unlabelled=sets.unlabelled if task.methods else None,
            probe_at=task.probed_at,
            report=training,
        )
    except UnwritableError as error:  # no further cell can be stored either
        raise StoreError(str(error)) from error
    except NonFiniteLossError as error:
        kept = task.result.with_suffix(".last-good.pt")
        write_weights(kept, distiller.student)
        raise NonFiniteLossError(f"{error} The student's weights before that step are in {kept}") from error


def _computed(task: Task, distiller: Distiller) -> Computed:
    """How the steps were computed. Where the teacher alone is large enough for Winograd's algorithm, none is told.

    The costs of a step are compared with those of a student alone.
    """
    found = Arithmetic.of_config(distiller, _config(task), torch.device(task.device))
    return Computed(
        precision=found.precision,
        channels_last=found.channels_last,
        winograd=found.winograd and gains(distiller.student),
    )


def _cached(
    task: Task, distiller: Distiller, images: DetectionDataset, sets: DataSets, trained: TrainResult
) -> CachedTeacher | None:
    """How the training used its teacher cache; None if it had none."""
    if trained.cache is None:
        return None
    config = _config(task)
    unlabelled = None if sets.unlabelled is None else sizes_of(sets.unlabelled)
    views = views_of_run(distiller, config, sizes_of(images), unlabelled, seed=task.seed).different
    asked = trained.cache.hits + trained.cache.misses  # fewer than were shown if no method works in some steps
    return CachedTeacher(
        hits=trained.cache.hits,
        misses=trained.cache.misses,
        views=min(views, asked),
        seconds_of_view=seconds_of_view(distiller, images, config, torch.device(task.device)),
    )


def _ap_at(step: int, trained: TrainResult) -> float | None:
    """The AP after a step in the middle of the training."""
    return next((row["eval/ap"] for row in trained.evaluations if row["step"] == step), None)


def _points(trained: TrainResult, last: Evaluation | None) -> list[dict[str, float | None]]:
    """What was measured while the student trained and at its end, by step."""
    found: dict[float, dict[str, float | None]] = {}
    rows = [*trained.evaluations, *trained.probes]
    if trained.steps and last is not None:
        rows.append({"step": trained.steps, "eval/ap": last.ap, "eval/ap50": last.ap50})
    for row in rows:
        step = row["step"] or 0
        point = found.setdefault(step, {"step": step})
        point |= {name.removeprefix("eval/"): value for name, value in row.items() if _in_curves(name)}
    return [found[step] for step in sorted(found)]


def _in_curves(name: str) -> bool:
    return name in ("eval/ap", "eval/ap50") or name.startswith(("conflict/", "share/"))
