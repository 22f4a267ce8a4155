"""Photos with boxes in COCO's format: all is checked when the data set is opened, and said in one error."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import unicodedata
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from kdtoolkit.data.dataset import DetectionDataset, Sample, digest
from kdtoolkit.data.pictures import MAX_PIXELS, PictureError, decode, seen_size
from kdtoolkit.errors import KDError

CACHE_BYTES = 2 * 2**30
MAX_OVERHANG = 1.0  # pixels that a box may reach beyond its image; annotation tools round that much. It is cut there.
# Of the image's side. Less is rounding noise: once scaled, mirrored or shifted in float32, both sides may be equal.
MIN_SIDE = 2.0**-20
SCORED_DETECTIONS = 100  # an image, by COCO's rule
SHOWN_FAULTS = 5
SHOWN_CHARACTERS = 80  # of a value that is wrong

log = logging.getLogger(__name__)


class CocoDetection(DetectionDataset):
    """Images of `root/images` with the boxes of `root/annotations/{split}.json`; labels follow the category ids.

    `max_size`: images with a longer side are scaled down to it, antialiased; none is enlarged. `class_names`: these
    categories only, labelled in this order. `on_bad`: `skip` leaves bad images and annotations out and says so in one
    warning. `progress(done, total)` counts images looked at. Images are decoded on access; `in_memory` decodes all of
    them and keeps them, if they take at most `cache_bytes`.

    Crowd boxes (`iscrowd`) are no training targets, but are in `coco`, where they count as COCO has it. Raises KDError
    that lists the first faults of the data and their number.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        max_size: int | None = None,
        class_names: Sequence[str] | None = None,
        on_bad: Literal["error", "skip"] = "error",
        cache_bytes: int = CACHE_BYTES,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if max_size is not None and max_size < 1:
            raise KDError(f"max_size must be at least 1 px, not {max_size}")
        self._max_size = max_size
        self._cache_bytes = cache_bytes
        self._on_bad: Literal["error", "skip"] = on_bad
        self._path, folder = _locate(Path(root), split)
        document = _parse(self._path)
        self._categories = _categories(document["categories"], class_names, self._path)
        self.class_names = tuple(category["name"] for category in self._categories)
        self._labels = {category["id"]: label for label, category in enumerate(self._categories)}

        faults: list[str] = []
        images = _images(document["images"], faults)
        annotations = _annotations(document, images, faults)
        files = _Files(folder)
        self._images: list[_Image] = []
        for done, image in enumerate(images.values(), 1):
            if image is not None:
                try:
                    self._images.append(_checked(image, files))
                except PictureError as error:
                    faults.append(str(error))
            if progress is not None:
                progress(done, len(images))
        _settle(faults, self._path, on_bad)

        self._annotations: dict[int, list[_Annotation]] = {image.id: [] for image in self._images}
        for annotation in annotations:
            if annotation["image_id"] in self._annotations and annotation["category_id"] in self._labels:
                self._annotations[annotation["image_id"]].append(annotation)
        self._count = len(self._images)
        self._hashes: dict[Path, str] = {}
        self._decoded: list[tuple[Tensor, Sample]] | None = None
        self._in_memory: CocoDetection | None = None
        self._check_not_empty()
        self._warn_of_many_boxes()

    def __str__(self) -> str:
        part = "" if len(self) == self._count else f"{len(self)} images of "
        return f"{part}{self._path}"

    def __len__(self) -> int:
        """Number of images, those without boxes included."""
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Sample]:
        """Image (3, H, W) uint8 and its boxes. Raises KDError where a file that is not in memory cannot be decoded."""
        if self._decoded is not None:
            return self._decoded[index]
        try:
            return self._read(self._images[index])
        except PictureError as error:
            raise KDError(f"{self._path}: {error}") from None

    def coco(self) -> dict[str, Any]:
        """Ground truth as the file has it, but for what was left out; boxes are cut at the image's edge.

        Annotations are numbered anew, for files may give them no ids, or the same one twice.
        """
        images = [
            {"id": image.id, "file_name": image.file_name, "width": image.width, "height": image.height}
            for image in self._images
        ]
        found = (annotation for image in self._images for annotation in self._annotations[image.id])
        annotations = [{"id": number, **annotation} for number, annotation in enumerate(found, 1)]
        return {"info": {}, "images": images, "annotations": annotations, "categories": self._categories}

    def fingerprint(self) -> str:
        """Digest of the content of all image files, of their annotations and of the arguments."""
        for image in self._images:
            if image.path not in self._hashes:
                self._hashes[image.path] = _hash(image)
        content = [
            (
                image.id,
                image.file_name,
                image.width,
                image.height,
                self._hashes[image.path],
                self._annotations[image.id],
            )
            for image in self._images
        ]
        return digest(self._max_size, self.class_names, self._categories, content)

    def subset(self, count: int | None, seed: int) -> DetectionDataset:
        """As every data set's; raises KDError also where none of the images chosen has a box."""
        part = super().subset(count, seed)
        if isinstance(part, CocoDetection) and part._has_no_box():
            raise KDError(
                f"{part}, chosen by seed {seed}, have no box: nothing can be trained or scored on them. Ask for more "
                "images, or for another seed"
            )
        return part

    def in_memory(self) -> DetectionDataset:
        """The data set with its images decoded and kept; itself where they take more than `cache_bytes`.

        Files that cannot be decoded are an error, or are left out, as `on_bad` has it. Raises KDError.
        """
        if self._in_memory is None and self._decoded is None:
            if sum(3 * math.prod(self._presented_size(image)) for image in self._images) > self._cache_bytes:
                return self
            faults: list[str] = []
            decoded, good = [], []
            for index, image in enumerate(self._images):
                try:
                    decoded.append(self._read(image))
                    good.append(index)
                except PictureError as error:
                    faults.append(str(error))
            _settle(faults, self._path, self._on_bad)
            self._in_memory = self._part(good)
            self._in_memory._check_not_empty()
            self._in_memory._decoded = decoded
        return self._in_memory or self

    def _part(self, indices: Sequence[int]) -> CocoDetection:
        part = copy.copy(self)
        part._images = [self._images[index] for index in indices]
        part._decoded = None if self._decoded is None else [self._decoded[index] for index in indices]
        part._in_memory = None
        return part

    def _check_not_empty(self) -> None:
        if not self._images:
            raise KDError(f"{self._path} lists no usable image; nothing can be trained or scored on it")
        if self._has_no_box():
            raise KDError(
                f"{self} has no usable annotation of {', '.join(self.class_names)}; "
                "nothing can be trained or scored on it"
            )

    def _has_no_box(self) -> bool:
        return all(a["iscrowd"] for image in self._images for a in self._annotations[image.id])

    def _warn_of_many_boxes(self) -> None:
        fullest = max(self._images, key=lambda image: len(self._annotations[image.id]))
        if (most := len(self._annotations[fullest.id])) > SCORED_DETECTIONS:
            log.warning(
                "%s: images with up to %d boxes (%s). COCO scores at most %d detections an image, so AP is bounded; "
                "DETR and its kin find no more objects than they have queries. Cut such images into tiles if all their "
                "objects matter.",
                self._path,
                most,
                fullest,
                SCORED_DETECTIONS,
            )

    def _presented_size(self, image: _Image) -> tuple[int, int]:
        """(height, width) of an image as it is given out."""
        longest = max(image.height, image.width)
        if self._max_size is None or longest <= self._max_size:
            return image.height, image.width
        scale = self._max_size / longest
        return max(1, round(image.height * scale)), max(1, round(image.width * scale))

    def _read(self, image: _Image) -> tuple[Tensor, Sample]:
        """Decode an image. Raises PictureError."""
        height, width = self._presented_size(image)
        with _naming(image):
            pixels = decode(image.path, (height, width))
        found = [annotation for annotation in self._annotations[image.id] if not annotation["iscrowd"]]
        scale = torch.tensor([width / image.width, height / image.height])
        xywh = torch.tensor([a["bbox"] for a in found], dtype=torch.float64).reshape(-1, 4)
        corners = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
        return pixels, {
            "boxes": (corners * scale.repeat(2)).float(),
            "labels": torch.tensor([self._labels[a["category_id"]] for a in found], dtype=torch.int64),
            "image_id": image.id,
            "original_size": (image.height, image.width),
        }


@dataclass(frozen=True)
class _Image:
    id: int
    file_name: str
    width: int
    height: int
    path: Path = Path()

    def __str__(self) -> str:
        return f"image {self.id} ({self.file_name})"


class _Annotation(TypedDict):
    """COCO's fields, but for the id. `bbox` is [x, y, width, height]."""

    image_id: int
    category_id: int
    bbox: list[float]
    area: float
    iscrowd: int


class _BadEntryError(Exception):
    """Why an image or annotation cannot be used, and how to mend it."""


class _Files:
    """The files of the images folder, by the names that annotation files give them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listings: dict[Path, dict[str, str]] = {}

    def find(self, name: str) -> Path:
        """The file of this name; separators may be Windows', and accents composed in another way.

        Raises PictureError where there is none, with the name of a file that differs in case only.
        """
        slashes = name.replace("\\", "/")
        forms = [unicodedata.normalize(form, slashes) for form in ("NFC", "NFD")]  # macOS writes the latter
        for form in dict.fromkeys((name, slashes, *forms)):
            if (path := self._folder / form).is_file():
                return path
        path = self._folder / name
        found = self._listing(path.parent).get(_plain(path.name))
        hint = f" (but {found}: upper and lower case count)" if found else ""
        raise PictureError(f"there is no file {path}{hint}; file_name is relative to the images folder")

    def _listing(self, folder: Path) -> dict[str, str]:
        """The names in a folder, by what is left of them without case."""
        if folder not in self._listings:
            names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
            self._listings[folder] = {_plain(name): name for name in names}
        return self._listings[folder]


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


@contextmanager
def _naming(image: _Image) -> Iterator[None]:
    """Let a PictureError say which image it is about."""
    try:
        yield
    except PictureError as error:
        raise PictureError(f"{image}: {error}") from None


def _checked(image: _Image, files: _Files) -> _Image:
    """The image with the path of its file. Raises PictureError where the file is missing, broken or of another size."""
    with _naming(image):
        path = files.find(image.file_name)
        width, height, is_turned = seen_size(path)
        if (width, height) != (image.width, image.height):
            how = " with its EXIF orientation applied" if is_turned else ""
            raise PictureError(
                f"the file is {width}x{height}{how}, the JSON says {image.width}x{image.height}; "
                "correct width and height there, and make sure that the boxes fit"
            )
    return replace(image, path=path)


def _hash(image: _Image) -> str:
    """Digest of a file's bytes. Raises KDError where it cannot be read."""
    try:
        with image.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise KDError(f"{image}: the file {image.path} cannot be read ({error.strerror})") from None


def _locate(root: Path, split: str) -> tuple[Path, Path]:
    """The annotation file and the images folder."""
    layout = (
        f"Expected are {root / 'annotations'}/train.json and val.json in COCO's format, and the images in "
        f"{root / 'images'}."
    )
    path, folder = root / "annotations" / f"{split}.json", root / "images"
    if not root.is_dir():
        raise KDError(f"there is no folder {root}. {layout}")
    if not path.is_file():
        others = ", ".join(sorted(other.name for other in path.parent.glob("*.json")))
        raise KDError(f"there is no file {path}{f' (but {others})' if others else ''}. {layout}")
    if not folder.is_dir():
        raise KDError(f"there is no folder {folder}. {layout}")
    return path, folder


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
    needed = ("images", "annotations", "categories")
    if not isinstance(document, dict):
        raise KDError(
            f"{path} holds a JSON {type(document).__name__}; COCO's format is an object with {', '.join(needed)}"
        )
    if wrong := [key for key in needed if not isinstance(document.get(key), list)]:
        raise KDError(
            f"{path} must have a list under each of {', '.join(needed)}; wrong or missing: {', '.join(wrong)}"
        )
    return document


def _categories(entries: list[Any], class_names: Sequence[str] | None, path: Path) -> list[dict[str, Any]]:
    """Id and name of each category, in the order of labels."""
    categories: list[dict[str, Any]] = []
    taken: dict[tuple[str, int | str], dict[str, Any]] = {}
    for index, entry in enumerate(entries):
        number = _integer(entry.get("id")) if isinstance(entry, dict) else None
        if number is None or not _is_text(entry.get("name")):
            raise KDError(f"{path}: categories[{index}] must be an object with an integer id and a name")
        category = {"id": number, "name": entry["name"]}
        for key, value in category.items():
            other = taken.setdefault((key, value), category)
            if other is not category:
                raise KDError(
                    f"{path}: categories {other['id']} ({other['name']}) and {number} ({category['name']}) have the "
                    f"same {key}; give each its own"
                )
        categories.append(category)
    if not categories:
        raise KDError(f"{path} lists no categories; add one for each class")
    categories.sort(key=lambda category: int(category["id"]))
    if class_names is None:
        return categories
    by_name = {category["name"]: category for category in categories}
    if unknown := [name for name in class_names if name not in by_name]:
        raise KDError(f"{path} has no class {', '.join(unknown)}; there are {', '.join(by_name)}")
    return [by_name[name] for name in class_names]


def _images(entries: list[Any], faults: list[str]) -> dict[int, _Image | None]:
    """The images by id; None for those with a fault."""
    images: dict[int, _Image | None] = {}
    for index, entry in enumerate(entries):
        try:
            image_id = _image_id(index, entry, images)
            images[image_id] = None
            images[image_id] = _image(image_id, entry)
        except _BadEntryError as error:
            faults.append(str(error))
    return images


def _annotations(
    document: dict[str, list[Any]], images: dict[int, _Image | None], faults: list[str]
) -> list[_Annotation]:
    """What scoring and training need of each good annotation; those of images with a fault are left out."""
    categories = {number for category in document["categories"] if (number := _integer(category["id"])) is not None}
    annotations: list[_Annotation] = []
    for index, entry in enumerate(document["annotations"]):
        try:
            annotation = _annotation(index, entry, images, categories)
        except _BadEntryError as error:
            faults.append(str(error))
        else:
            annotations += [annotation] if annotation else []
    return annotations


def _image_id(index: int, entry: Any, taken: Container[int]) -> int:
    number = _integer(entry.get("id")) if isinstance(entry, dict) else None
    if number is None:
        raise _BadEntryError(f"images[{index}] must be an object with an integer id")
    if number in taken:
        raise _BadEntryError(f"images[{index}]: the id {number} is there already; give each of them its own")
    return number


def _image(number: int, entry: dict[str, Any]) -> _Image:
    name = entry.get("file_name")
    if not isinstance(name, str) or not name or not _is_text(name):
        raise _BadEntryError(f"image {number}: file_name is missing or no text; name its file in the images folder")
    width, height = _integer(entry.get("width")), _integer(entry.get("height"))
    if width is None or height is None or width < 1 or height < 1:
        raise _BadEntryError(
            f"image {number} ({name}): width and height must be positive integers, not {_shown(entry.get('width'))} "
            f"and {_shown(entry.get('height'))}"
        )
    if width * height > MAX_PIXELS:
        raise _BadEntryError(
            f"image {number} ({name}): {width}x{height} are more than the {MAX_PIXELS // 10**6} million pixels that "
            "are read; cut it into tiles, or scale it down, with its boxes"
        )
    return _Image(number, name, width, height)


def _annotation(index: int, entry: Any, images: dict[int, _Image | None], categories: set[int]) -> _Annotation | None:
    """The annotation with its box cut at the image's edge; None where its image has a fault."""
    if not isinstance(entry, dict):
        raise _BadEntryError(f"annotations[{index}] must be an object")
    own_id = entry.get("id")  # needed for nothing else than to be named by
    where = f"annotation {_shown(own_id)}" if isinstance(own_id, int | float | str) else f"annotations[{index}]"
    box, area = entry.get("bbox"), entry.get("area")
    crowd = 0 if entry.get("iscrowd") is None else entry["iscrowd"]
    image_id, category_id = _integer(entry.get("image_id")), _integer(entry.get("category_id"))
    if image_id is None or image_id not in images:
        raise _BadEntryError(
            f"{where}: no image has the id {_shown(entry.get('image_id'))}; add the image, or delete the annotation"
        )
    image = images[image_id]
    where = f"{where} (image {image_id})"
    if category_id is None or category_id not in categories:
        ids = ", ".join(map(str, sorted(categories)))
        raise _BadEntryError(
            f"{where}: no category has the id {_shown(entry.get('category_id'))}, only {ids}; correct it, or add it"
        )
    if crowd not in (0, 1):
        raise _BadEntryError(f"{where}: iscrowd must be 0 or 1, not {_shown(crowd)}")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
        raise _BadEntryError(f"{where}: bbox must be four finite numbers [x, y, width, height], not {_shown(box)}")
    if area is not None and (not _is_finite(area) or area < 0):
        raise _BadEntryError(f"{where}: area must be a finite number of at least 0, not {_shown(area)}")
    if image is None:
        return None
    box = _cut(box, image, where)
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": box,
        "area": box[2] * box[3] if area is None else area,
        "iscrowd": int(crowd),
    }


def _cut(box: list[float], image: _Image, where: str) -> list[float]:
    """The part of a box that lies in its image. Raises _BadEntryError where there is none, or much lies beyond."""
    x, y, width, height = box
    if width <= MIN_SIDE * image.width or height <= MIN_SIDE * image.height:
        raise _BadEntryError(f"{where}: bbox {box} has no area; give it a positive width and height, or delete it")
    overhang = max(-x, -y, x + width - image.width, y + height - image.height)
    x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + width, image.width), min(y + height, image.height)
    problem = ""
    if x2 - x1 <= MIN_SIDE * image.width or y2 - y1 <= MIN_SIDE * image.height:
        problem = "lies outside"
    elif overhang > MAX_OVERHANG:
        problem = f"reaches {overhang:g} px beyond"
    if problem:
        raise _BadEntryError(
            f"{where}: bbox {box} {problem} the image of {image.width}x{image.height}; it must be "
            "[x, y, width, height] in pixels. Correct it, or delete it"
        )
    return [x1, y1, x2 - x1, y2 - y1] if overhang > 0 else box


def _settle(faults: list[str], path: Path, on_bad: Literal["error", "skip"]) -> None:
    if not faults:
        return
    shown = "".join(f"\n  {fault}" for fault in faults[:SHOWN_FAULTS])
    if len(faults) > SHOWN_FAULTS:
        shown += f"\n  and {len(faults) - SHOWN_FAULTS} more"
    number = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    if on_bad == "error":
        raise KDError(
            f'{path}: {number}:{shown}\nMend them, or leave them out: kd\'s --skip-bad, on_bad="skip" in Python.'
        )
    log.warning("%s: left out, as they are bad: %s%s", path, number, shown)


def _integer(value: object) -> int | None:
    """A whole number, also where it is written as 3.0; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None


def _is_text(value: object) -> bool:
    """Whether it is text that can be written to files: JSON may hold halves of characters."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _is_finite(value: object) -> bool:
    """Whether it is a number, and neither NaN nor infinite nor so large that sums would overflow."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _shown(value: object) -> str:
    """A wrong value as it stands in the file, cut where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
