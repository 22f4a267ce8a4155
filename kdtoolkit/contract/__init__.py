"""The contract between detectors and methods: read this first.

A detector is a short pipeline with named joints, and a method is a function of what crosses them:

    images -> features (pyramid levels) -> head: stage 0 -> stage 1 -> ... -> predictions -> detections

Shapes, here and everywhere: N images, C channels, H x W cells, L levels, A priors (all levels concatenated,
level by level, row by row, all priors of a cell together), K classes, B bins, G ground-truth boxes.
Boxes are xyxy in pixels of the batch's canvas; labels are int64 in [0, K).

An adapter's author writes `DetectorAdapter`; a method's author writes `Method`. Neither knows the other.

Each file is one idea, and imports only those above it: `spec` (facts), `data` (what passes), `adapter` (a detector),
`lazy` (sequences made when asked for), `view` (what it shows in a step), `recalled` (what of it
is known from earlier steps), `exchange` (what two of them show), `schedule`, `held`, `method`. All names
are imported from here.
"""

from kdtoolkit.contract.adapter import DetectorAdapter, check_precision, keep_states
from kdtoolkit.contract.data import (
    Assignment,
    Batch,
    Detections,
    HeadTrace,
    Predictions,
    Priors,
    Recorded,
    RecordedAlone,
    Said,
    State,
    Target,
)
from kdtoolkit.contract.exchange import Exchange, Matched, Whose
from kdtoolkit.contract.held import HeldShare
from kdtoolkit.contract.method import Method, Unlabelled
from kdtoolkit.contract.recalled import Recall, RecalledView
from kdtoolkit.contract.schedule import Schedule
from kdtoolkit.contract.spec import Capability, ClassRows, DetectorSpec, PriorKind, Stage
from kdtoolkit.contract.view import View

__all__ = [
    "Assignment",
    "Batch",
    "Capability",
    "ClassRows",
    "Detections",
    "DetectorAdapter",
    "DetectorSpec",
    "Exchange",
    "HeadTrace",
    "HeldShare",
    "Matched",
    "Method",
    "Predictions",
    "PriorKind",
    "Priors",
    "Recall",
    "RecalledView",
    "Recorded",
    "RecordedAlone",
    "Said",
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
