"""TeacherCache: keeps what a teacher computed for images, in memory or on disk (docs/teacher_cache.md)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kdtoolkit.errors import KDError
from kdtoolkit.files import bytes_in, write_beside

Precision = Literal["float32", "bfloat16"]
GIGABYTE = 10**9
_DIGEST_BYTES = 16
_HELD_BYTES = GIGABYTE  # of what lies on disk, the most that a process also holds in memory
_DIGEST = "digest of the file"  # the part of a file that is the digest of all others


class TeacherCache(ABC):
    """What a teacher computed for images, by key: for each image its parts, tensors by name.

    `Distiller(teacher_cache=...)` fills and reads it. A full cache takes what still fits and throws nothing away. Each
    epoch shows the same images, so those that it holds are found in every epoch. If it threw out the oldest, the next
    epoch would find none of them.

    Several teachers and several Distillers may share one cache. `in_memory` and `on_disk` make one.

    Attributes:
        hits: number of images that needed no pass of the teacher.
        misses: number of images that needed one.
        bytes: size of what is kept, in memory or in the folder.
        notices: what a user should know, in sentences: that the cache is full, that its disk is, or that files broke.
    """

    def __init__(self, gigabytes: float, precision: Precision) -> None:
        if gigabytes <= 0:
            raise KDError(f"gigabytes is {gigabytes}: the size of a teacher cache must be above 0")
        if precision not in get_args(Precision):
            raise KDError(f"precision is {precision!r}: a teacher cache keeps float32 or bfloat16")
        self.precision = precision
        self._limit = int(gigabytes * GIGABYTE)
        self.hits = 0
        self.misses = 0
        self.bytes = 0
        self.notices: list[str] = []

    def __deepcopy__(self, memo: object) -> Self:
        """The cache itself: the copy of a Distiller shares it."""
        return self

    @staticmethod
    def in_memory(gigabytes: float = 4, precision: Precision = "float32") -> TeacherCache:
        """A cache in the memory of this process.

        Args:
            gigabytes: the most that it holds, in 10^9 bytes.
            precision: how floats are kept. "bfloat16" needs half the memory, and rounds to 8 bits.

        Raises KDError if `gigabytes` is not above 0, or if `precision` is unknown.
        """
        return _InMemory(gigabytes, precision)

    @staticmethod
    def on_disk(folder: str | Path, gigabytes: float = 20, precision: Precision = "float32") -> TeacherCache:
        """A cache in a folder, which several processes may share, at one time or one after the other.

        A process also holds in memory what it has read, up to 10^9 bytes.

        Args:
            folder: where the files lie; made if it is not there.
            gigabytes: the most that the folder holds, in 10^9 bytes. If several processes write at one time, it may
                hold a little more.
            precision: how floats are kept. "bfloat16" needs half the space, and rounds to 8 bits.

        Raises KDError if `gigabytes` is not above 0, if `precision` is unknown, or if the folder cannot be written.
        """
        return _OnDisk(Path(folder), gigabytes, precision)

    @property
    def dtype(self) -> torch.dtype | None:
        """The type that floats are rounded to before they are kept; None keeps them as they are."""
        return torch.bfloat16 if self.precision == "bfloat16" else None

    @abstractmethod
    def find(self, key: str) -> Mapping[str, Tensor]:
        """What is known by this key; empty if nothing is."""

    @abstractmethod
    def keep(self, key: str, parts: Mapping[str, Tensor]) -> None:
        """Add parts to what is known by this key, unless the cache is full."""

    def _has_room(self, size: int) -> bool:
        if self.bytes + size <= self._limit:
            return True
        most = f"{self._limit / GIGABYTE:g} GB"
        self._notice(
            f"the teacher cache is full ({most}): it takes what still fits, and the teacher runs on all further images "
            "in each epoch"
        )
        return False

    def _notice(self, text: str) -> None:
        if text not in self.notices:
            self.notices.append(text)


class _InMemory(TeacherCache):
    def __init__(self, gigabytes: float, precision: Precision) -> None:
        super().__init__(gigabytes, precision)
        self._held: dict[str, dict[str, Tensor]] = {}

    def find(self, key: str) -> Mapping[str, Tensor]:
        return self._held.get(key, {})

    def keep(self, key: str, parts: Mapping[str, Tensor]) -> None:
        known = self._held.get(key, {})
        new = {name: part for name, part in parts.items() if name not in known}
        if self._has_room(size := _size(new)):
            self.bytes += size
            self._held[key] = known | {name: part.detach().to("cpu", copy=True) for name, part in new.items()}


class _OnDisk(TeacherCache):
    """One file a key, in folders by the key's first two digits. A broken file counts as missing: it is written anew.

    Each file has a digest of its own tensors. A process checks it when it reads the file for the first time.
    """

    def __init__(self, folder: Path, gigabytes: float, precision: Precision) -> None:
        super().__init__(gigabytes, precision)
        self.folder = folder
        self._held: dict[str, dict[str, Tensor]] = {}
        self._held_bytes = 0
        self._checked: set[str] = set()  # keys of files whose digest was right
        self._since = 0  # bytes written since the folder was measured: other processes may write too
        self._writes = True
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KDError(
                f"the teacher cache cannot use {folder} as its folder: {error.strerror or error}. Name a folder that "
                "can be made or written"
            ) from error
        self._measure()

    def find(self, key: str) -> Mapping[str, Tensor]:
        if key not in self._held:
            found = self._read(key)
            if not found or self._held_bytes + _size(found) > _HELD_BYTES:
                return found
            self._held_bytes += _size(found)
            self._held[key] = found
        return self._held[key]

    def keep(self, key: str, parts: Mapping[str, Tensor]) -> None:
        # What is held lacks these parts, and the file may have them from another process: read it when it is asked for.
        self._held_bytes -= _size(self._held.pop(key, {}))
        if not self._writes:
            return
        known = self._read(key)
        new = {name: part for name, part in parts.items() if name not in known}
        if self._since > self._limit // 20:
            self._measure()
        if not new or not self._has_room(size := _size(new)):
            return
        try:
            path = self._path(key)
            path.parent.mkdir(exist_ok=True)
            contiguous = torch.contiguous_format
            # Copies, because `save` refuses parts that share memory, such as a map that is also a head's first state.
            copies = {name: part.detach().to("cpu", copy=True, memory_format=contiguous) for name, part in new.items()}
            whole = known | copies
            write_beside(path, save(whole | {_DIGEST: _digest_of_parts(whole)}))
        except OSError as error:
            self._writes = False
            self._notice(f"the teacher cache in {self.folder} takes no further images: {error.strerror or error}")
            return
        self.bytes += size
        self._since += size

    def _read(self, key: str) -> dict[str, Tensor]:
        try:
            found = load(self._path(key).read_bytes())
        except OSError:
            return {}
        except SafetensorError:
            found = {}
        own = found.pop(_DIGEST, None)
        if key not in self._checked:
            if own is None or not torch.equal(own, _digest_of_parts(found)):
                self._notice(
                    f"the teacher cache in {self.folder} had broken files: the teacher sees their images again"
                )
                return {}
            self._checked.add(key)
        return found

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _measure(self) -> None:
        """Add up the sizes of all files in the folder, without those that a killed process left half-written."""
        self.bytes = bytes_in(self.folder)
        self._since = 0


def _size(parts: Mapping[str, Tensor]) -> int:
    return sum(part.numel() * part.element_size() for part in parts.values())


def digest(image: Tensor) -> str:
    """The digest of an image's values, type and shape, as hexadecimal digits. Waits for the device of the image."""
    found = blake2b(f"{image.dtype} {tuple(image.shape)}".encode(), digest_size=_DIGEST_BYTES)
    found.update(_bytes(image))
    return found.hexdigest()


def digest_of(text: str, tensors: Iterable[tuple[str, Tensor]] = ()) -> bytes:
    """The digest of a text, and of the names, types, shapes and values of tensors."""
    found = blake2b(text.encode(), digest_size=_DIGEST_BYTES)
    for name, x in tensors:
        found.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        found.update(_bytes(x))
    return found.digest()


def _bytes(x: Tensor) -> Any:
    """The values of a tensor as a buffer of bytes."""
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _digest_of_parts(parts: Mapping[str, Tensor]) -> Tensor:
    """The digest of all parts, as a tensor of bytes."""
    return torch.frombuffer(bytearray(digest_of("", sorted(parts.items()))), dtype=torch.uint8)
