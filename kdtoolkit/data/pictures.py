"""Image files: whether they are whole and how large, without decoding them; their pixels as 8-bit RGB."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor  # type: ignore[attr-defined]

from kdtoolkit.errors import KDError

MAX_PIXELS = 500_000_000  # which take 1.5 GB as RGB
VERSION = 1  # of what `decode` makes of a file; raise it with any change
DEPTHS = (8, 10, 12, 14, 16)  # bits a pixel of sensors; files hold them in 16 bits
JPEG = ("JPEG", "MPO")  # an MPO file holds several JPEG images
ORIENTATION = 0x0112  # a tag of EXIF, and of TIFF itself
CHECKED = 8, 8  # JPEG is decoded at an eighth of its size, which shows broken data as well
QUARTER_TURNS = (5, 6, 7, 8)
TIFF_WIDTH, TIFF_HEIGHT = 256, 257
TIFF_PIECES = ((273, 279), (324, 325))  # offsets and byte counts of strips, of tiles
TAIL = 1 << 16  # bytes at a file's end; what follows the pixels is mostly shorter
TEXTS = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")  # PNG's chunks that may hold an orientation

# Ultralytics replaces Image.open when it is imported. Its own installs a package where a file is broken.
_open_image = Image.open
_pillows_limit = threading.Lock()


class PictureError(KDError):
    """Why an image file cannot be used, and how to fix it. The caller adds which image it is."""


def seen_size(path: Path) -> tuple[int, int, bool]:
    """(width, height) of an image as one sees it, and whether it is stored turned or mirrored (EXIF's orientation).

    The file is opened and looked at, not decoded. Raises PictureError if it is no image, or is cut short.
    """
    with _opened(path) as opened:
        if not _ends_well(opened, path):
            opened.load()  # says what is wrong, if anything is
        # Of PNG, the method of the class itself decodes the file.
        orientation = Image.Image.getexif(opened).get(ORIENTATION, 1)
        width, height = _stored_size(opened)
    if orientation in QUARTER_TURNS:
        width, height = height, width
    return width, height, orientation != 1


def decode(path: Path, size: tuple[int, int]) -> Tensor:
    """Decode an image upright, as RGB (3, H, W) uint8, scaled down to `size` (height, width), antialiased.

    JPEG is decoded at an eighth, a quarter or half of its size if that is at least twice the wanted size. Animations
    and files with several pages give their first image. Raises PictureError.
    """
    height, width = size
    with _opened(path) as opened:
        if opened.format in JPEG:
            turned = opened.getexif().get(ORIENTATION, 1) in QUARTER_TURNS
            opened.draft(None, (2 * height, 2 * width) if turned else (2 * width, 2 * height))
        has_wide_colours = opened.mode[0] != "I" and any(";16" in str(tile.args) for tile in opened.tile)
        picture = _to_8_bits(ImageOps.exif_transpose(opened))
        if has_wide_colours and np.asarray(picture).max() < 16:
            raise PictureError(
                "its 16-bit colours use the lower 12 bits alone, and would be black in 8 bits; store it with 8 bits "
                "a channel"
            )
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)  # Pillow's is antialiased
    pixels: Tensor = pil_to_tensor(picture.convert("RGB"))
    return pixels


def check_whole(path: Path) -> None:
    """Decode an image as small as can be. Raises PictureError if that fails."""
    decode(path, CHECKED)


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    """Open a file. Whatever goes wrong while it is read becomes a PictureError."""
    if not os.path.isfile(path):  # Ultralytics' Image.open hid this error before 8.4.190
        aim = f": it is a link to {os.readlink(path)}; correct or delete it" if os.path.islink(path) else ""
        raise PictureError(f"there is no file {path}{aim}")
    try:
        with _pillows_limit:
            # Pillow takes large images for attacks. Here the annotation file has told the size before.
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                opened = _open_image(path)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
        with opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise PictureError(
                    f"the file has {width}x{height} pixels, and at most {MAX_PIXELS // 10**6} million are read; cut it "
                    "into tiles, or scale it down, with its boxes"
                )
            yield opened
    except PictureError:
        raise
    except Exception as error:  # on broken files Pillow's decoders raise nearly anything
        reason = str(error) or type(error).__name__
        raise PictureError(f"the file cannot be decoded ({reason}); replace it") from None


def _stored_size(opened: Image.Image) -> tuple[int, int]:
    """(width, height) before the orientation is applied. Of TIFF the tags are read, as Pillow's versions differ."""
    tags = _tiff_tags(opened)
    return (int(tags[TIFF_WIDTH]), int(tags[TIFF_HEIGHT])) if tags else opened.size


def _ends_well(opened: Image.Image, path: Path) -> bool:
    """Whether the file's end shows that it is whole. False may also mean that only decoding can tell."""
    if opened.format == "PNG":
        return _png_ends_well(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - TAIL))
        tail = file.read()
    if opened.format in JPEG:  # an end marker behind the last start of a scan; a thumbnail has an end marker too
        return tail.rfind(b"\xff\xd9") > tail.rfind(b"\xff\xda")
    if opened.format == "TIFF":
        tags = _tiff_tags(opened)
        pieces = [(tags[a], tags[b]) for a, b in TIFF_PIECES if a in tags and b in tags]
        return bool(pieces) and all(max(map(sum, zip(*piece, strict=True))) <= size for piece in pieces)
    return opened.format == "WEBP"  # which Pillow has read to its end


def _png_ends_well(path: Path) -> bool:
    """Whether a PNG has its last chunk, and behind its pixels nothing that may turn it: that is found by decoding."""
    with path.open("rb", buffering=0) as file:
        file.seek(8)
        has_pixels = False
        while len(header := file.read(8)) == 8:
            kind = header[4:]
            if kind == b"IEND":
                return len(file.read(4)) == 4
            if has_pixels and kind in TEXTS:
                return False
            has_pixels |= kind == b"IDAT"
            file.seek(int.from_bytes(header[:4]) + 4, os.SEEK_CUR)  # past the data and their checksum
    return False


def _tiff_tags(opened: Image.Image) -> Mapping[int, Any]:
    return getattr(opened, "tag_v2", {})


def _to_8_bits(picture: Image.Image) -> Image.Image:
    """Grey or RGB with 8 bits, from any mode. Transparency is dropped."""
    if picture.mode[0] == "I":
        return Image.fromarray(_narrowed(np.asarray(picture).astype(np.int64)))
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no stated range: store it with 8 or 16 bits")
    if picture.mode in ("1", "L", "LA"):
        return picture.convert("L")
    if picture.mode == "P":
        picture = picture.convert("RGBA")  # a palette may have transparent colours
    return picture.convert("RGB")


def _narrowed(values: np.ndarray) -> np.ndarray:
    """Integers of up to 16 bits, scaled to 8 by the depth of a sensor with that range; `convert` cuts off at 255."""
    largest = int(values.max())
    if values.min() < 0 or largest >= 1 << DEPTHS[-1]:
        raise ValueError("integers beyond 16 bits have no stated range: store it with 8 or 16 bits")
    depth = next(depth for depth in DEPTHS if largest < 1 << depth)
    return (values >> (depth - 8)).astype(np.uint8)
