"""Decoded images on disk, for all processes of a run and for later runs.

Each image has its own file. So data sets with common images share the files, and no process has to wait for another.
Files are mapped into memory, so all processes use the same pages.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import PIL
import torch
from torch import Tensor

from kdtoolkit.data.pictures import VERSION
from kdtoolkit.errors import KDError
from kdtoolkit.files import write_beside

SPARE = 2  # new images may take half of what the disk has left


@dataclass(frozen=True)
class CachedPicture:
    """An image (3, H, W) uint8 in a file; `size` is (height, width)."""

    path: Path
    size: tuple[int, int]

    def exists(self) -> bool:
        """Whether the file is there, as a whole."""
        return self.path.exists() and self.path.stat().st_size == self.bytes

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return 3 * math.prod(self.size)

    def read(self) -> Tensor:
        """The pixels, mapped. Raises KDError if the file was deleted meanwhile."""
        try:
            # Not shared: what a process changes in its image stays its own.
            pixels = torch.from_file(str(self.path), shared=False, size=self.bytes, dtype=torch.uint8)
        except RuntimeError:
            raise KDError(f"the decoded image {self.path} was deleted while it was in use; start again") from None
        return pixels.view(3, *self.size)


class PictureCache:
    """Images by the content of the file that they were decoded from, their size, and what decoded them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def picture(self, content: str, size: tuple[int, int]) -> CachedPicture:
        """The place of an image: of a file with this digest, at this size (height, width)."""
        name = f"{content[2:]}-{size[1]}x{size[0]}-{VERSION}-{PIL.__version__}.rgb"
        return CachedPicture(self._folder / content[:2] / name, size)

    def has_room(self, size: int) -> bool:
        """Whether the disk has room for twice this number of bytes: one half stays free for other files."""
        existing = next(each for each in (self._folder, *self._folder.absolute().parents) if each.exists())
        return SPARE * size <= shutil.disk_usage(existing).free

    def write(self, picture: CachedPicture, pixels: Tensor) -> None:
        """Store an image. Raises KDError if the folder cannot be written."""
        try:
            picture.path.parent.mkdir(parents=True, exist_ok=True)
            write_beside(picture.path, pixels.contiguous().numpy().tobytes())
        except OSError as error:
            raise KDError(
                f"cannot write decoded images to {self._folder} ({error.strerror}); free some space, or choose a "
                "different folder for results"
            ) from None
