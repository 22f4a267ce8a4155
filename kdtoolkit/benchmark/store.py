"""Results on disk: a run's folder and the teachers beside it. Whatever is there is complete: writes are atomic."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from kdtoolkit.errors import KDError


class StoreError(KDError):
    """The results folder cannot be written; no further cell can succeed."""


class CellResult(BaseModel):
    """What one cell measured: one training of a row with one seed.

    `key` and `key_parts`: digests of what determined it. `evaluation`, `per_class`: AP in percent or None.
    `train_seconds` is the whole training, `step_ms` the median step; `peak_memory_mb` that of the process up to the end
    of training (on CUDA, of its tensors); `stretch` the factor of the schedule's steps. `history`: loss terms by step.
    """

    model_config = ConfigDict(frozen=True)

    entry: str
    seed: int
    key: str
    key_parts: dict[str, str]
    data: str
    evaluation: dict[str, float | None]
    per_class: dict[str, float | None]
    steps: int
    stretch: float = 1.0
    train_seconds: float
    step_ms: float
    peak_memory_mb: float
    parameters: int
    history: list[dict[str, float]]
    warnings: list[str]
    versions: dict[str, str]
    machine: str
    device: str
    threads: int
    date: str

    @property
    def seconds_per_step(self) -> float:
        """Mean seconds of a training step."""
        return self.train_seconds / self.steps

    @property
    def hardware(self) -> str:
        """What it was measured on, in words: times of different hardware are not comparable."""
        where = self.machine if self.device == "cpu" else f"{self.device} ({self.machine})"
        return f"{where}, {self.threads} thread{'s' if self.threads > 1 else ''} a cell"


class Store:
    """One run's folder, `root`: suite, cells and boards.

    `teachers` and `pictures` (drawn ones) lie beside it and are shared by all runs of an output folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.teachers = root.parent / "teachers"
        self.pictures = root.parent / "pictures"

    @property
    def suite_path(self) -> Path:
        """The suite as run."""
        return self.root / "suite.yaml"

    @property
    def teacher_copy(self) -> Path:
        """A copy of the teacher's result, so that the folder can be read on its own."""
        return self.root / "teacher.json"

    def result_path(self, entry: str, seed: int) -> Path:
        """A cell's JSON; its student's weights lie beside it, ending in .pt."""
        return self.root / "cells" / entry / f"seed{seed}.json"

    def teacher_path(self, key: str) -> Path:
        """The JSON of the teacher with this key; its weights lie beside it, ending in .pt."""
        return self.teachers / f"{key}.json"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process, however it ends. Raises KDError if another one holds it."""
        holder = self.root / ".process"
        with writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        try:
            held = FileLock(self.root / ".lock").acquire(timeout=0)
        except Timeout:
            process = holder.read_text("utf-8") if holder.is_file() else "?"
            raise KDError(
                f"another `kd benchmark run` (process {process}) works in {self.root}: wait for it, or choose another "
                "folder with --out"
            ) from None
        except (OSError, NotImplementedError) as error:
            raise StoreError(f"cannot lock {self.root}: {error}") from error
        with held:
            write_atomic(holder, str(os.getpid()).encode())
            for leftover in self.root.rglob(".*.partial"):
                leftover.unlink(missing_ok=True)  # of a run that was killed while it wrote
            yield


def read_result(path: Path) -> CellResult | None:
    """A stored result; None if there is none. Raises KDError if the file is damaged."""
    try:
        return CellResult.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValidationError) as error:
        raise KDError(f"{path} is damaged: `kd benchmark run` sets it aside and runs the cell again") from error


def are_whole(weights: Path) -> bool:
    """Whether a file of weights is there and has its end: one that was cut short is no archive any more."""
    return zipfile.is_zipfile(weights)


def write_weights(path: Path, model: nn.Module) -> None:
    """Store a model's plain state dict, on the CPU."""
    buffer = io.BytesIO()
    torch.save({name: tensor.cpu() for name, tensor in model.state_dict().items()}, buffer)
    write_atomic(path, buffer.getvalue())


def write_result(path: Path, result: CellResult) -> None:
    """Store a cell's result; its weights are to lie beside it already."""
    write_atomic(path, result.model_dump_json(indent=1).encode())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the errors of a full or read-only disk into a StoreError that names `path`."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot write {path}: {_why(error)}; finished cells are kept, call again to go on") from error


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that it is complete or not there at all. Raises StoreError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def set_aside(path: Path) -> None:
    """Take a result that no longer holds off the board, without deleting it."""
    with writing(path):
        path.replace(path.with_suffix(".json.old"))


def discard(path: Path) -> None:
    """Delete a file if it is there."""
    with writing(path):
        path.unlink(missing_ok=True)


def _why(error: OSError) -> str:
    return error.strerror or str(error)
