"""One cell of a board, run in a process of its own: build data and models, train, evaluate, store."""

from __future__ import annotations

import faulthandler
import math
import os
import platform
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn

from kdtoolkit.benchmark.keys import key_of, package_of
from kdtoolkit.benchmark.store import CellResult, StoreError, write_result, write_weights, writing
from kdtoolkit.benchmark.suite import TEACHER, DataSection, DetectorSection, MethodUse
from kdtoolkit.data import DetectionDataset, ProceduralShapes, check_same_classes, open_dataset
from kdtoolkit.data.opening import name_of
from kdtoolkit.distiller import Distiller
from kdtoolkit.engine.evaluate import evaluate
from kdtoolkit.engine.train import Progress, train
from kdtoolkit.errors import KDError, NonFiniteLossError
from kdtoolkit.models import build_model


@dataclass(frozen=True, eq=False)
class Task:
    """What one cell does. `parts` are its key's; `result` is where its JSON goes, `teacher` the teacher's weights.

    `pictures`: the folder of drawn pictures and decoded photos.
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
    methods: tuple[MethodUse, ...] = ()
    teacher_detector: DetectorSection | None = None
    teacher: Path | None = None
    stretch: float = 1.0

    @property
    def name(self) -> str:
        """How the cell is called in messages."""
        return self.entry if self.entry == TEACHER else f"{self.entry}, seed {self.seed}"

    @property
    def steps(self) -> int:
        """Training steps, rounded up where the schedule is stretched."""
        return stretched(self.detector.train.steps, self.stretch)


@dataclass(frozen=True)
class Report:
    """What a cell says while it runs; `phase` is what it does at the moment."""

    phase: str
    step: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """Why a cell failed; `details` is the traceback of an unforeseen error, `fatal`: no other cell could succeed."""

    message: str
    details: str = ""
    fatal: bool = False


@dataclass(frozen=True)
class DataSets:
    """Images for the teacher, for the student, for evaluation, and what they are in words."""

    teacher: DetectionDataset
    student: DetectionDataset
    val: DetectionDataset
    description: str
    notices: tuple[str, ...]


def stretched(steps: int, stretch: float) -> int:
    """Steps of a stretched schedule, rounded up."""
    return math.ceil(round(steps * stretch, 6))


def load_data(data: DataSection, pictures: Path | None = None) -> DataSets:
    """The data sets of a suite. The student's images are some of the teacher's.

    `pictures`: a folder for drawn pictures and decoded photos, which all cells share. Nothing is drawn or decoded yet.
    Raises KDError if a data set cannot be read, its parts have different classes, or the images chosen have no box.
    """
    train: DetectionDataset
    val: DetectionDataset
    if data.root is None:
        assert data.teacher_images is not None  # DataSection has checked all three
        assert data.student_images is not None
        assert data.val_images is not None
        count = max(data.teacher_images, data.student_images)
        # Far apart, so that a suite's other seeds do not evaluate on what these train on.
        train = ProceduralShapes(count, image_size=data.image_size, seed=data.seed, folder=pictures)
        val = ProceduralShapes(data.val_images, image_size=data.image_size, seed=data.seed + 1_000_000, folder=pictures)
        source = f"procedural shapes, {data.image_size} px, seed {data.seed}"
    else:
        cache = None if pictures is None else pictures / "photos"
        train, val = (
            open_dataset(data.root, split, max_size=data.image_size, on_bad=data.on_bad, cache=cache)
            for split in ("train", "val")
        )
        check_same_classes(train, val)
        source = f"{name_of(data.root)}, at most {data.image_size} px, {len(train.class_names)} classes"
    notices: list[str] = []

    def take(dataset: DetectionDataset, count: int | None, role: str) -> DetectionDataset:
        if count is not None and count > len(dataset):
            notices.append(f"the suite asks for {count} images for {role}; the data has {len(dataset)}, all are used")
        if count is None or count >= len(dataset):
            return dataset
        try:
            return dataset.subset(count, data.seed)
        except KDError as error:
            raise KDError(f"data for {role}: {error}") from error

    teacher = take(train, data.teacher_images, "the teacher")
    student = take(train, data.student_images, "the student")
    val = take(val, data.val_images, "evaluation")
    counts = f"{len(teacher)} images for the teacher, {len(student)} for the student, {len(val)} for evaluation"
    return DataSets(teacher, student, val, f"{source}: {counts}", tuple(notices))


def build_detector(section: DetectorSection, num_classes: int, seed: int) -> nn.Module:
    """The detector, its weights drawn by `seed`. Raises KDError where name or arguments are wrong."""
    torch.manual_seed(seed)
    return build_model(section.model, num_classes, section.args)


def run(task: Task, report: Callable[[Report], None]) -> None:
    """Run a cell and store what it measured. Raises KDError where it cannot run."""
    torch.set_num_threads(task.threads)
    report(Report("reading data"))
    sets = load_data(task.data, task.pictures)
    images = sets.teacher if task.entry == TEACHER else sets.student
    num_classes = len(images.class_names)
    student = build_detector(task.detector, num_classes, task.seed).to(task.device)
    teacher = None
    if task.methods:
        assert task.teacher_detector is not None  # given to every task with methods
        assert task.teacher is not None
        teacher = build_detector(task.teacher_detector, num_classes, 0)
        teacher.load_state_dict(torch.load(task.teacher, weights_only=True))
        teacher.to(task.device)

    def training(progress: Progress) -> None:
        report(Report("training", progress.step, progress.losses, progress.seconds, progress.warnings))

    config = task.detector.train.model_copy(update={"steps": task.steps})
    distiller = Distiller(teacher, student, [use.build() for use in task.methods])
    try:
        trained = train(distiller, images, config, seed=task.seed, device=task.device, report=training)
    except NonFiniteLossError as error:
        kept = task.result.with_suffix(".last-good.pt")
        write_weights(kept, student)
        raise NonFiniteLossError(f"{error} The student as it was before that step: {kept}") from error
    memory = peak_memory_mb(task.device)

    def evaluating(done: int, total: int) -> None:
        report(Report(f"evaluating {done}/{total}", trained.steps, warnings=tuple(trained.warnings)))

    evaluating(0, len(sets.val))
    evaluation = evaluate(student, sets.val, device=task.device, progress=evaluating)
    metrics = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    result = CellResult(
        entry=task.entry,
        seed=task.seed,
        key=key_of(task.parts),
        key_parts=task.parts,
        data=sets.description,
        evaluation={name: getattr(evaluation, name) for name in metrics},
        per_class=evaluation.per_class,
        steps=trained.steps,
        stretch=task.stretch,
        train_seconds=trained.seconds,
        step_ms=trained.step_ms,
        peak_memory_mb=memory,
        parameters=sum(parameter.numel() for parameter in student.parameters()),
        history=trained.history,
        warnings=trained.warnings,
        versions={
            name: version(name)
            for name in dict.fromkeys(("kdtoolkit", "torch", "torchvision", "timm", package_of(task.detector.model)))
        }
        | {"python": platform.python_version()},
        machine=machine(),
        device=device_name(task.device),
        threads=task.threads,
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
    )
    report(Report("storing", trained.steps))
    write_weights(task.result.with_suffix(".pt"), student)  # first, so that a result is never without them
    write_result(task.result, result)


def work(task: Task, pipe: Connection) -> None:
    """Run a cell as a process: `pipe` takes Reports and, where it fails, a Failure; the result itself goes to disk."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    log = task.result.with_suffix(".log")
    try:
        with writing(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            file = log.open("w", encoding="utf-8")
        with file:  # what libraries and crashes say would tear the display to pieces
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            run(task, pipe.send)
        if not log.stat().st_size:
            log.unlink()
    except StoreError as error:
        pipe.send(Failure(str(error), fatal=True))
    except KDError as error:
        pipe.send(Failure(str(error)))
    except Exception as error:
        pipe.send(Failure(f"{type(error).__name__}: {error}", traceback.format_exc()))


def _end_with_parent(pipe: Connection) -> None:
    """Nothing is ever sent to a worker: what ends the wait is the parent's end of the pipe being closed."""
    with suppress(EOFError, OSError):
        pipe.recv_bytes()
    os._exit(1)


def peak_memory_mb(device: str) -> float:
    """Peak memory so far, in MB of 2^20 bytes: tensors on CUDA, else all resident memory of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):  # of this process alone, where ru_maxrss may count what it was forked from
                return int(line.split()[1]) / 2**10
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def machine() -> str:
    """Processor, number of cores and system, in words."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {cores()} cores, {platform.system()}"


def device_name(device: str) -> str:
    """What a cell computes on: `cpu`, or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
