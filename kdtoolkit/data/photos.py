"""A data set of photos. It is the same for all formats of annotations."""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kdtoolkit.data.cache import CachedPicture, PictureCache
from kdtoolkit.data.dataset import DetectionDataset, Sample, digest
from kdtoolkit.data.pictures import PictureError, decode
from kdtoolkit.data.records import Category, Fault, Photo, Reading, naming, settle, tell
from kdtoolkit.errors import KDError

MEMORY_BYTES = 2 * 2**30
SCORED_DETECTIONS = 100  # an image, by COCO's rule
DECODERS = 4  # threads; more would need much memory for large photos

log = logging.getLogger(__name__)


class PhotoDataset(DetectionDataset):
    """The photos that a reader found, made by `open_dataset`, which explains the arguments.

    Photos are decoded on access. `in_memory` decodes all of them once, and keeps them in memory or in the folder
    `cache`. Crowds and VOC's difficult objects are no targets. `coco` has them, and scoring treats them by COCO's
    rules. `root`: the folder of the data set. `held_out`: how the split was made, if the files have none.
    """

    def __init__(
        self,
        reading: Reading,
        *,
        max_size: int | None = None,
        class_names: Sequence[str] | None = None,
        on_bad: Literal["error", "skip"] = "error",
        memory_bytes: int = MEMORY_BYTES,
        cache: Path | None = None,
    ) -> None:
        if max_size is not None and max_size < 1:
            raise KDError(f"max_size must be at least 1 px, not {max_size}")
        self._source = reading.source
        self.root = reading.root
        self.has_ids = reading.has_ids
        self.held_out = reading.held_out
        self._categories = _chosen(reading, class_names)
        self.class_names = tuple(category.name for category in self._categories)
        settle(reading.faults, reading.source, on_bad)
        tell(reading.source, tuple(reading.remarks))
        self._photos = _relabelled(reading, self._categories)
        self._count = len(self._photos)
        self._max_size = max_size
        self._on_bad: Literal["error", "skip"] = on_bad
        self._memory_bytes = memory_bytes
        self._cache = None if cache is None else PictureCache(cache)
        self._hashes: dict[Path, str] = {}
        self._kept: list[Tensor | CachedPicture] | None = None
        self._in_memory: PhotoDataset | None = None
        self._check_not_empty()
        self._warn_of_many_boxes()

    def __str__(self) -> str:
        part = "" if len(self) == self._count and not self.held_out else f"{len(self)} images of "
        return f"{part}{self._source}"

    def __len__(self) -> int:
        """Number of images, those without boxes included."""
        return len(self._photos)

    def __getitem__(self, index: int) -> tuple[Tensor, Sample]:
        """Image (3, H, W) uint8 and its boxes. Raises KDError if the file has to be decoded, and cannot be."""
        photo = self._photos[index]
        if self._kept is not None:
            kept = self._kept[index]
            return kept if isinstance(kept, Tensor) else kept.read(), self._sample(photo)
        try:
            return self._decoded(photo), self._sample(photo)
        except PictureError as error:
            raise KDError(f"{self._source}: {error}") from None

    def coco(self) -> dict[str, Any]:
        """Ground truth as in the files, without the entries that were left out; boxes are cut at the image's edge.

        Annotations get new numbers, because files may give them no ids, or the same id twice.
        """
        images = [
            {"id": photo.id, "file_name": photo.name, "width": photo.width, "height": photo.height}
            for photo in self._photos
        ]
        annotations = [
            {
                "id": number,
                "image_id": photo.id,
                "category_id": self._categories[box.label].id,
                "bbox": list(box.xywh),
                "area": box.area,
                "iscrowd": int(box.crowd),
            }
            for number, (photo, box) in enumerate(
                ((photo, box) for photo in self._photos for box in photo.boxes), start=1
            )
        ]
        categories = [{"id": category.id, "name": category.name} for category in self._categories]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}

    def files(self) -> list[str]:
        """The path of each image file."""
        return [Path(os.path.abspath(photo.path)).as_posix() for photo in self._photos]

    def fingerprint(self) -> str:
        """Digest of the content of all image files, of their annotations and of the arguments."""
        content = [
            (
                photo.id,
                photo.name,
                photo.width,
                photo.height,
                self._hash(photo),
                [(self._categories[box.label].id, *box.xywh, box.area, box.crowd) for box in photo.boxes],
            )
            for photo in self._photos
        ]
        return digest(self._max_size, [(category.id, category.name) for category in self._categories], content)

    def subset(self, count: int | None, seed: int) -> DetectionDataset:
        """Choose `count` images, as `DetectionDataset.subset` does. Also raises KDError if none of them has a box."""
        part = super().subset(count, seed)
        if isinstance(part, PhotoDataset) and part._has_no_box():
            raise KDError(
                f"{part}, chosen by seed {seed}, have no box: nothing can be trained or scored on them. Ask for more "
                "images, or for another seed"
            )
        return part

    def split(self, share: float, seed: int) -> tuple[PhotoDataset, PhotoDataset]:
        """Hold out a share of the images, chosen by `seed`: those that are left, and those that are held out.

        Raises KDError if one of the two parts would have no image or no box.
        """
        count = round(share * len(self))
        if not 0 < count < len(self):
            raise KDError(
                f"{self} has {len(self)} images, of which a share of {share:g} cannot be held out: choose another share"
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        rest, part = self._part(sorted(order[count:])), self._part(sorted(order[:count]))
        if rest._has_no_box() or part._has_no_box():
            raise KDError(
                f"{self}: with a share of {share:g} held out, one of the two parts has no box. Choose a different share"
            )
        return rest, part

    def resized(self, max_size: int) -> PhotoDataset:
        """The same photos, where those with a longer side than `max_size` pixels are scaled down to it."""
        if max_size == self._max_size:
            return self
        part = self._part(range(len(self)))
        part._kept, part._max_size = None, max_size
        return part

    def in_memory(self) -> DetectionDataset:
        """The data set with its images decoded and kept: in the cache's folder if there is one, else in memory.

        If its images take too much of either, the data set is returned unchanged. `on_bad` decides whether files that
        cannot be decoded are an error (KDError) or are left out.
        """
        if self._in_memory is None and self._kept is None:
            if not self._has_room():
                return self
            with ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1)) as pool:
                found = list(pool.map(self._keep, self._photos))
            faults = [Fault(self._source, str(each), "image") for each in found if isinstance(each, PictureError)]
            settle(faults, self._source, self._on_bad)
            part = self._part([index for index, each in enumerate(found) if not isinstance(each, PictureError)])
            part._check_not_empty()
            part._kept = [each for each in found if not isinstance(each, PictureError)]
            self._in_memory = part
        return self._in_memory or self

    def _has_room(self) -> bool:
        """Whether all images can be kept, in memory or on disk."""
        if self._cache is None:
            return sum(3 * math.prod(self._presented_size(photo)) for photo in self._photos) <= self._memory_bytes
        places = []
        for photo in self._photos:
            with suppress(PictureError):  # `decode` reports it later
                places.append(self._cache.picture(self._hash(photo), self._presented_size(photo)))
        return self._cache.has_room(sum(place.bytes for place in places if not place.exists()))

    def _keep(self, photo: Photo) -> Tensor | CachedPicture | PictureError:
        """A photo, decoded; or why it cannot be."""
        try:
            if self._cache is None:
                return self._decoded(photo)
            place = self._cache.picture(self._hash(photo), self._presented_size(photo))
            if not place.exists():
                self._cache.write(place, self._decoded(photo))
            return place
        except PictureError as error:
            return error

    def _part(self, indices: Sequence[int]) -> PhotoDataset:
        part = copy.copy(self)
        part._photos = [self._photos[index] for index in indices]
        part._kept = None if self._kept is None else [self._kept[index] for index in indices]
        part._in_memory = None
        return part

    def _check_not_empty(self) -> None:
        if not self._photos:
            raise KDError(f"{self._source} lists no usable image; nothing can be trained or scored on it")
        if self._has_no_box():
            raise KDError(
                f"{self} has no usable annotation of {', '.join(self.class_names)}; "
                "nothing can be trained or scored on it"
            )

    def _has_no_box(self) -> bool:
        return all(box.crowd for photo in self._photos for box in photo.boxes)

    def _warn_of_many_boxes(self) -> None:
        fullest = max(self._photos, key=lambda photo: len(photo.boxes))
        if (most := len(fullest.boxes)) > SCORED_DETECTIONS:
            log.warning(
                "%s: images with up to %d boxes (%s). COCO scores at most %d detections an image, so AP is bounded; "
                "detectors like DETR find at most one object per query. Cut such images into tiles if all their "
                "objects matter.",
                self._source,
                most,
                fullest,
                SCORED_DETECTIONS,
            )

    def _presented_size(self, photo: Photo) -> tuple[int, int]:
        """(height, width) of a photo as it is given out."""
        longest = max(photo.height, photo.width)
        if self._max_size is None or longest <= self._max_size:
            return photo.height, photo.width
        scale = self._max_size / longest
        return max(1, round(photo.height * scale)), max(1, round(photo.width * scale))

    def _decoded(self, photo: Photo) -> Tensor:
        """Decode a photo. Raises PictureError that names it."""
        with naming(photo.title):
            return decode(photo.path, self._presented_size(photo))

    def _sample(self, photo: Photo) -> Sample:
        height, width = self._presented_size(photo)
        found = [box for box in photo.boxes if not box.crowd]
        scale = torch.tensor([width / photo.width, height / photo.height])
        xywh = torch.tensor([box.xywh for box in found], dtype=torch.float64).reshape(-1, 4)
        corners = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
        return {
            "boxes": (corners * scale.repeat(2)).float(),
            "labels": torch.tensor([box.label for box in found], dtype=torch.int64),
            "image_id": photo.id,
            "original_size": (photo.height, photo.width),
        }

    def _hash(self, photo: Photo) -> str:
        """Digest of a file's bytes. Raises PictureError if it cannot be read."""
        if photo.path not in self._hashes:
            try:
                with photo.path.open("rb") as file:
                    self._hashes[photo.path] = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise PictureError(f"{photo}: the file {photo.path} cannot be read ({error.strerror})") from None
        return self._hashes[photo.path]


def _chosen(reading: Reading, class_names: Sequence[str] | None) -> list[Category]:
    """The classes of these names, in this order; all of them if `class_names` is None. Raises KDError."""
    if class_names is None:
        return reading.categories
    by_name = {category.name: category for category in reading.categories}
    if unknown := [name for name in class_names if name not in by_name]:
        raise KDError(f"{reading.source} has no class {', '.join(unknown)}; there are {', '.join(by_name)}")
    if len(set(class_names)) < len(class_names):
        twice = next(name for name in class_names if list(class_names).count(name) > 1)
        raise KDError(f"class_names has {twice} twice; name each class once")
    return [by_name[name] for name in class_names]


def _relabelled(reading: Reading, categories: list[Category]) -> list[Photo]:
    """The photos with their objects of these classes."""
    if categories == reading.categories:
        return reading.photos
    labels = {reading.categories.index(category): label for label, category in enumerate(categories)}
    return [
        replace(photo, boxes=tuple(replace(box, label=labels[box.label]) for box in photo.boxes if box.label in labels))
        for photo in reading.photos
    ]
