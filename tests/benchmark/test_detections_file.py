import gzip
import json

import numpy as np
import pytest

from kdtoolkit.benchmark.detections_file import (
    GroundTruth,
    detections_path,
    keep_ground_truth,
    read_detections,
    read_ground_truth,
    write_detections,
)
from kdtoolkit.benchmark.store import DamagedError
from kdtoolkit.data import ProceduralShapes
from kdtoolkit.engine.scoring import Found, precisions
from tests.benchmark._suite import made_up

RESULT = made_up("PKD", 0, 20.0)


def noisy(truth, seed=0):
    """Detections beside the objects, some of a wrong class, as a detector would give them."""
    random = np.random.default_rng(seed)
    places = {image["id"]: place for place, image in enumerate(truth["images"])}
    ids = [category["id"] for category in truth["categories"]]
    objects = [each for each in truth["annotations"] for _ in range(2)]
    boxes = np.array([each["bbox"] for each in objects]) + random.normal(0, 2, (len(objects), 4))
    classes = np.array([ids.index(each["category_id"]) for each in objects])
    wrong = random.random(len(objects)) < 0.2
    classes[wrong] = random.integers(0, len(ids), wrong.sum())
    return Found(
        np.array([places[each["image_id"]] for each in objects]),
        classes,
        np.maximum(boxes, 1.0),
        random.random(len(objects)).astype(np.float32).astype(np.float64),
    )


def mean_ap(truth, found):
    precision = precisions(truth, found)
    return 100 * precision[precision > -1].mean()


def test_ap_from_the_file_is_the_ap_of_the_detections(tmp_path):
    truth = ProceduralShapes(20, image_size=96, seed=1).coco()
    found = noisy(truth)
    path = detections_path(tmp_path / "seed0.json")
    write_detections(path, found, RESULT)
    read = read_detections(path, RESULT)
    assert path.name == "seed0.detections.npz"
    assert read.images.dtype == read.classes.dtype == np.int64
    assert read.boxes.dtype == read.scores.dtype == np.float64
    assert np.array_equal(read.scores, found.scores)
    assert mean_ap(truth, read) == pytest.approx(mean_ap(truth, found), abs=1e-3)


def test_detections_of_a_different_training_are_none(tmp_path):
    path = tmp_path / "seed0.detections.npz"
    write_detections(path, noisy(ProceduralShapes(4, image_size=64, seed=1).coco()), RESULT)
    assert read_detections(path, RESULT) is not None
    for changed in ({"date": "2021-01-01"}, {"key": "of different settings"}):
        assert read_detections(path, RESULT.model_copy(update=changed)) is None


def test_no_detections_are_stored_too(tmp_path):
    write_detections(tmp_path / "none.npz", Found(*(np.zeros(shape) for shape in (0, 0, (0, 4), 0))), RESULT)
    assert read_detections(tmp_path / "none.npz", RESULT).boxes.shape == (0, 4)
    assert read_detections(tmp_path / "absent.npz", RESULT) is None


@pytest.mark.parametrize("size", [0, 10, 300, -1])
def test_a_damaged_file_is_named(tmp_path, size):
    path = tmp_path / "seed0.detections.npz"
    write_detections(path, noisy(ProceduralShapes(4, image_size=64, seed=1).coco()), RESULT)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DamagedError, match=r"seed0\.detections\.npz is damaged: delete it"):
        read_detections(path, RESULT)


def test_a_file_of_different_arrays_is_damaged_and_no_pickle_is_opened(tmp_path):
    path = tmp_path / "seed0.detections.npz"
    whole = {"images": np.zeros(2), "classes": np.zeros(2), "boxes": np.zeros((2, 4)), "scores": np.zeros(2)}
    for change in ({"boxes": np.zeros((2, 3))}, {"scores": np.zeros(1)}, {"scores": np.array([{}, {}])}):
        np.savez(path, **{**whole, **change})
        with pytest.raises(DamagedError):
            read_detections(path, RESULT)


def test_the_ground_truth_is_kept_once_and_replaced_by_that_of_different_data(tmp_path):
    path = tmp_path / "run" / "ground_truth.json.gz"
    assert read_ground_truth(path) is None
    shapes = ProceduralShapes(3, image_size=64, seed=1)
    keep_ground_truth(path, shapes)
    written = path.stat().st_mtime_ns
    keep_ground_truth(path, shapes)
    assert path.stat().st_mtime_ns == written
    assert read_ground_truth(path) == GroundTruth(shapes.fingerprint(), json.loads(json.dumps(shapes.coco())))
    path.write_bytes(gzip.compress(b"{}"))
    with pytest.raises(DamagedError, match="ground_truth"):
        read_ground_truth(path)
    others = ProceduralShapes(3, image_size=64, seed=2)
    keep_ground_truth(path, others)
    assert read_ground_truth(path).fingerprint == others.fingerprint()


def test_a_teacher_is_scored_on_the_classes_that_it_shares():
    truth = ProceduralShapes(20, image_size=96, seed=1).coco()
    found = noisy(truth)
    names = [category["name"] for category in truth["categories"]]
    whole, all_found = GroundTruth("", truth).of(made_up("teacher", 0, 1.0, per_class=dict.fromkeys(names)), found)
    assert (whole, all_found) == (truth, found)
    part, rest = GroundTruth("", truth).of(made_up("teacher", 0, 1.0, per_class=dict.fromkeys(names[1::2])), found)
    assert [category["name"] for category in part["categories"]] == names[1::2]
    assert len(rest.classes) == (found.classes % 2 == 1).sum()
    expected = precisions(truth, found)[:, :, 1::2]
    assert np.array_equal(precisions(part, rest), expected)
