"""Files that are complete, or not there at all; the files below a folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from uuid import uuid4

LOCK = ".lock"  # the file by which a process holds a folder
_PARTIAL = ".*.partial"


def is_partial(name: str) -> bool:
    """Whether a file or folder of this name is half-written: by a process that works on it now, or that was killed."""
    return fnmatch(name, _PARTIAL)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that it is complete, or as it was before, even if the process or the machine stops meanwhile.

    The content goes to a second file beside it, which is flushed to the disk and then renamed. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _flush_names(path.parent)


def write_beside(path: Path, content: bytes) -> None:
    """Write a file that other processes see complete or not at all, and do not wait for the disk.

    A power failure may leave it broken: use it for files that can be made again, else `write_atomic`. Raises OSError.
    """
    partial = _partial(path)
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def written_together(folder: Path) -> Iterator[Path]:
    """Write files of a library that only writes them itself: a new folder for them, until the block ends.

    Then each file is flushed to the disk and moved into `folder`, in place of the file that had its name. If the block
    fails, `folder` stays as it was. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = _partial(folder / "files")
    try:
        partial.mkdir(exist_ok=True)
        yield partial
        files = sorted(partial.iterdir())
        for file in files:
            with file.open("rb+") as written:
                os.fsync(written.fileno())
        for file in files:
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _flush_names(folder)


def remove_partial(folder: Path) -> None:
    """Delete half-written files of killed processes in a folder and its subfolders. The caller must hold it.

    Subfolders with a lock of their own are left alone: another process may be writing there.
    """
    for here, below, files in os.walk(folder):
        below[:] = [name for name in below if not Path(here, name, LOCK).exists()]
        for name in below:
            if is_partial(name):
                shutil.rmtree(Path(here, name), ignore_errors=True)
        for name in files:
            if is_partial(name):
                Path(here, name).unlink(missing_ok=True)


def walk(folder: Path, enters: Callable[[Path], bool] = lambda below: True) -> Iterator[Path]:
    """The files in a folder and its subfolders, in the same order each time; none if there is no such folder.

    Links to folders are followed. Each folder is entered once, so that a loop of links ends: links come last, and a
    folder that lies in `folder` is found by its own name. `enters` says whether to enter a subfolder. Raises OSError if
    a folder may not be read.
    """
    seen: set[tuple[int, int]] = set()
    starts = [folder]
    for start in starts:
        for here, below, files in os.walk(start, onerror=_raise_unless_gone):
            about = os.stat(here)
            if (about.st_dev, about.st_ino) in seen:
                below.clear()
                continue
            seen.add((about.st_dev, about.st_ino))
            below[:] = [name for name in sorted(below) if enters(Path(here, name))]
            starts += [Path(here, name) for name in below if os.path.islink(os.path.join(here, name))]
            yield from (Path(here, name) for name in sorted(files))


def walk_visible(folder: Path, enters: Callable[[Path], bool] = lambda below: True) -> Iterator[Path]:
    """What `walk` gives, without files and subfolders whose names begin with a dot: tools keep their own there."""
    for file in walk(folder, lambda below: not below.name.startswith(".") and enters(below)):
        if not file.name.startswith("."):
            yield file


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def bytes_in(folder: Path) -> int:
    """What the files in a folder and its subfolders take. Other processes may write and rename files there.

    Files that are half-written do not count.
    """
    found = 0
    for here, _, files in os.walk(folder):
        for name in files:
            if is_partial(name):
                continue
            with suppress(OSError):  # renamed or deleted meanwhile
                found += os.stat(os.path.join(here, name)).st_size
    return found


def _partial(path: Path) -> Path:
    """A name beside `path` that no thread or process has, on whatever machine: they may share the folder."""
    return path.with_name(f".{path.name}.{uuid4().hex}.partial")


def _flush_names(folder: Path) -> None:
    """Flush a folder's list of names, without which a renamed file may be lost where the machine stops."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows, which has no such call
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
