import numpy as np
import pytest

from kdtoolkit.engine.scoring import Found
from kdtoolkit.engine.thresholds import at_score, best_thresholds


def truth(boxes, crowds=()):
    """One image of one class; boxes are xywh."""
    annotations = [
        {"id": i, "image_id": 5, "category_id": 3, "bbox": list(box), "iscrowd": int(i in crowds)}
        for i, box in enumerate(boxes)
    ]
    return {"images": [{"id": 5}], "categories": [{"id": 3, "name": "ball"}], "annotations": annotations}


def found(*detections):
    """Detections (score, xywh)."""
    boxes = np.array([box for _, box in detections], np.float64).reshape(-1, 4)
    scores = np.array([score for score, _ in detections], np.float64)
    zeros = np.zeros(len(detections), np.int64)
    return Found(zeros, zeros, boxes, scores)


A, B, C = (0, 0, 10, 10), (20, 0, 10, 10), (40, 0, 10, 10)


def test_f1_decides():
    (best,) = best_thresholds(truth([A, B]), found((0.9, A), (0.8, C), (0.7, B), (0.6, C)))
    assert best.score == pytest.approx(0.65)  # F1 0.8 with three, 0.67 with one or four
    assert (best.precision, best.recall) == (pytest.approx(2 / 3), 1.0)


def test_an_object_is_found_once():
    (best,) = best_thresholds(truth([A, B]), found((0.9, A), (0.8, A), (0.7, A)))
    assert (best.score, best.precision, best.recall) == (pytest.approx(0.85), 1.0, 0.5)


def test_equal_scores_are_kept_together():
    (best,) = best_thresholds(truth([A]), found((0.5, A), (0.5, C)))
    assert (best.score, best.precision) == (0.25, 0.5)


def test_detections_on_a_crowd_do_not_count():
    (best,) = best_thresholds(truth([A, (20, 0, 100, 10)], crowds={1}), found((0.9, B), (0.8, A), (0.7, C)))
    assert (best.precision, best.recall, best.objects) == (1.0, 1.0, 1)


@pytest.mark.parametrize("detections", [(), ((0.9, C),)])
def test_nothing_right_gives_no_score(detections):
    (best,) = best_thresholds(truth([A]), found(*detections))
    assert (best.score, best.precision, best.recall, best.objects) == (None, None, 0.0, 1)


def test_a_class_whose_detections_are_mostly_wrong_gets_no_score():
    (best,) = best_thresholds(truth([A]), found((0.9, B), (0.8, C), (0.7, A)))
    assert (best.score, best.precision, best.recall) == (None, pytest.approx(1 / 3), 1.0)


def test_a_given_score_is_measured():
    (measured,) = at_score(truth([A, B]), found((0.9, A), (0.8, C), (0.3, B)), 0.5)
    assert (measured.score, measured.precision, measured.recall) == (0.5, 0.5, 0.5)
