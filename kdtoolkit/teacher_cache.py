"""TeacherCache: what a teacher showed of an image, kept so that the teacher is not asked again (docs/teacher_cache.md).

A key stands for the image's pixels, for where they lie on the teacher's canvas, for the teacher's weights and for the
arithmetic. So a cache is never wrong: a changed image, teacher or size has a different key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from kdtoolkit.contract import Batch, DetectorAdapter
from kdtoolkit.errors import KDError

Precision = Literal["float32", "bfloat16"]
GIGABYTE = 10**9
DIGEST_SIZE = 16  # bytes
_FORM = 1  # raise it when entries of older versions no longer fit


class TeacherCache:
    """What a teacher showed of images, by key: tensors by the name of the part, for one image.

    `Distiller(teacher_cache=...)` fills and reads it. A full cache takes nothing new and throws nothing away. Training
    goes round in a circle, so the images that it holds are found in every epoch. To throw out the oldest would miss
    all of them.

    Several teachers and several Distillers may share one cache.

    Attributes:
        hits: number of images that needed no pass of the teacher.
        misses: number of images that needed one.
        bytes: size of what is held in memory, or lies in the folder.
        notices: what a user should know, in sentences: that the cache is full, that a file is broken.
    """

    def __init__(self, folder: Path | None, gigabytes: float, precision: Precision) -> None:
        if gigabytes <= 0:
            raise KDError(f"gigabytes is {gigabytes}: the size of a teacher cache must be above 0")
        if precision not in get_args(Precision):
            raise KDError(f"precision is {precision!r}: a teacher cache keeps float32 or bfloat16")
        self.folder = folder
        self.precision = precision
        self.limit = int(gigabytes * GIGABYTE)
        self.hits = 0
        self.misses = 0
        self.bytes = 0
        self.notices: list[str] = []
        self._held: dict[str, dict[str, Tensor]] = {}

    @classmethod
    def in_memory(cls, gigabytes: float = 4, precision: Precision = "float32") -> Self:
        """A cache in the memory of this process.

        Args:
            gigabytes: the most that it holds, in 10^9 bytes.
            precision: how floats are kept. "bfloat16" needs half the memory, and rounds to 8 bits.

        Raises KDError if an argument is none of these.
        """
        return cls(None, gigabytes, precision)

    @property
    def dtype(self) -> torch.dtype | None:
        """The type that floats are rounded to before they are kept; None keeps them as they are."""
        return torch.bfloat16 if self.precision == "bfloat16" else None

    def find(self, key: str) -> Mapping[str, Tensor]:
        """What is known by this key; empty if nothing is."""
        return self._held.get(key, {})

    def keep(self, key: str, parts: Mapping[str, Tensor]) -> None:
        """Add parts to what is known by this key, unless the cache is full."""
        copies = {name: part.detach().to("cpu", copy=True) for name, part in parts.items()}
        size = sum(copy.numel() * copy.element_size() for copy in copies.values())
        if self.bytes + size > self.limit:
            self._notice(f"the teacher cache is full ({self.limit / GIGABYTE:g} GB): it takes no further images")
            return
        self.bytes += size
        self._held[key] = {**self._held.get(key, {}), **copies}

    def _notice(self, text: str) -> None:
        if text not in self.notices:
            self.notices.append(text)


def digest(image: Tensor) -> str:
    """The digest of an image's values, type and shape, as hexadecimal digits. Waits for the device of the image."""
    found = blake2b(f"{image.dtype} {tuple(image.shape)}".encode(), digest_size=DIGEST_SIZE)
    found.update(_bytes(image))
    return found.hexdigest()


def teacher_digest(adapter: DetectorAdapter) -> str:
    """The digest of a teacher: its adapter, its facts, and all its weights and buffers."""
    spec = adapter.spec
    facts = type(adapter).__qualname__, spec.name, spec.num_classes, spec.strides, spec.channels, _FORM
    found = blake2b(repr(facts).encode(), digest_size=DIGEST_SIZE)
    for name, x in _tensors(adapter.model):
        found.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        found.update(_bytes(x))
    return found.hexdigest()


def versions(model: nn.Module) -> tuple[int, ...]:
    """Counts of how often each weight and buffer was written to. If a count changes, so may the digest."""
    return tuple(x._version for _, x in _tensors(model))


def view_keys(images: Sequence[str], batch: Batch, teacher: str, precision: Precision) -> list[str]:
    """The key of each image of a teacher's batch.

    Args:
        images: digests of the images.
        batch: what the teacher is shown: the canvas, and the sizes of the images on it.
        teacher: the teacher's digest.
        precision: how the cache keeps floats.
    """
    device, canvas = batch.images.device.type, tuple(batch.images.shape[-2:])
    arithmetic = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "float32"
    shared = f"{teacher} {canvas} {arithmetic} {precision}"
    return [
        blake2b(f"{shared} {sizes} {image}".encode(), digest_size=DIGEST_SIZE).hexdigest()
        for image, *sizes in zip(images, batch.sizes, batch.padded_sizes, strict=True)
    ]


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _bytes(x: Tensor) -> Any:
    """The values of a tensor as a buffer of bytes."""
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
