"""Class lists that differ: which classes two detectors share, and a detector that shows only these.

Methods know nothing of it. They get the views of two `SharedClasses`, which have equal class counts: class k is the
same class in both.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn

from kdtoolkit.canvas import scaled
from kdtoolkit.contract import (
    Assignment,
    Batch,
    Detections,
    DetectorAdapter,
    DetectorSpec,
    HeadOutputs,
    HeadTrace,
    Predictions,
    Priors,
    Recorded,
    State,
    Target,
)
from kdtoolkit.errors import KDError
from kdtoolkit.options import did_you_mean


@dataclass(frozen=True)
class ClassMap:
    """The classes that a student and a teacher share: the student's class `student[k]` is the teacher's `teacher[k]`.

    Both are labels, counted from 0, without background. `ClassMap.by_name` makes one from the names of the classes.

    Raises KDError if a label occurs twice, if the two lists differ in length, or if they are empty.
    """

    student: tuple[int, ...]
    teacher: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "student", tuple(self.student))
        object.__setattr__(self, "teacher", tuple(self.teacher))
        if len(self.student) != len(self.teacher) or not self.student:
            raise KDError(
                f"ClassMap(student={self.student}, teacher={self.teacher}): both name the shared classes, so both need "
                "the same number of labels, at least one"
            )
        for role, labels in (("student", self.student), ("teacher", self.teacher)):
            if len(set(labels)) < len(labels) or min(labels) < 0:
                raise KDError(
                    f"ClassMap({role}={labels}): labels count from 0, and a class can be shared only once: name each "
                    "label once"
                )

    @classmethod
    def by_name(
        cls,
        student: Sequence[str],
        teacher: Sequence[str],
        given: Mapping[str, str] | None = None,
        roles: tuple[str, str] = ("student", "teacher"),
    ) -> ClassMap:
        """Pair the classes that have the same name, or a name that differs by case, spaces, `-` and `_` alone.

        Args:
            student: the student's class names, label 0 first.
            teacher: the teacher's class names, label 0 first.
            given: the teacher's name for a class of the student, where the names differ: {"parrot": "bird"}.
            roles: what errors call the two, if they are not student and teacher.

        Raises:
            KDError: a name in `given` is not in its list, a list has a name twice, two classes of the student would be
                one class of the teacher, or no class is shared.
        """
        lists = (student, teacher)
        for role, names in zip(roles, lists, strict=True):
            if twice := [name for name in names if names.count(name) > 1]:
                raise KDError(f"the {role} has two classes {twice[0]!r}: give each class a name of its own")
        pairs: dict[int, int] = {}
        for own, its in (given or {}).items():
            found: list[int] = []
            for role, name, names in zip(roles, (own, its), lists, strict=True):
                if not (alike := _alike(name, names)):
                    raise KDError(
                        f"the class map says {own!r}: {its!r}, and the {role} has no class {name!r}"
                        f"{did_you_mean(name, names)}: it has {_listed(names)}"
                    )
                found.append(_only(alike, names, role))
            pairs[found[0]] = found[1]
        for label, name in enumerate(student):
            if label not in pairs and (alike := _alike(name, teacher)):
                if teacher[alike[0]] != name:
                    _only(_folded(name, student), student, roles[0])
                pairs[label] = _only(alike, teacher, roles[1])
        taken: dict[int, int] = {}
        for own_label, its_label in pairs.items():
            if its_label in taken:
                first, second = sorted((taken[its_label], own_label))
                raise KDError(
                    f"the {roles[0]}'s classes {student[first]!r} and {student[second]!r} would both be "
                    f"the {roles[1]}'s {teacher[its_label]!r}: give the {roles[0]} one class for both, or map only "
                    "one of them"
                )
            taken[its_label] = own_label
        if not pairs:
            likely = [f"{name!r}{hint}" for name in student if (hint := did_you_mean(name, teacher))]
            raise KDError(
                f"{roles[0]} and {roles[1]} share no class: the {roles[0]} has {_listed(student)}; the {roles[1]} has "
                f"{_listed(teacher)}. Write which are the same, as in class_map {{{_example(student)}: "
                f"{_example(teacher)}}}" + (f". Similar are {', '.join(likely[:3])}" if likely else "")
            )
        return cls(tuple(sorted(pairs)), tuple(pairs[label] for label in sorted(pairs)))

    def is_identity(self, student_classes: int, teacher_classes: int) -> bool:
        """Whether two detectors with these numbers of classes have the same classes in the same order."""
        every = tuple(range(student_classes))
        return student_classes == teacher_classes and self.student == self.teacher and sorted(self.student) == [*every]

    def describe(self, student_names: Sequence[str], teacher_names: Sequence[str], teacher: str = "teacher") -> str:
        """What is shared, what has a different name in the teacher, and what is left out, in sentences.

        `teacher`: what the text calls it, if it is no teacher.
        """
        pairs = [(student_names[s], teacher_names[t]) for s, t in zip(self.student, self.teacher, strict=True)]
        shared = [own if own == its else f"{own} (the {teacher}'s {its})" for own, its in pairs]
        text = f"shared classes: {_listed(shared)}"
        if own := [name for label, name in enumerate(student_names) if label not in self.student]:
            text += f"; the {teacher} says nothing about {_listed(own)}"
        if others := [name for label, name in enumerate(teacher_names) if label not in self.teacher]:
            text += f"; {len(others)} of the {teacher}'s classes are left out ({_listed(others)})"
        return text


def check_labels(adapter: DetectorAdapter, labels: Sequence[int]) -> None:
    """Raise KDError if a class map names a class that the detector does not have."""
    classes = adapter.spec.num_classes
    if wrong := [label for label in labels if not 0 <= label < classes]:
        raise KDError(
            f"the class map names the class {wrong[0]} of {adapter.spec.name}, which has {classes} classes: labels "
            f"must lie in 0..{classes - 1}"
        )


class SharedClasses(DetectorAdapter):
    """A detector that shows some of its classes: class k is the wrapped detector's class `labels[k]`.

    Everything else is the wrapped detector's. With a softmax, background becomes "none of these": its logit is the log
    of the sum of the exponentials of background and of all classes that are not shown. So each score stays what it was,
    and nothing that compares scores moves probability between background and a class that is not shown.

    To methods, an object of a class that is not shown is no object. Priors that answer for one have weight 0, so
    nothing is compared there.

    Args:
        adapter: the detector's adapter.
        labels: its classes that are shown, in the order in which they are shown.

    Raises KDError if the detector has no class of such a label.
    """

    def __init__(self, adapter: DetectorAdapter, labels: Sequence[int]) -> None:
        super().__init__(adapter.model)
        check_labels(adapter, labels)
        self._inner = adapter
        self._labels = tuple(labels)
        self._hidden = tuple(label for label in range(adapter.spec.num_classes) if label not in labels)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Always False: it wraps an adapter."""
        return False

    def describe(self) -> DetectorSpec:
        """The wrapped detector's facts, with the number of classes that are shown."""
        return replace(self._inner.spec, num_classes=len(self._labels))

    @cached_property
    def spec(self) -> DetectorSpec:
        """The facts about the detector as it is shown."""
        return replace(self.describe(), first_stage=None if self.first_stage is None else self.first_stage.spec)

    @property
    def assigner(self) -> object:
        """The wrapped detector's."""
        return self._inner.assigner

    @property
    def first_stage(self) -> DetectorAdapter | None:
        """The region proposal network; None if some classes are not shown, because it knows only "object"."""
        return None if self._hidden else self._inner.first_stage

    def prepare(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None, like: Batch | None = None
    ) -> Batch:
        """Prepare images as the detector does. Labels of `targets` count the classes that are shown."""
        whole = self._inner.prepare(images, None if targets is None else self.own_objects(targets), like)
        shown = () if targets is None else tuple(target["labels"] for target in targets)
        return _as_seen(whole, whole.boxes, shown)

    def with_objects(self, batch: Batch, objects: Sequence[Target]) -> Batch:
        """The batch with these objects, which are in pixels of the original images, instead of its own."""
        whole = with_objects(self._inner, _whole(batch), self.own_objects(objects))
        return _as_seen(whole, whole.boxes, tuple(each["labels"] for each in objects))

    def seen(self, whole: Batch) -> Batch:
        """A batch of the wrapped detector, as methods see it: without the objects of classes that are not shown."""
        if not whole.boxes:
            return _as_seen(whole, (), ())
        objects = [Target(boxes=b, labels=k) for b, k in zip(whole.boxes, whole.labels, strict=True)]
        seen = self.seen_objects(objects)
        return _as_seen(whole, tuple(each["boxes"] for each in seen), tuple(each["labels"] for each in seen))

    def seen_objects(self, objects: Sequence[Target]) -> list[Target]:
        """The objects of the classes that are shown, with the labels that are shown."""
        labels = [self._numbers(each["labels"].device)[each["labels"]] for each in objects]
        if not self._hidden:
            return [Target(boxes=each["boxes"], labels=own) for each, own in zip(objects, labels, strict=True)]
        keep = torch.cat(labels) < len(self._labels)
        # Indices from the host: the host of a GPU then waits once, not once for each image.
        rows = iter(keep.tolist())
        chosen = [torch.tensor([i for i in range(len(own)) if next(rows)], dtype=torch.long) for own in labels]
        return [
            Target(boxes=each["boxes"][index.to(own.device)], labels=own[index.to(own.device)])
            for each, own, index in zip(objects, labels, chosen, strict=True)
        ]

    def own_objects(self, objects: Sequence[Target]) -> list[Target]:
        """Objects with the labels that are shown, with the wrapped detector's own labels."""
        return [
            Target(boxes=each["boxes"], labels=_table(self._labels, each["labels"].device)[each["labels"]])
            for each in objects
        ]

    def features(self, batch: Batch) -> tuple[Tensor, ...]:
        """Run backbone and neck."""
        return self._inner.features(_whole(batch))

    def head(
        self,
        features: tuple[Tensor, ...],
        batch: Batch,
        priors: Priors | None = None,
        stages: Collection[int] | None = None,
    ) -> HeadTrace:
        """Run the head."""
        return self.seen_trace(self._inner.head(features, _whole(batch), priors, stages))

    def seen_trace(self, trace: HeadTrace) -> HeadTrace:
        """A pass of the wrapped detector's head, as methods see it. The pass itself is the context."""
        first = None if self.first_stage is None else trace.first
        return HeadTrace(trace.states, self._seen_predictions(trace.predictions), context=trace, first=first)

    def resume(self, state: State, stage: int, trace: HeadTrace) -> Predictions:
        """Run the head from `state` to its end."""
        return self._seen_predictions(self._inner.resume(state, stage, _own(trace)))

    def rebuild(self, outputs: HeadOutputs, batch: Batch) -> HeadTrace:
        """Make a pass of the wrapped detector's head again, from the predictions of all its classes."""
        return self.seen_trace(self._inner.rebuild(outputs, _whole(batch)))

    def own_predictions(self, trace: HeadTrace) -> Predictions:
        """The predictions of all classes of the wrapped detector."""
        return self._inner.own_predictions(_own(trace))

    def layers(self, trace: HeadTrace) -> tuple[HeadTrace, ...]:
        """The pass after each decoder layer."""
        return tuple(map(self.seen_trace, self._inner.layers(_own(trace))))

    def queries_at(self, content: Tensor, boxes: Tensor, batch: Batch) -> Priors:
        """Make queries that look at given boxes."""
        return self._inner.queries_at(content, boxes, _whole(batch))

    def task_losses(self, trace: HeadTrace, batch: Batch) -> tuple[dict[str, Tensor], Assignment | None]:
        """The wrapped detector's own losses, of all its classes."""
        losses, assignment = self._inner.task_losses(_own(trace), _whole(batch))
        return losses, None if assignment is None else self.seen_assignment(assignment)

    def assign(self, trace: HeadTrace, batch: Batch) -> Assignment:
        """Assign all objects by the detector's own rule, then show those of the classes that are shown."""
        return self.seen_assignment(self._inner.assign(_own(trace), _whole(batch)))

    def detections(self, trace: HeadTrace, batch: Batch) -> list[Detections]:
        """The wrapped detector's detections of the classes that are shown."""
        found = []
        for image in self._inner.detections(_own(trace), _whole(batch)):
            labels = self._numbers(image["labels"].device)[image["labels"]]
            keep = labels < len(self._labels)
            found.append(Detections(boxes=image["boxes"][keep], scores=image["scores"][keep], labels=labels[keep]))
        return found

    def seen_assignment(self, assignment: Assignment) -> Assignment:
        """An assignment of the wrapped detector, as methods see it."""
        labels = self._numbers(assignment.labels.device)[assignment.labels]
        positive = labels < len(self._labels)
        counts = positive | ~assignment.positive  # all but the priors that answer for an object that is not shown
        return replace(assignment, labels=labels, positive=positive, weights=assignment.weights * counts)

    def _seen_predictions(self, predictions: Predictions) -> Predictions:
        logits = predictions.logits
        shown = logits.index_select(-1, _table(self._labels, logits.device))
        if predictions.activation == "softmax":
            rest = logits.index_select(-1, _table((*self._hidden, self._inner.spec.num_classes), logits.device))
            shown = torch.cat([shown, rest.logsumexp(-1, keepdim=True)], -1)
        return replace(predictions, logits=shown)

    def _numbers(self, device: torch.device) -> Tensor:
        """(K + 1,): for each label of the wrapped detector, and background, the label that is shown for it."""
        numbers = [len(self._labels)] * (self._inner.spec.num_classes + 1)
        for number, label in enumerate(self._labels):
            numbers[label] = number
        return _table(tuple(numbers), device)


@dataclass(frozen=True)
class SharedBatch(Batch):
    """A batch of which methods see the objects of shared classes. `whole` is the detector's own batch."""

    whole: Batch | None = None

    def at_images(self, indices: Sequence[int]) -> SharedBatch:
        """The batch of some of the images, on the same canvas."""
        return replace(super().at_images(indices), whole=_whole(self).at_images(indices))


def with_objects(adapter: DetectorAdapter, batch: Batch, objects: Sequence[Target]) -> Batch:
    """A batch of the adapter with these objects, one target for each image, in pixels of the original images."""
    if isinstance(adapter, SharedClasses):
        return adapter.with_objects(batch, objects)
    places = zip(objects, batch.sizes, batch.original_sizes, strict=True)
    boxes = tuple(scaled(each["boxes"], size, original) for each, size, original in places)
    return replace(batch, boxes=boxes, labels=tuple(each["labels"] for each in objects))


def with_recorded(batch: Batch, recorded: Sequence[Recorded]) -> Batch:
    """The batch of a teacher that is a file, with its detections, whose boxes are in pixels of the original images."""
    if isinstance(batch, SharedBatch):
        return replace(batch, whole=with_recorded(_whole(batch), recorded))
    places = zip(recorded, batch.sizes, batch.original_sizes, strict=True)
    moved = (
        Recorded(boxes=scaled(each["boxes"], *sizes), probabilities=each["probabilities"]) for each, *sizes in places
    )
    return replace(batch, recorded=tuple(moved))


def _as_seen(whole: Batch, boxes: tuple[Tensor, ...], labels: tuple[Tensor, ...]) -> SharedBatch:
    return SharedBatch(whole.images, whole.sizes, whole.padded_sizes, whole.original_sizes, boxes, labels, whole=whole)


def _whole(batch: Batch) -> Batch:
    assert isinstance(batch, SharedBatch), "a SharedClasses takes batches that it prepared itself"
    assert batch.whole is not None
    return batch.whole


def _own(trace: HeadTrace) -> HeadTrace:
    assert isinstance(trace.context, HeadTrace), "a SharedClasses takes passes of its own head"
    return trace.context


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a tensor made in inference mode could not be used in training later
def _table(values: tuple[int, ...], device: torch.device) -> Tensor:
    """The values as a tensor. It is cached, because each copy to a GPU makes the host wait."""
    return torch.tensor(values, device=device)


def _alike(name: str, names: Sequence[str]) -> list[int]:
    """The label of the class with this name; else of all classes that differ by case, spaces, `-` and `_` alone."""
    return [names.index(name)] if name in names else _folded(name, names)


def _folded(name: str, names: Sequence[str]) -> list[int]:
    return [label for label, each in enumerate(names) if _plain(each) == _plain(name)]


def _only(labels: Sequence[int], names: Sequence[str], role: str) -> int:
    """The one label. Raises KDError if there are more."""
    if len(labels) > 1:
        raise KDError(
            f"the {role}'s classes {names[labels[0]]!r} and {names[labels[1]]!r} cannot be told apart by a name that "
            "is written differently: write the names alike in both lists, or say in class_map which is which"
        )
    return labels[0]


def _plain(name: str) -> str:
    return "".join(name.casefold().replace("-", " ").replace("_", " ").split())


def _listed(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _example(names: Sequence[str]) -> str:
    return names[0] if names else "..."
