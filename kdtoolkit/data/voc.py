"""Pascal VOC's format: `ImageSets/Main/SPLIT.txt` lists names, `Annotations/NAME.xml` has the boxes of an image.

The image file lies in `JPEGImages` and has the same name. `layouts.py` says where else tools put both. VOC counts
pixels from 1 and includes the last one: a box from xmin = 1 to xmax = 40 covers an image 40 pixels wide. Here its left
edge is xmin - 1 and its right edge xmax.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from functools import lru_cache
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from kdtoolkit.data.layouts import Part, parts_of, splits_of
from kdtoolkit.data.records import (
    DECIMALS,
    ENDINGS,
    BadEntryError,
    Box,
    Category,
    Choose,
    Files,
    Form,
    Photo,
    Progress,
    Reading,
    agreed_size,
    check_pixels,
    everything,
    few_of,
    is_finite,
    is_text,
    leads_out,
    naming,
    read_text,
    shown,
    telling_what_is_unreadable,
    whole,
)
from kdtoolkit.errors import KDError
from kdtoolkit.files import walk_visible

DECLARED = re.compile(rb"<\?xml[^>]*?\sencoding\s*=\s*[\"']([A-Za-z0-9._-]+)[\"'][^>]*>")
EXPATS = ("utf-8", "utf-16", "iso-8859-1", "us-ascii")  # encodings that expat reads itself
SIDES = ("xmin", "ymin", "xmax", "ymax")
CROWDS = ("difficult", "ignore")
RULE = "xmin, ymin, xmax and ymax are pixels, counted from 1"


def locate(path: Path) -> Path | None:
    """The data set's folder. `path` is that folder, or the folder `Annotations` in it."""
    for root in (path, path.parent):
        folder = root / "Annotations"
        if folder in (path, path / "Annotations") and any(file.suffix == ".xml" for file in walk_visible(folder)):
            return root
    return path if path.is_dir() and parts_of("VOC", path) else None


@telling_what_is_unreadable()
def splits(root: Path) -> list[str]:
    """The splits that have a list. Raises KDError if there is none."""
    found = splits_of("VOC", root)
    if not found:
        raise _missing(root, "train")
    return found


@telling_what_is_unreadable()
def read(root: Path, split: str, progress: Progress, choose: Choose = everything) -> Reading:
    """Read a split. Raises KDError if lists or folders are missing, or no annotation has an object."""
    parts = parts_of("VOC", root)
    if split not in parts:
        raise _missing(root, split)
    part = parts[split]
    folder, images = _annotations(part, root), part.images[0]
    names = _names(part, root)
    chosen = choose(names)
    names = [name for name in names if name in chosen]
    reading = Reading(part.labels, root, _categories(root, {_annotations(each, root) for each in parts.values()}))
    labels = {category.name: label for label, category in enumerate(reading.categories)}
    pictures = _Pictures(images)
    seen: set[str] = set()
    users: dict[Path, str] = {}
    from_0 = 0
    for done, name in enumerate(names, 1):
        file = folder / f"{name}.xml"
        with reading.noting(reading.source, "image"):
            if not is_text(name) or leads_out(name):
                raise BadEntryError(f"{shown(name)} leads out of the data set, or is no text; correct the name")
            if name in seen:
                raise BadEntryError(f"{name} is listed twice; list it once")
            seen.add(name)
            where = f"{folder.name}/{name}.xml"
            with naming(where):
                annotation = parse(file)
                stated = _stated_size(annotation)
                path = pictures.find(name, _text(annotation, "filename"))
                if (first := users.setdefault(path, where)) != where:
                    raise BadEntryError(
                        f"{first} has the same image, and each would lack the boxes of the other; merge the two files"
                    )
            short = path.relative_to(images).as_posix()
            title = f"image {images.name}/{short}"
            with naming(title):
                size = agreed_size(path, stated, "XML")
            boxes = []
            for entry in annotation.findall("object"):
                with reading.noting(file, "box"), naming(f"{where}, line {entry.get('line')}"):
                    corners = _corners(entry)
                    boxes.append(_box(entry, corners, size, labels, reading))
                    from_0 += min(corners[:2]) < 1
            reading.photos.append(Photo(done, short, title, path, *size, tuple(boxes)))
        progress(done, len(names))
    if from_0:
        reading.remarks.append(
            f"{from_0} boxes begin at pixel 0, and VOC counts from 1: the tool that wrote them may count from 0. Then "
            "the left and upper edges of all boxes are read 1 px too far out"
        )
    return reading


FORM = Form("VOC", locate, splits, read)


def parse(path: Path) -> Element:
    """The root of an XML file; each element has the attribute `line`, and none of its own.

    A document type is refused, since entities are defined there: a small file could grow without end, or read others.
    Raises BadEntryError.
    """
    builder = TreeBuilder()
    parser = expat.ParserCreate()

    def start(tag: str, _: dict[str, str]) -> None:
        builder.start(tag, {"line": str(parser.CurrentLineNumber)})

    def refuse(*_: object) -> None:
        raise BadEntryError("a document type (<!DOCTYPE ...>) is not read; delete it")

    parser.StartElementHandler = start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(_decoded(path.read_bytes()), True)
        root: Element = builder.close()
    except expat.ExpatError as error:
        raise BadEntryError(
            f"line {error.lineno}: not valid XML ({expat.ErrorString(error.code)}); write the file again"
        ) from None
    except FileNotFoundError:
        raise BadEntryError("there is no such file; delete the name from the list, or add the file") from None
    except (OSError, ValueError, LookupError) as error:  # no permission; a name too long; an unknown encoding
        raise BadEntryError(f"the file cannot be read: {error}") from None
    if root.tag != "annotation":
        raise BadEntryError(f"the file holds <{root.tag}>; VOC's format is <annotation> with <object> in it")
    return root


def _decoded(content: bytes) -> bytes | str:
    """The text of an XML file that declares an encoding, unless expat knows it: it has none of several bytes.

    Raises LookupError or ValueError if Python does not know the encoding, or the bytes are none in it.
    """
    declared = DECLARED.match(content)
    if declared is None or (encoding := declared[1].decode()).lower() in EXPATS:
        return content
    return content.decode(encoding)


class _Pictures:
    """The image files of a folder, by their names without endings."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = Files(folder, "an image has the name of its XML file")
        self._by_name: dict[str, list[Path]] = {}
        for path in sorted(walk_visible(folder)):
            if path.suffix.lower() in ENDINGS:
                self._by_name.setdefault(path.relative_to(folder).with_suffix("").as_posix(), []).append(path)

    def find(self, name: str, file_name: str) -> Path:
        """The image of an annotation file of this name, in which `file_name` stands.

        An image of the annotation's name comes first, as in VOC's tools. `file_name` counts if there is none, or to
        choose between several. Raises BadEntryError or PictureError.
        """
        found = self._by_name.get(name, [])
        stated = self._folder / file_name
        if stated in found:
            return stated
        if len(found) > 1:
            names = " and ".join(path.name for path in found)
            raise BadEntryError(f"{self._folder.name} has {names}; keep one of them")
        if found:
            if is_text(file_name) and not leads_out(file_name) and os.path.isfile(stated):
                raise BadEntryError(
                    f"its filename is {file_name}, but {self._folder.name} has {found[0].name} as well; correct the "
                    "filename"
                )
            return found[0]
        if not is_text(file_name):
            raise BadEntryError(f"{self._folder.name} has no image {name}, and the file has no filename; add the image")
        return self._files.find(file_name)


def _list_of(root: Path, split: str) -> Path:
    return root / "ImageSets" / "Main" / f"{split}.txt"


def _annotations(part: Part, root: Path) -> Path:
    """The folder of a part's XML files: all that lie in it, or those that a list names."""
    return part.labels if part.labels.is_dir() else root / "Annotations"


def _names(part: Part, root: Path) -> list[str]:
    """The names of a part's images. Raises KDError."""
    if part.labels.is_dir():
        files = (file for file in walk_visible(part.labels) if file.suffix == ".xml")
        return [file.relative_to(part.labels).with_suffix("").as_posix() for file in files]
    if not (root / "JPEGImages").is_dir():
        raise KDError(f"there is no folder {root / 'JPEGImages'}. {_layout(root)}")
    try:
        lines = read_text(part.labels).splitlines()
    except BadEntryError as error:
        raise KDError(str(error)) from None
    names = [line.strip().replace("\\", "/") for line in lines if line.strip()]
    return [_without_ending(root, name) for name in names]


def _without_ending(root: Path, name: str) -> str:
    """The name that a line means. Some tools list file names, and `x.png` may be the name of `x.png.jpg`."""
    ending = Path(name).suffix
    if ending.lower() not in ENDINGS or os.path.isfile(root / "Annotations" / f"{name}.xml"):
        return name
    return name.removesuffix(ending)


def _missing(root: Path, split: str) -> KDError:
    parts = parts_of("VOC", root)
    others = ", ".join(parts)
    if any(part.is_export for part in parts.values()):
        return KDError(f"{root} has no {split}, only {others}; export that split as well")
    return KDError(
        f"there is no file {_list_of(root, split)}{f' (but of {others})' if others else ''}. {_layout(root)}"
    )


def _layout(root: Path) -> str:
    return (
        f"Expected are lists of names, one a line, in {_list_of(root, 'train')} and val.txt, and images in "
        f"{root / 'JPEGImages'}."
    )


def _categories(root: Path, folders: Collection[Path]) -> list[Category]:
    """The classes: those that `classes.txt` lists, or else the names in all annotation files, sorted.

    Raises KDError if there is none.
    """
    path = root / "classes.txt"
    if path.is_file():
        try:
            names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        except BadEntryError as error:
            raise KDError(str(error)) from None
        if wrong := [name for name in names if not is_text(name) or names.count(name) > 1]:
            raise KDError(f"{path}: {shown(wrong[0])} is there twice, or is no text; list each class once, one a line")
    else:
        files = (file for folder in folders for file in walk_visible(folder) if file.suffix == ".xml")
        names = _names_in(files)
    if not names:
        where = " and ".join(map(str, sorted(folders)))
        raise KDError(f"{where} has no object with a name, and there is no list {path}")
    return [Category(number, name) for number, name in enumerate(names, 1)]


def _names_in(files: Iterable[Path]) -> list[str]:
    """The names of the objects in annotation files, sorted. A file that cannot be read is told when it is listed.

    Raises KDError if none can be read.
    """
    found: set[str] = set()
    wrong, readable = "", False
    for file in files:
        try:
            about = file.stat()
            found |= _class_names(file, (about.st_mtime_ns, about.st_size))
        except (BadEntryError, OSError) as error:
            wrong = wrong or f"{file}: {error}"
        else:
            readable = True
    if wrong and not readable:
        raise KDError(f"no annotation file can be read; the first is {wrong}")
    return sorted(found)


@lru_cache(maxsize=1 << 17)
def _class_names(path: Path, version: tuple[int, int]) -> frozenset[str]:
    """The names of a file's objects. They are kept for the other splits, which ask for them too.

    `version`: time and size of the file. Raises BadEntryError.
    """
    return frozenset(name for entry in parse(path).findall("object") if is_text(name := _text(entry, "name")))


def _stated_size(annotation: Element) -> tuple[int, int] | None:
    """(width, height), as the file has them; None if they are missing or 0, as some tools leave them."""
    texts = [_text(annotation, f"size/{side}") for side in ("width", "height")]
    if all(text in ("", "0") for text in texts):
        return None
    width, height = (whole(_number(text)) for text in texts)
    if width is None or height is None or width < 1 or height < 1:
        raise BadEntryError(f"width and height must be positive integers, not {shown(texts[0])} and {shown(texts[1])}")
    check_pixels(width, height)
    return width, height


def _corners(entry: Element) -> list[float]:
    """xmin, ymin, xmax, ymax of an object. Raises BadEntryError."""
    texts = [_text(entry, f"bndbox/{side}") for side in SIDES]
    numbers = [number for text in texts if (number := _number(text)) is not None]
    if len(numbers) < 4:
        raise BadEntryError(f"bndbox must have four finite numbers {', '.join(SIDES)}, not {shown(texts)}")
    return numbers


def _box(entry: Element, corners: list[float], size: tuple[int, int], labels: dict[str, int], reading: Reading) -> Box:
    """An object. Raises BadEntryError."""
    name, flags = _text(entry, "name"), {key: _text(entry, key) or "0" for key in CROWDS}
    if name not in labels:
        raise BadEntryError(f"the object's name is {shown(name)}, which is none of {few_of(labels)}; correct it")
    for key, flag in flags.items():
        if flag not in ("0", "1"):
            raise BadEntryError(f"{key} must be 0 or 1, not {shown(flag)}")
    x1, y1, x2, y2 = corners
    reading.unread["truncated flags"] += _text(entry, "truncated") == "1"
    reading.unread["parts of objects"] += len(entry.findall("part"))
    x, y, width, height = (round(value, DECIMALS) for value in (x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1))
    xywh = reading.inside((x, y, width, height), size, "bndbox", corners, RULE)
    return Box(labels[name], xywh, xywh[2] * xywh[3], "1" in flags.values())


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if is_finite(number) else None


def _text(element: Element, path: str) -> str:
    """The text of the element at a path, without space around it; empty if there is none."""
    return (element.findtext(path) or "").strip()
