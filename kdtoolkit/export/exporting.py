"""`kdtoolkit.export.export`: an opened detector becomes a file that is checked before it gets its name."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit.contract import DetectorAdapter
from kdtoolkit.data import DetectionDataset, open_dataset
from kdtoolkit.data.dataset import check_same_classes
from kdtoolkit.data.shapes import ProceduralShapes
from kdtoolkit.engine.evaluate import evaluate
from kdtoolkit.errors import KDError
from kdtoolkit.export.check import Comparison, compare, total
from kdtoolkit.libraries import adapt
from kdtoolkit.models import Detector, open_detector
from kdtoolkit.options import did_you_mean

FORMATS = ("onnx",)
CHECKED_IMAGES = 8
CALIBRATION_IMAGES = 64
OPSET = 18
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
    format: Literal["onnx"] = "onnx",
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
        out: the file; None for the model's name with the format's ending, in the working directory.
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
    file = Path(out) if out is not None else Path(f"{_stem(detector.name)}.{format}")
    _check_writable(file)
    dataset = None if data is None else _dataset(data, split, size, detector, adapter, skip_bad)
    shown, which = _images(dataset, images, size)
    modes = [(part, part.training) for part in adapter.model.modules()]
    device = next(adapter.model.parameters()).device
    adapter.model.cpu().eval()
    partial = file.with_name(f".{file.stem}.{os.getpid()}.partial.onnx")
    try:
        exported = _written(adapter, detector, partial, shown, which, size, batch_size, fixed, opset, say)
        found = None
        if int8:
            assert data is not None
            assert dataset is not None
            train = _dataset(data, "train", size, detector, adapter, skip_bad)
            found = _quantised(partial, file, train, dataset, say)
        partial.replace(file)
    except OSError as error:
        raise KDError(f"cannot write {file}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
        adapter.model.to(device)
        for part, training in modes:
            part.training = training
    return Exported(file, exported.free, which, exported.check, (*detector.notes, *exported.notes), found)


def _check_libraries() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise KDError(f"export needs {name}: pip install 'kdtoolkit[onnx]' (importing it failed: {error})") from error


def _opened(model: str | Path, weights: str | Path | None) -> Detector:
    detector = open_detector(model, weights=weights)
    if not detector.trained:
        raise KDError(
            f"{detector.name} has no weights for detection, so that an exported file would detect at random: name a "
            "file or the library's own weights, --weights FILE or --weights pretrained"
        )
    return detector


def _stem(name: str) -> str:
    """A file name from a model's name."""
    return name.partition("?")[0].rstrip("/").rpartition("/")[2].rpartition(":")[2] or "model"


def _check_writable(file: Path) -> None:
    """Raise KDError at once for a place where the file could not be written in the end."""
    if file.suffix != ".onnx" or file.is_dir():
        raise KDError(f"{file} must be a file that ends in .onnx: write --out {file.with_suffix('.onnx')}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        probe = file.with_name(f".{file.stem}.{os.getpid()}.partial.onnx")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise KDError(f"cannot write {file}: {error.strerror}") from error


def _dataset(
    data: str | Path, split: str, size: int, detector: Detector, adapter: DetectorAdapter, skip_bad: bool
) -> DetectionDataset:
    dataset = open_dataset(data, split, max_size=size, on_bad="skip" if skip_bad else "error")
    own, count = detector.class_names, adapter.spec.num_classes
    if own is not None and tuple(own) != tuple(dataset.class_names):
        raise KDError(f"the classes of {detector.name} are {', '.join(own)}, and those of {dataset} differ: name its own data")
    if len(dataset.class_names) != count:
        raise KDError(f"{detector.name} has {count} classes, and {dataset} has {len(dataset.class_names)}: name its own data")
    return dataset


def _images(
    dataset: DetectionDataset | None, folder: str | Path | None, size: int
) -> tuple[list[Tensor], str]:
    """The images of the check, float (3, H, W), and what they are."""
    if dataset is not None:
        step = max(1, len(dataset) // CHECKED_IMAGES)
        chosen = [dataset[i][0] for i in range(0, len(dataset), step)][:CHECKED_IMAGES]
        return [image.float() / 255 for image in chosen], f"{len(chosen)} of {dataset}"
    if folder is not None:
        return _photos(Path(folder), size)
    shapes = ProceduralShapes(CHECKED_IMAGES // 2, size=min(size, 256))
    drawn = [F.interpolate(shapes[i][0][None].float() / 255, (size, size), mode="bilinear")[0] for i in range(4)]
    noise = torch.rand(CHECKED_IMAGES // 2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return [*drawn, *noise], f"{CHECKED_IMAGES} generated images (noise and drawn shapes, because no images were named)"
