"""The source files of code that is not kdtoolkit's, such as a user's detector or the method of another package."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

_IMPORTED = re.compile(r"^\s*(?:from|import)\s+(\w+)", re.MULTILINE)
_INSTALLED = {"site-packages", "dist-packages"}


def modules_of(cls: type, base: type) -> set[str]:
    """The modules of a class and of those that it inherits from, up to `base`; without those of kdtoolkit and torch."""
    modules = {each.__module__ for each in cls.__mro__ if issubclass(each, base)}
    return {module for module in modules if module.partition(".")[0] not in ("kdtoolkit", "torch")}


def source_files(modules: Iterable[str]) -> dict[str, Path]:
    """The Python files of modules, by their paths from the folder that they are imported from.

    A module of a package stands for the whole package. Files and packages beside it that are imported there belong to
    it, as in a user's project; but not those of other installed packages. A module without a file has none.
    """
    found: dict[str, Path] = {}
    waiting = [place for place in map(_place_of, modules) if place is not None]
    while waiting:
        root, top = waiting.pop()
        for path in [top] if top.is_file() else sorted(top.rglob("*.py")):
            name = path.relative_to(root)
            if str(name) in found or any(part.startswith(".") for part in name.parts):
                continue
            found[str(name)] = path
            if root.name not in _INSTALLED:
                imported = set(_IMPORTED.findall(path.read_text("utf-8", "ignore"))) - {"kdtoolkit"}
                beside = (place for name in imported for place in (root / name, root / f"{name}.py"))
                waiting += [(root, place) for place in beside if place.exists()]
    return found


def digests_of(files: Mapping[str, Path]) -> dict[str, str]:
    """The digest of what each file holds, by the names of the files."""
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def _place_of(module: str) -> tuple[Path, Path] | None:
    """The folder that a module is imported from, and the file or folder there that it is, or is a part of."""
    try:
        spec = importlib.util.find_spec(module)
    except Exception:  # it was made without a file, or importing its package fails, which building it tells
        return None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return None
    path = Path(spec.origin)
    first, *inner = module.split(".")
    depth = len(inner) + (spec.submodule_search_locations is not None)
    return path.parents[depth], path.parents[depth] / first if depth else path
