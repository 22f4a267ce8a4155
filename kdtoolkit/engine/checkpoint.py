"""Checkpoints on disk: each is whole or does not count. Tensors lie in safetensors, all else in JSON."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from kdtoolkit.errors import KDError
from kdtoolkit.files import write_atomic

_NAME = re.compile(r"step-(\d+)\.json")


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a step: tensors by name, and facts that JSON can hold."""

    step: int
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one run, in a folder: `step-00000120.safetensors`, and `step-00000120.json` beside it.

    The JSON holds the digest of both and is written last: without it there is no checkpoint. The last `keep` stay.
    Those of later steps than the one just written are damaged, for the run has gone back behind them. They are deleted.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    def write(self, checkpoint: Checkpoint) -> None:
        """Store a checkpoint, then delete the oldest and those of later steps.

        Raises OSError if it cannot be written; all earlier ones then stay.
        """
        path = self._path(checkpoint.step)
        content = to_bytes(checkpoint.tensors)
        facts = json.dumps(checkpoint.facts, allow_nan=False)
        described = {
            "step": checkpoint.step,
            "tensors_sha256": hashlib.sha256(content).hexdigest(),
            "facts_sha256": hashlib.sha256(facts.encode()).hexdigest(),
            "facts": facts,
        }
        write_atomic(path.with_suffix(".safetensors"), content)
        write_atomic(path, json.dumps(described).encode())
        kept = [step for step in self._steps() if step <= checkpoint.step][-self._keep :]
        for old in self.folder.glob("step-*.*"):
            if not any(self._path(step).stem == old.stem for step in kept):
                old.unlink(missing_ok=True)

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is whole, None if there is none, and a sentence for each newer damaged one.

        Raises KDError if there are checkpoints and all are damaged: the user decides whether to start again.
        """
        damaged: list[str] = []
        for step in reversed(self._steps()):
            try:
                return self._read(step), [f"{reason}; going on from the checkpoint before it" for reason in damaged]
            except KDError as error:
                damaged.append(str(error))
        if damaged:
            raise KDError(
                f"{'; '.join(damaged)}. No whole checkpoint is left in {self.folder}: delete the folder to start again"
            )
        return None, []

    def _read(self, step: int) -> Checkpoint:
        path = self._path(step)
        try:
            described = json.loads(path.read_bytes())
            facts = described["facts"]
            if hashlib.sha256(facts.encode()).hexdigest() != described["facts_sha256"] or described["step"] != step:
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise KDError(f"checkpoint {path} is damaged") from error
        tensors = path.with_suffix(".safetensors")
        try:
            content = tensors.read_bytes()
        except OSError as error:
            raise KDError(f"checkpoint {tensors} cannot be read: {error.strerror}") from error
        if hashlib.sha256(content).hexdigest() != described["tensors_sha256"]:
            raise KDError(f"checkpoint {tensors} is damaged")
        try:
            return Checkpoint(step, safetensors.torch.load(content), json.loads(facts))
        except (SafetensorError, ValueError) as error:  # whole as written, and yet of no use
            raise KDError(f"checkpoint {tensors} is damaged: {error}") from error

    def _steps(self) -> list[int]:
        """The steps that there are checkpoints of, in order."""
        names = [_NAME.fullmatch(path.name) for path in self.folder.glob("step-*.json")]
        return sorted(int(name[1]) for name in names if name)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08}.json"


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a safetensors file with these tensors."""
    content: bytes = safetensors.torch.save(
        {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    )
    return content
