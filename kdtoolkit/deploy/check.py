"""Compares detections of an exported file with those of PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdtoolkit.contract import Detections

SCORE_TOLERANCE = 1e-3
BOX_TOLERANCE = 0.5  # pixels
CUT = 1e-4  # detections whose score is so near the lowest one may be cut off
TIE = 1e-6  # scores so near each other change places by rounding; or nearer than twice what partners differ by
LARGEST_TIE = 1e-4
STRAY = 1 / 100  # of all detections may be missing without explanation: IoUs that lie on NMS's threshold


@dataclass(frozen=True)
class Comparison:
    """How the detections of two programs on the same images agree.

    `compared`: pairs of detections of equal class that were found in both. `score`: the largest difference of their
    scores. `box`: the largest difference of their corners, in pixels. `missing`: detections of one program without a
    partner in the other. `unsure`: those of them that rounding may explain, because equal scores change places.
    """

    images: int
    compared: int
    score: float
    box: float
    missing: int
    unsure: int

    @property
    def agrees(self) -> bool:
        """Whether both programs find the same, but for what rounding decides."""
        stray = self.missing - self.unsure
        return stray <= self.compared * STRAY and self.missing <= self.compared / 5

    def __str__(self) -> str:
        text = (
            f"{self.compared} detections on {self.images} images: scores differ by at most {self.score:.1e}, boxes by "
            f"{self.box:.4f} px"
        )
        if self.missing:
            text += f"; {self.missing} have no partner ({self.unsure} have a score that others have too)"
        return text


def compare(expected: Sequence[Detections], found: Sequence[Detections]) -> Comparison:
    """Pair detections of the same class, image by image, best first.

    A pair differs by at most `SCORE_TOLERANCE` in score and `BOX_TOLERANCE` in each corner.
    """
    return total([_compare(own, other) for own, other in zip(expected, found, strict=True)])


def total(parts: Sequence[Comparison]) -> Comparison:
    """The comparison of all images."""
    return Comparison(
        images=sum(part.images for part in parts),
        compared=sum(part.compared for part in parts),
        score=max((part.score for part in parts), default=0.0),
        box=max((part.box for part in parts), default=0.0),
        missing=sum(part.missing for part in parts),
        unsure=sum(part.unsure for part in parts),
    )


def _compare(expected: Detections, found: Detections) -> Comparison:
    free = torch.ones(len(found["scores"]), dtype=torch.bool)
    score = box = 0.0
    lost: list[int] = []
    for i in range(len(expected["scores"])):
        scores = (found["scores"] - expected["scores"][i]).abs()
        boxes = (found["boxes"] - expected["boxes"][i]).abs().amax(-1)
        fits = free & (found["labels"] == expected["labels"][i])
        fits &= (scores <= SCORE_TOLERANCE) & (boxes <= BOX_TOLERANCE)
        if not fits.any():
            lost.append(i)
            continue
        j = int(torch.where(fits, boxes + scores, torch.inf).argmin())
        free[j] = False
        score, box = max(score, float(scores[j])), max(box, float(boxes[j]))
    extra = free.nonzero()[:, 0].tolist()
    every = torch.cat([expected["scores"], found["scores"]])
    tie = min(max(TIE, 2 * score), LARGEST_TIE)
    unsure = sum(
        _may_change(own["scores"][i], every, tie) for own, rows in ((expected, lost), (found, extra)) for i in rows
    )
    return Comparison(1, len(expected["scores"]) - len(lost), score, box, len(lost) + len(extra), unsure)


def _may_change(score: Tensor, every: Tensor, tie: float) -> bool:
    """Whether rounding decides if a detection of this score is kept.

    It is so at the end of a list, and between equal scores in NMS and where queries are selected: then more than the
    detection and its partner have this score, within `tie`. `every` are the scores of both programs.
    """
    return bool(score - every.min() <= CUT) or int(((every - score).abs() <= tie).sum()) > 2
