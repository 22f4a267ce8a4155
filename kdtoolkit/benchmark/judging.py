"""What a detector gets right and wrong on each image, at the scores that suit it best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdtoolkit.engine.matching import Flags, Objects, match
from kdtoolkit.engine.scoring import Floats, Found
from kdtoolkit.engine.thresholds import best_thresholds


@dataclass(frozen=True)
class Judged:
    """What a detector gets right and wrong on the images of a ground truth.

    Attributes:
        found: the detections (D of them) whose score is high enough: each class has the score with its best F1.
        right: (D,) whether a detection has found an object. Those that lie on a crowd are not in `found`.
        missed: (G,) whether an object was not found; false for crowds.
        f1: (I,) the harmonic mean of precision and recall on each image; 1 where there is nothing to find and nothing
            is found.
    """

    found: Found
    right: Flags
    missed: Flags
    f1: Floats


def judge(truth: Mapping[str, Any], objects: Objects, found: Found) -> Judged:
    """Judge detections at an IoU of 0.5. `truth` is in COCO's format, `objects` are its objects."""
    scores = [each.score for each in best_thresholds(truth, found)]
    least = np.array([np.inf if score is None else score for score in scores])
    kept = found.where(found.scores >= least[found.classes])
    right, ignored = np.zeros((2, len(kept.scores)), bool)
    missed, f1 = ~objects.crowds, np.ones(len(truth["images"]))
    for place, image in match(objects, kept):
        right[image.detections] = image.right
        ignored[image.detections] = image.ignored
        missed[image.objects] = ~image.found
        parts = len(image.objects) + int((~image.ignored).sum())
        f1[place] = 2 * int(image.right.sum()) / parts if parts else 1.0
    return Judged(kept.where(~ignored), right[~ignored], missed, f1)
