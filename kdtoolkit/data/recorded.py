"""The detections of a file beside the labels of a data set, so that they go through the same changes as the image."""

from __future__ import annotations

import copy
import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdtoolkit.boxes import pairwise_iou
from kdtoolkit.contract import Recorded, Target
from kdtoolkit.data.dataset import DetectionDataset, Sample, digest
from kdtoolkit.data.detections import DetectionFile, Key
from kdtoolkit.data.records import ENDINGS, shown
from kdtoolkit.errors import KDError

MOST_WITHOUT = 0.5  # of the images may lack detections; more are taken for images that the detector has not seen
MOST_BEYOND = 0.1  # of the boxes may reach far beyond their images
FAR = 0.1  # of an image's side
LEAST_FOUND = 0.05  # of the objects that must have a detection on them; fewer look like boxes in different pixels
ON_OBJECT = 0.3  # IoU
ENOUGH = 20  # objects tell this; fewer may be missed by chance


class WithDetections(DetectionDataset):
    """A data set that gives out what a teacher has found on each image, beside the labels; `attach` makes it.

    Boxes are cut at the image's edge. Those outside the image are left out. Entries of an image with equal boxes are
    one detection with several classes.
    """

    def __init__(self, dataset: DetectionDataset, file: DetectionFile) -> None:
        self.class_names = dataset.class_names
        self.has_ids = dataset.has_ids
        self.file = file
        self._inner = dataset
        rows, places = found_on(file, dataset)
        corners, inside = _corners(file.boxes[rows], _sizes(dataset)[places])
        order = np.argsort(places[inside], kind="stable")
        self._rows, self._corners = rows[inside][order], corners[inside][order]
        self._starts = np.searchsorted(places[inside][order], np.arange(len(dataset) + 1))

    def __str__(self) -> str:
        return str(self._inner)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._inner)

    def __getitem__(self, index: int) -> tuple[Tensor, Sample]:
        """An image and its ground truth, with the detections in pixels of the image that is given out."""
        image, sample = self._inner[index]
        boxes, probabilities = self._of(index)
        (height, width), (old_height, old_width) = image.shape[-2:], sample["original_size"]
        boxes = boxes * np.tile([width / old_width, height / old_height], 2)
        recorded = Recorded(boxes=torch.from_numpy(boxes).float(), probabilities=torch.from_numpy(probabilities))
        return image, {**sample, "recorded": recorded}

    def _of(self, index: int) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """The distinct boxes (D, 4) on an image, and their probabilities (D, K)."""
        part = slice(self._starts[index], self._starts[index + 1])
        rows, corners = self._rows[part], self._corners[part]
        if self.file.probabilities is None:
            scores = np.zeros((len(rows), len(self.file.class_names)), np.float32)
            scores[np.arange(len(rows)), self.file.labels[rows]] = self.file.scores[rows]
        else:
            scores = self.file.probabilities[rows]
        boxes, first, which = np.unique(corners, axis=0, return_index=True, return_inverse=True)
        best = np.zeros((len(boxes), scores.shape[1]), np.float32)
        np.maximum.at(best, which.reshape(-1), scores)
        order = np.argsort(first)
        return boxes[order], best[order]

    def coco(self) -> dict[str, Any]:
        """Ground truth of the data set."""
        return self._inner.coco()

    def files(self) -> list[str]:
        """Files of the data set."""
        return self._inner.files()

    def fingerprint(self) -> str:
        """Digest of the data set and of the file."""
        return digest(self._inner.fingerprint(), self.file.digest)

    def in_memory(self) -> DetectionDataset:
        """The data set with its images kept in memory. Detections are not looked up anew."""
        kept = copy.copy(self)
        kept._inner = self._inner.in_memory()
        return kept


def attach(dataset: DetectionDataset, file: DetectionFile) -> DetectionDataset:
    """The data set, with the detections of a file beside the labels of each image.

    A training loop on its `batches` hands them on to the teacher: they go through the same crops, flips, mosaics and
    resizing as the image.

    Raises KDError if most images have no detection in the file, or if the boxes do not fit the images.
    """
    return dataset if isinstance(dataset, WithDetections) and dataset.file is file else WithDetections(dataset, file)


def found_on(file: DetectionFile, dataset: DetectionDataset) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The detections (E',) of a file that are on images of a data set, and the place of the image of each.

    Raises KDError if most images have no detection, if a name in the file fits several images, if many boxes do not fit
    their images, or if hardly a labelled object has a detection on it.
    """
    rows, places = _checked(file, _Names.of(dataset), _sizes(dataset), str(dataset))
    _check_objects(file, rows, places, dataset)
    return rows, places


def found_on_files(
    file: DetectionFile, sizes: Mapping[Path, tuple[int, int]], title: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The detections (E',) of a file that are on these image files, and the place of the image of each.

    `sizes`: (width, height) of each image. `title`: what errors call the images. Raises the errors of `found_on`.
    """
    return _checked(file, _Names.of(list(sizes)), np.array(list(sizes.values()), np.float64).reshape(-1, 2), title)


def why_not_seen(file: DetectionFile, dataset: DetectionDataset) -> str | None:
    """Why a file is not taken for one of a data set: most images have no detection; None if it is."""
    names = _Names.of(dataset)
    return _why_not_seen(file, str(dataset), names, _on(file, names)[1])


def check_images(
    file: DetectionFile,
    parts: Mapping[str, DetectionDataset | Sequence[Path]],
    others: Callable[[], Mapping[str, DetectionDataset]],
) -> tuple[str, ...]:
    """Check that each image of the file is one image of the parts, which are data sets or image files.

    `others` opens further parts of the data; it is called only if an image is in none of `parts`.

    Returns a note on images that are nowhere, if the file names them by their files: it may be of more images than
    these. Raises KDError that names the first entry whose image has an id that is nowhere, or is in several parts.
    """
    owners: list[dict[str, str]] = [{} for _ in file.keys]  # for each image its files, and a part that has each

    def look(parts: Mapping[str, DetectionDataset | Sequence[Path]], keys: Sequence[int]) -> None:
        for name, images in parts.items():
            names = _Names.of(images)
            for key, place in zip(keys, names.places(file, [file.keys[key] for key in keys]), strict=True):
                if place is not None:
                    owners[key].setdefault(names.files[place], name)

    look(parts, range(len(owners)))
    if unknown := [key for key, found in enumerate(owners) if not found]:
        for name, dataset in others().items():
            look({name: dataset}, [key for key in unknown if not owners[key]])
    for place, (key, found) in enumerate(zip(file.keys, owners, strict=True)):
        if len(found) == 1 or (not found and isinstance(key, str)):
            continue
        entry = f"{file.path}: detection {int(np.argmax(file.images == place))} (counted from 0) is on the image"
        if not found:
            raise KDError(
                f"{entry} {shown(key)}, and the data has no such image. image_id must be an id of the data's "
                "annotations in COCO's format; or leave it out and give a file_name, the path of the file in the "
                "images folder"
            )
        raise KDError(
            f"{entry} {shown(key)}, and there is one in {' and in '.join(found.values())}: give each entry a "
            "file_name with as many of its folders as tell them apart, such as train/0001.jpg"
        )
    if nowhere := [key for key, found in zip(file.keys, owners, strict=True) if not found]:
        which = f"{len(nowhere)} of the {len(file.keys)} images of {file.path}, such as {shown(nowhere[0])}"
        return (f"the data does not have {which}: their detections are left out",)
    return ()


class _Names:
    """How files of detections may name the images of a data set.

    `files`: the file of each image. `numbers`: the places of the images that a number may mean.
    """

    def __init__(self, files: Sequence[str], numbers: Mapping[int, list[int]]) -> None:
        self.files = files
        self._numbers = numbers
        self._parts = [PurePosixPath(unicodedata.normalize("NFC", file)).parts for file in files]
        self._by_end: dict[int, dict[tuple[str, ...], list[int]]] = {}

    @classmethod
    def of(cls, dataset: DetectionDataset | Sequence[Path]) -> _Names:
        if not isinstance(dataset, DetectionDataset):
            return cls([Path(os.path.abspath(path)).as_posix() for path in dataset], {})
        files = dataset.files()
        numbers: dict[int, list[int]] = {}
        if dataset.has_ids:
            numbers = {image["id"]: [place] for place, image in enumerate(dataset.coco()["images"])}
        elif dataset.class_names:
            # Frameworks that know no ids write the number that is the file's name. Images without labels have none.
            for place, file in enumerate(files):
                if (stem := _stem(PurePosixPath(file).name)).isdecimal():
                    numbers.setdefault(int(stem), []).append(place)
        return cls(files, numbers)

    def places(self, file: DetectionFile, keys: Sequence[Key]) -> list[int | None]:
        """For each key of a file the image's place; None if it is not there. Raises KDError if it fits several."""
        found: list[int | None] = []
        for key in keys:
            if len(places := self._fitting(key)) > 1:
                one, two = (self.files[place] for place in places[:2])
                raise KDError(
                    f"{file.path} has detections on the image {shown(key)}, which may be {one} or {two}: give its "
                    "entries a file_name with its folders"
                )
            found.append(places[0] if places else None)
        return found

    def _fitting(self, key: Key) -> list[int]:
        """The images whose number it is, or whose path ends in it."""
        if isinstance(key, int):
            return self._numbers.get(key, [])
        *folders, last = PurePosixPath(key).parts or ("",)
        places = self._ending(len(folders)).get((*folders, _stem(last)), [])
        return [place for place in places if last in (name := self._parts[place][-1], _stem(name))]

    def _ending(self, count: int) -> dict[tuple[str, ...], list[int]]:
        """The places of the images by their last `count` folders and their names without endings."""
        if count not in self._by_end:
            found = self._by_end.setdefault(count, {})
            for place, (*folders, name) in enumerate(self._parts):
                if count <= len(folders):
                    found.setdefault((*folders[len(folders) - count :], _stem(name)), []).append(place)
        return self._by_end[count]


def _checked(
    file: DetectionFile, names: _Names, sizes: NDArray[np.float64], title: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What `_on` returns. Raises KDError if most images have no detection, or if many boxes do not fit their images."""
    rows, places = _on(file, names)
    if reason := _why_not_seen(file, title, names, places):
        raise KDError(reason)
    _check_boxes(file, rows, sizes[places], title)
    return rows, places


def _on(file: DetectionFile, names: _Names) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The detections (E',) on these images, and the place of the image of each."""
    places = [-1 if place is None else place for place in names.places(file, file.keys)]
    of_entries = np.array(places, np.int64)[file.images]
    rows = np.flatnonzero(of_entries >= 0)
    return rows, of_entries[rows]


def _why_not_seen(file: DetectionFile, title: str, names: _Names, places: NDArray[np.int64]) -> str | None:
    """Which of the images the detector has not been run on, as far as the file shows that."""
    count = len(names.files)
    if file.listed is not None:
        seen = set(names.places(file, sorted(file.listed)))
        most = 0
    else:
        seen = set(places.tolist())
        most = int(MOST_WITHOUT * count)
    missing = [place for place in range(count) if place not in seen]
    if len(missing) <= most:
        return None
    which = f"{len(missing)} of the {count} images of {title}, such as {names.files[missing[0]]}"
    if file.listed is not None:
        return f"{file.path} does not list {which}, under `images`: run the detector on them too"
    return (
        f"{file.path} has no detection on {which}. Run the detector on all of them, and let it write low scores too. "
        "If it did, check how the file names images (image_id, or file_name); or list all images that the detector has "
        "seen in the file, under `images`"
    )


def _sizes(dataset: DetectionDataset) -> NDArray[np.float64]:
    """The (width, height) of each original image."""
    return np.array([(image["width"], image["height"]) for image in dataset.coco()["images"]], np.float64)


def _check_boxes(file: DetectionFile, rows: NDArray[np.int64], sizes: NDArray[np.float64], title: str) -> None:
    """Raise KDError if many boxes reach far beyond their images: then they are in different pixels, or no xywh.

    `sizes`: (E', 2) of the image of each of the `rows`.
    """
    boxes = file.boxes[rows]
    beyond = ((boxes[:, :2] + boxes[:, 2:] > (1 + FAR) * sizes) | (boxes[:, :2] < -FAR * sizes)).any(1)
    if len(rows) and beyond.mean() > MOST_BEYOND:
        first = int(np.argmax(beyond))
        width, height = sizes[first].astype(int).tolist()
        raise KDError(
            f"{file.path}: {beyond.sum()} of {len(rows)} boxes reach far beyond their images of {title}. The first is "
            f"the box of detection {rows[first]} (counted from 0), {boxes[first].tolist()} on an image of "
            f"{width}x{height}: bbox must be [x, y, width, height] in pixels of the original image"
        )


def _check_objects(
    file: DetectionFile, rows: NDArray[np.int64], places: NDArray[np.int64], dataset: DetectionDataset
) -> None:
    """Raise KDError if hardly an object has a detection on it, of whatever class, though the detector knows its class.

    Boxes in pixels of a smaller image lie within the image, so that only the objects tell.
    """
    truth = dataset.coco()
    known = {name.casefold() for name in file.class_names}
    classes = {each["id"] for each in truth["categories"] if each["name"].casefold() in known}
    objects: dict[int, list[list[float]]] = {}
    for each in truth["annotations"]:
        if each["category_id"] in classes and not each.get("iscrowd"):
            objects.setdefault(each["image_id"], []).append(each["bbox"])
    if (count := sum(map(len, objects.values()))) < ENOUGH:
        return
    order = np.argsort(places, kind="stable")
    starts = np.searchsorted(places[order], np.arange(len(dataset) + 1))
    found = 0
    for place, image in enumerate(truth["images"]):
        if found >= LEAST_FOUND * count:
            return
        own = file.boxes[rows[order[starts[place] : starts[place + 1]]]]
        if image["id"] in objects and len(own):
            theirs, ours = (torch.from_numpy(_ends(boxes)) for boxes in (np.array(objects[image["id"]], float), own))
            found += int((pairwise_iou(theirs, ours).amax(1) >= ON_OBJECT).sum())
    if found < LEAST_FOUND * count:
        raise KDError(
            f"{file.path}: only {found} of the {count} labelled objects of {dataset} have a detection on them. bbox "
            "must be [x, y, width, height] in pixels of the original image, not of the resized one that a detector "
            "sees; and image_id or file_name must name the image on which the detector ran"
        )


def _corners(boxes: NDArray[np.float64], sizes: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Boxes (E', 4) as xyxy, cut at their images' edges, and whether something of each is left (E',)."""
    corners = np.clip(_ends(boxes), 0, np.tile(sizes, 2))
    return corners, np.all(corners[:, 2:] > corners[:, :2], axis=1)


def _ends(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Boxes (E', 4) of x, y, width and height as xyxy."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def _stem(name: str) -> str:
    """A file's name without the ending of images."""
    stem, ending = os.path.splitext(name)
    return stem if ending.lower() in ENDINGS else name


class Carrier:
    """Carries detections through random changes of images: they travel as boxes with labels below 0.

    Changes of an image keep each box together with its label, leave out what they crop, and put the boxes of several
    images together. So what is done to the boxes of labels is done to the boxes of detections.
    """

    @classmethod
    def unchanged(cls, sample: Sample) -> Target:
        """The target of an image that is shown as it is."""
        carrier = cls()
        return carrier.unladen(carrier.laden(sample))

    def __init__(self) -> None:
        self._probabilities: list[Tensor] = []
        self._count = 0

    def laden(self, sample: Sample) -> Target:
        """The ground truth of an image that is about to be changed, with its detections, if it has some."""
        if "recorded" not in sample:
            return {"boxes": sample["boxes"], "labels": sample["labels"]}
        boxes, probabilities = sample["recorded"]["boxes"], sample["recorded"]["probabilities"]
        labels = -1 - self._count - torch.arange(len(boxes))
        self._probabilities.append(probabilities)
        self._count += len(boxes)
        return {"boxes": torch.cat([sample["boxes"], boxes]), "labels": torch.cat([sample["labels"], labels])}

    def unladen(self, target: Target) -> Target:
        """The ground truth of a changed image, and the detections apart from it."""
        if not self._probabilities:
            return target
        boxes, labels = target["boxes"], target["labels"]
        own = labels >= 0
        probabilities = torch.cat(self._probabilities)[-1 - labels[~own]]
        recorded = Recorded(boxes=boxes[~own], probabilities=probabilities)
        return {"boxes": boxes[own], "labels": labels[own], "recorded": recorded}
