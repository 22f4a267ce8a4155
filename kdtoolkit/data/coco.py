"""Photos with boxes in COCO's format: all is checked when the data set is opened, and said in one error."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor  # type: ignore[attr-defined]

from kdtoolkit.data.dataset import DetectionDataset, Sample, digest
from kdtoolkit.errors import KDError

CACHE_BYTES = 2 * 2**30
MAX_OVERHANG = 1.0  # pixels that a box may reach beyond its image; annotation tools round that much. It is cut there.
SHOWN_FAULTS = 5
EXIF_ORIENTATION = 0x0112

log = logging.getLogger(__name__)


class CocoDetection(DetectionDataset):
    """Images of `root/images` with the boxes of `root/annotations/{split}.json`; labels follow the category ids.

    `max_size`: images with a longer side are scaled down to it, antialiased; none is enlarged. `class_names`: these
    categories only, labelled in this order. `on_bad`: `skip` leaves bad images and annotations out and says so in one
    warning. `progress(done, total)` counts images read. Images are kept in memory if all of them take at most
    `cache_bytes`; else they are decoded on access.

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
        self._path, self._folder = _locate(Path(root), split)
        raw = self._path.read_bytes()
        self._digest = hashlib.sha256(raw).hexdigest()
        document = _parse(raw, self._path)
        self._categories = _categories(document["categories"], class_names, self._path)
        self.class_names = tuple(category["name"] for category in self._categories)

        faults: list[str] = []
        images = _images(document["images"], faults)
        annotations = _annotations(document, images, faults)
        total = sum(3 * math.prod(self._presented_size(image)) for image in images.values() if image)
        cached: list[Tensor] = []
        self._images: list[_Image] = []
        for done, image in enumerate(images.values(), 1):
            if image is not None:
                try:
                    pixels = self._read(image, decode=total <= cache_bytes)
                except _BadEntryError as error:
                    faults.append(str(error))
                else:
                    self._images.append(image)
                    cached += [] if pixels is None else [pixels]
            if progress is not None:
                progress(done, len(images))
        self._cache = cached or None

        _settle(faults, self._path, on_bad)
        chosen = {category["id"] for category in self._categories}
        good = {image.id for image in self._images}
        self._annotations = [a for a in annotations if a["image_id"] in good and a["category_id"] in chosen]
        if not self._images:
            raise KDError(f"{self._path} lists no usable image; nothing can be trained or scored on it")
        if all(a["iscrowd"] for a in self._annotations):
            raise KDError(
                f"{self._path} has no usable annotation of {', '.join(self.class_names)}; "
                "nothing can be trained or scored on it"
            )
        self._samples = list(self._make_samples())

    def __str__(self) -> str:
        return str(self._path)

    def __len__(self) -> int:
        """Number of images, those without boxes included."""
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Sample]:
        """Image (3, H, W) uint8 and its boxes. Raises KDError where a file that is not cached cannot be decoded."""
        if self._cache is not None:
            return self._cache[index], self._samples[index]
        try:
            pixels = self._read(self._images[index], decode=True)
        except _BadEntryError as error:
            raise KDError(f"{self._path}: {error}") from None
        assert pixels is not None
        return pixels, self._samples[index]

    def coco(self) -> dict[str, Any]:
        """Ground truth as the file has it, but for what was left out; boxes are cut at the image's edge."""
        images = [
            {"id": image.id, "file_name": image.file_name, "width": image.width, "height": image.height}
            for image in self._images
        ]
        return {"info": {}, "images": images, "annotations": self._annotations, "categories": self._categories}

    def fingerprint(self) -> str:
        """Digest of the annotation file, of names and sizes of the image files, and of the arguments."""
        files = [(image.file_name, (self._folder / image.file_name).stat().st_size) for image in self._images]
        return digest(self._digest, self._max_size, self.class_names, files)

    def _presented_size(self, image: _Image) -> tuple[int, int]:
        """(height, width) of an image as it is given out."""
        longest = max(image.height, image.width)
        if self._max_size is None or longest <= self._max_size:
            return image.height, image.width
        scale = self._max_size / longest
        return max(1, round(image.height * scale)), max(1, round(image.width * scale))

    def _read(self, image: _Image, *, decode: bool) -> Tensor | None:
        """Check an image's file, and decode it if asked to. Raises _BadEntryError."""
        path = self._folder / image.file_name
        try:
            if not path.is_file():
                raise _BadEntryError(f"{image}: there is no file {path}; file_name is relative to the images folder")
            with Image.open(path) as opened:
                width, height = opened.size
                turned = opened.getexif().get(EXIF_ORIENTATION, 1)
                if turned in (5, 6, 7, 8):  # a quarter turn
                    width, height = height, width
                if (width, height) != (image.width, image.height):
                    how = " with its EXIF orientation applied" if turned != 1 else ""
                    raise _BadEntryError(
                        f"{image}: the file is {width}x{height}{how}, the JSON says {image.width}x{image.height}; "
                        "correct width and height there, and make sure that the boxes fit"
                    )
                if not decode:
                    return None
                picture = _to_rgb(ImageOps.exif_transpose(opened))
        except _BadEntryError:
            raise
        except Exception as error:  # on broken files Pillow's decoders raise nearly anything
            raise _BadEntryError(f"{image}: the file cannot be decoded ({error}); replace it") from None
        size = self._presented_size(image)
        if size != (height, width):
            picture = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)  # Pillow's is antialiased
        pixels: Tensor = pil_to_tensor(picture)
        return pixels

    def _make_samples(self) -> Iterator[Sample]:
        label_of = {category["id"]: label for label, category in enumerate(self._categories)}
        targets: dict[int, list[dict[str, Any]]] = {image.id: [] for image in self._images}
        for annotation in self._annotations:
            if not annotation["iscrowd"]:
                targets[annotation["image_id"]].append(annotation)
        for image in self._images:
            height, width = self._presented_size(image)
            scale = torch.tensor([width / image.width, height / image.height])
            xywh = torch.tensor([a["bbox"] for a in targets[image.id]], dtype=torch.float64).reshape(-1, 4)
            corners = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
            yield {
                "boxes": (corners * scale.repeat(2)).float(),
                "labels": torch.tensor([label_of[a["category_id"]] for a in targets[image.id]], dtype=torch.int64),
                "image_id": image.id,
                "original_size": (image.height, image.width),
            }


@dataclass(frozen=True)
class _Image:
    id: int
    file_name: str
    width: int
    height: int

    def __str__(self) -> str:
        return f"image {self.id} ({self.file_name})"


class _BadEntryError(Exception):
    """Why an image or annotation cannot be used, and how to mend it."""


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


def _parse(raw: bytes, path: Path) -> dict[str, list[Any]]:
    """The file's content, with the three lists that must be in it."""
    try:
        document = json.loads(raw)
    except json.JSONDecodeError as error:
        raise KDError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}). Export the file again."
        ) from None
    except UnicodeDecodeError as error:
        raise KDError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start})") from None
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
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or not _is_int(entry.get("id")) or not isinstance(entry.get("name"), str):
            raise KDError(f"{path}: categories[{index}] must be an object with an integer id and a name")
        for other in categories:
            if same := [key for key in ("id", "name") if other[key] == entry[key]]:
                raise KDError(
                    f"{path}: categories {other['id']} ({other['name']}) and {entry['id']} ({entry['name']}) have the "
                    f"same {' and '.join(same)}; give each its own"
                )
        categories.append({"id": entry["id"], "name": entry["name"]})
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
            image_id = _new_id("images", index, entry, images)
            images[image_id] = None
            images[image_id] = _image(entry)
        except _BadEntryError as error:
            faults.append(str(error))
    return images


def _annotations(
    document: dict[str, list[Any]], images: dict[int, _Image | None], faults: list[str]
) -> list[dict[str, Any]]:
    """What scoring and training need of each good annotation; those of images with a fault are left out."""
    categories = {category["id"] for category in document["categories"]}
    annotations: list[dict[str, Any]] = []
    ids: set[int] = set()
    for index, entry in enumerate(document["annotations"]):
        try:
            ids.add(_new_id("annotations", index, entry, ids))
            annotation = _annotation(entry, images, categories)
        except _BadEntryError as error:
            faults.append(str(error))
        else:
            annotations += [annotation] if annotation else []
    return annotations


def _new_id(key: str, index: int, entry: Any, taken: Container[int]) -> int:
    if not isinstance(entry, dict) or not _is_int(entry.get("id")):
        raise _BadEntryError(f"{key}[{index}] must be an object with an integer id")
    number: int = entry["id"]
    if number in taken:
        raise _BadEntryError(f"{key}[{index}]: the id {number} is there already; give each of them its own")
    return number


def _image(entry: dict[str, Any]) -> _Image:
    name: Any = entry.get("file_name")
    width: Any = entry.get("width")
    height: Any = entry.get("height")
    if not isinstance(name, str) or not name:
        raise _BadEntryError(
            f"image {entry['id']}: file_name is missing or no text; name its file in the images folder"
        )
    if not _is_int(width) or not _is_int(height) or width < 1 or height < 1:
        raise _BadEntryError(
            f"image {entry['id']} ({name}): width and height must be positive integers, not {width!r} and {height!r}"
        )
    return _Image(entry["id"], name, width, height)


def _annotation(entry: dict[str, Any], images: dict[int, _Image | None], categories: set[int]) -> dict[str, Any] | None:
    """The annotation with its box cut at the image's edge; None where its image has a fault."""
    image_id, category_id, box, area = (entry.get(key) for key in ("image_id", "category_id", "bbox", "area"))
    crowd = entry.get("iscrowd", 0)
    if not _is_int(image_id) or image_id not in images:
        raise _BadEntryError(
            f"annotation {entry['id']}: no image has the id {image_id!r}; add the image, or delete the annotation"
        )
    image = images[image_id]
    where = f"annotation {entry['id']} (image {image_id})"
    if not _is_int(category_id) or category_id not in categories:
        ids = ", ".join(map(str, sorted(categories)))
        raise _BadEntryError(f"{where}: no category has the id {category_id!r}, only {ids}; correct it, or add it")
    if crowd not in (0, 1):
        raise _BadEntryError(f"{where}: iscrowd must be 0 or 1, not {crowd!r}")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
        raise _BadEntryError(f"{where}: bbox must be four finite numbers [x, y, width, height], not {box}")
    if area is not None and (not _is_finite(area) or area < 0):
        raise _BadEntryError(f"{where}: area must be a finite number of at least 0, not {area!r}")
    if image is None:
        return None
    x, y, width, height = box
    if width <= 0 or height <= 0:
        raise _BadEntryError(f"{where}: bbox {box} has no area; give it a positive width and height, or delete it")
    overhang = max(-x, -y, x + width - image.width, y + height - image.height)
    x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + width, image.width), min(y + height, image.height)
    if overhang > MAX_OVERHANG or x2 <= x1 or y2 <= y1:
        raise _BadEntryError(
            f"{where}: bbox {box} reaches {overhang:g} px beyond the image of {image.width}x{image.height}; it must be "
            "[x, y, width, height] in pixels. Correct it, or delete it"
        )
    if overhang > 0:
        box = [x1, y1, x2 - x1, y2 - y1]
    return {
        "id": entry["id"],
        "image_id": image_id,
        "category_id": category_id,
        "bbox": box,
        "area": box[2] * box[3] if area is None else area,
        "iscrowd": int(crowd),
    }


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


def _to_rgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB from any mode. Transparency is dropped; 16-bit grey is scaled, which `convert` would cut off at 255."""
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64) >> 8
        picture = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    elif picture.mode == "F":
        raise ValueError("floating-point pixels have no stated range: store it with 8 or 16 bits")
    return picture.convert("RGB")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    """Whether it is a number, and neither NaN nor infinite nor so large that sums would overflow."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9
