"""What is measured before and after a training: the AP of teacher and student, and whether the teacher can teach."""

from __future__ import annotations

import time

import torch

from kdtoolkit.data.opening import name_of
from kdtoolkit.detectors.recorded import RecordedDetector
from kdtoolkit.engine.evaluate import Evaluation, evaluate, why_not_measured
from kdtoolkit.errors import KDError
from kdtoolkit.libraries import adapt
from kdtoolkit.models import Detector
from kdtoolkit.workflow.display import Display
from kdtoolkit.workflow.options import DistillOptions
from kdtoolkit.workflow.prepare import Prepared

WEAK_AP = 5.0  # a teacher below it knows next to nothing of this data


def measured_teacher(prepared: Prepared, device: torch.device, display: Display) -> Evaluation | None:
    """Measure the teacher at the size that the student sees, and say what it has; None if it cannot be measured."""
    teacher = prepared.teacher
    assert teacher is not None
    if reason := why_not_measured(teacher.model, prepared.images.val):
        display.line(f"the teacher is not measured: {reason}")
        return None
    found = evaluated(prepared, teacher, device, display, "the teacher", teaching=True)
    size = "" if isinstance(teacher.model, RecordedDetector) else ", at the size that the student sees"
    display.line(f"the teacher has {in_words(found)} on these {found.images} images{size}")
    return found


def check_teacher(
    prepared: Prepared, found: Evaluation, before: Evaluation | None, device: torch.device, display: Display
) -> None:
    """Raise KDError if a teacher is bad on this data; warn if the student is better before training.

    `found`: what was measured of the teacher. `before`: the same of the student before training, None if it cannot
    detect yet.
    """
    options, teacher = prepared.options, prepared.teacher
    assert isinstance(options, DistillOptions)
    assert teacher is not None
    ap, name = found.ap, name_of(options.data)
    if (ap is None or ap < WEAK_AP) and not options.allow_weak_teacher:
        anyway = "To go on all the same, add --allow-weak-teacher"
        if ap is None:
            raise KDError(
                f"the teacher cannot be measured: the validation images of {name} have no object of a class that it "
                f"knows. Add such images, or pair classes of different names by --class-map. {anyway}"
            )
        alone = evaluated(prepared, teacher, device, display, "the teacher alone")
        if alone.ap is not None and alone.ap >= WEAK_AP:
            raise KDError(
                f"the teacher has {in_words(found)} on the validation images of {name} at the size that the "
                f"student sees, and {in_words(alone)} alone, where it resizes them itself: let the student see larger "
                f"images than {options.image_size} px (--image-size). {anyway}"
            )
        same = "" if alone.ap == ap else f" (alone, where it resizes them itself, it has {in_words(alone)})"
        raise KDError(
            f"the teacher has {in_words(found)} on the validation images of {name}: a student cannot learn from "
            f"it{same}. Usual reasons: its classes have different names or a different order (--class-map), it was "
            f"trained on images of a different size than {options.image_size} px (--image-size), or on other images "
            f"(`kd train` trains a teacher on yours). {anyway}"
        )
    if before is not None and before.ap is not None and ap is not None and before.ap > ap:
        display.warn(
            f"the student is better than its teacher before training ({before.ap:.1f} and {ap:.1f} AP): the "
            "teacher may hold it back. `kd train` trains it alone, --compare-baseline shows the difference"
        )


def evaluated(
    prepared: Prepared,
    detector: Detector,
    device: torch.device,
    display: Display,
    what: str,
    *,
    teaching: bool = False,
) -> Evaluation:
    """Measure a detector on the validation images; `teaching`: at the size at which the student sees them."""
    begun = time.monotonic()
    found = evaluate(
        detector.model,
        prepared.images.val,
        batch_size=prepared.config.batch_size,
        device=device,
        class_map=prepared.class_map if detector is prepared.teacher else None,
        like=adapt(prepared.student.model) if teaching else None,
        together=True,
        progress=display.counting(f"evaluating {what}"),
    )
    display.evaluation_seconds = time.monotonic() - begun
    return found


def in_words(found: Evaluation) -> str:
    """`42.1 AP`."""
    return "no AP" if found.ap is None else f"{found.ap:.1f} AP"
