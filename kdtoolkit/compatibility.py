"""Which levels of two detectors correspond, and why a pair of detectors is refused.

Each function `why_...` returns a reason in words, or None if nothing is wrong. A reason says what is wrong and what to
use instead. It completes "PKD cannot distil A into B: ..." and has no full stop at its end. A method returns one:

    def refuses(self, student_spec, teacher_spec):
        return why_priors_differ(student_spec, teacher_spec) or why_scores_differ(student_spec, teacher_spec)
"""

from __future__ import annotations

from kdtoolkit.contract import Capability, DetectorSpec, Method, Predictions, PriorKind
from kdtoolkit.contract.method import check_facts
from kdtoolkit.errors import IncompatibleError

_OF_FEATURES = "a method of features (PKD, FGD)"
_OF_ANY_HEADS = f"ObjectKD, which compares objects, or {_OF_FEATURES}"
_OF_DETECTIONS = "ObjectKD, which learns from detections; or make labels of them, `kd pseudo-label`"
# Methods that need one of these run the heads, and may compare their classes.
_OF_HEADS = set(Capability) - {Capability.FEATURES}


def why_refused(method: type[Method] | Method, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> str | None:
    """Why a method cannot distil this pair. A class stands for a method with its default settings.

    Raises KDError if the class does not say what a method must say.
    """
    check_facts(method)
    for role, spec in (("student", student_spec), ("teacher", teacher_spec)):
        if missing := sorted(method.needs - spec.capabilities):
            return f"it needs {', '.join(missing)}, which the {role} ({spec.name}) does not show{use_instead(spec)}"
    built = method() if isinstance(method, type) else method
    for role, spec in (("student", student_spec), ("teacher", teacher_spec)):
        if absent := sorted(set(built.strides) - set(spec.strides)):
            return (
                f"it was told to work at the strides {absent}, and the {role} ({spec.name}) has only "
                f"{spec.strides}: name only these in at_strides"
            )
    if reason := built.refuses(student_spec.at_strides(built.strides), teacher_spec.at_strides(built.strides)):
        return reason
    if method.needs & _OF_HEADS and built.compares_classes and student_spec.num_classes != teacher_spec.num_classes:
        shows_features = Capability.FEATURES in teacher_spec.capabilities
        return (
            f"it compares class scores, and the student has {student_spec.num_classes} classes, the teacher "
            f"{teacher_spec.num_classes}. Say which classes they share: Distiller(..., class_map=ClassMap.by_name("
            "STUDENT'S NAMES, TEACHER'S NAMES))"
            + (f". Or use a method that compares no classes, such as {_OF_FEATURES}" if shows_features else "")
        )
    return None


def shared_levels(student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> list[tuple[int, int]]:
    """Pairs (student level, teacher level) of equal stride, finest first; no level is in two of them."""
    pairs: list[tuple[int, int]] = []
    for i, stride in enumerate(student_spec.strides):
        free = [j for j, other in enumerate(teacher_spec.strides) if other == stride and j not in {t for _, t in pairs}]
        pairs += [(i, free[0])] if free else []
    return pairs


def why_no_shared_level(student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> str | None:
    """Why features cannot be compared level by level: no stride is in both pyramids."""
    if shared_levels(student_spec, teacher_spec):
        return None
    return (
        f"the two have no stride in common: the student's levels have the strides {student_spec.strides}, the "
        f"teacher's {teacher_spec.strides}. Use Cosine, which needs none, or a teacher with a level at one of the "
        "student's strides"
    )


def why_not_on_grid(spec: DetectorSpec, role: str, use: str = _OF_FEATURES) -> str | None:
    """Why a detector's predictions are no maps: its priors are proposals or queries.

    Args:
        spec: of the detector.
        role: "student" or "teacher".
        use: what to use instead.
    """
    if spec.priors.on_grid:
        return None
    return f"it needs predictions on a grid (points or anchors), and the {role} predicts at {spec.priors}. Use {use}"


def why_cells_differ(student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> str | None:
    """Why two heads do not predict at corresponding places: their strides or their kinds of priors differ."""
    if student_spec.priors.on_grid and teacher_spec.priors.on_grid:
        if student_spec.strides == teacher_spec.strides:
            return None
        return (
            f"it compares whole grids, and the student has the strides {student_spec.strides}, the teacher "
            f"{teacher_spec.strides}. Use CrossKD, LD or {_OF_FEATURES}: they work at the strides that both have"
        )
    if student_spec.priors != teacher_spec.priors:
        return (
            f"the student predicts at {student_spec.priors}, the teacher at {teacher_spec.priors}, and these do not "
            f"correspond{use_instead(teacher_spec) or f'. Use {_OF_ANY_HEADS}'}"
        )
    if student_spec.prior_form != teacher_spec.prior_form:
        return (
            f"the two detectors' {student_spec.priors} differ in kind: the student's are {student_spec.prior_form}, "
            f"the teacher's {teacher_spec.prior_form}. Use a teacher of the student's family, {_OF_ANY_HEADS}"
        )
    return None


def why_priors_differ(student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> str | None:
    """Why priors do not correspond one to one: their places or their numbers in a cell differ."""
    if reason := why_cells_differ(student_spec, teacher_spec):
        return reason
    if student_spec.priors_per_cell != teacher_spec.priors_per_cell:
        ours, theirs = _numbers(student_spec), _numbers(teacher_spec)
        return f"the student has {ours} a cell, the teacher {theirs}. Use CrossKD or {_OF_FEATURES}"
    return None


def why_scores_differ(student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> str | None:
    """Why class scores cannot be compared: one detector has a sigmoid, the other a softmax."""
    if student_spec.activation == teacher_spec.activation:
        return None
    return (
        f"the student's class scores are a {student_spec.activation}, the teacher's a {teacher_spec.activation}. Use "
        f"CrossKD or {_OF_FEATURES}"
    )


def why_too_few_classes(spec: DetectorSpec, least: int = 2) -> str | None:
    """Why a softmax over a detector's classes says nothing: there are fewer than `least` (for one it is always 1)."""
    classes = spec.num_classes + (spec.activation == "softmax")
    if classes >= least:
        return None
    return f"it takes a softmax over at least {least} classes, and the detectors have {classes}"


def why_bins_differ(student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> str | None:
    """Why distributions of box sides cannot be compared: they are over different bins, or one head has none."""
    if student_spec.bins == teacher_spec.bins:
        return None
    ours, theirs = (
        f"has {len(spec.bins)} bins ({spec.bins[0]:g} to {spec.bins[-1]:g})" if spec.bins else "predicts plain boxes"
        for spec in (student_spec, teacher_spec)
    )
    return (
        f"it compares distributions of box sides, and the student {ours}, the teacher {theirs}. Use CrossKD, BCKD or "
        f"{_OF_FEATURES}"
    )


def check_grids(method: str, student: Predictions, teacher: Predictions) -> None:
    """Raise IncompatibleError where the two detectors made grids of different sizes from this batch."""
    if student.priors.grid != teacher.priors.grid:
        raise IncompatibleError(
            f"{method} compares grids of equal size, and for this batch they are {student.priors.grid} (H, W) in the "
            f"student and {teacher.priors.grid} in the teacher: build both detectors with the same image size"
        )


def why_no_student(spec: DetectorSpec) -> str | None:
    """Why a detector cannot be trained as a student: it does not show both features and predictions."""
    if {Capability.FEATURES, Capability.PREDICTIONS} <= spec.capabilities:
        return None
    shown = ", ".join(sorted(spec.capabilities)) or "nothing"
    return f"{spec.name} can only teach, because it shows nothing but {shown}: name a detector as the student"


def use_instead(spec: DetectorSpec) -> str:
    """What works with a teacher that shows features alone, or detections alone, as a sentence; empty for all others."""
    if spec.priors is PriorKind.NONE:
        return f". Use Cosine, or {_OF_FEATURES} where strides are equal"
    return f". Use {_OF_DETECTIONS}" if spec.priors is PriorKind.DETECTIONS else ""


def _numbers(spec: DetectorSpec) -> str:
    """`9 priors`, or `4, 6, 4 priors` where the levels differ."""
    numbers = spec.priors_per_cell[:1] if len(set(spec.priors_per_cell)) == 1 else spec.priors_per_cell
    return f"{', '.join(map(str, numbers))} prior{'' if numbers == (1,) else 's'}"
