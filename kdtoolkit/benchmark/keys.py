"""Keys: digests of all that determines a cell's result; it is run again when, and only when, one of them changes."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import kdtoolkit
from kdtoolkit.benchmark.suite import DetectorSection, MethodUse
from kdtoolkit.libraries import library_of_name
from kdtoolkit.models import content_of

# Sources that every cell depends on: all but the commands and what they print. The detector's adapter and the methods'
# own files are added.
_SOURCES = ("*.py", "contract/*.py", "methods/common.py", "benchmark/cell.py", "data/*.py", "engine/*.py")
_NOT_OF_CELLS = {"__main__.py", "inspect.py", "listing.py", "matrix.py"}


def cell_parts(
    student: DetectorSection,
    methods: tuple[MethodUse, ...],
    *,
    seed: int,
    steps: int,
    data: str,
    teacher: str,
    device: str,
    threads: int,
) -> dict[str, str]:
    """What determines a student and what it costs.

    That is its section, with the precision resolved; methods, seed and steps; the digests of its data and of its
    teacher; the device by name, threads, versions and source.
    """
    library = package_of(student.model)
    return {
        "detector": digest(student.model_dump(mode="json")),
        "methods": json.dumps([[use.name, use.args] for use in methods]),
        "seed": str(seed),
        "steps": str(steps),
        "data": data,
        "teacher": teacher if methods else "none",
        "precision": student.train.precision,
        "device": device,
        "threads": str(threads),
        "torch": torch.__version__,
        "library": f"{library} {version(library)}",
        **({"weights": content} if (content := content_of(student.model)) else {}),
        "code": source_digest(student.model, tuple(Path(inspect.getfile(use.method)) for use in methods)),
    }


def key_of(parts: Mapping[str, str]) -> str:
    """The key of a cell, 16 hexadecimal digits."""
    return digest(dict(parts))


def difference(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """What changed between two cells, in words."""
    changed = [name for name in new if old.get(name) != new[name]]
    told = ("torch", "library", "steps", "precision", "device", "threads")
    shown = (f"{name} ({old.get(name)} -> {new[name]})" if name in told else name for name in changed)
    return "changed: " + ", ".join(shown)


def digest(value: Any) -> str:
    """Digest of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def package_of(model: str) -> str:
    """The package that a model is made of, by the model's name; torchvision for one of the user's own."""
    library = library_of_name(model)
    return "torchvision" if library is None else library.package


@cache  # what a run began with is what its workers have imported, whatever is edited meanwhile
def source_digest(model: str, extra: tuple[Path, ...] = ()) -> str:
    """Digest of the source that trains and evaluates: kdtoolkit's, the file of a model of one's own, and `extra`."""
    package = Path(kdtoolkit.__file__).parent
    files = {path for pattern in (*_SOURCES, *_adapter_sources(model)) for path in package.glob(pattern)} | set(extra)
    files -= {package / name for name in _NOT_OF_CELLS}
    module, is_own, _ = model.partition("?")[0].partition(":")
    if is_own and (spec := importlib.util.find_spec(module)) is not None and spec.origin is not None:
        files.add(Path(spec.origin))

    def name(path: Path) -> str:  # where the package is installed makes no difference
        return str(path.relative_to(package)) if path.is_relative_to(package) else path.name

    return digest({name(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)})


def _adapter_sources(model: str) -> tuple[str, ...]:
    """Patterns of the files that show a model to methods: a model of the user's own may need any of them."""
    library = library_of_name(model)
    if library is None:
        return "adapters/**/*.py", "detectors/*.py"
    module = library.adapters.removeprefix("kdtoolkit.").replace(".", "/")
    return f"{module}.py", f"{module}/*.py", "adapters/_*.py", *library.sources
