"""Compared with the numbers of the published package tidecv, with hand-made images, and with loops."""

import json
from pathlib import Path

import numpy as np
import pytest

from kdtoolkit.engine.breakdown import ERRORS, TOTALS, breakdown
from kdtoolkit.engine.scoring import IOU_THRESHOLDS, Found, precisions
from tests.engine.test_scoring import scene

TIDE = json.loads((Path(__file__).parent / "golden" / "tide.json").read_text("utf-8"))["scenes"]
SQUARE, AWAY = [10.0, 10.0, 20.0, 20.0], [100.0, 100.0, 20.0, 20.0]
SHIFTED = [20.0, 10.0, 20.0, 20.0]  # an IoU of 1/3 with the square
NOTHING = dict.fromkeys((*ERRORS, *TOTALS), 0.0)


def made(objects, detections, classes=("cat", "dog")):
    """Ground truth and detections: lists of (image, class, box) with iscrowd or a score."""
    images = sorted({each[0] for each in (*objects, *detections)})
    truth = {
        "images": [{"id": image} for image in images],
        "categories": [{"id": number, "name": name} for number, name in enumerate(classes, 1)],
        "annotations": [
            {
                "image_id": image,
                "category_id": classes.index(name) + 1,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": int(any(crowd)),
            }
            for image, name, box, *crowd in objects
        ],
    }
    places, names, boxes, scores = zip(*detections, strict=True) if detections else ((), (), (), ())
    return truth, Found(
        np.array([images.index(each) for each in places], np.int64),
        np.array([classes.index(each) for each in names], np.int64),
        np.array(boxes, np.float64).reshape(-1, 4),
        np.array(scores, np.float64),
    )


@pytest.mark.parametrize("case", TIDE)
def test_errors_are_those_of_the_published_package(case):
    names = [str(number) for number in case["categories"]]
    objects = [(image, str(name), box, crowd) for image, name, *box, crowd in case["objects"]]
    detections = [(image, str(name), box, score) for image, name, *box, score in case["detections"]]
    found = breakdown(*made(objects, detections, names))
    assert found.errors == pytest.approx(case["errors"], abs=1e-6)
    assert min(found.errors.values()) > 0.5  # something to compare


@pytest.mark.parametrize(
    ("kind", "total", "wrong"),
    [
        ("localisation", "false positive", [(1, "cat", SHIFTED, 0.9), (2, "cat", SQUARE, 0.8)]),
        (
            "classification",
            "false positive",
            [(1, "dog", SQUARE, 0.9), (2, "cat", SQUARE, 0.8), (3, "dog", SQUARE, 0.5)],
        ),
        (
            "both",
            "false positive",
            [(1, "dog", SHIFTED, 0.9), (1, "cat", SQUARE, 0.8), (2, "cat", SQUARE, 0.8), (3, "dog", SQUARE, 0.5)],
        ),
        ("background", "false positive", [(1, "cat", AWAY, 0.9), (1, "cat", SQUARE, 0.8), (2, "cat", SQUARE, 0.8)]),
        ("duplicate", "false positive", [(1, "cat", SQUARE, 0.9), (1, "cat", SQUARE, 0.8), (2, "cat", SQUARE, 0.7)]),
        ("missed", "false negative", [(1, "cat", SQUARE, 0.9)]),
    ],
)
def test_each_kind_of_error_is_seen_alone(kind, total, wrong):
    objects = [(1, "cat", SQUARE), (2, "cat", SQUARE)]
    if any(name == "dog" for _, name, *_ in wrong):
        objects.append((3, "dog", SQUARE))
    errors = breakdown(*made(objects, wrong)).errors
    assert errors[kind] > 5
    assert {name: value for name, value in errors.items() if name in ERRORS and value > 0}.keys() == {kind}
    assert errors[total] > 5


def test_a_perfect_detector_has_no_errors_and_a_blind_one_misses_all():
    objects = [(1, "cat", SQUARE), (1, "dog", AWAY), (2, "cat", SQUARE)]
    perfect = breakdown(*made(objects, [(*each, 1.0) for each in objects]))
    assert perfect.errors == NOTHING
    assert perfect.calibration_error == 0
    blind = breakdown(*made(objects, []))
    assert blind.errors == {**NOTHING, "missed": 100, "false negative": 100}
    assert blind.calibration_error is None
    assert all(each.confidence is each.precision is None for each in blind.calibration)
    assert blind.by_class == {"cat": 0, "dog": 0}


def test_nothing_to_find_has_no_ap_and_only_background():
    found = breakdown(*made([], [(1, "cat", SQUARE, 0.95)]))
    assert found.errors == NOTHING
    assert {*found.by_class.values(), *found.by_size.values(), *found.by_iou.values()} == {None}
    assert found.calibration_error == pytest.approx(0.95)


def test_detections_of_a_class_without_objects_cost_nothing():
    objects, right = [(1, "cat", SQUARE)], (1, "cat", SQUARE, 0.5)
    assert breakdown(*made(objects, [right, (1, "dog", AWAY, 0.9)])).errors == NOTHING


def test_detections_on_crowds_are_neither_right_nor_wrong():
    objects = [(1, "cat", SQUARE), (1, "cat", AWAY, True)]
    detections = [(1, "cat", SQUARE, 0.95), (1, "cat", AWAY, 0.99), (1, "cat", [105.0, 105.0, 5.0, 5.0], 0.98)]
    found = breakdown(*made(objects, detections))
    assert found.errors == NOTHING
    assert [each.count for each in found.calibration] == [0] * 9 + [1]


def test_as_many_detections_of_a_class_count_as_are_asked_for():
    objects = [(1, "cat", SQUARE), (1, "dog", AWAY)]
    detections = [(1, "cat", AWAY, 0.9), (1, "cat", SQUARE, 0.8), (1, "dog", AWAY, 0.1)]
    all_of_them, one = (breakdown(*made(objects, detections), max_detections=count) for count in (100, 1))
    assert (all_of_them.max_detections, one.max_detections) == (100, 1)
    assert all_of_them.errors["missed"] == 0
    assert one.errors["missed"] == 0  # without its object, the class is left with a mistake: its AP stays 0
    assert one.by_class == {"cat": 0, "dog": pytest.approx(100)}
    assert sum(each.count for each in one.calibration) == 2


@pytest.mark.parametrize("seed", range(3))
def test_ap_by_class_size_and_iou_is_that_of_coco(seed):
    truth, found = scene(seed)
    precision, parts = precisions(truth, found), breakdown(truth, found)
    defined = [value for value in parts.by_class.values() if value is not None]
    every = precision[..., 0]
    assert np.mean(defined) == pytest.approx(100 * every[every > -1].mean())
    assert len(defined) == 4
    assert list(parts.by_iou) == [f"0.{percent}" for percent in range(50, 100, 5)]
    for place in range(len(IOU_THRESHOLDS)):
        own = every[place][every[place] > -1]
        assert list(parts.by_iou.values())[place] == pytest.approx(100 * own.mean())
    for place, size in enumerate(("small", "medium", "large"), 1):
        own = precision[..., place][precision[..., place] > -1]
        assert parts.by_size[size] == (pytest.approx(100 * own.mean()) if own.size else None)


def test_calibration_is_that_of_a_loop():
    truth, found = scene(3, crowds=0.0)
    parts = breakdown(truth, found)
    places = {image["id"]: place for place, image in enumerate(truth["images"])}
    labels = {category["id"]: label for label, category in enumerate(truth["categories"])}
    free = [(places[a["image_id"]], labels[a["category_id"]], a["bbox"]) for a in truth["annotations"]]
    bins = [[] for _ in range(10)]
    for index in np.argsort(-found.scores):
        box, score = found.boxes[index], found.scores[index]
        candidates = [
            (iou(box, each[2]), number)
            for number, each in enumerate(free)
            if each is not None and each[:2] == (found.images[index], found.classes[index])
        ]
        best, number = max(candidates, default=(0, None))
        if best >= 0.5:
            free[number] = None
        bins[int(score * 10)].append((score, best >= 0.5))
    error = 0.0
    for own, got in zip(bins, parts.calibration, strict=True):
        confidence, precision = np.mean(own, 0)
        assert (got.count, got.confidence, got.precision) == pytest.approx((len(own), confidence, precision))
        error += len(own) * abs(confidence - precision)
    assert parts.calibration_error == pytest.approx(error / len(found.scores))


def iou(a, b):
    width, height = (min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) for i in range(2))
    common = max(0, width) * max(0, height)
    return common / (a[2] * a[3] + b[2] * b[3] - common)
