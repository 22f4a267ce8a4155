import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kdtoolkit.benchmark.resampling import resampled_aps, resamples
from kdtoolkit.engine import scoring
from kdtoolkit.engine.scoring import Found, mean_precision, precisions

CLASSES = 4  # the last has no object


def made_up(rng, images=12):
    """A ground truth with crowds and an image without objects, and detections of which no two have the same score."""
    truth = {
        "images": [{"id": 7 * place + 3, "width": 100, "height": 100} for place in range(images)],
        "categories": [{"id": 5 * label + 2, "name": str(label)} for label in range(CLASSES)],
        "annotations": [],
    }
    places, classes, boxes = [], [], []
    for place, image in enumerate(truth["images"]):
        for _ in range(0 if place == 1 else rng.integers(1, 6)):
            label, box = int(rng.integers(CLASSES - 1)), np.r_[rng.uniform(0, 60, 2), rng.uniform(10, 40, 2)]
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image["id"],
                    "category_id": 5 * label + 2,
                    "bbox": box.tolist(),
                    "area": float(box[2] * box[3]),
                    "iscrowd": int(rng.random() < 0.15),
                }
            )
            for _ in range(rng.integers(0, 3)):
                places.append(place)
                classes.append(label)
                boxes.append(box + rng.normal(0, 3, 4))
        for _ in range(3):
            places.append(place)
            classes.append(rng.integers(CLASSES))
            boxes.append(np.r_[rng.uniform(0, 60, 2), rng.uniform(10, 40, 2)])
    scores = rng.permutation(len(places)) / len(places)
    return truth, Found(np.array(places), np.array(classes), np.array(boxes).clip(1), scores)


def repeated(truth, found, count):
    """The data set in which each image is as often as `count` says."""
    images, annotations, parts = [], [], []
    for place, image in enumerate(truth["images"]):
        for _ in range(count[place]):
            images.append({**image, "id": len(images) + 1})
            own = [each for each in truth["annotations"] if each["image_id"] == image["id"]]
            annotations += [{**each, "image_id": len(images)} for each in own]
            of_image = found.where(found.images == place)
            parts.append(Found(np.full(len(of_image.scores), len(images) - 1), *list(vars(of_image).values())[1:]))
    annotations = [{**each, "id": number} for number, each in enumerate(annotations, 1)]
    return {**truth, "images": images, "annotations": annotations}, Found.concatenated(parts)


@pytest.mark.parametrize(("engine", "max_detections"), [("hotcoco", 100), ("hotcoco", 2), ("pycocotools", 100)])
def test_the_ap_is_that_of_a_data_set_with_repeated_images(engine, max_detections, monkeypatch):
    if engine == "pycocotools":
        monkeypatch.setattr(scoring, "COCO", COCO)
        monkeypatch.setattr(scoring, "COCOeval", COCOeval)
    rng = np.random.default_rng(max_detections)
    for _ in range(5):
        truth, found = made_up(rng)
        counts = np.concatenate([np.ones((1, 12), np.int64), resamples(12, 60, seed=1)])
        aps = resampled_aps(truth, found, counts, max_detections)
        for place in (0, 1, 2, 30, 60):  # 60 is in a second part of the table
            again = precisions(*repeated(truth, found, counts[place]), max_detections)
            assert aps[place] == pytest.approx(mean_precision(again[..., 0]), abs=1e-9)


def test_a_sample_without_objects_has_no_ap():
    truth, found = made_up(np.random.default_rng(0))
    counts = np.zeros((2, 12), np.int64)
    counts[0, 1], counts[1, 0] = 12, 12  # image 1 has no object
    aps = resampled_aps(truth, found, counts)
    assert np.isnan(aps[0])
    assert not np.isnan(aps[1])


def test_a_detector_that_finds_nothing_has_ap_0():
    truth, found = made_up(np.random.default_rng(0))
    assert resampled_aps(truth, found.where(found.scores < 0), np.ones((1, 12), np.int64)).tolist() == [0.0]


def test_samples_are_as_large_as_the_set_and_the_same_for_a_seed():
    counts = resamples(30, 400)
    assert counts.shape == (400, 30)
    assert (counts.sum(1) == 30).all()
    assert (counts == resamples(30, 400)).all()
    assert (counts == 0).mean() == pytest.approx(np.exp(-1), abs=0.02)  # the share of images that a sample lacks
