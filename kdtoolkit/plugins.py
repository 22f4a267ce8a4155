"""What other installed packages announce to kdtoolkit, by entry points."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from kdtoolkit.errors import KDError


@cache
def entries(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of a group. All installed packages are searched once, which takes tens of milliseconds."""
    return tuple(entry_points(group=group))


def announced(group: str) -> list[Any]:
    """Load everything that other packages announce under a group of entry points.

    Raises KDError that names the package whose entry point cannot be loaded.
    """
    found = []
    for entry in entries(group):
        try:
            found.append(entry.load())
        except Exception as error:  # another package's module may raise anything when it is imported
            package = "an installed package" if entry.dist is None else f"the installed package {entry.dist.name}"
            raise KDError(
                f"{package} announces {entry.value} ({group}), which cannot be loaded: {type(error).__name__}: "
                f"{error}. Fix it or uninstall it"
            ) from error
    return found
