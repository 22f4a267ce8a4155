"""What other installed packages announce to kdtoolkit, by entry points."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from kdtoolkit.errors import KDError


def announced(group: str) -> list[Any]:
    """Load everything that other packages announce under a group of entry points.

    Raises KDError that names the package whose entry point cannot be loaded.
    """
    found = []
    for entry in entry_points(group=group):
        try:
            found.append(entry.load())
        except Exception as error:  # another package's module may raise anything when it is imported
            package = "an installed package" if entry.dist is None else f"the installed package {entry.dist.name}"
            raise KDError(
                f"{package} announces {entry.value} ({group}), which cannot be loaded: {type(error).__name__}: "
                f"{error}. Fix it or uninstall it"
            ) from error
    return found
