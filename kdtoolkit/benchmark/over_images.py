"""What a board with one seed can say: how much its APs depend on the images that they were measured on."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, Field, TypeAdapter

from kdtoolkit.benchmark.cells import Cells
from kdtoolkit.benchmark.detections_file import GroundTruth, detections_path, read_detections, read_ground_truth
from kdtoolkit.benchmark.resampling import resampled_aps, resamples
from kdtoolkit.benchmark.store import CellResult, DamagedError, Store, StoreError, write_atomic
from kdtoolkit.benchmark.suite import TEACHER
from kdtoolkit.engine.scoring import Floats, Found

SAMPLES = 1000


class _Kept(BaseModel):
    """The APs of one row, and what they were computed from."""

    key: str
    aps: Annotated[tuple[float, ...], Field(min_length=SAMPLES, max_length=SAMPLES)]


_CACHE = TypeAdapter(dict[str, _Kept])


def aps_over_images(store: Store, cells: Cells, max_detections: int) -> dict[str, Floats]:
    """The AP of each row's first student, and of the teacher, on 1,000 samples of the validation images.

    All rows have the same samples, drawn with replacement (Efron, Bootstrap methods, Annals of Statistics 1979). A row
    whose detections are not stored is missing. What was computed once is kept in a file of the run's folder.
    """
    with suppress(DamagedError):
        if (truth := read_ground_truth(store.ground_truth_path)) is not None:
            return _aps(store, cells, truth, max_detections)
    return {}


def _aps(store: Store, cells: Cells, truth: GroundTruth, max_detections: int) -> dict[str, Floats]:
    results = {row: found[0] for row, found in cells.rows.items() if found}
    if cells.teacher is not None:
        results[TEACHER] = cells.teacher
    cache = store.root / "over_images.json"
    known = _read(cache)
    current: dict[str, _Kept] = {}
    for row, result in results.items():
        path = detections_path(store.teacher_copy if row == TEACHER else store.result_path(row, result.seed))
        if result.fingerprints.get("val_data") != truth.fingerprint:
            continue
        with suppress(DamagedError):
            if (found := read_detections(path, result)) is None:
                continue
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            key = f"{content} {truth.fingerprint} {max_detections} {SAMPLES}"
            if row in known and known[row].key == key:
                current[row] = known[row]
            else:
                current[row] = _Kept(key=key, aps=_sampled(found, result, truth, max_detections))
    if current != known:
        with suppress(StoreError):  # a folder that cannot be written can be read
            write_atomic(cache, _CACHE.dump_json(current))
    return {row: np.array(each.aps) for row, each in current.items()}


def _sampled(found: Found, result: CellResult, truth: GroundTruth, max_detections: int) -> tuple[float, ...]:
    document, own = truth.of(result, found)
    counts = resamples(len(document["images"]), SAMPLES)
    return tuple(resampled_aps(document, own, counts, max_detections).tolist())


def _read(cache: Path) -> dict[str, _Kept]:
    try:
        return _CACHE.validate_json(cache.read_bytes())
    except (OSError, ValueError):  # what cannot be read is computed again
        return {}
