"""`kdtoolkit.export`: an opened detector becomes a file that is checked before it gets its name."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit.contract import DetectorAdapter
from kdtoolkit.data import DetectionDataset, ProceduralShapes, open_dataset
from kdtoolkit.data.detections import is_detection_file
from kdtoolkit.data.image_files import image_files
from kdtoolkit.data.pictures import PictureError, decode, seen_size
from kdtoolkit.deploy.check import Comparison, compare, total
from kdtoolkit.deploy.onnx_file import (
    ALL_FREE,
    BATCH_FREE,
    FIXED,
    Freedom,
    OnnxDetector,
    Size,
    detector_of,
    metadata,
    on_canvas,
    write,
)
from kdtoolkit.engine.evaluate import evaluate
from kdtoolkit.errors import KDError
from kdtoolkit.libraries import adapt
from kdtoolkit.models import Detector, enlarging, has_classes, open_detector
from kdtoolkit.modes import in_eval_mode
from kdtoolkit.options import did_you_mean

FORMATS = ("onnx",)
CHECKED_IMAGES = 8
CALIBRATION_IMAGES = 64
OPSET = 18  # the lowest that has all operators that are written (kdtoolkit/deploy/operators.py)
IMAGE_SIZE = 640
Say = Callable[[str], None]


@dataclass(frozen=True)
class Int8:
    """The quantised file beside the float one.

    `ap`, `ap_float`: COCO's AP in percent on the validation images, of the quantised and the float file; None if the
    images have no objects. `seconds`, `seconds_float`: median time of one image. `bytes`, `bytes_float`: sizes of the
    files. `images`: how many validation images were used.
    """

    file: Path
    ap: float | None
    ap_float: float | None
    seconds: float
    seconds_float: float
    bytes: int
    bytes_float: int
    images: int

    def lines(self) -> list[str]:
        """Both files side by side, in words."""
        before, after = ("-" if ap is None else f"{ap:.1f}" for ap in (self.ap_float, self.ap))
        return [
            f"AP on {self.images} images: {before} before, {after} in int8",
            f"size: {self.bytes_float / 1e6:.1f} MB before, {self.bytes / 1e6:.1f} MB in int8",
            f"time of one image: {1e3 * self.seconds_float:.1f} ms before, {1e3 * self.seconds:.1f} ms in int8",
        ]


@dataclass(frozen=True)
class Exported:
    """An exported detector.

    `free`: which dimensions of the input are free, in words. `images`: which images the check ran on, in words.
    `check`: how its detections agree with those of PyTorch. `notes`: what the user should know, one sentence each.
    """

    file: Path
    free: str
    images: str
    check: Comparison
    notes: tuple[str, ...] = ()
    int8: Int8 | None = field(default=None)


def export(
    model: str | Path | Detector,
    *,
    format: str = "onnx",
    out: str | Path | None = None,
    data: str | Path | None = None,
    split: str = "val",
    images: str | Path | None = None,
    image_size: int | None = None,
    batch_size: int = 1,
    fixed: bool = False,
    opset: int = OPSET,
    int8: bool = False,
    weights: str | Path | None = None,
    skip_bad: bool = False,
    say: Say = lambda line: None,
) -> Exported:
    """Write a trained detector as a file that runs without kdtoolkit and PyTorch (docs/export.md).

    The file's detections are compared with PyTorch's on real images before it gets its name.

    Args:
        model: what `open_detector` takes, or an opened detector.
        format: "onnx".
        out: the file; None for the name of the model's folder or file with the format's ending, in the working
            directory.
        data: a data set. The check and `int8` use its images.
        split: which part of `data` the check and the AP are computed on.
        images: a folder of images for the check, instead of `data`.
        image_size: longest side of images in pixels; None for the one that the detector was trained at, or 640.
        batch_size: images at a time, if the file cannot leave their number free.
        fixed: fix the batch size and the image size, which may be (image_size, image_size) only.
        opset: version of ONNX's operators, 18 or higher.
        int8: also write a quantised file, and measure both. It needs `data`.
        weights: as in `open_detector`.
        skip_bad: leave bad images and annotations of `data` out.
        say: called with a line of text at each step.

    Raises:
        KDError: an argument is wrong, a library is missing, the detector cannot be exported, or its detections differ
            from PyTorch's. Then there is no file.
    """
    if format not in FORMATS:
        raise KDError(f"unknown format {format!r}{did_you_mean(format, FORMATS)}: write one of {', '.join(FORMATS)}")
    _check_libraries()
    if int8 and data is None:
        raise KDError("int8 needs images to calibrate with and to measure AP on: name a data set, --data DIR")
    if data is not None and images is not None:
        raise KDError("images and data both name images for the check: leave out one")
    if opset < OPSET:
        raise KDError(f"opset {opset} is too old for the operators of detectors: {OPSET} is the lowest")
    if batch_size < 1 or (image_size is not None and image_size < 32):
        raise KDError(f"batch_size is {batch_size} and image_size {image_size}: at least 1, and at least 32 px")
    detector = model if isinstance(model, Detector) else _opened(model, weights)
    adapter = adapt(detector.model)
    size = image_size or detector.image_size or IMAGE_SIZE
    file = Path(out) if out is not None else Path(f"{_stem(model)}.{format}")
    _check_writable(file)
    on_bad: Literal["skip", "error"] = "skip" if skip_bad else "error"
    dataset = None if data is None else open_dataset(data, split, max_size=size, on_bad=on_bad)
    train = None
    if int8 and data is not None and dataset is not None:
        _check_classes(detector, adapter, dataset)
        train = open_dataset(data, "train", max_size=size, on_bad=on_bad)
    shown, which = _images(dataset, images, size)
    about = metadata(detector.name, detector.class_names, (size, size), version("kdtoolkit"))
    plan = _Plan((size, size), batch_size, fixed, opset, about)
    device = next(adapter.model.parameters()).device
    adapter.model.cpu()
    partial = file.with_name(f".{file.stem}.{os.getpid()}.partial.onnx")
    try:
        found = None
        with in_eval_mode(adapter.model):
            freedom, check, notes = _written(adapter, partial, shown, plan, say)
            if train is not None and dataset is not None:
                found = _quantised(partial, file, train, dataset, say)
        partial.replace(file)
    except OSError as error:
        raise KDError(f"cannot write {file}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
        adapter.model.to(device)
    return Exported(file, str(freedom), which, check, (*detector.notes, *enlarging(detector, size), *notes), found)


@dataclass(frozen=True)
class _Plan:
    """How the file shall be: its image size, its batch size where that is fixed, and its metadata."""

    size: Size
    batch_size: int
    fixed: bool
    opset: int
    about: dict[str, str]


def _check_libraries() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise KDError(
                f"export needs {name}: pip install 'kdtoolkit[onnx]' (importing it failed: {error})"
            ) from error


def _opened(model: str | Path, weights: str | Path | None) -> Detector:
    if is_detection_file(model):
        raise KDError(f"{model} is a file of detections, so there is no network to export: name a detector")
    detector = open_detector(model, weights=weights)
    if not detector.trained:
        raise KDError(
            f"{detector.name} has no weights for detection, so that an exported file would detect at random: name a "
            "file or the library's own weights, --weights FILE or --weights pretrained"
        )
    return detector


def _stem(model: str | Path | Detector) -> str:
    """A file name for a model: that of its folder or file, or the end of its name."""
    if not isinstance(model, Detector) and Path(model).exists():
        place = Path(model).absolute()
        return place.name if place.is_dir() else place.stem
    name = model.name if isinstance(model, Detector) else str(model)
    return name.partition("?")[0].rstrip("/").rpartition("/")[2].rpartition(":")[2] or "model"


def _check_writable(file: Path) -> None:
    """Raise KDError at once for a place where the file could not be written in the end."""
    try:
        is_folder = file.is_dir()
        if is_folder or file.suffix != ".onnx":
            better = file / "model.onnx" if is_folder else file.with_suffix(".onnx")
            raise KDError(f"{file} must be a file that ends in .onnx: write --out {better}")
        file.parent.mkdir(parents=True, exist_ok=True)
        probe = file.with_name(f".{file.stem}.{os.getpid()}.partial.onnx")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise KDError(f"cannot write {file}: {error.strerror}") from error


def _check_classes(detector: Detector, adapter: DetectorAdapter, dataset: DetectionDataset) -> None:
    """Raise KDError if the detector's classes are not those of the data, on which AP is measured."""
    if not has_classes(detector, dataset.class_names):
        own = detector.class_names
        named = f"{adapter.spec.num_classes} classes" if own is None else ", ".join(own)
        raise KDError(
            f"int8 measures AP on {dataset}, whose classes are {', '.join(dataset.class_names)}; {detector.name} has "
            f"{named}: name a data set with the detector's own classes"
        )


def _images(dataset: DetectionDataset | None, place: str | Path | None, size: int) -> tuple[list[Tensor], str]:
    """The images of the check, float (3, H, W), and what they are."""
    if dataset is not None:
        chosen = _spread(range(len(dataset)), CHECKED_IMAGES)
        return [dataset[i][0].float() / 255 for i in chosen], f"{len(chosen)} images of {dataset}"
    if place is not None:
        files = image_files(Path(place))
        photos = [_photo(file, size) for file in _spread(files, CHECKED_IMAGES)]
        return photos, f"{len(photos)} of the {len(files)} images in {place}"
    half = CHECKED_IMAGES // 2
    shapes = ProceduralShapes(half, image_size=min(size, 256))
    drawn = [F.interpolate(shapes[i][0][None].float() / 255, (size, size), mode="bilinear")[0] for i in range(half)]
    noise = torch.rand(half, 3, size, size, generator=torch.Generator().manual_seed(0))
    # With noise on them too: places that look alike have equal scores, among which rounding chooses.
    shown = [*(0.8 * each + 0.2 * noise[0] for each in drawn), *noise]
    return shown, f"{CHECKED_IMAGES} generated images, because none were named: drawn shapes and noise"


T = TypeVar("T")


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, spread evenly over all."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else list(items)


def _photo(file: Path, size: int) -> Tensor:
    try:
        width, height, _ = seen_size(file)
        factor = min(1.0, size / max(height, width))
        return decode(file, (max(1, round(height * factor)), max(1, round(width * factor)))).float() / 255
    except PictureError as error:
        raise KDError(f"{file}: {error}, or leave this image out of the folder") from error


def _written(
    adapter: DetectorAdapter, file: Path, images: Sequence[Tensor], plan: _Plan, say: Say
) -> tuple[Freedom, Comparison, list[str]]:
    """Write the file with as many free dimensions as the detector allows: what is free, the check, and what was not."""
    notes: list[str] = []
    for freedom in (FIXED,) if plan.fixed else (ALL_FREE, BATCH_FREE, FIXED):
        say(f"exporting with {freedom}")
        try:
            write(
                adapter,
                file,
                freedom=freedom,
                size=plan.size,
                batch_size=plan.batch_size,
                opset=plan.opset,
                about=plan.about,
            )
            say("comparing its detections with PyTorch's")
            check = _checked(adapter, file, images, freedom, plan)
        except KDError as error:
            notes.append(f"A file with {freedom} cannot be had: {error}.")
            continue
        if check.agrees and check.compared:
            return freedom, check, notes
        reason = f"its detections differ from PyTorch's ({check})"
        if not check.compared and not check.missing:
            reason = "nothing is detected on the images, so nothing can be compared: name others, --images DIR"
        notes.append(f"A file with {freedom} cannot be had: {reason}.")
    raise KDError(f"this detector cannot be exported. {notes[-1]}")


def _checked(
    adapter: DetectorAdapter, file: Path, images: Sequence[Tensor], freedom: Freedom, plan: _Plan
) -> Comparison:
    """Compare on all images, and where dimensions are free on a batch of three, and of a different size."""
    detector, reference = OnnxDetector(file), detector_of(adapter)
    height, width = plan.size
    if freedom.size:
        # Three quarters as high as wide: a size at which the graph was not followed.
        other = F.interpolate(images[0][None], (max(32, height * 3 // 4 // 32 * 32), width), mode="bilinear")
        batches = [*(image[None] for image in images), other.repeat(3, 1, 1, 1) * _SHADES]
    else:
        canvases = torch.cat([on_canvas(image[None], plan.size) for image in images])
        # The last one is filled up where it runs.
        batches = [*torch.split(canvases, 1 if freedom.batch else plan.batch_size)]
        if freedom.batch:
            batches = [*batches, canvases[:1].repeat(3, 1, 1, 1) * _SHADES]
    return total([compare(reference([*batch]), detector.run(batch)) for batch in batches])


_SHADES = torch.tensor([1.0, 0.9, 0.8])[:, None, None, None]  # makes three images of one


def _quantised(source: Path, file: Path, train: DetectionDataset, val: DetectionDataset, say: Say) -> Int8:
    """Quantise `source`, and compare both files."""
    from kdtoolkit.deploy.int8 import latencies, quantise

    target = file.with_name(f"{file.stem}-int8.onnx")
    partial = target.with_name(f".{target.stem}.{os.getpid()}.partial.onnx")
    chosen = _spread(range(len(train)), CALIBRATION_IMAGES)
    say(f"quantising: ranges of {len(chosen)} images of {train}")
    whole = OnnxDetector(source)
    try:
        quantise(source, partial, [whole.batch_of(train[i][0][None].float() / 255) for i in chosen])
        small = OnnxDetector(partial)
        say(f"evaluating both on {val}")
        before, after = (evaluate(each, val, labels_from=0, batch_size=8).ap for each in (whole, small))
        slow, fast = latencies((whole, small), val[0][0][None].float() / 255)
        sizes = source.stat().st_size, partial.stat().st_size
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return Int8(target, after, before, fast, slow, sizes[1], sizes[0], len(val))
