"""TeacherCache: what a teacher showed of an image, kept so that the teacher is not asked again (docs/teacher_cache.md).

A key stands for the image's pixels, for where they lie on the teacher's canvas, for the teacher and for the arithmetic.
So a changed image, teacher or size has a different key. `versions` says which changes of a teacher in use are noticed.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from kdtoolkit.contract import Batch, DetectorAdapter
from kdtoolkit.errors import KDError
from kdtoolkit.files import bytes_in, write_beside

Precision = Literal["float32", "bfloat16"]
GIGABYTE = 10**9
DIGEST_SIZE = 16  # bytes
HELD = GIGABYTE  # of what lies on disk, the most that a process also holds in memory
_DIGEST = "digest of the file"  # the part of a file that is the digest of all others
_FORM = 2  # raise it when entries of older versions no longer fit


class TeacherCache(ABC):
    """What a teacher showed of images, by key: tensors by the name of the part, for one image.

    `Distiller(teacher_cache=...)` fills and reads it. A full cache takes nothing new and throws nothing away. Training
    goes round in a circle, so the images that it holds are found in every epoch. To throw out the oldest would miss
    all of them.

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
        self.limit = int(gigabytes * GIGABYTE)
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
        if self.bytes + size <= self.limit:
            return True
        self._notice(f"the teacher cache is full ({self.limit / GIGABYTE:g} GB): it takes no further images")
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
            if not found or self._held_bytes + _size(found) > HELD:
                return found
            self._held_bytes += _size(found)
            self._held[key] = found
        return self._held[key]

    def keep(self, key: str, parts: Mapping[str, Tensor]) -> None:
        if not self._writes:
            return
        known = self._read(key)
        new = {name: part for name, part in parts.items() if name not in known}
        if self._since > self.limit // 20:
            self._measure()
        if not new or not self._has_room(size := _size(new)):
            return
        try:
            path = self._path(key)
            path.parent.mkdir(exist_ok=True)
            whole = known | {name: part.detach().cpu().contiguous() for name, part in new.items()}
            write_beside(path, save(whole | {_DIGEST: _digest_of(whole)}))
        except OSError as error:
            self._writes = False
            self._notice(f"the teacher cache in {self.folder} takes no further images: {error.strerror or error}")
            return
        self._held_bytes -= _size(self._held.pop(key, {}))  # read anew when it is asked for
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
            if own is None or not torch.equal(own, _digest_of(found)):
                self._notice(f"the teacher cache in {self.folder} had broken files: their images are shown again")
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


def _digest_of(parts: Mapping[str, Tensor]) -> Tensor:
    """The digest of names, types, shapes and values, as a tensor of bytes."""
    found = blake2b(digest_size=DIGEST_SIZE)
    for name in sorted(parts):
        _add(found, name, parts[name])
    return torch.frombuffer(bytearray(found.digest()), dtype=torch.uint8)


def digest(image: Tensor) -> str:
    """The digest of an image's values, type and shape, as hexadecimal digits. Waits for the device of the image."""
    found = blake2b(f"{image.dtype} {tuple(image.shape)}".encode(), digest_size=DIGEST_SIZE)
    found.update(_bytes(image))
    return found.hexdigest()


def teacher_digest(adapter: DetectorAdapter) -> str:
    """The digest of a teacher: its adapter and facts, its layers and their settings, its weights and buffers.

    How it normalises images is part of it as well: what `prepare` makes of a fixed image.
    """
    spec = adapter.spec
    layers = re.sub(r" at 0x[0-9a-f]+", "", repr(adapter.model))  # addresses differ in each process
    facts = type(adapter).__qualname__, spec.name, spec.num_classes, spec.strides, spec.channels, layers, _FORM
    found = blake2b(repr(facts).encode(), digest_size=DIGEST_SIZE)
    _add(found, "prepared", _prepared(adapter))
    for name, x in _tensors(adapter.model):
        _add(found, name, x)
    return found.hexdigest()


def _prepared(adapter: DetectorAdapter) -> Tensor:
    """What the adapter makes of an image with values from 0 to 1."""
    device = next(adapter.model.parameters()).device
    image = torch.linspace(0, 1, 3 * 64 * 64, device=device).view(3, 64, 64)
    size = ((64, 64),)
    return adapter.prepare([image], like=Batch(image[None], size, size, size)).images


def versions(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Of each weight and buffer, how often it was written to, and where it lies. If they change, so may the digest.

    A write through `.data` or a numpy view changes neither. Nor does a different setting of a layer, such as `eps`.
    Make a new Distiller after such a change.
    """
    return tuple((x._version, x.data_ptr()) for _, x in _tensors(model))


def view_keys(images: Sequence[str], batch: Batch, teacher: str, precision: Precision) -> list[str]:
    """The key of each image of a teacher's batch.

    Args:
        images: digests of the images.
        batch: what the teacher is shown: the canvas, and the sizes of the images on it.
        teacher: the teacher's digest.
        precision: how the cache keeps floats.
    """
    device, canvas = batch.images.device.type, tuple(batch.images.shape[-2:])
    shared = f"{teacher} {canvas} {_arithmetic(device)} {precision}"
    return [
        blake2b(f"{shared} {sizes} {image}".encode(), digest_size=DIGEST_SIZE).hexdigest()
        for image, *sizes in zip(images, batch.sizes, batch.padded_sizes, strict=True)
    ]


def _arithmetic(device: str) -> str:
    """What products are computed in, as far as it changes more than rounding of float32."""
    dtype = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "float32"
    if device != "cuda":
        return dtype
    # TF32 has 10 bits of mantissa. Matrix products and convolutions have a switch each.
    return f"{dtype} {torch.backends.cuda.matmul.allow_tf32} {torch.backends.cudnn.allow_tf32}"


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _add(found: Any, name: str, x: Tensor) -> None:
    """Add a tensor to a digest."""
    found.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
    found.update(_bytes(x))


def _bytes(x: Tensor) -> Any:
    """The values of a tensor as a buffer of bytes."""
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
