"""What a detector is while kdtoolkit opens it and saves it: the model, its classes and where its weights come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn


@dataclass(frozen=True, eq=False)
class Detector:
    """A detector that `open_detector` opened.

    Attributes:
        model: the plain model of its library.
        name: what builds the same architecture again, such as "kdtoolkit/gfl?backbone=resnet18".
        class_names: the names of its classes in the order of their labels; None if nobody knows them.
        weights: where its weights come from, in words; empty if they are random.
        trained: whether it can detect, or, if it shows features alone, whether it can teach. It is False if any class
            layer has random weights.
        notes: what the user should know, one sentence each.
        image_size: the longest side of the images that it was trained on, in pixels; None if nobody knows it.
    """

    model: nn.Module = field(repr=False)
    name: str
    class_names: tuple[str, ...] | None
    weights: str = ""
    trained: bool = False
    notes: tuple[str, ...] = ()
    image_size: int | None = None


@dataclass(frozen=True, eq=False)
class Opened:
    """A trained detector as its library opened it, with the classes of its weights.

    `build` makes the same architecture for a number of classes, with random weights. `num_classes` is the number of
    classes that `model` has; 0 if it shows features alone. The rest is as in `Detector`.
    """

    model: nn.Module
    build: Callable[[int], nn.Module]
    num_classes: int
    name: str
    class_names: tuple[str, ...] | None
    weights: str
    trained: bool = True
    notes: tuple[str, ...] = ()
    image_size: int | None = None


@dataclass(frozen=True)
class SavedDetector:
    """What `save_detector` wrote.

    `folder` is what `open_detector` takes. `file` holds the weights. `how_to_open` is Python code that opens the
    detector without kdtoolkit, if its library can; it is run in `folder`.
    """

    folder: Path
    file: Path
    how_to_open: str


def named(names: Sequence[str]) -> tuple[str, ...]:
    """Class names of published weights, in which labels without a class have names of their own: "unused 12"."""
    unused = ("N/A", "__background__", "")
    return tuple(f"unused {label}" if name in unused else name for label, name in enumerate(names))
