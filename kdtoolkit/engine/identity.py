"""What decides a run's result. A folder keeps it, so that a different run does not go on there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from hashlib import sha256
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from kdtoolkit import processes
from kdtoolkit.contract import Method
from kdtoolkit.data import DetectionDataset
from kdtoolkit.data.dataset import digest
from kdtoolkit.distiller import Distiller
from kdtoolkit.engine.arithmetic import Arithmetic
from kdtoolkit.engine.checkpoint import to_bytes
from kdtoolkit.engine.config import TrainConfig, Validation
from kdtoolkit.engine.processor import processor_name
from kdtoolkit.errors import KDError

_SETTINGS = (
    "seed",
    "student",
    "teacher",
    "teacher_scale",
    "methods",
    "method_settings",
    "held_shares",
    "data",
    "validation",
    "unlabelled",
    "class_map",
    "score",
)
# Options that change how fast a run is. What it computes they change by rounding at most.
ONLY_SPEED = frozenset({"workers", "teacher_cache", "teacher_cache_gb", "channels_last", "winograd"})
# How versions trained that had no such option and kept no such circumstance.
_BEFORE = {"channels_last": False, "winograd": False, "teacher_cache": "off"}
_CIRCUMSTANCES = ("torch", "device", "processor", "threads", "precision", "channels_last", "winograd", "processes")


def identity(
    distiller: Distiller,
    config: TrainConfig,
    dataset: DetectionDataset,
    unlabelled: DetectionDataset | None,
    validation: Validation | None,
    seed: int,
    device: torch.device,
    arithmetic: Arithmetic,
) -> dict[str, Any]:
    """A run's settings and circumstances, as values that JSON can hold."""
    teacher, class_map = distiller.teacher_adapter, distiller.class_map
    methods = [method for method in distiller.methods if isinstance(method, Method)]
    return {
        "config": config.model_dump(mode="json"),
        "seed": seed,
        "data": dataset.fingerprint(),
        "unlabelled": None if unlabelled is None else unlabelled.fingerprint(),
        "validation": None if validation is None else validation.dataset.fingerprint(),
        "student": digest([(name, tuple(x.shape)) for name, x in distiller.student.state_dict().items()]),
        "teacher": None if teacher is None else sha256(to_bytes(teacher.model.state_dict())).hexdigest(),
        "teacher_scale": float(distiller.teacher_scale),
        "class_map": None if class_map is None else [list(class_map.student), list(class_map.teacher)],
        "score": float(distiller.score),
        "methods": [type(method).__name__ for method in methods],
        "method_settings": [_settings(method) for method in methods],
        "held_shares": [None if method.held is None else float(method.held.share) for method in methods],
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "precision": arithmetic.precision,
        "channels_last": arithmetic.channels_last,
        "winograd": arithmetic.winograd,
        "processes": processes.count(),
    }


def compare(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> list[str]:
    """Notices about a run that goes on under different circumstances. Raises KDError if its settings differ.

    A folder of an earlier version may lack some of the names in `old`. These are not compared.
    """
    now = new["config"]
    # An earlier version may not have had an option. It then trained as the option's default does, or as `_BEFORE` says.
    before = TrainConfig.model_construct(steps=now["steps"]).model_dump(mode="json") | _BEFORE | old["config"]
    changed = [name for name in now if name not in ONLY_SPEED and before[name] != now[name]]
    changed += [name for name in _SETTINGS if name in old and old[name] != new[name]]
    if changed:
        raise KDError(
            f"{folder} holds a run that began with different settings ({', '.join(changed)}): choose another folder, "
            "or delete this one"
        )
    old = {name: before[name] for name in _BEFORE} | dict(old)
    differing = [(name, old[name], new[name]) for name in _CIRCUMSTANCES if name in old and old[name] != new[name]]
    caches = before["teacher_cache"], now["teacher_cache"]
    if caches[0] != caches[1] and "off" in caches:  # in memory and on disk it gives the same bits
        differing.append(("teacher_cache", *caches))
    return [
        f"the run in {folder} began with {name} {began} and goes on with {goes_on}: its last digits will differ from a "
        "run that was never stopped"
        for name, began, goes_on in differing
    ]


def _settings(method: Method) -> str:
    """What a user has chosen for a method: its arguments, which it keeps as public values, its schedule and strides.

    A held share is a module and no value: `held_shares` has it.
    """
    kept = {name: value for name, value in vars(method).items() if not name.startswith("_")}
    kept |= {"schedule": method.schedule, "strides": method.strides}
    return repr({name: _plain(kept[name]) for name in sorted(kept.keys() - {"training", "in_use"})})


def _plain(value: object) -> object:
    """The value in types that Python writes alike in each process. All else is written as the name of its type."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Real):
        return float(value)  # 6 and 6.0 are the same weight
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return type(value).__name__
