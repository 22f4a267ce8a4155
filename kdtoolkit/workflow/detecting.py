"""What evaluation, prediction and labelling share: an opened detector on its device, and the classes that it knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from kdtoolkit.classes import ClassMap
from kdtoolkit.data import DetectionDataset
from kdtoolkit.data.detections import is_detection_file
from kdtoolkit.data.opening import categories_of, class_names_of, open_all
from kdtoolkit.data.recorded import check_images
from kdtoolkit.detectors.recorded import RecordedDetector
from kdtoolkit.engine.detect import Runner
from kdtoolkit.errors import KDError
from kdtoolkit.libraries import adapt
from kdtoolkit.models import Detector, UnknownClassesError, enlarging, open_detector, shortened
from kdtoolkit.workflow.defaults import SMALLEST_SIZE

LARGEST_SIZE = 1333  # pixels, as in the preprocessing of torchvision and of DETR


@dataclass(frozen=True, eq=False)
class Ready:
    """A trained detector that is ready to run.

    `image_size`: the longest side of images in pixels; larger images are scaled down to it. None is enlarged, but for
    what the detector's own preprocessing does.
    `class_names`: of the detector, label 0 first; "class 0" and so on if nobody knows them. `named`: whether they are
    known. `notes`: what the user should know of it.
    """

    detector: Detector
    runner: Runner
    image_size: int
    class_names: tuple[str, ...]
    named: bool
    notes: tuple[str, ...]

    def shared_with(
        self, class_names: Sequence[str], data: str, given: Mapping[str, str] | None
    ) -> tuple[ClassMap | None, tuple[str, ...]]:
        """Which classes a data set and the detector share, and what the user should know of it, in sentences.

        None if both have the same classes in the same order. `given`: the detector's name for a class of the data,
        where the names differ. Raises KDError if no class is shared, or if nobody knows the names of the detector's
        classes and their number differs.
        """
        if tuple(class_names) == self.class_names and not given:
            return None, ()
        if not self.named:
            if len(class_names) != len(self.class_names):
                raise KDError(
                    f"{self.detector.name} has {len(self.class_names)} classes whose names nobody knows, and {data} "
                    f"has {len(class_names)}: name a data set that has the detector's classes, --classes-as-in PATH"
                )
            if given:
                raise KDError(
                    "class_map needs the names of the detector's classes, which nobody knows: leave class_map out, or "
                    "name a data set that has the detector's classes, --classes-as-in PATH"
                )
            order = f"{class_names[0]} to {class_names[-1]}" if len(class_names) > 1 else class_names[0]
            return None, (
                f"Nobody knows the names of the detector's classes: they are taken for those of the data ({order}).",
            )
        found = ClassMap.by_name(class_names, self.class_names, given, ("data set", "detector"))
        text = found.describe(class_names, self.class_names, "detector")
        return found, (f"{text[:1].upper()}{text[1:]}.",)


def make_ready(
    model: str | Path | Detector,
    *,
    weights: str | Path | None = None,
    classes_as_in: Path | None = None,
    image_size: int | None = None,
    device: str | torch.device = "auto",
    data: Path | None = None,
) -> Ready:
    """Open a detector and bring it to its device.

    Args:
        model: what `open_detector` takes, or an opened detector. That one moves to the device too.
        weights: as in `open_detector`.
        classes_as_in: a data set whose classes the detector has, in this order.
        image_size: longest side of images in pixels; None takes the one that the detector was trained at, if it
            is known, else 1333.
        device: "cpu", "cuda" or "cuda:1"; "auto" takes a GPU if there is one.
        data: the data set whose ids a file of detections uses.

    Raises KDError if the detector cannot be opened, or has no weights for detection.
    """
    if image_size is not None and image_size < SMALLEST_SIZE:
        raise KDError(f"image_size is {image_size} px; it must be at least {SMALLEST_SIZE}")
    if isinstance(model, Detector):
        if weights is not None or classes_as_in is not None:
            raise KDError(
                "weights and classes_as_in are for a detector that is opened here: give them to open_detector"
            )
        detector = model
    elif is_detection_file(model):
        source = classes_as_in or data
        detector = open_detector(model, weights=weights, categories=None if source is None else categories_of(source))
    elif isinstance(model, str | Path):
        if classes_as_in is None:
            detector = open_detector(model, weights=weights)
        else:
            detector = _opened_with(model, weights, classes_as_in)
    else:
        raise KDError(
            f"the model is a {type(model).__name__}; it must be a name, a file or a folder that open_detector takes, "
            "or an opened detector: kdtoolkit.models.Detector(model, name, class_names, trained=True)"
        )
    if not detector.trained:
        raise KDError(
            f"{detector.name} has no weights for detection, so that its detections would be random. Name a file or the "
            f"library's own weights: --weights FILE, or --weights pretrained"
            + "".join(f". {note[:1].upper()}{note[1:]}" for note in detector.notes)
        )
    detector.model.to(found_device(device))
    runner = Runner.of(detector.model)
    names = detector.class_names
    if names is None:
        if runner.spec is None:
            raise KDError(
                f"{detector.name} does not say its classes: give their names, Detector(..., class_names=[...])"
            )
        names = tuple(f"class {label}" for label in range(runner.spec.num_classes))
    size = image_size or detector.image_size or LARGEST_SIZE
    notes = (*detector.notes, *enlarging(detector, size, SMALLEST_SIZE))
    return Ready(detector, runner, size, tuple(names), named=detector.class_names is not None, notes=notes)


def check_recorded(
    model: nn.Module, parts: Mapping[str, DetectionDataset | Sequence[Path]], data: Path
) -> tuple[str, ...]:
    """Check that a file of detections is of these images, or of other splits of `data`; all other detectors pass.

    Returns and raises what `check_images` does.
    """
    if not isinstance(model, RecordedDetector):
        return ()
    return check_images(model.file, parts, lambda: open_all(data, without=parts))


def _opened_with(model: str | Path, weights: str | Path | None, data: Path) -> Detector:
    """The detector with the class names of a data set. Raises KDError if it knows names of its own, and they differ."""
    names = class_names_of(data)
    detector = open_detector(model, weights=weights, class_names=names)
    if detector.trained:
        return detector
    with suppress(UnknownClassesError):
        own = open_detector(model, weights=weights)
        if own.trained:
            count = adapt(own.model).spec.num_classes
            theirs = f"{count} classes" if own.class_names is None else f"the classes {shortened(own.class_names)}"
            raise KDError(
                f"{model} has {theirs}, and {data} has {shortened(names)}: leave out --classes-as-in, or name the data "
                "set that the detector was trained on"
            )
    return detector


def found_device(device: str | torch.device) -> torch.device:
    """The device of this name; "auto" is a GPU if there is one. Raises KDError if there is no such device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise KDError(
            f"device={str(device)!r} is no device that kdtoolkit knows: write 'auto', 'cpu', 'cuda' or 'cuda:1'"
        )
    if found.type == "cuda" and not torch.cuda.is_available():
        raise KDError("there is no CUDA device: use --device cpu, or install a torch build with CUDA")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        names = ", ".join(f"cuda:{index}" for index in range(torch.cuda.device_count()))
        raise KDError(f"there is no device {found}: this machine has {names}")
    return found
