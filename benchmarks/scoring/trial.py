"""Compares hotcoco with pycocotools on data sets, for equality of every precision and for time.

    python benchmarks/scoring/trial.py FOLDER [FOLDER ...]

Detections are made from the objects: some are moved, some have a wrong class or lie anywhere. Each data set is scored
as it is, with many equal scores and boxes at whole pixels, with every fifth object a crowd, and with classes that have
no detections or no objects. Prints a table in Markdown, and ends with an error if a single number differs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kdtoolkit.data import open_dataset
from kdtoolkit.data.opening import splits_of
from kdtoolkit.engine import scoring
from kdtoolkit.engine.breakdown import breakdown
from kdtoolkit.engine.scoring import Floats, Found

PER_OBJECT = 4  # detections
Scene = tuple[dict[str, Any], Found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    given = parser.parse_args()
    print(f"hotcoco {hotcoco.__version__}\n")
    print("| data | case | images | objects | detections | numbers | different | hotcoco | pycocotools | breakdown |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    wrong = 0
    for folder in given.folders:
        for split in splits_of(folder):
            scene = made_from(open_dataset(folder, split, on_bad="skip").coco())
            for name, change in CASES.items():
                wrong += compare(f"{folder.name}, {split}", name, *change(*scene))
    if wrong:
        raise SystemExit(f"{wrong} precisions differ")


def compare(data: str, case: str, truth: dict[str, Any], found: Found) -> int:
    """Print a row of the table; the number of precisions that differ, with 100 and with 300 detections."""
    numbers = different = 0
    seconds = [0.0, 0.0]
    for limit in (100, 300):
        ours, seconds[0] = timed(hotcoco.COCO, hotcoco.COCOeval, truth, found, limit)
        theirs, seconds[1] = timed(COCO, COCOeval, truth, found, limit)
        numbers += ours.size
        different += int((ours != theirs).sum())
    scoring.COCO, scoring.COCOeval = hotcoco.COCO, hotcoco.COCOeval
    begun = time.process_time()
    breakdown(truth, found)
    parts = time.process_time() - begun
    cells = (data, case, len(truth["images"]), len(truth["annotations"]), len(found.scores), numbers, different)
    times = (f"{1000 * value:.0f} ms" for value in (*seconds, parts))
    print("| " + " | ".join(map(str, (*cells, *times))) + " |", flush=True)
    return different


def timed(coco: Any, evaluation: Any, truth: dict[str, Any], found: Found, limit: int) -> tuple[Floats, float]:
    """Precisions by one of the two engines, and seconds of CPU time."""
    scoring.COCO, scoring.COCOeval = coco, evaluation
    begun = time.process_time()
    result = scoring.precisions(truth, found, limit)
    return result, time.process_time() - begun


def made_from(truth: dict[str, Any]) -> Scene:
    """Ground truth, and detections made from its objects."""
    random = np.random.default_rng(0)
    places = {image["id"]: place for place, image in enumerate(truth["images"])}
    labels = {category["id"]: label for label, category in enumerate(truth["categories"])}
    objects = [each for each in truth["annotations"] for _ in range(PER_OBJECT)]
    boxes = np.array([each["bbox"] for each in objects], np.float64).reshape(-1, 4)
    boxes += random.normal(0, 0.1, boxes.shape) * np.tile(boxes[:, 2:], 2)
    boxes[:, 2:] = boxes[:, 2:].clip(0)
    classes = np.array([labels[each["category_id"]] for each in objects], np.int64)
    images = np.array([places[each["image_id"]] for each in objects], np.int64)
    stray = random.random(len(objects)) < 0.2
    images[stray] = random.integers(0, len(places), int(stray.sum()))
    mistaken = random.random(len(objects)) < 0.1
    classes[mistaken] = random.integers(0, len(labels), int(mistaken.sum()))
    return truth, Found(images, classes, boxes, random.random(len(objects)))


def with_ties(truth: dict[str, Any], found: Found) -> Scene:
    return truth, replace(found, boxes=found.boxes.round(), scores=found.scores.round(1))


def with_crowds(truth: dict[str, Any], found: Found) -> Scene:
    annotations = [{**each, "iscrowd": int(place % 5 == 0)} for place, each in enumerate(truth["annotations"])]
    return {**truth, "annotations": annotations}, found


def with_empty_classes(truth: dict[str, Any], found: Found) -> Scene:
    """The first class has no objects, the last one no detections."""
    first = truth["categories"][0]["id"]
    kept = [each for each in truth["annotations"] if each["category_id"] != first]
    return {**truth, "annotations": kept}, found.where(found.classes != len(truth["categories"]) - 1)


CASES: dict[str, Callable[[dict[str, Any], Found], Scene]] = {
    "as it is": lambda *scene: scene,
    "ties": with_ties,
    "crowds": with_crowds,
    "empty classes": with_empty_classes,
}


if __name__ == "__main__":
    main()
