"""What a detector gets right and wrong on each image, at the scores that suit it best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdtoolkit.engine.matching import Flags, Objects, match
from kdtoolkit.engine.scoring import Found, Ints
from kdtoolkit.engine.thresholds import best_thresholds


@dataclass(frozen=True)
class Judged:
    """What a detector gets right and wrong on the images of a ground truth.

    Attributes:
        found: the detections (D of them) whose score is high enough: each class has the score with its best F1.
        right: (D,) whether a detection has found an object. Those that lie on a crowd are not in `found`.
        missed: (G,) whether an object was not found; false for crowds.
        mistakes: (I,) on each image, wrong detections and missed objects together.
    """

    found: Found
    right: Flags
    missed: Flags
    mistakes: Ints


def judge(truth: Mapping[str, Any], objects: Objects, found: Found) -> Judged:
    """Judge detections at an IoU of 0.5. `truth` is in COCO's format, `objects` are its objects."""
    scores = [each.score for each in best_thresholds(truth, found)]
    least = np.array([np.inf if score is None else score for score in scores])
    kept = found.where(found.scores >= least[found.classes])
    right, ignored = np.zeros((2, len(kept.scores)), bool)
    missed = ~objects.crowds
    for _, image in match(objects, kept):
        right[image.detections] = image.right
        ignored[image.detections] = image.ignored
        missed[image.objects] = ~image.found
    places = np.concatenate([kept.images[~ignored & ~right], objects.images[missed]])
    mistakes = np.bincount(places, minlength=len(truth["images"]))
    return Judged(kept.where(~ignored), right[~ignored], missed, mistakes)
