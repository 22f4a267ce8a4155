"""What cells have found on the validation images, and the ground truth, on disk: AP can be computed again from them."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from kdtoolkit.benchmark.store import CellResult, DamagedError, read_file, write_atomic
from kdtoolkit.data import DetectionDataset
from kdtoolkit.engine.scoring import Found

# Detectors compute in float32 at most, so scores lose nothing. Boxes lose less than 0.001 pixels.
_TYPES = {"images": np.int32, "classes": np.int32, "boxes": np.float32, "scores": np.float32}
_READ_TYPES = {"images": np.int64, "classes": np.int64, "boxes": np.float64, "scores": np.float64}


@dataclass(frozen=True)
class GroundTruth:
    """The ground truth of the validation images: their fingerprint, and a document in COCO's format."""

    fingerprint: str
    truth: dict[str, Any]

    def of(self, result: CellResult, found: Found) -> tuple[dict[str, Any], Found]:
        """The document and the detections of the classes that a result was evaluated on.

        They are all classes, except for a teacher that shares some of its classes with the data.
        """
        names = [category["name"] for category in self.truth["categories"]]
        kept = [place for place, name in enumerate(names) if name in result.per_class]
        if len(kept) == len(names):
            return self.truth, found
        categories = [self.truth["categories"][place] for place in kept]
        ids = {category["id"] for category in categories}
        annotations = [each for each in self.truth["annotations"] if each["category_id"] in ids]
        places = np.full(len(names), -1)
        places[kept] = np.arange(len(kept))
        found = replace(found, classes=places[found.classes])
        return {**self.truth, "categories": categories, "annotations": annotations}, found.where(found.classes >= 0)


def detections_path(result: Path) -> Path:
    """The file of detections beside the JSON file of a result."""
    return result.with_suffix(".detections.npz")


def write_detections(path: Path, found: Found, result: CellResult) -> None:
    """Store detections of a result, compressed. Raises StoreError if the file cannot be written."""
    buffer = io.BytesIO()
    arrays = {name: getattr(found, name).astype(kind) for name, kind in _TYPES.items()}
    np.savez_compressed(buffer, of=np.array(_identity(result)), **arrays)
    write_atomic(path, buffer.getvalue())


def read_detections(path: Path, result: CellResult) -> Found | None:
    """Stored detections of a result; None if there is no file, or if it is of a different training.

    Detections are stored before their result. If a run is killed between the two, they lie beside an older result.
    Raises DamagedError if the file is damaged, and KDError if it cannot be read.
    """
    if (content := read_file(path)) is None:
        return None
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            if "of" in arrays and str(arrays["of"]) != _identity(result):  # earlier versions did not store it
                return None
            found = Found(*(arrays[field.name].astype(_READ_TYPES[field.name]) for field in fields(Found)))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _damaged(path) from error
    count = len(found.scores)
    if [getattr(found, name).shape for name in _TYPES] != [(count,), (count,), (count, 4), (count,)]:
        raise _damaged(path)
    return found


def keep_ground_truth(path: Path, dataset: DetectionDataset) -> None:
    """Store a data set's ground truth, unless it is there. Raises StoreError if it cannot be written."""
    fingerprint = dataset.fingerprint()
    with suppress(DamagedError):
        if (known := read_ground_truth(path)) is not None and known.fingerprint == fingerprint:
            return
    text = json.dumps({"fingerprint": fingerprint, "truth": dataset.coco()})
    write_atomic(path, gzip.compress(text.encode(), mtime=0))  # equal content makes equal files


def read_ground_truth(path: Path) -> GroundTruth | None:
    """The stored ground truth; None if there is no file.

    Raises DamagedError if the file is damaged, and KDError if it cannot be read.
    """
    if (content := read_file(path)) is None:
        return None
    try:
        return GroundTruth(**json.loads(gzip.decompress(content)))
    except (gzip.BadGzipFile, ValueError, TypeError, EOFError, zlib.error) as error:
        raise DamagedError(f"{path} is damaged: delete it, and `kd benchmark run` writes it again") from error


def _identity(result: CellResult) -> str:
    """What tells the result from those of other trainings of its cell."""
    return f"{result.key} {result.date}"


def _damaged(path: Path) -> DamagedError:
    return DamagedError(
        f"{path} is damaged: delete it. The result beside it stays, but nothing can be said about single images"
    )
