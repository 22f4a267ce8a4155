"""Inheriting: a student's neck, encoder, decoder and head start from the teacher's weights where name and shape fit.

The backbone is left alone, unless all of it fits. A smaller student has a different backbone, and a few layers of a
foreign one would not work together. If both backbones are the same network, the neck and head that are taken fit the
teacher's features only, so the backbone is taken with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdtoolkit.classes import ClassMap, check_labels
from kdtoolkit.contract import Capability, ClassRows, DetectorAdapter
from kdtoolkit.errors import KDError
from kdtoolkit.libraries import adapt


@dataclass(frozen=True)
class Inherited:
    """What a student has taken from its teacher.

    Attributes:
        taken: the names in the student's state dict that have the teacher's values now. Of class layers, the rows of
            the shared classes have them.
        left: for each name that stayed as it was, the reason.
    """

    taken: tuple[str, ...]
    left: Mapping[str, str]

    def describe(self) -> str:
        """What was taken and what stayed, by parts of the model, in one sentence."""
        reasons = Counter(self.left.values())
        stayed = "; ".join(f"{count} because {reason}" for reason, count in reasons.most_common())
        return f"the student starts from the teacher's weights in {', '.join(self._parts())}" + (
            f"; of its other tensors {stayed}" if stayed else ""
        )

    def _parts(self) -> list[str]:
        """The modules that took values. A module whose tensors all did is named by its first name alone."""
        told = []
        for top, names in _grouped((*self.taken, *self.left), 1).items():
            if not set(names) & self.left.keys():
                told.append(top)
                continue
            for part, own in _grouped(names, 2).items():
                if taken := len(set(own) - self.left.keys()):
                    told.append(part if taken == len(own) else f"{part} ({taken} of {len(own)} tensors)")
        return told


@torch.no_grad()
def inherit(
    student: nn.Module | DetectorAdapter, teacher: nn.Module | DetectorAdapter, class_map: ClassMap | None = None
) -> Inherited:
    """Give the student the teacher's weights, in place: of neck, encoder, decoder and head, where name and shape fit.

    Args:
        student: a detector.
        teacher: a detector, of which the student's kind is.
        class_map: which classes the two share, if their class lists differ. Rows of all other classes stay as they are.

    Raises:
        KDError: the teacher is no whole detector, nothing fits, the class counts differ and there is no `class_map`,
            `class_map` names a class that a detector does not have, or the adapter of detectors whose classes differ
            does not say which weights belong to classes.
    """
    ours, theirs = adapt(student), adapt(teacher)
    if not {Capability.FEATURES, Capability.PREDICTIONS} <= theirs.spec.capabilities:
        raise KDError(
            f"{theirs.spec.name} is no whole detector, so it has no neck and head to start from: leave init out"
        )
    counts = ours.spec.num_classes, theirs.spec.num_classes
    if class_map is None:
        if counts[0] != counts[1]:
            raise KDError(
                f"the student has {counts[0]} classes, the teacher {counts[1]}: say which they share, as in "
                "inherit(student, teacher, ClassMap.by_name(STUDENT'S NAMES, TEACHER'S NAMES))"
            )
        class_map = ClassMap(tuple(range(counts[0])), tuple(range(counts[0])))
    check_labels(ours, class_map.student)
    check_labels(theirs, class_map.teacher)
    layers = ours.class_layers
    if layers is None and not class_map.is_identity(*counts):
        raise KDError(
            f"the class lists differ, and the adapter {type(ours).__name__} does not say which weights belong to "
            "classes: write its `class_layers` (docs/own_detector.md)"
        )
    own, others = ours.model.state_dict(), theirs.model.state_dict()
    backbone_fits = _fits(_backbone(ours, own), _backbone(theirs, others))
    taken, left = [], {}
    for name, value in own.items():
        rows = (layers or {}).get(name.rpartition(".")[0])
        if within(name, ours.backbone) and not backbone_fits:
            left[name] = "they belong to the backbone, and the teacher's is a different one"
        elif name not in others or (within(name, theirs.backbone) and not backbone_fits):
            left[name] = "the teacher has no tensors of these names"
        elif rows is not None:
            if (pair := _class_rows(value, others[name], rows, counts)) is None:
                left[name] = "the teacher's have different shapes"
                continue
            _take_rows(*pair, rows, class_map)
            taken.append(name)
        elif value.shape == others[name].shape:
            value.copy_(others[name])
            taken.append(name)
        else:
            left[name] = "the teacher's have different shapes"
    if not taken:
        raise KDError(
            f"nothing of {theirs.spec.name} fits {ours.spec.name}: no tensor outside of their backbones has the same "
            "name and shape. Do without inheriting, or choose a teacher of the student's family with as many channels "
            "in neck and head"
        )
    return Inherited(tuple(taken), left)


def within(name: str, modules: Sequence[str]) -> bool:
    """Whether a tensor belongs to one of the modules."""
    return any(name.startswith(f"{module}.") for module in modules)


def _backbone(adapter: DetectorAdapter, state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items() if within(name, adapter.backbone)}


def _fits(ours: Mapping[str, torch.Size], theirs: Mapping[str, torch.Size]) -> bool:
    return bool(ours) and ours == theirs


def _class_rows(own: Tensor, other: Tensor, rows: ClassRows, counts: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
    """Both tensors as (repeats, classes, inner, ...); None if they do not fit."""
    views = []
    for tensor, classes in ((own, counts[0]), (other, counts[1])):
        columns = rows.before + classes + rows.after
        if tensor.ndim == 0 or len(tensor) % (columns * rows.inner):
            return None
        views.append(tensor.view(-1, columns, rows.inner, *tensor.shape[1:]))
    ours, theirs = views
    same = ours.shape[0] == theirs.shape[0] and ours.shape[2:] == theirs.shape[2:]
    return (ours, theirs) if same else None


def _take_rows(own: Tensor, other: Tensor, rows: ClassRows, class_map: ClassMap) -> None:
    """Copy the rows of the shared classes, and of background."""
    for label, its in zip(class_map.student, class_map.teacher, strict=True):
        own[:, rows.before + label] = other[:, rows.before + its]
    own[:, : rows.before] = other[:, : rows.before]
    if rows.after:
        own[:, -rows.after :] = other[:, -rows.after :]


def _grouped(names: Iterable[str], levels: int) -> dict[str, list[str]]:
    """Names of tensors by the first `levels` names of their modules."""
    groups: dict[str, list[str]] = {}
    for name in names:
        *modules, last = name.split(".")
        groups.setdefault(".".join(modules[:levels]) or last, []).append(name)
    return groups
