"""Where a detector's average precision comes from, and what costs it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

ERRORS = ("classification", "localisation", "both", "duplicate", "background", "missed")
TOTALS = ("false positive", "false negative")


class Bin(BaseModel):
    """The detections whose score lies in (low, high].

    `confidence` is their mean score, and `precision` the share of them that are right; both lie in [0, 1] and are None
    if there are none. `count` says how many there are.
    """

    model_config = ConfigDict(frozen=True)

    low: float
    high: float
    confidence: float | None
    precision: float | None
    count: float


class Breakdown(BaseModel):
    """Where a detector's AP comes from.

    Attributes:
        errors: for each kind of error (`ERRORS`), and for all false positives and all false negatives (`TOTALS`), by
            how many points AP50 would rise if the detector did not make them. The values do not add up to 100.
        by_class: AP in percent by the name of the class; None for a class without objects.
        by_size: AP in percent of "small", "medium" and "large" objects; None if there are none.
        by_iou: AP in percent by the IoU that a detection needs, "0.50", "0.55" ... "0.95".
        calibration: ten bins of scores from 0 to 1.
        calibration_error: mean distance between score and precision over all detections, in [0, 1]; None without
            detections.
        max_detections: how many detections of an image and class count.
    """

    model_config = ConfigDict(frozen=True)

    errors: dict[str, float]
    by_class: dict[str, float | None]
    by_size: dict[str, float | None]
    by_iou: dict[str, float | None]
    calibration: tuple[Bin, ...]
    calibration_error: float | None
    max_detections: int = 100
