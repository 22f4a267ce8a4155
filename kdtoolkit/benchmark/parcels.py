"""Files on their way to different machines: sent once by content, and unpacked once on each machine."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kdtoolkit.benchmark.store import holding, writing
from kdtoolkit.errors import KDError

PIECE_BYTES = 64 * 2**20  # files are sent in pieces of at least this size, so few bytes are in memory at a time
KEPT_DAYS = 30  # of what no cell has used


@dataclass(frozen=True)
class Parcel:
    """Files by the names that they will have. `digest`: 32 hexadecimal digits of all names and contents."""

    digest: str
    files: tuple[tuple[str, Path], ...]

    @classmethod
    def of(cls, files: Mapping[str, Path]) -> Parcel:
        """A parcel of these files, by their names in it, with slashes. Raises KDError if one cannot be read."""
        told = sorted(files.items())
        content = [(name, _digest_of(path)) for name, path in told]
        return cls(hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32], tuple(told))

    def pieces(self, size: int = PIECE_BYTES) -> Iterator[bytes]:
        """ZIP archives of the files, not compressed; each but the last has at least `size` bytes."""
        archive = io.BytesIO()
        held = zipfile.ZipFile(archive, "w")
        for name, path in self.files:
            held.writestr(name, _content_of(path))
            if archive.tell() >= size:
                held.close()
                yield archive.getvalue()
                archive = io.BytesIO()
                held = zipfile.ZipFile(archive, "w")
        held.close()
        yield archive.getvalue()


def unpack(digest: str, pieces: Iterable[bytes], cache: Path) -> Path:
    """The folder in `cache` with a parcel's files. `pieces` are fetched only if it is not there yet.

    Several processes may ask for the same parcel: one unpacks it, and the others wait. Before it is unpacked, what no
    cell has used for 30 days is deleted. Raises StoreError if the folder cannot be written.
    """
    folder = cache / digest
    if folder.is_dir():
        return used(folder)
    lock = cache / f"{digest}.lock"
    with holding(lock, lambda holder: None), writing(folder):
        if not folder.is_dir():
            _forget(cache)
            partial = lock / f".{os.getpid()}.partial"  # what a killed process left is deleted with the lock's taking
            partial.mkdir()
            for piece in pieces:
                with zipfile.ZipFile(io.BytesIO(piece)) as archive:
                    archive.extractall(partial)
            partial.rename(folder)
    return used(folder)


def used(folder: Path) -> Path:
    """The folder, which is made if it is missing, with a note that it is used today. Raises StoreError."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
    return folder


def pictures_folder(cache: Path, digest: str) -> Path:
    """The folder in `cache` for decoded photos of a parcel. Raises StoreError if it cannot be written."""
    return used(cache / "pictures" / digest)


def teacher_cache_folder(cache: Path, key: str) -> Path:
    """The folder in `cache` for what a teacher showed. Raises StoreError if it cannot be written."""
    return used(cache / "teacher_cache" / key)


def cell_folder(cache: Path, name: str) -> Path:
    """The folder in `cache` that a cell works in. Raises StoreError if it cannot be written."""
    return used(cache / "cells" / name)


def _forget(cache: Path) -> None:
    """Delete parcels, decoded photos, teacher caches and unfinished cells that were not used for 30 days."""
    oldest = time.time() - KEPT_DAYS * 86400
    kinds = "?" * 32, "pictures/*", "teacher_cache/*", "cells/*"
    for folder in (folder for kind in kinds for folder in cache.glob(kind)):
        with suppress(OSError):  # a different process may delete it at the same time
            if folder.stat().st_mtime < oldest:
                folder.rename(cache / f"{folder.parent.name}-{folder.name}.old")  # so no process finds a part of it
    for folder in cache.glob("*.old"):
        shutil.rmtree(folder, ignore_errors=True)


def cache_folder() -> Path:
    """This machine's folder for unpacked files: in the folder of temporary files, and only this user may open it.

    Raises KDError if it belongs to a different user.
    """
    user = os.getuid() if hasattr(os, "getuid") else None  # Windows gives each user a folder of their own
    folder = Path(tempfile.gettempdir()) / (f"kdtoolkit-{user}" if user is not None else "kdtoolkit")
    with writing(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        owner = folder.stat().st_uid
    if user is not None and owner != user:
        raise KDError(f"{folder} belongs to a different user: delete it, or set TMPDIR to a folder of your own")
    return folder


def _digest_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise KDError(f"cannot read {path}: {error.strerror}") from error


def _content_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise KDError(f"cannot read {path}: {error.strerror}") from error
