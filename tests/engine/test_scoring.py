"""Compared with pycocotools, for equality: not a bit may differ."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kdtoolkit.engine import scoring
from kdtoolkit.engine.scoring import Found, precisions


def by_pycocotools(truth, found, max_detections=100):
    def index(annotations):
        coco = COCO()
        numbered = [{**annotation, "id": number} for number, annotation in enumerate(annotations, 1)]
        coco.dataset = {**truth, "annotations": numbered}
        coco.createIndex()
        return coco

    detections = [
        {
            "image_id": truth["images"][image]["id"],
            "category_id": truth["categories"][label]["id"],
            "bbox": box,
            "area": box[2] * box[3],
            "score": score,
        }
        for image, label, box, score in zip(
            found.images.tolist(), found.classes.tolist(), found.boxes.tolist(), found.scores.tolist(), strict=True
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        scoring = COCOeval(index(truth["annotations"]), index(detections), "bbox")
        scoring.params.maxDets = [max_detections]
        scoring.evaluate()
        scoring.accumulate()
    return scoring.eval["precision"][..., -1]


def scene(seed, *, images=12, objects=40, detections=400, side=200.0, crowds=0.2, whole=False):
    """Random objects, and detections near them and anywhere; `whole`: at whole pixels and tenths, so that much ties."""
    rng = np.random.default_rng(seed)
    image_ids, category_ids = rng.permutation(1000)[:images], rng.permutation(90)[:5]
    corners = rng.uniform(0, side, (objects, 2))
    boxes = np.concatenate([corners, rng.uniform(4, side, (objects, 2))], 1)
    boxes = boxes.round() if whole else boxes
    where, labels = rng.integers(0, images - 2, objects), rng.integers(0, 4, objects)  # of one class there is nothing
    truth = {
        "images": [{"id": int(each)} for each in image_ids],
        "categories": [{"id": int(each), "name": str(each)} for each in category_ids],
        "annotations": [
            {
                "image_id": int(image_ids[image]),
                "category_id": int(category_ids[label]),
                "bbox": box.tolist(),
                "area": float(rng.choice([box[2] * box[3], 0.5 * box[2] * box[3], 32**2, 96**2])),
                "iscrowd": int(rng.random() < crowds),
            }
            for image, label, box in zip(where, labels, boxes, strict=True)
        ],
    }
    near = rng.integers(0, objects, detections) if objects else np.zeros(detections, int)
    stray = rng.random(detections) < 0.3 if objects else np.ones(detections, bool)
    around = boxes[near] if objects else np.zeros((detections, 4))
    shift = rng.normal(0, 0.1, (detections, 4)) * np.tile(around[:, 2:], 2)
    found = np.where(stray[:, None], rng.uniform(1, side, (detections, 4)), around + shift)
    found[:, 2:] = found[:, 2:].clip(0)
    scores = rng.random(detections)
    return truth, Found(
        np.where(stray, rng.integers(0, images, detections), where[near] if objects else 0),
        np.where(stray, rng.integers(0, 5, detections), labels[near] if objects else 0),
        found.round() if whole else found,
        scores.round(1) if whole else scores,
    )


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crowds": 0.0, "objects": 150},
        {"crowds": 1.0},
        {"images": 3, "objects": 30, "detections": 1500},  # more than count, of an image and class
        {"side": 60.0},  # small ones alone
        {"objects": 0},
        {"detections": 0},
    ],
)
def test_precisions_are_those_of_pycocotools(whole, changes):
    for seed in range(3):
        truth, found = scene(seed, whole=whole, **changes)
        expected = by_pycocotools(truth, found)
        assert np.array_equal(precisions(truth, found), expected)
        if changes == {}:
            assert 0.05 < expected[expected > -1].mean() < 0.95  # something to compare


@pytest.mark.parametrize("count", [1, 3, 300])
def test_as_many_detections_count_as_are_asked_for(count):
    truth, found = scene(1, images=3, objects=30, detections=6000)
    expected = by_pycocotools(truth, found, count)
    assert np.array_equal(precisions(truth, found, count), expected)
    assert not np.array_equal(precisions(truth, found), expected)


def test_without_hotcoco_pycocotools_scores(monkeypatch):
    monkeypatch.setattr(scoring, "COCO", COCO)
    monkeypatch.setattr(scoring, "COCOeval", COCOeval)
    for changes in ({}, {"detections": 0}):
        truth, found = scene(0, **changes)
        assert np.array_equal(precisions(truth, found), by_pycocotools(truth, found))
        assert np.array_equal(precisions(truth, found, 2), by_pycocotools(truth, found, 2))


def test_boxes_at_the_very_threshold_and_equal_overlaps():
    truth = {
        "images": [{"id": 7}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"image_id": 7, "category_id": 1, "bbox": [x, 0.0, 10.0, 10.0], "area": area, "iscrowd": 0}
            for x, area in ((0.0, 100.0), (10.0, 2000.0), (5.0, 100.0))
        ],
    }
    boxes = np.array([[0.0, 0, 10, 20], [5.0, 0, 10, 10], [5.0, 0, 10, 10], [2.5, 0, 10, 10], [0.0, 0, 0, 10]])
    found = Found(np.zeros(5, int), np.zeros(5, int), boxes, np.array([0.5, 0.9, 0.5, 0.5, 0.9]))
    assert np.array_equal(precisions(truth, found), by_pycocotools(truth, found))


@pytest.mark.parametrize("above", [1, 2**60])
def test_ids_of_any_size_count(above):
    truth, found = scene(0)
    expected = precisions(truth, found)
    for entry in (*truth["images"], *truth["categories"]):
        entry["id"] += above
    for annotation in truth["annotations"]:
        annotation["image_id"] += above
        annotation["category_id"] += above
    assert np.array_equal(precisions(truth, found), expected)
