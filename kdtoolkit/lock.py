"""Folders that only one process may hold at a time. A second process gets an error that names the first."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from kdtoolkit.errors import KDError
from kdtoolkit.files import LOCK, remove_partial, write_atomic

_HOLDER = ".lock.json"


@contextmanager
def hold(folder: Path, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold a folder for this process until the block or the process ends, and make the folder if it is missing.

    If another process holds the folder, `waiting` is called once with that process in words, and then the block waits.
    Without `waiting` it raises KDError that names the process. Raises OSError if it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if waiting is None:
            raise KDError(
                f"{_holder(folder)} works in {folder}: wait until it ends, stop it, or choose another folder"
            ) from None
        waiting(_holder(folder))
        lock.acquire(poll_interval=0.2)
    except NotImplementedError as error:
        raise OSError(errno.ENOLCK, "its file system has no locks", str(folder)) from error
    try:
        remove_partial(folder)
        write_atomic(folder / _HOLDER, json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode())
        yield
    finally:
        with suppress(OSError):
            (folder / _HOLDER).unlink(missing_ok=True)
        lock.release()


def _holder(folder: Path) -> str:
    """Who holds a folder, in words. The lock file itself cannot tell: taking a lock empties it."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        holder = json.loads((folder / _HOLDER).read_text("utf-8"))
        return f"process {int(holder['process'])} on {holder['host']}"
    return "another process"
