"""The contract between detectors and methods: read this first.

A detector is a short pipeline with named joints, and a method is a function of what crosses them:

    images -> features (pyramid levels) -> head: stage 0 -> stage 1 -> ... -> predictions -> detections

Shapes, here and everywhere: N images, C channels, H x W cells, L levels, A priors (all levels concatenated,
level by level, row by row, all priors of a cell together), K classes, B bins, G ground-truth boxes.
Boxes are xyxy in pixels of the batch's canvas; labels are int64 in [0, K).

An adapter's author writes `DetectorAdapter`; a method's author writes `Method`. Neither knows the other.

Each file is one idea, and imports only those above it: `spec` (facts), `data` (what passes), `adapter` (a detector),
`lazy` (sequences made when asked for), `recompute` (passes computed again in the backward pass), `view`
(what a detector shows in a step), `cached` (the same, with parts that a cache knows), `exchange` (what two
detectors show), `schedule`, `held`, `method`. All names are imported from here.
"""

from kdtoolkit.contract.adapter import DetectorAdapter, check_precision, keep_states
from kdtoolkit.contract.cached import CachedView
from kdtoolkit.contract.data import (
    Assignment,
    Batch,
    Detections,
    HeadOutputs,
    HeadTrace,
    Predictions,
    Priors,
    Recorded,
    RecordedAlone,
    State,
    Target,
)
from kdtoolkit.contract.exchange import Exchange, Matched, Whose
from kdtoolkit.contract.held import HeldShare
from kdtoolkit.contract.method import Method, Unlabelled
from kdtoolkit.contract.schedule import Schedule
from kdtoolkit.contract.spec import Capability, ClassRows, DetectorSpec, PriorKind, Stage
from kdtoolkit.contract.view import View

__all__ = [
    "Assignment",
    "Batch",
    "CachedView",
    "Capability",
    "ClassRows",
    "Detections",
    "DetectorAdapter",
    "DetectorSpec",
    "Exchange",
    "HeadOutputs",
    "HeadTrace",
    "HeldShare",
    "Matched",
    "Method",
    "Predictions",
    "PriorKind",
    "Priors",
    "Recorded",
    "RecordedAlone",
    "Schedule",
    "Stage",
    "State",
    "Target",
    "Unlabelled",
    "View",
    "Whose",
    "check_precision",
    "keep_states",
]
