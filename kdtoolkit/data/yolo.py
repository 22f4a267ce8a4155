"""Ultralytics' YOLO format: `data.yaml` names classes and image folders; each image has a text file of boxes.

The label file of `images/train/a.jpg` is `labels/train/a.txt`. Each of its lines is an object: `class cx cy w h`, or
`class x1 y1 x2 y2 x3 y3 ...` for a polygon, divided by the image's width and height.

CVAT and Label Studio export the same labels with files of their own in place of `data.yaml`: `obj.data`, which names
lists of images and of classes, or `classes.txt` beside the folders `images` and `labels`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import yaml

from kdtoolkit.data.layouts import split_of
from kdtoolkit.data.records import (
    ALL,
    DECIMALS,
    ENDINGS,
    SPLITS,
    BadEntryError,
    Box,
    Category,
    Choose,
    Fault,
    Form,
    Photo,
    Progress,
    Reading,
    agreed_size,
    everything,
    folded,
    forms_of,
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

LINE = "class, centre x, centre y, width, height, each but the class divided by the image's width or height"
CVAT_LISTS = ("train.txt", "data/train.txt")  # of all images, if there is no other; CVAT calls each such part train
RULE = f"these are pixels: x, y, width, height; a line is {LINE}"


def locate(path: Path) -> Path | None:
    """The YAML file, or what stands for it. `path` is that file or its folder.

    Raises KDError if the folder has several YAML files that describe data.
    """
    if path.is_file():
        return path if path.suffix.lower() in (".yaml", ".yml") or path.name in _DOCUMENTS else None
    for usual in (path / "data.yaml", path / "obj.data"):
        if usual.is_file():
            return usual
    found = [each for each in sorted(path.glob("*.y*ml")) if _describes_data(each)]
    if len(found) > 1:
        names = ", ".join(each.name for each in found)
        raise KDError(f"{path} has several YAML files that describe data ({names}); name one of them")
    if found:
        return found[0]
    is_plain = all((path / each).exists() for each in ("classes.txt", "images", "labels"))
    return path / "classes.txt" if is_plain else None


@telling_what_is_unreadable()
def splits(place: Path) -> list[str]:
    """The splits that the file lists."""
    return list(_Layout.of(place).entries)


@telling_what_is_unreadable()
def read(place: Path, split: str, progress: Progress, choose: Choose = everything) -> Reading:
    """Read a split. Raises KDError if the YAML cannot be used, or names folders that are not there."""
    layout = _Layout.of(place)
    reading = Reading(place, layout.root, layout.categories)
    every, unread = _images(layout, split, reading)
    chosen = choose([name for _, name in every])
    listed = [(path, name) for path, name in every if name in chosen]
    users: dict[Path, list[Path]] = {}
    unlabelled: list[Path] = []
    for done, (path, name) in enumerate(listed, 1):
        title = f"image {_short(path, layout.root)}"
        with reading.noting(path, "image"), naming(title):
            labels = find_label(path, layout.root)
            (unlabelled if labels is None else users.setdefault(labels, [])).append(path)
            size = agreed_size(path, None, "")
            boxes = () if labels is None else _boxes(labels, size, layout, reading)
            reading.photos.append(Photo(done, name, title, path, *size, boxes))
        progress(done, len(listed))
    if unlabelled:
        reading.remarks.append(
            f"{len(unlabelled)} of {len(listed)} images have no label file (the first is {unlabelled[0].name}): they "
            f"count as images without objects. Looked for was {label_file(unlabelled[0])}"
        )
    for path, name in every:
        if name not in chosen and (labels := find_label(path, layout.root)) is not None:
            users.setdefault(labels, []).append(path)
    folders = {label_file(path).parent for path in unlabelled} | {label.parent for label in users}
    _remark_labels(users, folders, unread, layout, reading)
    return reading


FORM = Form("YOLO", locate, splits, read)


def label_file(image: Path) -> Path:
    """Where the labels of an image are: the last folder `images` of its path becomes `labels`, if there is one."""
    *folders, _ = parts = list(image.parts)
    if "images" in folders:
        parts[len(folders) - 1 - folders[::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")


def document_of(place: Path) -> dict[Any, Any]:
    """The mapping that `data.yaml` holds, or would hold. Raises KDError."""
    return _DOCUMENTS.get(place.name, _parse)(place)


def _of_darknet(place: Path) -> dict[Any, Any]:
    """What `obj.data` says: lines such as `train = data/train.txt`."""
    pairs = (line.partition("=") for line in _text(place).splitlines())
    values = {key.strip(): value.strip() for key, _, value in pairs if value.strip()}
    if "names" not in values:
        raise KDError(f"{place} has no names; add the line `names = obj.names`, with the file of the classes")
    names = place.parent / _without_data(place.parent, values["names"])
    listed = {split: value for key, value in values.items() if (split := split_of(key)) is not None}
    return {"names": _lines(names), **listed}


def _of_classes(place: Path) -> dict[Any, Any]:
    """What `classes.txt` says: a class a line. The splits are the folders in `images` that have their names."""
    folders = [each for each in sorted((place.parent / "images").iterdir()) if each.is_dir()]
    listed = {split: f"images/{each.name}" for each in folders if (split := split_of(each.name)) is not None}
    return {"names": _lines(place), **(listed or {ALL: "images"})}


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in _text(path).splitlines() if line.strip()]


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except BadEntryError as error:
        raise KDError(str(error)) from None


_DOCUMENTS = {"obj.data": _of_darknet, "classes.txt": _of_classes}


def _without_data(root: Path, name: str) -> str:
    """A path without the folder `data` that CVAT writes before it, if there is no such folder."""
    inside = name.removeprefix("data/")
    return inside if not os.path.exists(root / name) and os.path.exists(root / inside) else name


def find_label(image: Path, root: Path) -> Path | None:
    """The label file of an image of the data in `root`, or None.

    It is `label_file`, or lies beside the image. Accents may be composed in a different way in its name, and its ending
    be in upper case.
    """
    places = label_file(image), image.with_suffix(".txt")
    for place in places:
        if os.path.isfile(place):
            return place
    for place in places:
        base = root if place.is_relative_to(root) else place.parent
        for name in forms_of(place.relative_to(base).as_posix()):
            for ending in (".txt", ".TXT"):
                if os.path.isfile(path := (base / name).with_suffix(ending)):
                    return path
    return None


@dataclass(frozen=True)
class _Layout:
    """What `data.yaml` says.

    `root`: the folder of the data. `entries`: folders or lists of images by split. `pose_numbers`: how many numbers a
    line of a pose has, by `kpt_shape`. `lost_path`: the value of `path`, if there is no such folder.
    """

    place: Path
    root: Path
    entries: dict[str, list[str]]
    categories: list[Category]
    pose_numbers: int | None
    lost_path: str | None

    @staticmethod
    def of(place: Path) -> _Layout:
        """Read the file. Raises KDError that names the key and what it must be."""
        document = document_of(place)
        folder, lost_path = Path(os.path.abspath(place)).parent, None
        path = document.get("path")
        if path is not None and not isinstance(path, str):
            raise KDError(f"{place}: path must be the folder of the data, not {shown(path)}")
        root = Path(os.path.normpath(folder / path.replace("\\", "/"))) if path else folder
        if not os.path.isdir(root):
            root, lost_path = folder, path
        named = [split for split in (*SPLITS, ALL) if document.get(split) is not None]
        entries = {split: _listed(place, split, document[split]) for split in named}
        if not entries:
            raise KDError(f"{place} names no images: write `train: images/train` and `val: images/val` into it")
        if named == ["train"] and document["train"] in CVAT_LISTS:
            entries = {ALL: entries["train"]}
        return _Layout(place, root, entries, _categories(place, document), _pose_numbers(place, document), lost_path)


class _AsWritten(str):
    """The text of a number that Python would write differently: 010, which YAML takes for 8, or 12:30, for 750."""


class _Loader(yaml.SafeLoader):
    """Reads YAML, and refuses a key that is there twice: the first value would be lost."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (about := (key.tag, key.value)) in keys:
                    raise yaml.composer.ComposerError(
                        None, None, f"the key {shown(key.value)} is there twice; delete one", key.start_mark
                    )
                keys.add(about)
        return node

    def number(self, node: yaml.ScalarNode) -> int | float | _AsWritten:
        """The value of a number, or its text if Python would write it differently."""
        is_whole = node.tag.endswith("int")
        value = self.construct_yaml_int(node) if is_whole else self.construct_yaml_float(node)
        return value if str(value) == node.value else _AsWritten(node.value)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.number)


def _describes_data(path: Path) -> bool:
    try:
        document = _parse(path)
    except KDError:
        return False
    return ("train" in document or "val" in document) and ("names" in document or "nc" in document)


def _parse(path: Path) -> dict[Any, Any]:
    """The mapping that a YAML file holds. Raises KDError."""
    try:
        document = yaml.load(read_text(path), _Loader)
    except BadEntryError as error:
        raise KDError(str(error)) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise KDError(f"{path}{where}: not YAML: {getattr(error, 'problem', None) or 'bad characters'}") from None
    except (RecursionError, ValueError) as error:  # nested too deep; an impossible date
        raise KDError(f"{path} cannot be read as YAML: {error}") from None
    if isinstance(document, dict) and "val" not in document and "validation" in document:
        document["val"] = document.pop("validation")  # as Ultralytics does
    if not isinstance(document, dict):
        raise KDError(f"{path} must be a mapping with the keys path, train, val and names, not {shown(document)}")
    return document


def _listed(place: Path, split: str, value: object) -> list[str]:
    entries = value if isinstance(value, list) else [value]
    if not entries or not all(is_text(entry) for entry in entries):
        raise KDError(
            f"{place}: {split} must be a folder of images, a .txt file that lists images, or a list of these, not "
            f"{shown(value)}"
        )
    return list(map(str, entries))


def _categories(place: Path, document: dict[Any, Any]) -> list[Category]:
    """The classes; ids count from 1, as COCO's do."""
    names, count = document.get("names"), document.get("nc")
    if count is not None and (whole(count) is None or count < 1):
        raise KDError(f"{place}: nc must be the number of classes, not {shown(count)}")
    if names is None:
        if count is None:
            raise KDError(f"{place} has no names; write them as a list, such as `names: [cat, dog]`")
        if count > 100_000:
            raise KDError(f"{place}: nc is {shown(count)}, and no class has a name; write names")
        names = [f"class_{index}" for index in range(int(count))]
    if isinstance(names, dict):
        numbers = [whole(int(key) if isinstance(key, str) and key.isdecimal() else key) for key in names]
        if sorted(number for number in numbers if number is not None) != list(range(len(names))):
            raise KDError(f"{place}: names must have the keys 0 to {len(names) - 1}, not {shown(list(names))}")
        values = list(names.values())
        names = [values[numbers.index(number)] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise KDError(
            f"{place}: names must be a list of class names, or a mapping from 0, 1, ... to them, not {shown(names)}"
        )
    for index, name in enumerate(names):
        if isinstance(name, _AsWritten):
            raise KDError(
                f"{place}: names[{index}] is {name}, which YAML takes for a number and writes differently; put it in "
                "quotes"
            )
        if isinstance(name, bool) or not isinstance(name, str | int | float) or not is_text(str(name)):
            raise KDError(
                f"{place}: names[{index}] is {shown(name)}, which is no text; write it in quotes, as YAML takes words "
                "such as no and on for truth values"
            )
    names = [str(name) for name in names]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise KDError(f"{place}: names has {twice} twice; give each class its own name")
    if count is not None and count != len(names):
        raise KDError(f"{place}: nc is {shown(count)}, and names has {len(names)}; correct one of them, or delete nc")
    return [Category(number, name) for number, name in enumerate(names, 1)]


def _pose_numbers(place: Path, document: dict[Any, Any]) -> int | None:
    """How many numbers the line of a pose has: the box's and the keypoints'."""
    shape = document.get("kpt_shape")
    if shape is None:
        return None
    if not isinstance(shape, list) or len(shape) != 2 or not all(whole(each) and 0 < each < 10_000 for each in shape):
        raise KDError(f"{place}: kpt_shape must be two numbers, such as [17, 3], not {shown(shape)}")
    return 5 + prod(map(int, shape))


def _images(layout: _Layout, split: str, reading: Reading) -> tuple[list[tuple[Path, str]], list[Path]]:
    """The image files of a split with the name of each, and what else lies in its folders.

    Images that cannot be used are noted as faults.
    """
    place, root = layout.place, layout.root
    if split not in layout.entries:
        sign = " =" if place.name == "obj.data" else ":"
        raise KDError(f"{place} has no {split}, only {', '.join(layout.entries)}; add `{split}{sign} images/{split}`")
    found: list[tuple[Path, str]] = []
    others: list[Path] = []
    entries = layout.entries[split]
    for entry in entries:
        target = _target(layout, split, entry)
        if target.is_dir():
            base = target if len(entries) == 1 else root
            for each in sorted(walk_visible(target)):
                if each.suffix.lower() in ENDINGS:
                    found.append((each, _short(each, base)))
                else:
                    others.append(each)
        else:
            found += _of_list(target, layout, reading)
    images: dict[Path, str] = {}
    for path, name in found:
        with reading.noting(path, "image"), naming(f"image {shown(_short(path, root))}"):
            if not is_text(name):
                raise BadEntryError("its name has control characters; rename it")
            if path in images:
                raise BadEntryError("it is listed twice; list it once")
            images[path] = name
    if not images and not reading.faults:
        raise KDError(
            f"{place}: {split}: there are no images in {', '.join(entries)}; images end in {', '.join(ENDINGS)}"
        )
    return list(images.items()), others


def _target(layout: _Layout, split: str, entry: str) -> Path:
    """The folder or list that an entry of `data.yaml` means. Raises KDError."""
    place, root = layout.place, layout.root
    target = Path(os.path.normpath(root / _without_data(root, entry.replace("\\", "/"))))
    if not _lies_in(target, root):
        # Some tools write ../train/images for a folder that lies beside the file.
        inside = entry.replace("\\", "/")
        while inside.startswith("../"):
            inside = inside[3:]
        if inside != entry and not leads_out(inside) and os.path.exists(root / inside):
            target = root / inside
        elif os.path.exists(target):
            raise KDError(
                f"{place}: {split}: {entry} lies outside of the data set's folder {root}; set `path` to a folder that "
                "holds all of the data"
            )
    if not target.is_dir() and not (target.is_file() and target.suffix.lower() == ".txt"):
        lost = (
            f" (path, {layout.lost_path}, is no folder, so the folder of the file was taken)"
            if layout.lost_path
            else ""
        )
        raise KDError(f"{place}: {split}: there is no folder and no .txt list {target}{lost}; correct {split}, or path")
    return target


def _of_list(path: Path, layout: _Layout, reading: Reading) -> Iterator[tuple[Path, str]]:
    """The images that a text file lists, one a line.

    A line that begins with ./ is relative to the folder of the list, any other to that of the data set. An absolute
    one must lie in the data set's folder.
    """
    for number, line in enumerate(_text(path).splitlines(), 1):
        name = line.strip().replace("\\", "/")
        if not name:
            continue
        with reading.noting(path, "image"), naming(f"{_short(path, layout.root)}, line {number}"):
            base = path.parent if name.startswith("./") else layout.root
            name = _without_data(base, name)
            image = Path(os.path.normpath(base / name))
            if ".." in name.split("/") or not _lies_in(image, layout.root):
                raise BadEntryError(
                    f"{shown(name)} lies outside of the data set's folder {layout.root}; name an image inside of it, "
                    "or set `path` in the YAML file"
                )
            if not os.path.isfile(image):
                raise BadEntryError(f"there is no file {shown(name)} in {base}; correct the line, or delete it")
            short = _short(image, layout.root)
            yield image, short.removeprefix("images/")


def _boxes(path: Path, size: tuple[int, int], layout: _Layout, reading: Reading) -> tuple[Box, ...]:
    """The good boxes of a label file. Raises BadEntryError if it is no text."""
    boxes = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if fields := line.split():
            try:
                boxes.append(_box(fields, size, layout, reading))
            except BadEntryError as error:
                reading.faults.append(Fault(path, f"{_short(path, layout.root)}, line {number}: {error}", "box"))
    return tuple(boxes)


def _box(fields: list[str], size: tuple[int, int], layout: _Layout, reading: Reading) -> Box:
    """The object of a line. Raises BadEntryError."""
    try:
        numbers = [float(field) for field in fields]
    except ValueError:
        numbers = []
    if not numbers or not all(map(is_finite, numbers)):
        raise BadEntryError(f"{shown(' '.join(fields))} must be finite numbers: {LINE}")
    label, *places = numbers
    count = len(layout.categories)
    if not label.is_integer() or not 0 <= label < count:
        raise BadEntryError(
            f"class {shown(fields[0])} is none of 0 to {count - 1}; correct it, or add the class to names"
        )
    if len(numbers) == layout.pose_numbers:
        places = places[:4]
        reading.unread["sets of keypoints"] += 1
    if len(places) == 4:
        cx, cy, width, height = places
        x1, y1 = cx - width / 2, cy - height / 2
    elif len(places) >= 6 and len(places) % 2 == 0:  # a polygon, or the four corners of a turned box
        x1, y1 = min(places[::2]), min(places[1::2])
        width, height = max(places[::2]) - x1, max(places[1::2]) - y1
        reading.unread["polygons (the boxes around them are read)"] += 1
    else:
        raise BadEntryError(
            f"the line has {len(numbers)} numbers; it must be {LINE}, or class, x1, y1, x2, y2, x3, y3, ... of a "
            "polygon. If it is a pose, set kpt_shape in the YAML file"
        )
    x, y, width, height = (
        round(value * side, DECIMALS) for value, side in zip((x1, y1, width, height), size * 2, strict=True)
    )
    xywh = reading.inside((x, y, width, height), size, "box", (x, y, width, height), RULE)
    return Box(int(label), xywh, xywh[2] * xywh[3])


def _remark_labels(
    users: dict[Path, list[Path]], folders: set[Path], others: list[Path], layout: _Layout, reading: Reading
) -> None:
    """Tell of label files that no image has, or that two images share.

    `users`: the images of each label file. `folders`: where labels lie. `others`: files that are no images by their
    endings.
    """
    for file, images in users.items():
        if len(images) > 1:
            names = " and ".join(image.name for image in images)
            reading.remarks.append(f"{names} share the label file {_short(file, layout.root)}")
    known = {folded(str(file)) for file in users}
    unread = {
        folded(str(label)): file
        for file in others
        if file.suffix.lower() != ".txt"
        and (label := find_label(file, layout.root))
        and folded(str(label)) not in known
    }
    if unread:
        reading.remarks.append(
            f"{len(unread)} files have labels, but endings that are not read (the first is "
            f"{_short(next(iter(unread.values())), layout.root)}): store such images as PNG or JPEG"
        )
    known |= unread.keys()
    if any(entry.lower().endswith(".txt") for entries in layout.entries.values() for entry in entries):
        return  # a folder of labels may serve several splits
    files = (file for folder in sorted(folders) if "labels" in folder.parts for file in sorted(_texts_in(folder)))
    lonely = [file for file in files if folded(str(file)) not in known]
    if lonely:
        reading.remarks.append(
            f"{len(lonely)} label files belong to no image; the first is {_short(lonely[0], layout.root)}"
        )


def _texts_in(folder: Path) -> list[Path]:
    """The label files of a folder."""
    files = folder.glob("*") if folder.is_dir() else ()
    return [
        file
        for file in files
        if file.suffix.lower() == ".txt" and not file.name.startswith(".") and file.name != "classes.txt"
    ]


def _lies_in(path: Path, root: Path) -> bool:
    """Whether a path lies in a folder, also if the folder was reached by a link."""
    return path.is_relative_to(root) or Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def _short(path: Path, root: Path) -> str:
    """The path relative to a folder that it lies in, or else its name."""
    if path.is_relative_to(root):  # which costs nothing; the rest asks the disk
        return path.relative_to(root).as_posix()
    real, base = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    return real.relative_to(base).as_posix() if real.is_relative_to(base) else path.name
