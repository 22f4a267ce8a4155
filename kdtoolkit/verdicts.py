"""Which methods can distil a pair of detectors, what would help the others, and which settings suit the student."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations

from kdtoolkit.compatibility import why_refused
from kdtoolkit.contract import DetectorSpec, Method
from kdtoolkit.methods import all_methods, published_settings

Pair = tuple[DetectorSpec, DetectorSpec]
"""Student and teacher."""


@dataclass(frozen=True)
class Verdict:
    """Whether a method with its default settings can distil a pair.

    Attributes:
        reason: why it cannot; None if it can.
        mends: the fewest things that the two detectors must have in common so that the method works. Empty if only a
            different kind of detector helps.
        settings: the method's published settings for the student's kind (`CrossKD.for_fcos`); empty if there are none.
    """

    reason: str | None = None
    mends: tuple[str, ...] = ()
    settings: str = ""


def judge_pair(student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> dict[str, Verdict]:
    """Whether each method, with its default settings, can distil this pair."""
    pair, verdicts = (student_spec, teacher_spec), {}
    for name, method in all_methods().items():
        if reason := why_refused(method, *pair):
            verdicts[name] = Verdict(reason, mends=_mends(method, *pair))
        else:
            verdicts[name] = Verdict(settings=_settings_for(method, student_spec))
    return verdicts


def _settings_for(method: type[Method], spec: DetectorSpec) -> str:
    """The published settings that are named after a detector's kind: `CrossKD.for_fcos` for any FCOS; empty if none."""
    kind = spec.name.rpartition(" ")[2].lower()  # without the library's name, as in "torchvision FCOS"
    names = (name for name in published_settings(method) if name.partition(".for_")[2].replace("_", "") == kind)
    return next(names, "")


def _mends(method: type[Method], student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> tuple[str, ...]:
    """What the two detectors must agree in for the method to accept them. It is found by trying."""
    pair = student_spec, teacher_spec
    differ = {what: change for what, change in _AGREEMENTS.items() if change(*pair) != pair}
    for count in range(1, len(differ) + 1):
        for chosen in combinations(differ, count):
            changed = pair
            for what in chosen:
                changed = differ[what](*changed)
            if why_refused(method, *changed) is None:
                return chosen
    return ()


def _equal_levels(ours: DetectorSpec, theirs: DetectorSpec) -> Pair:
    if ours.strides == theirs.strides:
        return ours, theirs
    levels = len(theirs.strides)
    stages = (
        replace(stage, channels={branch: each[:1] * levels for branch, each in stage.channels.items()})
        if stage.spatial
        else stage
        for stage in ours.stages
    )
    changed = replace(
        ours,
        strides=theirs.strides,
        channels=ours.channels[:1] * levels,
        priors_per_cell=ours.priors_per_cell[:1] * levels,
        stages=tuple(stages),
    )
    return changed, theirs


def _equal_bins(ours: DetectorSpec, theirs: DetectorSpec) -> Pair:
    bins = theirs.bins or ours.bins
    return replace(ours, bins=bins), replace(theirs, bins=bins)


# For each thing that two detectors can agree in: their specs, changed so that they do. Levels come first, because later
# changes count things on each level.
_AGREEMENTS: Mapping[str, Callable[[DetectorSpec, DetectorSpec], Pair]] = {
    "equal class counts, or a class map": lambda ours, theirs: (replace(ours, num_classes=theirs.num_classes), theirs),
    "equal pyramid levels": _equal_levels,
    "equal numbers of priors a cell": lambda ours, theirs: (
        replace(ours, priors_per_cell=theirs.priors_per_cell),
        theirs,
    ),
    "sigmoid scores in both": lambda ours, theirs: (
        replace(ours, activation="sigmoid"),
        replace(theirs, activation="sigmoid"),
    ),
    "box distributions over equal bins": _equal_bins,
}
