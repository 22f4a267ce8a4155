"""The logs of a run: lines of JSON in its folder, and the trackers of Accelerate (TensorBoard, W&B, MLflow ...)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdtoolkit.errors import KDError

Row = Mapping[str, float | None]


class Log:
    """A file with a line of JSON for each row. Rows wait in memory until `flush`."""

    def __init__(self, path: Path, position: int = 0) -> None:
        """Go on after the first `position` bytes; what follows them is of steps that are done again. Raises OSError.

        `missing` is the number of bytes that are not there any more because somebody changed the file.
        """
        self._path = path
        self._waiting: list[bytes] = []
        with path.open("ab") as file:
            self.position = min(position, file.tell())
            file.truncate(self.position)
        self.missing = position - self.position

    def add(self, row: Row) -> None:
        """Add a row."""
        self._waiting.append(json.dumps(row, allow_nan=False).encode() + b"\n")

    def flush(self) -> None:
        """Write all rows to the disk. After an OSError the rows are still in memory, and no half line is left."""
        content = b"".join(self._waiting)
        with self._path.open("ab") as file:
            # Somebody may have emptied or deleted the file meanwhile; `truncate` would fill it up with zero bytes.
            self.position = min(self.position, file.tell())
            file.truncate(self.position)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self.position += len(content)
        self._waiting.clear()


def check_trackers(names: Sequence[str]) -> None:
    """Raise KDError if Accelerate does not know a tracker of this name, or if it is not installed."""
    _trackers(names)


def _trackers(names: Sequence[str]) -> dict[str, Any]:
    """The classes of these trackers, by name."""
    if not names:
        return {}
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = {str(name): tracker for name, tracker in LOGGER_TYPE_TO_CLASS.items()}
    installed = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in known:
            raise KDError(f"no tracker {name!r}: Accelerate knows {', '.join(known)}")
        if name not in installed:
            raise KDError(f"the tracker {name} is not installed: pip install {name}")
    return {name: known[name] for name in names}


class Trackers:
    """Accelerate's trackers, by name. Accelerate is imported only if a tracker is asked for."""

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any], *, step: int) -> None:
        """Start trackers for a run that has done `step` steps; those that write files write them in `folder`.

        Raises KDError if one is not installed.
        """
        self._trackers: list[Any] = []
        for name, known in _trackers(names).items():
            options: dict[str, Any] = {"logging_dir": folder.parent} if known.requires_logging_directory else {}
            if name == "tensorboard":
                options["purge_step"] = step + 1  # what a stopped run wrote beyond its checkpoint
            tracker = known(folder.name, **options)
            tracker.start()
            if not step:
                tracker.store_init_configuration(
                    {key: value if isinstance(value, int | float) else str(value) for key, value in config.items()}
                )
            self._trackers.append(tracker)

    def log(self, row: Row, step: int) -> None:
        """Hand a row to all trackers."""
        for tracker in self._trackers:
            tracker.log({name: value for name, value in row.items() if value is not None}, step=step)

    def finish(self) -> None:
        """Close all trackers."""
        for tracker in self._trackers:
            tracker.finish()
