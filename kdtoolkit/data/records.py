"""What the readers of all formats produce, and the checks that they share.

A reader (`coco.py`, `yolo.py`, `voc.py`) turns the files of one split into a `Reading`: classes, photos with their
boxes, and the faults that it met. `photos.py` makes a data set of it, `tools/` checks, converts and shows it.
"""

from __future__ import annotations

import logging
import os
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path, PureWindowsPath
from typing import Literal, Protocol

from kdtoolkit.data.pictures import MAX_PIXELS, PictureError, seen_size
from kdtoolkit.errors import KDError

SPLITS = ("train", "val", "test")
OPENED = ("train", "val")  # what training opens
ALL = "all"  # the one part of a data set whose images belong to no split
# What Pillow reads of the endings that Ultralytics' reader looks for in folders, in lower case.
ENDINGS = (".avif", ".bmp", ".jp2", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp")
MAX_OVERHANG = 1.0  # pixels that a box may reach beyond its image; annotation tools round that much. It is cut there.
# Of the image's side. Less is rounding noise: once scaled, mirrored or shifted in float32, both sides may be equal.
MIN_SIDE = 2.0**-20
DECIMALS = 6  # of a pixel: the noise of dividing by an image's size, or adding 1, and back is rounded away
NOTICEABLE = 0.01  # pixels; what is cut below that is rounding, and not worth a remark
SHOWN_FAULTS = 5
SHOWN_VALUES = 12  # of those that are right
SHOWN_CHARACTERS = 80  # of a value that is wrong

Progress = Callable[[int, int], None]
"""Called with the number of images that were looked at, and of all."""

Choose = Callable[[Sequence[str]], Collection[str]]
"""Called with the names of all images of a part; returns those that are to be read."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Category:
    """A class of objects: its name, and the id that files give it."""

    id: int
    name: str


@dataclass(frozen=True, slots=True)
class Box:
    """An object. `xywh`: left, top, width and height in pixels of the image as one sees it; all of it is in the image.

    `label`: index of its class. `area`: in square pixels, as COCO's scores by size use it. `crowd`: COCO's `iscrowd`,
    VOC's `difficult`, or `ignore` in either. Such an object is no target in training, and in scoring a detection of it
    is no mistake.
    """

    label: int
    xywh: tuple[float, float, float, float]
    area: float
    crowd: bool = False


@dataclass(frozen=True, slots=True)
class Photo:
    """An image file with its objects.

    `id`: COCO's, or a number from 1. `name`: the path that the format gives the file. `title`: what messages call it.
    `width`, `height`: pixels of the image as one sees it, with the orientation of EXIF applied.
    """

    id: int
    name: str
    title: str
    path: Path
    width: int
    height: int
    boxes: tuple[Box, ...]

    def __str__(self) -> str:
        return self.title


@dataclass(frozen=True)
class Fault:
    """Something in a data set that cannot be used. `loses`: what is left out if the user chooses to skip it.

    `text` names the image or annotation, says what is wrong, and how to fix it. `file` is where it stands.
    """

    file: Path
    text: str
    loses: Literal["image", "box"]


@dataclass
class Reading:
    """What a reader found in one split.

    `source`: the file that stands for the split in messages. `root`: the folder of the data set. `remarks`: sentences
    about what is odd, but can be read. `cut`: number of boxes that reached beyond the image's edge and were cut there.
    `unread`: numbers of entries in the files that detection does not use. `has_ids`: whether the files themselves give
    images and classes their ids. `held_out`: how the split was made, if the files have none.
    """

    source: Path
    root: Path
    categories: list[Category]
    photos: list[Photo] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    cut: int = 0
    unread: Counter[str] = field(default_factory=Counter)
    has_ids: bool = False
    held_out: str = ""

    def __post_init__(self) -> None:
        alike: dict[str, list[str]] = {}
        for category in self.categories:
            alike.setdefault(" ".join(category.name.casefold().split()), []).append(category.name)
        for names in alike.values():
            if len(names) > 1:
                self.remarks.append(
                    f"the classes {', '.join(map(repr, names))} differ by case or spaces alone, and are learnt as "
                    "different ones: if they are one, give all its objects the same name"
                )

    @contextmanager
    def noting(self, file: Path, loses: Literal["image", "box"]) -> Iterator[None]:
        """Keep a BadEntryError or PictureError as a fault of `file`."""
        try:
            yield
        except (BadEntryError, PictureError) as error:
            self.faults.append(Fault(file, str(error), loses))

    def inside(
        self,
        xywh: tuple[float, float, float, float],
        size: tuple[int, int],
        what: str,
        numbers: Sequence[float],
        rule: str,
    ) -> tuple[float, float, float, float]:
        """The part of a box that lies in its image of `size` (width, height).

        `what` and `numbers`: the box as the format writes it; `rule`: how the format writes boxes. Raises BadEntryError
        if the box has no area, lies outside, or reaches more than MAX_OVERHANG beyond the image.
        """
        (x, y, width, height), (image_width, image_height) = xywh, size
        thinnest = MIN_SIDE * image_width, MIN_SIDE * image_height
        overhang = max(-x, -y, x + width - image_width, y + height - image_height)
        if overhang <= 0 and width > thinnest[0] and height > thinnest[1]:
            return xywh
        box = f"{what} [{', '.join(f'{number:.10g}' for number in numbers)}]"
        if width <= thinnest[0] or height <= thinnest[1]:
            raise BadEntryError(f"{box} has no area; give it a positive width and height, or delete it")
        x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + width, image_width), min(y + height, image_height)
        problem = ""
        if x2 - x1 <= thinnest[0] or y2 - y1 <= thinnest[1]:
            problem = "lies outside"
        elif overhang > MAX_OVERHANG:
            problem = f"reaches {overhang:g} px beyond"
        if problem:
            raise BadEntryError(
                f"{box} {problem} the image of {image_width}x{image_height}; {rule}. Correct it, or delete it"
            )
        self.cut += overhang > NOTICEABLE
        return x1, y1, x2 - x1, y2 - y1


def everything(names: Sequence[str]) -> Collection[str]:
    """Choose all images."""
    return names


class Read(Protocol):
    """Reads one split of a place: the images that `choose` takes."""

    def __call__(self, place: Path, split: str, progress: Progress, choose: Choose = everything, /) -> Reading:
        """Raise KDError if there is no such split, or if the data cannot be read at all."""


@dataclass(frozen=True)
class Form:
    """A format of data sets.

    `locate` returns the place to read from if the path holds data of this format, else None. `splits` names the splits
    of a place, or ALL; it raises KDError if there is none, or if the data cannot be read at all. `read` reads one.
    """

    name: str
    locate: Callable[[Path], Path | None]
    splits: Callable[[Path], list[str]]
    read: Read


class BadEntryError(Exception):
    """Why an image or annotation cannot be used, and how to fix it."""


class Files:
    """The files of one folder, by the names that annotations give them.

    `rule` says where the names come from, and ends a sentence about a file that is missing.
    """

    def __init__(self, folder: Path, rule: str) -> None:
        self._folder = folder
        self._rule = rule
        self._listings: dict[Path, dict[str, str]] = {}

    def find(self, name: str) -> Path:
        """The file of this name; separators may be Windows', and accents composed in a different way.

        Raises PictureError if the name leads out of the folder, or if there is no such file. The error also names a
        file whose name differs only in case.
        """
        if leads_out(name):
            raise PictureError(f"{shown(name)} leads out of {self._folder}; {self._rule}. Name a file inside of it")
        slashes = name.replace("\\", "/")
        for form in dict.fromkeys((name, *forms_of(slashes))):
            if os.path.isfile(path := self._folder / form):
                return path
        path = self._folder / name
        found = self._listing(path.parent).get(folded(path.name))
        hint = f" (but {found}: upper and lower case count)" if found else ""
        raise PictureError(f"there is no file {path}{hint}; {self._rule}")

    def _listing(self, folder: Path) -> dict[str, str]:
        """The names in a folder, by what is left of them without case."""
        if folder not in self._listings:
            names = os.listdir(folder) if os.path.isdir(folder) else []
            self._listings[folder] = {folded(name): name for name in names}
        return self._listings[folder]


def forms_of(name: str) -> Iterator[str]:
    """A file's name as it is, and with its accents composed and decomposed; macOS writes the latter."""
    yield name
    if not name.isascii():
        yield from (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))


def folded(name: str) -> str:
    """What is left of a file's name without case and without the way in which its accents are composed."""
    return unicodedata.normalize("NFC", name).casefold()


def is_spare(split: str, splits: Collection[str]) -> bool:
    """Whether training does not open a split of a data set, so that it may be bad: it opens train and val."""
    return split not in OPENED and any(each in splits for each in OPENED)


def leads_out(name: str) -> bool:
    """Whether a file name is absolute, on any system, or climbs with `..`."""
    path = PureWindowsPath(name)
    return bool(path.anchor) or ".." in path.parts


def agreed_size(path: Path, stated: tuple[int, int] | None, where: str) -> tuple[int, int]:
    """(width, height) of an image file, which is opened, not decoded.

    `stated`: the size in the annotations, if they give one; `where` names the place. Raises PictureError if the two
    differ, or if the file is broken.
    """
    width, height, is_turned = seen_size(path)
    if stated is not None and stated != (width, height):
        how = " with its EXIF orientation applied" if is_turned else ""
        raise PictureError(
            f"the file is {width}x{height}{how}, the {where} says {stated[0]}x{stated[1]}; "
            "correct width and height there, and make sure that the boxes fit"
        )
    return width, height


def check_pixels(width: int, height: int) -> None:
    """Raises BadEntryError if an image has more than MAX_PIXELS pixels."""
    if width * height > MAX_PIXELS:
        raise BadEntryError(
            f"{width}x{height} are more than the {MAX_PIXELS // 10**6} million pixels that are read; cut it into "
            "tiles, or scale it down, with its boxes"
        )


@contextmanager
def naming(title: str) -> Iterator[None]:
    """Put the name of the image or annotation before the message of a BadEntryError or PictureError."""
    try:
        yield
    except (BadEntryError, PictureError) as error:
        raise type(error)(f"{title}: {error}") from None


@contextmanager
def telling_what_is_unreadable() -> Iterator[None]:
    """Make a KDError of an OSError, such as that of a folder that may not be read."""
    try:
        yield
    except OSError as error:
        raise KDError(f"{error.filename or 'the data set'} cannot be read: {error.strerror or error}") from None


def settle(faults: Sequence[Fault], source: Path, on_bad: Literal["error", "skip"]) -> None:
    """Raise KDError that lists the first faults and their number, or log the same as a warning."""
    if not faults:
        return
    listed = "".join(f"\n  {fault.text}" for fault in faults[:SHOWN_FAULTS])
    if len(faults) > SHOWN_FAULTS:
        listed += f"\n  and {len(faults) - SHOWN_FAULTS} more; `kd data check` lists all"
    number = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    if on_bad == "error":
        raise KDError(
            f'{source}: {number}:{listed}\nCorrect them. Or skip them: --skip-bad of kd, or on_bad="skip" in Python.'
        )
    log.warning("%s: left out, as they are bad: %s%s", source, number, listed)


@cache
def tell(source: Path, remarks: tuple[str, ...]) -> None:
    """Log what is odd in a split as a warning, once in a process."""
    for remark in remarks:
        log.warning("%s: %s", source, remark)


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte-order mark. Raises BadEntryError."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadEntryError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise BadEntryError(f"{path} cannot be read ({error.strerror})") from None


def whole(value: object) -> int | None:
    """A whole number, also if it is written as 3.0; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None


def is_text(value: object) -> bool:
    """Whether it is text of at least one character that can be written to files and shown on a terminal.

    JSON may hold halves of characters, and names may hold control characters, which a terminal takes for commands.
    """
    return (
        isinstance(value, str)
        and bool(value)
        and all(unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp") for character in value)
    )


def is_finite(value: object) -> bool:
    """Whether it is a number, and neither NaN nor infinite nor so large that sums would overflow."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def shown(value: object) -> str:
    """A wrong value as Python writes it, cut where it is long or deep."""
    text = repr(value) if isinstance(value, str | int | float) else _short.repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def few_of(values: Collection[object]) -> str:
    """The first of some values, for a message: a file may have a fault in each of its lines."""
    return ", ".join(map(str, islice(values, SHOWN_VALUES))) + (", ..." if len(values) > SHOWN_VALUES else "")


_short = reprlib.Repr()
_short.maxlist = _short.maxdict = 6
_short.maxstring = _short.maxother = _short.maxlong = SHOWN_CHARACTERS
