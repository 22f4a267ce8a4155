"""What methods have learned, in a file beside a trainer's own checkpoint, which has no place for it."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from kdtoolkit.distiller import Distiller
from kdtoolkit.errors import KDError
from kdtoolkit.files import write_atomic


def save_learned(distiller: Distiller, path: Path, *, step: int) -> None:
    """Write the methods' parameters and buffers, and the number of optimiser steps done, to a safetensors file."""
    about = {"methods": _names(distiller), "step": str(step)}
    # Copies, because parameters that levels share have several names, and safetensors wants memory for each.
    state = {name: value.cpu().clone().contiguous() for name, value in distiller.methods.state_dict().items()}
    write_atomic(path, save(state, metadata=about))


def load_learned(distiller: Distiller, path: Path) -> int:
    """Give the methods the parameters and buffers in a file of `save_learned`. Returns its number of steps done.

    Raises KDError if the file is missing or damaged, or was written with different methods.
    """
    if not path.is_file():
        raise KDError(
            f"{path} is missing: it holds what the methods had learned when the checkpoint beside it was written. "
            "Resume from a checkpoint that has this file, or start a new run"
        )
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError) as error:
        raise KDError(f"{path} cannot be read ({error}): resume from an earlier checkpoint") from error
    if about.get("methods") != _names(distiller):
        raise KDError(
            f"{path} was written with the methods {about.get('methods')}, and this run has {_names(distiller)}: resume "
            "with the same methods, or start a new run"
        )
    try:
        distiller.methods.load_state_dict(state)
    except RuntimeError as error:
        raise KDError(
            f"{path} does not fit the methods of this run ({' '.join(str(error).split())}): resume with the same "
            "teacher, student and arguments of methods, or start a new run"
        ) from error
    return int(about["step"])


def _names(distiller: Distiller) -> str:
    return ", ".join(type(method).__name__ for method in distiller.methods) or "none"
