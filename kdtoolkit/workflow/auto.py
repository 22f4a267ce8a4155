"""Method `auto`: which methods distil a pair of detectors, chosen by what the pair allows."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass

from kdtoolkit.contract import DetectorSpec, PriorKind
from kdtoolkit.distiller import TEACHER_SCALES
from kdtoolkit.errors import IncompatibleError, KDError
from kdtoolkit.method_use import MethodUse
from kdtoolkit.methods import all_methods
from kdtoolkit.verdicts import judge_pair
from kdtoolkit.workflow.defaults import Choice

_FALLBACK = ("PKD", "FitNet", "CWD", "Cosine")  # methods of features, which need least
_DEEP = 32  # px, the stride of the levels that foundation teachers are compared at


@dataclass(frozen=True)
class Chosen:
    """The methods, and why these."""

    methods: tuple[MethodUse, ...]
    why: str


def choose(student_spec: DetectorSpec, teacher_spec: DetectorSpec, library: str) -> Chosen:
    """The methods for a pair, whose student is of this library.

    Raises IncompatibleError if none works, with what hinders each of them.
    """
    verdicts = judge_pair(student_spec, teacher_spec)
    works = [name for name, verdict in verdicts.items() if verdict.reason is None]
    wanted, why = _wanted(student_spec, teacher_spec, works, library)
    if not wanted:
        reasons = "; ".join(f"{name}: {verdicts[name].reason}" for name in _FALLBACK)
        raise IncompatibleError(
            f"no method can distil {teacher_spec.name} into {student_spec.name} ({reasons}). Choose another student: "
            "`kd adapters --matrix` and docs/matrix.md show what works"
        )
    return Chosen(tuple(MethodUse.model_validate(verdicts[name].settings or name) for name in wanted), why)


def teacher_scale(student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> Choice:
    """The size of the teacher's images beside the student's, if the user does not say it.

    A teacher that shows features alone gets the size at which its deepest level lies nearest to the student's deepest
    level of stride 32 or finer. All others see what the student sees.
    """
    if teacher_spec.priors is not PriorKind.NONE:
        return Choice(1.0, "as the student")
    fine = [stride for stride in student_spec.strides if stride <= _DEEP] or student_spec.strides[:1]
    stride = teacher_spec.strides[-1]
    scale = min(TEACHER_SCALES, key=lambda scale: abs(math.log(stride / scale / max(fine))))
    return Choice(scale, f"its cells of {stride} px are then {stride / scale:g} px, beside the student's {max(fine)}")


def _wanted(
    student_spec: DetectorSpec, teacher_spec: DetectorSpec, works: list[str], library: str
) -> tuple[tuple[str, ...], str]:
    if teacher_spec.priors is PriorKind.NONE and "Cosine" in works:
        return ("Cosine",), "made for teachers that show features alone"
    if teacher_spec.priors is PriorKind.DETECTIONS and "ObjectKD" in works:
        return ("ObjectKD",), "the teacher shows detections alone"
    if student_spec.priors is PriorKind.QUERIES and "KDDETR" in works:
        return ("KDDETR",), "best for queries on our boards"
    if student_spec.priors is PriorKind.PROPOSALS and "CrossKD" in works:
        return ("CrossKD",), "best for proposals on our boards"
    if "CrossKD" in works and "PKD" in works and library == "kdtoolkit":
        return ("CrossKD", "PKD"), "together the best on our boards"
    if "CrossKD" in works:
        return ("CrossKD",), "best on our boards; PKD beside it lowered AP"
    for name in _FALLBACK:
        if name in works:
            return (name,), "the heads cannot be compared, so features are"
    return (), ""


def scaled(use: MethodUse, factor: float) -> MethodUse:
    """A method with all its weights multiplied, for a student whose library multiplies its own loss.

    Raises KDError for published settings such as `CrossKD.for_fcos`, whose weights cannot be given, and for methods
    that have no weights.
    """
    if use.name not in all_methods():
        raise KDError(
            f"the weights of {use.name} are fixed, and the student's library needs them x {factor:g}: name the method "
            f"and its arguments, as in --method {use.method.__name__}"
        )
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(use.method).parameters.items()
        if name.endswith("weight") and isinstance(parameter.default, float)
    }
    if not defaults:
        raise KDError(f"{use.name} has no weights, and the student's library needs them x {factor:g}")
    weights = {name: factor * use.args.get(name, default) for name, default in defaults.items()}
    return MethodUse.model_validate({use.name: use.args | {name: weight for name, weight in weights.items() if weight}})
