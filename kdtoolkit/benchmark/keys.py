"""Keys: digests of all that a cell's result depends on. Settings: the part of it that a user has chosen."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

import kdtoolkit
from kdtoolkit.benchmark.suite import DetectorSection
from kdtoolkit.build import find_modules_here
from kdtoolkit.contract import DetectorAdapter, Method
from kdtoolkit.engine.checkpoint import to_bytes
from kdtoolkit.engine.config import TrainConfig
from kdtoolkit.engine.identity import ONLY_SPEED
from kdtoolkit.libraries import ENTRY_POINTS, library_of_name
from kdtoolkit.method_use import MethodUse
from kdtoolkit.models import content_of
from kdtoolkit.plugins import announced
from kdtoolkit.sources import digests_of, modules_of, source_files

# The source files of all cells. Those of the detector's adapter are added, and those of the cell's methods with the
# files of kdtoolkit/methods that these import. Files of commands, and of what they print, are left out. Of a model,
# method or adapter of another package, all files of that package are added.
_OF_CELLS = ("benchmark/cell.py", "benchmark/datasets.py")
_SOURCES = ("*.py", "contract/*.py", "data/*.py", "engine/*.py", *_OF_CELLS)
_NOT_OF_CELLS = {
    "__main__.py",
    "inspect.py",
    "listing.py",
    "matrix.py",
    "matrix_tables.py",
    "probe_words.py",
    "verdicts.py",
}

# What a cell depends on and no suite says: with `--any-version` results may differ in it.
_CIRCUMSTANCES = {"code", "torch", "library", "device", "threads"}


def cell_parts(
    detector: DetectorSection,
    methods: tuple[MethodUse, ...],
    *,
    seed: int,
    steps: int,
    data: str,
    teacher: str | None,
    device: str,
    threads: int,
) -> dict[str, str]:
    """All that the result and the cost of a cell depend on, by name.

    `detector`: the detector's section; a precision replaces `auto`. `data`, `teacher`: their digests; None for a cell
    without teacher. `device`: the device's name. Versions of libraries and the source code are added.
    """
    library = package_of(detector.model)
    return {
        "detector": json.dumps(_without_folders(detector).model_dump(mode="json"), sort_keys=True),
        "methods": json.dumps([[use.name, use.args] for use in methods]),
        "seed": str(seed),
        "steps": str(steps),
        "data": data,
        "teacher": teacher or "none",
        "precision": "float32" if detector.train is None else detector.train.precision,
        "device": device,
        "threads": str(threads),
        "torch": torch.__version__,
        "library": f"{library} {version(library)}",
        **({"weights": content} if (content := content_of(detector.model, detector.args, detector.weights)) else {}),
        "code": source_digest(detector.model, tuple(use.method for use in methods)),
    }


def key_of(parts: Mapping[str, str]) -> str:
    """The key of a cell, 16 hexadecimal digits."""
    return digest(dict(parts))


def same_settings(old: Mapping[str, str], new: Mapping[str, str], *, any_precision: bool = False) -> bool:
    """Whether two cells differ at most in the source code, in the versions of libraries, and in the hardware.

    `any_precision`: whether they may differ in the precision too, since the hardware chooses it (`auto`). Options that
    the old cell does not have, because they are newer, must have their defaults in the new one.
    """
    return settings_of(old, any_precision=any_precision) == settings_of(new, any_precision=any_precision)


def settings_of(parts: Mapping[str, str], *, any_precision: bool = False) -> dict[str, str]:
    """The parts of a cell's key that a user has chosen; the detector with all its options, in one order.

    Options that change nothing but rounding have their defaults. `any_precision`: without the precision.
    """
    chosen = {name: value for name, value in parts.items() if name not in _CIRCUMSTANCES}
    if any_precision:
        chosen.pop("precision", None)
    with suppress(ValidationError):  # an option has been removed since, or the result is older than the settings in it
        section = DetectorSection.model_validate_json(parts.get("detector", ""))
        section = _with(section, {name: TrainConfig.model_fields[name].default for name in ONLY_SPEED})
        if any_precision:
            section = in_precision(section, "auto")
        chosen["detector"] = json.dumps(section.model_dump(mode="json"), sort_keys=True)
    return chosen


def in_precision(section: DetectorSection, precision: str) -> DetectorSection:
    """The section with a precision; as it is if it is not trained."""
    return _with(section, {"precision": precision})


def _with(section: DetectorSection, options: Mapping[str, Any]) -> DetectorSection:
    """The section with options of its training; as it is if it is not trained."""
    if section.train is None:
        return section
    return section.model_copy(update={"train": section.train.model_copy(update=options)})


def difference(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """What changed between two cells, in words."""
    changed = [name for name in new if old.get(name) != new[name]]
    told = ("torch", "library", "steps", "precision", "device", "threads")
    shown = (f"{name} ({old.get(name)} -> {new[name]})" if name in told else name for name in changed)
    return "changed: " + ", ".join(shown)


def digest(value: Any) -> str:
    """16 hexadecimal digits of a JSON value's hash."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def digest_of(state: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits of the content of weights, wherever and in whatever file they are."""
    return hashlib.sha256(to_bytes(state)).hexdigest()[:16]


def package_of(model: str) -> str:
    """The package that the model of this name comes from; torchvision for a user's own model."""
    library = library_of_name(model)
    return "torchvision" if library is None else library.package


def _without_folders(section: DetectorSection) -> DetectorSection:
    """The section with the names of its files alone: what is in them is a part of its own, and they may be moved."""

    def name(value: Any) -> Any:
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

    args = {key: name(value) if key == "pretrained" else value for key, value in section.args.items()}
    return section.model_copy(update={"model": name(section.model), "weights": name(section.weights), "args": args})


@cache
def package_digest() -> str:
    """8 hexadecimal digits that stand for the whole source code of kdtoolkit."""
    package = Path(kdtoolkit.__file__).parent
    return digest(digests_of({str(path.relative_to(package)): path for path in package.rglob("*.py")}))[:8]


@cache  # computed once: workers have imported the files as they were when the run began
def source_digest(model: str, methods: tuple[type[Method], ...] = ()) -> str:
    """Digest of the files that train and evaluate a model by methods: kdtoolkit's, and those of other packages."""
    package = Path(kdtoolkit.__file__).parent
    modules = {module for method in methods for module in modules_of(method, Method)}
    patterns = [*_SOURCES, *_adapter_sources(model)]
    if modules:  # a method of another package may use what it likes of kdtoolkit/methods
        patterns.append("methods/*.py")
    files = {path for pattern in patterns for path in package.glob(pattern)}
    own = [method for method in methods if method.__module__.partition(".")[0] == "kdtoolkit"]
    files |= _with_imports((Path(inspect.getfile(method)) for method in own), package / "methods")
    files -= {package / name for name in _NOT_OF_CELLS}
    module, is_own, _ = model.partition("?")[0].partition(":")
    if is_own:
        find_modules_here()
        # Which of the announced adapters is its own is known only when it is built.
        modules |= {module, *(name for cls in announced(ENTRY_POINTS) for name in modules_of(cls, DetectorAdapter))}
    # Without the folder of a package: where it is installed makes no difference.
    names = {str(path.relative_to(package)) if path.is_relative_to(package) else path.name: path for path in files}
    names |= {f"../{name}": path for name, path in source_files(modules).items()}
    return digest(digests_of(names))


def _with_imports(files: Iterable[Path], methods: Path) -> set[Path]:
    """Files of methods, and all files of the folder `methods` that they import, directly or not."""
    found: set[Path] = set()
    waiting = list(files)
    while waiting:
        if (path := waiting.pop()) not in found:
            found.add(path)
            names = re.findall(r"^from kdtoolkit\.methods\.(\w+) import", path.read_text("utf-8"), re.MULTILINE)
            waiting += [methods / f"{name}.py" for name in names]
    return found


def _adapter_sources(model: str) -> tuple[str, ...]:
    """Patterns of the files of the model's adapter. A model of the user may need any adapter."""
    library = library_of_name(model)
    if library is None:
        return "adapters/**/*.py", "detectors/*.py"
    module = library.adapters.removeprefix("kdtoolkit.").replace(".", "/")
    return f"{module}.py", f"{module}/*.py", "adapters/_*.py", *library.sources
