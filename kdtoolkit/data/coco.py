"""COCO's format: a JSON file for each split with images, annotations and categories.

`layouts.py` says where it lies in what tools export, and where the images lie. Else it is `annotations/SPLIT.json`, and
the images are in `images/`.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdtoolkit.data.layouts import ExportedFiles, Part, folder_of, parts_of, splits_of
from kdtoolkit.data.records import (
    ALL,
    BadEntryError,
    Box,
    Category,
    Choose,
    Fault,
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
    naming,
    shown,
    telling_what_is_unreadable,
    whole,
)
from kdtoolkit.errors import KDError

NEEDED = ("images", "annotations", "categories")
UNREAD = {"segmentation": "segmentations", "keypoints": "sets of keypoints"}
CROWDS = ("iscrowd", "ignore")  # the latter in data made from CrowdHuman, CityPersons, WIDER FACE
RULE = "it must be [x, y, width, height] in pixels"
NAME_RULE = "file_name is relative to the images folder"


def locate(path: Path) -> Path | None:
    """The data set's folder, or the one JSON file that `path` is. `path` may also be the folder `annotations`."""
    if path.is_file():
        return path if path.suffix.lower() == ".json" else None
    for root in (path, path.parent):
        folder = root / "annotations"
        if folder in (path, path / "annotations") and next(folder.glob("*.json"), None) is not None:
            return root
    return path if parts_of("COCO", path) else None


@telling_what_is_unreadable()
def splits(root: Path) -> list[str]:
    """The splits that have a file. Raises KDError if there is none."""
    found = splits_of("COCO", root)
    if not found:
        raise _missing(root, "train")
    return found


def label_files(root: Path) -> list[Path]:
    """The JSON files of a data set."""
    return [part.labels for part in parts_of("COCO", root).values()]


@telling_what_is_unreadable()
def read(root: Path, split: str, progress: Progress, choose: Choose = everything) -> Reading:
    """Read a split. Raises KDError if the JSON cannot be used at all."""
    part = _part_of(root, split)
    path = part.labels
    document = _parse(path)
    if part.is_export:
        document["categories"] = _without_superclass(document, root, path)
    if choose is not everything:
        document |= _chosen(document, choose)
    categories = categories_in(document["categories"], path)
    reading = Reading(path, folder_of(root), categories, has_ids=True)
    entries = _images(document["images"], reading)
    boxes = _boxes(document["annotations"], entries, reading)
    files = ExportedFiles(part.images, NAME_RULE) if part.is_export else Files(part.images[0], NAME_RULE)
    users: dict[Path, _Entry] = {}
    for done, entry in enumerate(entries.values(), 1):
        if entry is not None:
            with reading.noting(path, "image"), naming(str(entry)):
                file = files.find(entry.name)
                if (first := users.setdefault(file, entry)) is not entry:
                    raise BadEntryError(
                        f"{first} has the same file, and each would lack the boxes of the other; merge the two "
                        "entries, with their annotations"
                    )
                width, height = agreed_size(file, (entry.width, entry.height), "JSON")
                found = tuple(boxes[entry.id])
                reading.photos.append(Photo(entry.id, entry.name, str(entry), file, width, height, found))
        progress(done, len(entries))
    return reading


FORM = Form("COCO", locate, splits, read)


@dataclass(frozen=True)
class _Entry:
    """An image as the JSON has it."""

    id: int
    name: str
    width: int
    height: int

    def __str__(self) -> str:
        return f"image {self.id} ({self.name})"


def _part_of(root: Path, split: str) -> Part:
    """The annotation file and the folders of images. Raises KDError if they are not there."""
    if not root.exists():
        raise KDError(f"there is no folder {root}. {_layout(root)}")
    part = parts_of("COCO", root).get(split)
    if part is None:
        raise _missing(root, split)
    if not any(folder.is_dir() for folder in part.images):
        folders = " or ".join(map(str, part.images))
        raise KDError(
            f"there is no folder {folders}. "
            + ("Export the data with images, or put them there." if part.is_export else _layout(root))
        )
    return part


def _missing(root: Path, split: str) -> KDError:
    parts = parts_of("COCO", root)
    if root.is_file():
        return KDError(f"{root} has no {split}, only {', '.join(parts)}; name the folder of the data set instead")
    if any(part.is_export for part in parts.values()):
        return KDError(f"{root} has no {split}, only {', '.join(parts)}; export that split as well.{_advice(parts)}")
    folder = root / "annotations"
    files = sorted(folder.glob("*.json"))
    others = ", ".join(other.name for other in files)
    advice = _advice(parts if parts or len(files) != 1 else parts_of("COCO", files[0]))
    return KDError(
        f"there is no file {folder / split}.json{f' (but {others})' if others else ''}. {_layout(root)}{advice}"
    )


def _advice(parts: Mapping[str, Part]) -> str:
    """What to do if there is no val."""
    part = None if "val" in parts else parts.get("train") or parts.get(ALL)
    return f" Or name {part.labels} as the data: then a fifth of its images is val." if part else ""


def _layout(root: Path) -> str:
    return (
        f"Expected are {root / 'annotations'}/train.json and val.json in COCO's format, and the images in "
        f"{root / 'images'}."
    )


def _parse(path: Path) -> dict[str, list[Any]]:
    """The file's content, with the three lists that must be in it."""
    try:
        document = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise KDError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}). Export the file again."
        ) from None
    except UnicodeDecodeError as error:
        raise KDError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start})") from None
    except (OSError, RecursionError, ValueError) as error:  # no permission; nested too deep; an integer too long
        raise KDError(f"{path} cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise KDError(
            f"{path} holds a JSON {type(document).__name__}; COCO's format is an object with {', '.join(NEEDED)}. "
            "Export the data in that format."
        )
    if wrong := [key for key in NEEDED if not isinstance(document.get(key), list)]:
        raise KDError(
            f"{path} must have a list under each of {', '.join(NEEDED)}; wrong or missing: {', '.join(wrong)}"
        )
    return document


def _without_superclass(document: dict[str, list[Any]], root: Path, path: Path) -> list[Any]:
    """The categories but one that has no annotation in any split, and to which all others belong.

    Roboflow writes such a category for the project.
    """
    entries = document["categories"]
    for entry in entries:
        name, others = _get(entry, "name"), [each for each in entries if each is not entry]
        if others and _get(entry, "supercategory") != name == _common([_get(e, "supercategory") for e in others]):
            boxes = document["annotations"] + [
                box for file in label_files(root) if file != path for box in _annotations_of(file)
            ]
            if all(_get(box, "category_id") != _get(entry, "id") for box in boxes):
                return others
    return entries


def _annotations_of(path: Path) -> list[Any]:
    """The annotations of a different split; none if it cannot be read, which is told when it is opened."""
    try:
        return _parse(path)["annotations"]
    except KDError:
        return []


def _chosen(document: dict[str, list[Any]], choose: Choose) -> dict[str, list[Any]]:
    """The images that are chosen by their names, and all annotations but those of others."""
    images = document["images"]
    chosen = choose([str(_get(image, "file_name")) for image in images])
    kept = [image for image in images if str(_get(image, "file_name")) in chosen]
    ids, all_ids = ({whole(_get(image, "id")) for image in each} for each in (kept, images))
    others = all_ids - ids
    boxes = [box for box in document["annotations"] if whole(_get(box, "image_id")) not in others]
    return {"images": kept, "annotations": boxes}


def _get(entry: Any, key: str) -> Any:
    """A value of an entry that may be no object."""
    return entry.get(key) if isinstance(entry, dict) else None


def _common(values: list[Any]) -> Any:
    """The value that all have; None if they differ."""
    return values[0] if all(value == values[0] for value in values) else None


def categories_in(entries: list[Any], path: Path) -> list[Category]:
    """The classes in the order of labels, which is that of the ids."""
    categories: list[Category] = []
    taken: dict[tuple[str, int | str], Category] = {}
    for index, entry in enumerate(entries):
        number = whole(entry.get("id")) if isinstance(entry, dict) else None
        if number is None or not is_text(entry.get("name")):
            raise KDError(f"{path}: categories[{index}] must be an object with an integer id and a name")
        category = Category(number, entry["name"])
        for key, value in (("id", category.id), ("name", category.name)):
            other = taken.setdefault((key, value), category)
            if other is not category:
                raise KDError(
                    f"{path}: categories {other.id} ({other.name}) and {number} ({category.name}) have the "
                    f"same {key}; give each its own"
                )
        categories.append(category)
    if not categories:
        raise KDError(f"{path} lists no categories; add one for each class")
    return sorted(categories, key=lambda category: category.id)


def _images(entries: list[Any], reading: Reading) -> dict[int, _Entry | None]:
    """The images by id; None for those with a fault."""
    images: dict[int, _Entry | None] = {}
    for index, entry in enumerate(entries):
        with reading.noting(reading.source, "image"):
            image_id = _image_id(index, entry, images)
            images[image_id] = None
            images[image_id] = _image(image_id, entry)
    return images


def _image_id(index: int, entry: Any, taken: Container[int]) -> int:
    number = whole(entry.get("id")) if isinstance(entry, dict) else None
    if number is None:
        raise BadEntryError(f"images[{index}] must be an object with an integer id")
    if number in taken:
        raise BadEntryError(f"images[{index}]: the id {number} is there already; give each of them its own")
    return number


def _image(number: int, entry: dict[str, Any]) -> _Entry:
    name = entry.get("file_name")
    if not isinstance(name, str) or not is_text(name):
        raise BadEntryError(f"image {number}: file_name is missing or no text; name its file in the images folder")
    with naming(f"image {number} ({name})"):
        width, height = whole(entry.get("width")), whole(entry.get("height"))
        if width is None or height is None or width < 1 or height < 1:
            raise BadEntryError(
                f"width and height must be positive integers, not {shown(entry.get('width'))} "
                f"and {shown(entry.get('height'))}"
            )
        check_pixels(width, height)
    return _Entry(number, name, width, height)


def _boxes(entries: list[Any], images: dict[int, _Entry | None], reading: Reading) -> dict[int, list[Box]]:
    """The good boxes of each good image, by the image's id."""
    boxes: dict[int, list[Box]] = {number: [] for number in images}
    labels = {category.id: label for label, category in enumerate(reading.categories)}
    for index, entry in enumerate(entries):
        try:
            image_id, box = _box(entry, images, labels, reading)
        except BadEntryError as error:
            reading.faults.append(Fault(reading.source, f"{_title(index, entry, images)}{error}", "box"))
        else:
            if box is not None:
                boxes[image_id].append(box)
    return boxes


def _title(index: int, entry: Any, images: Container[int]) -> str:
    """What a bad annotation is called: by its id, if it has one, and by its image."""
    if not isinstance(entry, dict):
        return f"annotations[{index}] "
    own_id, image_id = entry.get("id"), whole(entry.get("image_id"))
    title = f"annotation {shown(own_id)}" if isinstance(own_id, int | float | str) else f"annotations[{index}]"
    return f"{title} (image {image_id}): " if image_id is not None and image_id in images else f"{title}: "


def _box(
    entry: Any, images: dict[int, _Entry | None], labels: dict[int, int], reading: Reading
) -> tuple[int, Box | None]:
    """The image's id and the object of an annotation, cut at the image's edge; None if the image has a fault.

    Raises BadEntryError.
    """
    if not isinstance(entry, dict):
        raise BadEntryError("must be an object")
    image_id, category_id = whole(entry.get("image_id")), whole(entry.get("category_id"))
    if image_id is None or image_id not in images:
        raise BadEntryError(
            f"no image has the id {shown(entry.get('image_id'))}; add the image, or delete the annotation"
        )
    image, box, area = images[image_id], entry.get("bbox"), entry.get("area")
    flags = {key: entry[key] for key in CROWDS if entry.get(key) is not None}
    if category_id is None or category_id not in labels:
        raise BadEntryError(
            f"no category has the id {shown(entry.get('category_id'))}, only {few_of(labels)}; correct it, or add it"
        )
    for key, flag in flags.items():
        if flag not in (0, 1):
            raise BadEntryError(f"{key} must be 0 or 1, not {shown(flag)}")
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_finite, box)):
        raise BadEntryError(f"bbox must be four finite numbers [x, y, width, height], not {shown(box)}")
    if area is not None and (not is_finite(area) or area < 0):
        raise BadEntryError(f"area must be a finite number of at least 0, not {shown(area)}")
    if image is None:
        return image_id, None
    for key, what in UNREAD.items():
        if entry.get(key):
            reading.unread[what] += 1
    x, y, width, height = box
    xywh = reading.inside((x, y, width, height), (image.width, image.height), "bbox", box, RULE)
    return image_id, Box(labels[category_id], xywh, xywh[2] * xywh[3] if area is None else area, any(flags.values()))
