"""What a board with one seed can say: how much its APs depend on the images that they were measured on."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from kdtoolkit.benchmark.cells import Cells
from kdtoolkit.benchmark.detections_file import GroundTruth, detections_path, read_detections, read_ground_truth
from kdtoolkit.benchmark.resampling import resampled_aps, resamples
from kdtoolkit.benchmark.store import CellResult, DamagedError, Store, StoreError, write_atomic
from kdtoolkit.benchmark.suite import TEACHER
from kdtoolkit.engine.scoring import Floats

SAMPLES = 1000


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
    current: dict[str, dict[str, Any]] = {}
    for row, result in results.items():
        path = detections_path(store.teacher_copy if row == TEACHER else store.result_path(row, result.seed))
        if result.fingerprints.get("val_data") == truth.fingerprint:
            with suppress(OSError, DamagedError):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                key = f"{content} {truth.fingerprint} {max_detections} {SAMPLES}"
                same = known.get(row, {}).get("key") == key
                current[row] = (
                    known[row] if same else {"key": key, "aps": _sampled(path, result, truth, max_detections)}
                )
    if current != known:
        with suppress(StoreError):  # a folder that cannot be written can be read
            write_atomic(cache, json.dumps(current).encode())
    return {row: np.array(each["aps"]) for row, each in current.items()}


def _sampled(path: Path, result: CellResult, truth: GroundTruth, max_detections: int) -> list[float]:
    found = read_detections(path)
    assert found is not None  # its content has been read
    document, own = truth.of(result, found)
    counts = resamples(len(document["images"]), SAMPLES)
    aps: list[float] = resampled_aps(document, own, counts, max_detections).tolist()
    return aps


def _read(cache: Path) -> dict[str, dict[str, Any]]:
    try:
        known: dict[str, dict[str, Any]] = json.loads(cache.read_bytes())
    except (OSError, ValueError):  # what cannot be read is computed again
        return {}
    return known
