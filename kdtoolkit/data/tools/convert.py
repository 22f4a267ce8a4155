"""`kd data convert`: a data set in a different format. Image files are copied as they are."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from xml.sax.saxutils import escape

from kdtoolkit.data.opening import locate
from kdtoolkit.data.records import ENDINGS, Box, Photo, Progress, Reading, is_spare, is_text, settle, shown, tell
from kdtoolkit.data.yolo import label_file
from kdtoolkit.errors import KDError
from kdtoolkit.yaml_text import dump

Write = Callable[[Path, dict[str, Reading], dict[str, dict[int, str]]], None]


@dataclass(frozen=True)
class Outcome:
    """What was written, and what was left out because the new format, or detection, has no place for it."""

    images: int
    boxes: int
    losses: tuple[str, ...]


def convert(
    source: Path,
    target: Path,
    to: Literal["coco", "yolo", "voc"],
    *,
    on_bad: Literal["error", "skip"] = "error",
    progress: Progress,
) -> Outcome:
    """Write all splits of a data set into the new folder `target`, which appears only when it is complete.

    A split that training does not open is left out if it cannot be read, and told as a loss. Raises KDError if the data
    are bad (unless `on_bad` is `skip`), cannot be told apart in the new format, or cannot be written.
    """
    check_new(target)
    form, place = locate(source)
    splits = form.splits(place)
    readings: dict[str, Reading] = {}
    unread: list[str] = []
    for split in splits:
        try:
            readings[split] = form.read(place, split, progress)
        except KDError as error:
            if not is_spare(split, splits):
                raise
            unread.append(f"the split {split}, which cannot be read: {error}")
    for reading in readings.values():
        settle(reading.faults, reading.source, on_bad)
        tell(reading.source, tuple(reading.remarks))
    classes = {tuple(category.name for category in reading.categories) for reading in readings.values()}
    if len(classes) > 1:
        listed = "; ".join(", ".join(names) for names in sorted(classes))
        raise KDError(f"the splits of {source} have different classes: {listed}. Give all splits the same ones")
    write(readings, target, to)
    photos = [photo for reading in readings.values() for photo in reading.photos]
    kept = [box for photo in photos for box in photo.boxes if not (to == "yolo" and box.crowd)]
    return Outcome(len(photos), len(kept), (*unread, *_losses(readings, form.name, to)))


def check_new(target: Path) -> None:
    """Raise KDError if a folder to write into is there already, and not empty, or could not be made in the end."""
    try:
        is_taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
        parent = next(folder for folder in target.absolute().parents if folder.exists())
    except OSError as error:
        raise KDError(f"cannot write {target}: {error.strerror or error}; name a different folder") from None
    if is_taken:
        raise KDError(f"{target} is there already; name a new folder")
    if not parent.is_dir():
        raise KDError(f"cannot write {target}: {parent} is no folder; name a different folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise KDError(f"cannot write {target}: {parent} is not writable; name a different folder")


def with_slashes(name: str) -> str:
    """The name of an image in a new data set. On Windows folders are divided by backslashes."""
    return name.replace("\\", "/")


def check_names(named: Iterable[tuple[str, str]], source: Path, to: Literal["coco", "yolo", "voc"]) -> None:
    """Check the names of a split's images, each with what messages call it, for a new data set of them.

    Names are those of `with_slashes`.

    Raises KDError if a name cannot be written, if two images would have one name or one file of annotations, or if
    readers of the format would not find an image.
    """
    titles: dict[str, str] = {}
    for name, title in named:
        if not is_text(name):
            raise KDError(
                f"{source}: the name of the file {shown(name)} cannot be written: it has control characters, or is no "
                "text in UTF-8; rename it"
            )
        if to != "coco" and (PurePosixPath(name).suffix.lower() not in ENDINGS or name != name.strip()):
            raise KDError(
                f"{title}: readers of {to.upper()} look for images by their endings, {', '.join(ENDINGS)}; rename "
                f"{shown(name)}, or store it in a different form"
            )
        if (key := _key(name, to)) in titles:
            raise KDError(
                f"{source}: {titles[key]} and {title} would both be {key} in the new data set, and share their "
                "annotations; rename one of the files"
            )
        titles[key] = title


def write(
    readings: dict[str, Reading],
    target: Path,
    to: Literal["coco", "yolo", "voc"],
    more: Mapping[str, str] | None = None,
) -> None:
    """Write splits, with copies of their images, into the new folder `target`, which appears only when it is complete.

    `more`: the text of further files by their names. Raises KDError if two images would have one name, if readers of
    the format would not find an image or change the name of a class, or if the folder cannot be written.
    """
    names = _names(readings, to)
    for reading in readings.values():
        for category in reading.categories:
            if to == "voc" and category.name != category.name.strip():
                raise KDError(
                    f"{reading.source}: the class {category.name!r} has spaces around its name, and readers of VOC "
                    "drop them; give it a name without"
                )
    beside = target.absolute().with_name(f".{target.absolute().name}.partial")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        _WRITERS[to](beside, readings, names)
        for name, text in (more or {}).items():
            _write_text(beside / name, text)
        if target.exists():
            target.rmdir()
        beside.replace(target)
    except OSError as error:
        raise KDError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _losses(readings: dict[str, Reading], form: str, to: str) -> Iterator[str]:
    for what in dict.fromkeys(key for reading in readings.values() for key in reading.unread):
        if count := sum(reading.unread[what] for reading in readings.values()):
            yield f"{count} {what}"
    boxes = [box for reading in readings.values() for photo in reading.photos for box in photo.boxes]
    if to == "coco":
        return
    if form == "COCO":
        yield "ids of images and categories: they are numbered anew"
    if to == "yolo":
        yield "the order of images: it becomes that of their names"
        if count := sum(box.crowd for box in boxes):
            yield f"{count} crowds or difficult objects, which are left out"
    if count := sum(abs(box.area - box.xywh[2] * box.xywh[3]) > 0.01 + 1e-3 * box.area for box in boxes):
        yield f"{count} areas of masks: AP of small, medium and large objects will go by boxes"


def _names(readings: dict[str, Reading], to: Literal["coco", "yolo", "voc"]) -> dict[str, dict[int, str]]:
    """The name of each photo in the new data set, by split and place.

    Splits share a folder in COCO's and VOC's format. If they have different images of one name there, all names begin
    with the split. Raises KDError as `check_names` does.
    """
    names = {
        split: {index: with_slashes(photo.name) for index, photo in enumerate(reading.photos)}
        for split, reading in readings.items()
    }
    taken: dict[str, Path] = {}
    collide = False
    for split, reading in readings.items():
        check_names(zip(names[split].values(), map(str, reading.photos), strict=True), reading.source, to)
        for name, photo in zip(names[split].values(), reading.photos, strict=True):
            if to != "yolo":
                first = taken.setdefault(_key(name, to), photo.path)
                collide |= first != photo.path and not filecmp.cmp(first, photo.path, shallow=False)
    if collide:
        return {split: {i: f"{split}/{name}" for i, name in found.items()} for split, found in names.items()}
    return names


def _key(name: str, to: str) -> str:
    """What images of a new data set may not share: a file's name, or that of its annotations without the ending."""
    return name if to == "coco" else PurePosixPath(name).with_suffix("").as_posix()


def _copy(photo: Photo, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(photo.path, path)


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def _write_coco(root: Path, readings: dict[str, Reading], names: dict[str, dict[int, str]]) -> None:
    for split, reading in readings.items():
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index, photo in enumerate(reading.photos):
            name = names[split][index]
            _copy(photo, root / "images" / name)
            images.append({"id": photo.id, "file_name": name, "width": photo.width, "height": photo.height})
            for box in photo.boxes:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": photo.id,
                        "category_id": reading.categories[box.label].id,
                        "bbox": list(box.xywh),
                        "area": box.area,
                        "iscrowd": int(box.crowd),
                    }
                )
        categories = [{"id": category.id, "name": category.name} for category in reading.categories]
        document = {"images": images, "annotations": annotations, "categories": categories}
        _write_text(root / "annotations" / f"{split}.json", json.dumps(document, ensure_ascii=False))


def _write_yolo(root: Path, readings: dict[str, Reading], names: dict[str, dict[int, str]]) -> None:
    for split, reading in readings.items():
        for index, photo in enumerate(reading.photos):
            name = names[split][index]
            path = root / "images" / split / name
            _copy(photo, path)
            lines = [_yolo_line(box, photo) for box in photo.boxes if not box.crowd]
            _write_text(label_file(path), "".join(lines))
    classes = next(iter(readings.values())).categories
    # Without `path`: Ultralytics would take a relative one as relative to where it is started.
    described: dict[str, Any] = {split: f"images/{split}" for split in readings}
    described |= {"names": {label: category.name for label, category in enumerate(classes)}}
    _write_text(root / "data.yaml", dump(described))


def _yolo_line(box: Box, photo: Photo) -> str:
    x, y, width, height = box.xywh
    shares = (
        (x + width / 2) / photo.width,
        (y + height / 2) / photo.height,
        width / photo.width,
        height / photo.height,
    )
    return f"{box.label} {' '.join(map(_number, shares))}\n"


def _write_voc(root: Path, readings: dict[str, Reading], names: dict[str, dict[int, str]]) -> None:
    written: dict[Path, str] = {}
    for split, reading in readings.items():
        listed = []
        for index, photo in enumerate(reading.photos):
            name = names[split][index]
            short = PurePosixPath(name).with_suffix("").as_posix()
            path, text = root / "Annotations" / f"{short}.xml", _xml(photo, name, reading)
            if written.setdefault(path, text) != text:
                raise KDError(
                    f"{photo} is in several splits with different boxes; VOC has one annotation file for each image"
                )
            _copy(photo, root / "JPEGImages" / name)
            _write_text(path, text)
            listed.append(f"{short}\n")
        _write_text(root / "ImageSets" / "Main" / f"{split}.txt", "".join(listed))
    classes = next(iter(readings.values())).categories
    _write_text(root / "classes.txt", "".join(f"{category.name}\n" for category in classes))


def _xml(photo: Photo, name: str, reading: Reading) -> str:
    lines = [
        "<annotation>",
        f"  <folder>JPEGImages</folder><filename>{escape(name)}</filename>",
        f"  <size><width>{photo.width}</width><height>{photo.height}</height><depth>3</depth></size>",
    ]
    for box in photo.boxes:
        x, y, width, height = box.xywh
        corners = zip(("xmin", "ymin", "xmax", "ymax"), (x + 1, y + 1, x + width, y + height), strict=True)
        sides = "".join(f"<{side}>{_number(value)}</{side}>" for side, value in corners)
        lines += [
            "  <object>",
            f"    <name>{escape(reading.categories[box.label].name)}</name><difficult>{int(box.crowd)}</difficult>",
            f"    <bndbox>{sides}</bndbox>",
            "  </object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])


def _number(value: float) -> str:
    """A number in few digits, exact to a millionth of a pixel."""
    return f"{value:.12g}"


_WRITERS: dict[str, Write] = {"coco": _write_coco, "yolo": _write_yolo, "voc": _write_voc}
