"""Results on disk: a run's folder, and the teachers beside it. Writes are atomic, so no file is half written."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import nn

from kdtoolkit import files
from kdtoolkit.benchmark.suite import TEACHER
from kdtoolkit.engine.breakdown import Breakdown
from kdtoolkit.engine.evaluate import METRICS
from kdtoolkit.engine.inference_cost import InferenceCost
from kdtoolkit.errors import KDError
from kdtoolkit.lock import hold
from kdtoolkit.words import counted

FORMAT = 2  # of the results that this version writes; 1 has no suite, settings, fingerprints and detections


class StoreError(KDError):
    """The results folder cannot be written, so no further cell can succeed."""


class DamagedError(KDError):
    """A stored file is not what this version or an earlier one has written. Its cell can be run again."""


class CachedTeacher(BaseModel):
    """How a cell's teacher was asked by a cache.

    `hits`, `misses`: images shown that needed no pass of the teacher, and that needed one. `views`: how many of the
    images shown differ. `seconds_of_view`: what the teacher's pass over one of them costs: CPU time on a CPU, time by
    the clock on a GPU.
    """

    model_config = ConfigDict(frozen=True)

    hits: int
    misses: int
    views: int
    seconds_of_view: float

    @property
    def seconds_spared(self) -> float:
        """What the passes would have cost that the cell found in the cache because different cells had made them."""
        return max(0, self.views - self.misses) * self.seconds_of_view


class Computed(BaseModel):
    """How a cell's steps were computed: their costs can be compared with those of cells that were computed alike.

    `precision`: what the forward pass computes in. `channels_last`: whether the channels lie last in memory.
    `winograd`: whether the student's large 3x3 convolutions were computed by Winograd's algorithm.
    """

    model_config = ConfigDict(frozen=True)

    precision: str
    channels_last: bool = False
    winograd: bool = False

    def __str__(self) -> str:
        layout = "channels last" if self.channels_last else "channels first"
        return f"{self.precision}, {layout}{', Winograd' if self.winograd else ''}"


class CellResult(BaseModel):
    """What one cell measured: one training of a row with one seed.

    `key`, `key_parts`: digests of all that the result depends on. `evaluation`, `per_class`: AP in percent, or None if
    undefined. `ap_at_four_fifths`: AP after four fifths of the steps, where the suite asks for it. `train_seconds`: the
    whole training by the clock. `cpu_seconds`: CPU time of the training, over all threads; None in results of earlier
    versions. `step_ms`: the median step by the clock. `peak_memory_mb`: peak memory of the process until the end of
    training; on a GPU, of its tensors in the training. `stretch`: the factor by which the schedule was stretched.
    `history`: loss terms and the methods' metrics by step. `inherited`: what the student took from its teacher before
    training, in words; empty if nothing.

    `format`: the version of this record. `suite`: the name of the suite that ran it. `settings`: all that repeats it:
    `detector`, `methods`, `data`, `seed`, `steps`, and `teacher` if it had one. `fingerprints`: digests of the content
    of `train_data` and `val_data`, of `unlabelled` images and of the teacher's weights (`teacher`) if it had them.
    `evaluations`: what was measured at some steps of the training and after the last one: `ap` and `ap50` in percent;
    where the suite has a `probe`, `conflict/METHOD`, the cosine of the method's gradient with the task's, and
    `share/METHOD`, its share of both gradients; `conflict/task` is the cosine between the task's gradients of two
    batches, to compare with. `breakdown`: where the AP comes from. `inference`: what one image costs the trained
    detector. `cached`: how a teacher cache was used, if there was one. `computed`: how the steps were computed. All of
    these are empty in results of earlier versions, but for the fingerprints of data, which their key holds, and for
    `computed`: their channels were first, and no convolution was computed by Winograd's algorithm.
    """

    model_config = ConfigDict(frozen=True)

    entry: str
    seed: int
    key: str
    key_parts: dict[str, str]
    data: str
    evaluation: dict[str, float | None]
    per_class: dict[str, float | None]
    ap_at_four_fifths: float | None = None
    steps: int
    stretch: float = 1.0
    train_seconds: float
    cpu_seconds: float | None = None
    step_ms: float
    peak_memory_mb: float
    parameters: int
    history: list[dict[str, float]]
    inherited: str = ""
    warnings: list[str]
    versions: dict[str, str]
    machine: str
    device: str
    threads: int
    date: str
    format: int = 1
    suite: str = ""
    settings: dict[str, Any] = {}
    fingerprints: dict[str, str] = {}
    evaluations: list[dict[str, float | None]] = []
    breakdown: Breakdown | None = None
    inference: InferenceCost | None = None
    cached: CachedTeacher | None = None
    computed: Computed = Computed(precision="float32")

    @model_validator(mode="before")
    @classmethod
    def _with_precision(cls, raw: Any) -> Any:
        """Results of earlier versions have the precision in the parts of their key alone."""
        if not isinstance(raw, dict) or "computed" in raw or not isinstance(raw.get("key_parts"), dict):
            return raw
        return {**raw, "computed": {"precision": raw["key_parts"].get("precision", "float32")}}

    @model_validator(mode="before")
    @classmethod
    def _with_fingerprints(cls, raw: Any) -> Any:
        """Results of format 1 have the digests of their data in the key alone: of training, then of evaluation."""
        if not isinstance(raw, dict) or raw.get("fingerprints") or not isinstance(raw.get("key_parts"), dict):
            return raw
        digests = str(raw["key_parts"].get("data", "")).split()
        return {**raw, "fingerprints": dict(zip(("train_data", "val_data"), digests, strict=False))}

    @model_validator(mode="after")
    def _has_all_metrics(self) -> CellResult:
        if missing := [name for name in METRICS if name not in self.evaluation]:
            raise ValueError(f"its evaluation has no {missing[0]}")
        return self

    @property
    def name(self) -> str:
        """The cell's name in messages."""
        return cell_name(self.entry, self.seed)

    @property
    def teacher_key(self) -> str:
        """The key of the teacher that taught this cell, or of the cell if it is a teacher; empty without teacher."""
        if self.entry == TEACHER:
            return self.key
        key = self.key_parts.get("teacher", "none").partition(",")[0]
        return "" if key == "none" else key

    @property
    def seconds_per_step(self) -> float:
        """Mean seconds of a training step by the clock; 0 for a detector that was not trained."""
        return self.train_seconds / self.steps if self.steps else 0.0

    @property
    def cost_per_step(self) -> float | None:
        """Mean seconds that a training step costs; None if they were not measured.

        On a CPU this is CPU time, divided by the number of threads: programs that run beside it hardly change it. With
        a teacher cache it holds the teacher's pass over each view once, whichever cell made it: so the first cell of a
        board costs no more than the others, and each costs what it would cost alone.
        """
        if not self.steps:
            return None
        spared = 0.0 if self.cached is None else self.cached.seconds_spared
        if self.device != "cpu":
            return (self.train_seconds + spared) / self.steps
        return None if self.cpu_seconds is None else (self.cpu_seconds + spared) / self.threads / self.steps

    @property
    def cost_ms(self) -> float | None:
        """What a training step costs, in milliseconds: `cost_per_step`, but on a GPU without cache the median step.

        With a cache the median step asks the teacher nothing, so it is less than what a step costs.
        """
        if self.device != "cpu" and self.cached is None:
            return self.step_ms
        return None if self.cost_per_step is None else 1000 * self.cost_per_step

    @property
    def hardware(self) -> str:
        """What it was measured on, in words. Times on different hardware cannot be compared."""
        where = self.machine if self.device == "cpu" else f"{self.device} ({self.machine})"
        return f"{where}, {counted(self.threads, 'thread')} a cell"

    @property
    def way(self) -> str:
        """How its steps were computed, and whether its teacher had a cache, in words."""
        return str(self.computed) if self.cached is None else f"{self.computed}, teacher cache"


def cell_name(row: str, seed: int) -> str:
    """A cell's name in messages."""
    return row if row == TEACHER else f"{row}, seed {seed}"


class Store:
    """The folder of one run, `root`, with its suite, cells and boards.

    `teachers`, `teacher_cache` (what they showed of images) and `pictures` (drawn images) lie beside it. All runs of an
    output folder share them.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.teachers = root.parent / "teachers"
        self.teacher_caches = root.parent / "teacher_cache"
        self.pictures = root.parent / "pictures"

    @property
    def suite_path(self) -> Path:
        """The suite as it was run."""
        return self.root / "suite.yaml"

    @property
    def teacher_copy(self) -> Path:
        """A copy of the teacher's result, so that the folder can be read on its own."""
        return self.root / "teacher.json"

    @property
    def status_path(self) -> Path:
        """What the run says about itself while it works."""
        return self.root / "status.json"

    @property
    def tensorboard(self) -> Path:
        """Curves for TensorBoard, if they are asked for: a folder for each row, and in it one for each seed."""
        return self.root / "tensorboard"

    @property
    def ground_truth_path(self) -> Path:
        """The ground truth of the images that all cells are evaluated on."""
        return self.root / "ground_truth.json.gz"

    def result_path(self, entry: str, seed: int) -> Path:
        """The JSON file of a cell's result. The student's weights (.pt) and detections lie beside it."""
        return self.root / "cells" / entry / f"seed{seed}.json"

    def teacher_path(self, key: str) -> Path:
        """The JSON file of the teacher with this key. Its weights lie beside it, in a file that ends in .pt."""
        return self.teachers / f"{key}.json"

    def teacher_cache(self, key: str) -> Path:
        """The folder of what the teacher with this key showed of images."""
        return self.teacher_caches / key

    def lock(self) -> AbstractContextManager[None]:
        """Lock the folder for this process until it ends. Raises KDError that names the process that holds it."""
        return holding(self.root)


def read_result(path: Path) -> CellResult | None:
    """A stored result, of this format or an earlier one; None if there is no file.

    Raises DamagedError if the file is damaged, and KDError if it cannot be read, or if a newer version of kdtoolkit has
    written it.
    """
    content = read_file(path)
    if content is None:
        return None
    try:
        raw = json.loads(content)
        if isinstance(raw, dict) and isinstance(made := raw.get("format", 1), int) and made > FORMAT:
            raise KDError(
                f"{path} was made by a newer kdtoolkit, in format {made}; this version reads formats 1 to {FORMAT}: "
                "pip install -U kdtoolkit"
            )
        return CellResult.model_validate(raw)
    except ValueError as error:
        raise DamagedError(f"{path} is damaged. `kd benchmark run` sets it aside and runs the cell again") from error


def read_file(path: Path) -> bytes | None:
    """A file's content; None if there is no file. Raises KDError if it cannot be read: it need not be damaged."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(path, error) from error


def intact_result(path: Path) -> CellResult | None:
    """A stored result; None if it is missing or damaged.

    Raises KDError if it cannot be read, or if a newer version of kdtoolkit has written it.
    """
    with suppress(DamagedError):
        return read_result(path)
    return None


def usable_result(path: Path, fits: Callable[[CellResult], bool]) -> CellResult | None:
    """A stored result; None unless it `fits`, and its weights are complete."""
    found = intact_result(path)
    return found if found is not None and fits(found) and are_whole(path.with_suffix(".pt")) else None


def are_whole(weights: Path) -> bool:
    """Whether a file of weights exists and is complete. A file that was cut short is no ZIP archive any more.

    Raises KDError if it cannot be read.
    """
    try:
        with weights.open("rb") as file:
            return zipfile.is_zipfile(file)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise _unreadable(weights, error) from error


def write_weights(path: Path, model: nn.Module) -> None:
    """Store a model's state dict, with its tensors on the CPU."""
    buffer = io.BytesIO()
    torch.save({name: tensor.cpu() for name, tensor in model.state_dict().items()}, buffer)
    write_atomic(path, buffer.getvalue())


def write_result(path: Path, result: CellResult) -> None:
    """Store a cell's result. Its weights must be stored before."""
    write_atomic(path, result.model_dump_json(indent=1).encode())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A context in which errors of a full or read-only disk become a StoreError that names `path`."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot write {path}: {_why(error)}. Finished cells are kept; run the same command to continue"
        ) from error


@contextmanager
def holding(folder: Path, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold a folder as `hold` does. Raises StoreError if the folder cannot be written."""
    with ExitStack() as held:
        with writing(folder):
            held.enter_context(hold(folder, waiting))
        yield


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file completely, or leave it as it was. Raises StoreError if it cannot be written."""
    with writing(path):
        files.write_atomic(path, content)


def set_aside(path: Path) -> Path:
    """Rename a result that is out of date with its weights and detections, so that boards leave it out.

    Nothing is lost: all that was set aside earlier stays too. Returns the result's new path, which ends in `.old` or,
    if there is such a file, in `.old2` or a higher number.
    """
    beside = (path, path.with_suffix(".pt"), path.with_suffix(".detections.npz"))  # without its result, no board has it

    def old(file: Path, number: int) -> Path:
        return file.with_name(f"{file.name}.old{number if number > 1 else ''}")

    free = next(number for number in count(1) if not any(old(file, number).exists() for file in beside))
    with writing(path):
        for file in beside:
            if file.exists():
                file.replace(old(file, free))
    return old(path, free)


def discard(path: Path) -> None:
    """Delete a file if it exists."""
    with writing(path):
        path.unlink(missing_ok=True)


def discard_runs(result: Path, but: Path | None = None) -> None:
    """Delete the folders of a cell's unfinished trainings, except `but`.

    The caller must hold the run's folder, or for a teacher its lock folder: else it deletes what another run works in.
    """
    for folder in result.parent.glob("*.run"):
        if folder.name.startswith(f"{result.stem}.") and folder != but:
            with writing(folder):
                shutil.rmtree(folder)


def _unreadable(path: Path, error: OSError) -> KDError:
    return KDError(f"cannot read {path}: {_why(error)}. Mend that, and run the same command again")


def _why(error: OSError) -> str:
    return error.strerror or str(error)
