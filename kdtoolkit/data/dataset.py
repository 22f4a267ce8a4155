"""What every data set offers: images with boxes, their ground truth for scoring, and a fingerprint of the content."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdtoolkit.contract import Recorded
from kdtoolkit.errors import KDError


class Sample(TypedDict):
    """Ground truth of one image as it is given out, which may be smaller than the original.

    `boxes`: (G, 4) float32, xyxy in pixels of the image given out. `labels`: (G,) int64 in [0, K). `image_id`: the
    image's id in `DetectionDataset.coco`. `original_size`: (height, width) of the image that `coco` refers to.
    `recorded`: what a teacher found on the image, if it is a file of detections; boxes as those of the ground truth.
    """

    boxes: Tensor
    labels: Tensor
    image_id: int
    original_size: tuple[int, int]
    recorded: NotRequired[Recorded]


class DetectionDataset(Dataset[tuple[Tensor, Sample]], ABC):
    """Images with boxes. A model is shown the items; its detections are scored against `coco`.

    `has_ids`: whether the ids of images and categories in `coco` are the user's own, so that a file of detections may
    refer to them.
    """

    class_names: tuple[str, ...]
    has_ids: bool = True

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Tensor, Sample]:
        """Image (3, H, W) uint8 RGB and its ground truth; `index` in [0, len)."""

    @abstractmethod
    def coco(self) -> dict[str, Any]:
        """Ground truth in COCO's format at original sizes; `categories` are in the order of `class_names`."""

    def files(self) -> list[str]:
        """The file of each image, with slashes and as many folders as are known."""
        return [image["file_name"] for image in self.coco()["images"]]

    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of everything that determines the content. Equal data in two folders have equal digests."""

    def in_memory(self) -> DetectionDataset:
        """The data set with its images decoded and kept, for a reader that needs them again and again.

        A data set that cannot keep its images returns itself. Raises KDError if an image cannot be decoded.
        """
        return self

    def subset(self, count: int | None, seed: int) -> DetectionDataset:
        """Choose `count` images by `seed`, and keep their order. None means all. No image is decoded.

        Raises KDError if `count` is below 1, or more than there are.
        """
        if count is None:
            return self
        if not 1 <= count <= len(self):
            raise KDError(f"a subset of {count} images is too large: the data set has {len(self)}; ask for no more")
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return self._part(sorted(chosen.tolist()))

    def _part(self, indices: Sequence[int]) -> DetectionDataset:
        return _Subset(self, indices)


class _Subset(DetectionDataset):
    def __init__(self, whole: DetectionDataset, indices: Sequence[int]) -> None:
        self.class_names = whole.class_names
        self.has_ids = whole.has_ids
        self._whole = whole
        self._indices = indices

    def __str__(self) -> str:
        return f"{len(self)} images of {self._whole}"

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Sample]:
        return self._whole[self._indices[index]]

    def coco(self) -> dict[str, Any]:
        truth = self._whole.coco()
        images = [truth["images"][i] for i in self._indices]
        ids = {image["id"] for image in images}
        annotations = [a for a in truth["annotations"] if a["image_id"] in ids]
        return {**truth, "images": images, "annotations": annotations}

    def files(self) -> list[str]:
        files = self._whole.files()
        return [files[i] for i in self._indices]

    def fingerprint(self) -> str:
        return digest(self._whole.fingerprint(), self._indices)


def own_ids(dataset: DetectionDataset) -> dict[int, str] | None:
    """The names of the classes by the user's own ids; None if there are no such ids."""
    return {each["id"]: each["name"] for each in dataset.coco()["categories"]} if dataset.has_ids else None


def check_is_dataset(dataset: object) -> None:
    """Raises KDError for anything but a data set of kdtoolkit, such as a list of images."""
    if not isinstance(dataset, DetectionDataset):
        raise KDError(
            f"the data set is a {type(dataset).__name__}; it must be a DetectionDataset, such as "
            "open_dataset(folder, 'train') or your own subclass of kdtoolkit.data.DetectionDataset"
        )


def checked_item(dataset: DetectionDataset, index: int) -> tuple[Tensor, Sample]:
    """An item of a data set, which users may have written. Raises KDError if its image is not (3, H, W) uint8."""
    image, sample = dataset[index]
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise KDError(f"image {index} of {dataset} is {what}; data sets give tensors (3, H, W) of uint8, 0 to 255")
    return image, sample


def digest(*parts: object) -> str:
    """A hash of the parts as Python writes them: 32 hexadecimal digits."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def check_same_classes(a: DetectionDataset, b: DetectionDataset) -> None:
    """Check that labels mean the same in both. Raises KDError that names the classes that differ."""
    if tuple(a.class_names) == tuple(b.class_names):  # users' data sets may have lists
        return
    only_a = [name for name in a.class_names if name not in b.class_names]
    only_b = [name for name in b.class_names if name not in a.class_names]
    if only_a or only_b:
        reason = f"only the first has {_listed(only_a)}, only the second {_listed(only_b)}"
    else:
        reason = f"the same classes come in a different order: {_listed(a.class_names)}; {_listed(b.class_names)}"
    raise KDError(f"the classes of {a} and {b} differ: {reason}. Give both the same classes in the same order.")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
