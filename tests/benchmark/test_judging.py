import numpy as np

from kdtoolkit.benchmark.judging import judge
from kdtoolkit.engine.matching import Objects
from tests.engine.test_breakdown import AWAY, SHIFTED, SQUARE, made


def judged(objects, detections):
    truth, found = made(objects, detections)
    return judge(truth, Objects.of(truth), found)


def test_right_wrong_and_missed_are_told_apart_on_each_image():
    objects = [(1, "cat", SQUARE), (2, "cat", SQUARE), (2, "cat", AWAY), (3, "dog", AWAY)]
    found = judged(
        objects,
        [(1, "cat", SQUARE, 0.9), (2, "cat", SQUARE, 0.8), (2, "cat", SHIFTED, 0.85), (4, "cat", SQUARE, 0.1)],
    )
    assert sorted(found.found.scores.tolist()) == [0.8, 0.85, 0.9]  # the last would lower the F1 of cats
    assert {score: bool(right) for score, right in zip(found.found.scores, found.right, strict=True)} == {
        0.9: True,
        0.8: True,
        0.85: False,
    }
    assert found.missed.tolist() == [False, False, True, True]
    assert found.mistakes.tolist() == [0, 2, 1, 0]


def test_crowds_are_neither_missed_nor_wrong():
    found = judged([(1, "cat", SQUARE), (1, "cat", AWAY, True)], [(1, "cat", SQUARE, 0.9), (1, "cat", AWAY, 0.95)])
    assert found.found.scores.tolist() == [0.9]
    assert not np.any(found.missed)
    assert found.mistakes.tolist() == [0]
