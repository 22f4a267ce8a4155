"""Writes a detector as an ONNX file, and reads such a file."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtoolkit.contract import Detections, DetectorAdapter
from kdtoolkit.errors import KDError

GREY = 114 / 255  # fills canvases of a fixed size
INPUT = "images"
OUTPUTS = ("boxes", "scores", "labels")
Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True)
class Freedom:
    """Which dimensions of the input are free."""

    batch: bool
    size: bool

    def __str__(self) -> str:
        if self.size:
            return "any batch size, any image size"
        return "any batch size, one image size" if self.batch else "one batch size, one image size"


ALL_FREE, BATCH_FREE, FIXED = Freedom(True, True), Freedom(True, False), Freedom(False, False)


def write(
    adapter: DetectorAdapter,
    file: Path,
    *,
    freedom: Freedom,
    size: Size,
    batch_size: int,
    opset: int,
    about: dict[str, str],
) -> None:
    """Write the detector's graph into `file`, with the texts of `about` as metadata.

    torch.onnx.export follows the graph by torch.export. Where sizes are free, it follows images that are not square,
    so that no two dimensions are taken for one. Raises KDError with the exporter's reason.
    """
    from kdtoolkit.deploy.operators import TRANSLATIONS  # needs onnxscript

    graph = copy.deepcopy(adapter.graph()).cpu().eval().requires_grad_(False)
    height, width = size
    if freedom.size:
        width += 64
    images = torch.rand(max(2, batch_size) if freedom.batch else batch_size, 3, height, width)
    free = torch.export.Dim.AUTO
    dims = {0: free} if freedom.batch else {}
    if freedom.size:
        dims |= {2: free, 3: free}
    try:
        with quiet():
            program = torch.export.export(
                graph,
                (images,),
                dynamic_shapes=({axis: dims.get(axis, torch.export.Dim.STATIC) for axis in range(4)},),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            _check_free(program, dims)
            for optimise in (True, False):
                written: Any = torch.onnx.export(
                    program,
                    (images,),
                    dynamo=True,
                    custom_translation_table=TRANSLATIONS,
                    input_names=[INPUT],
                    output_names=list(OUTPUTS),
                    opset_version=opset,
                    optimize=optimise,
                    verbose=False,
                )
                model = written.model
                model.metadata_props.clear()
                model.metadata_props.update(about)
                model.producer_name, model.producer_version = "kdtoolkit", about["kdtoolkit"]
                _name_dimensions(model, freedom)
                written.save(file, external_data=False)
                # The exporter's optimiser leaves nodes without their inputs in Deformable DETR (torch 2.14).
                if optimise and _opens(file):
                    break
    except KDError:
        raise
    except Exception as error:  # torch's exporter has many kinds, and models raise their own
        raise KDError(_reason(error)) from error


def _opens(file: Path) -> bool:
    """Whether onnxruntime can open a file."""
    try:
        OnnxDetector(file)
    except KDError:
        return False
    return True


def _check_free(program: torch.export.ExportedProgram, dims: Mapping[int, Any]) -> None:
    """Raise KDError if torch.export has fixed a dimension that shall be free."""
    (images,) = (node for node in program.graph.nodes if node.name == INPUT)
    shape = images.meta["val"].shape
    for axis in dims:
        size = shape[axis]
        bounds = None if isinstance(size, int) else program.range_constraints.get(size.node.expr)
        if isinstance(size, int) or (bounds is not None and bounds.lower == bounds.upper):
            what = ("the batch size", "", "the image height", "the image width")[axis]
            raise KDError(f"its code fixes {what} while torch.export follows it")


def _name_dimensions(model: Any, freedom: Freedom) -> None:
    """Give the free dimensions of input and outputs names that say what they are."""
    import onnx_ir

    names = ["batch" if freedom.batch else None, None, *(["height", "width"] if freedom.size else [None, None])]
    for value in model.graph.inputs:
        value.shape = onnx_ir.Shape([name or own for name, own in zip(names, value.shape, strict=True)])
    for value in model.graph.outputs:
        value.shape = onnx_ir.Shape([names[0] or value.shape[0], *value.shape[1:]])


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress lines and warnings of exporters."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _reason(error: BaseException) -> str:
    """The first cause of an exporter's error, in one line: the operator that has no place in ONNX, or what failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:300].rstrip(". ")


class OnnxDetector(nn.Module):
    """An exported file as a detector, as torchvision's are called: a list of images in, a list of detections out.

    Images of equal size run together, up to `batch_size` at a time. If the file has a fixed size, images lie at the top
    left of that canvas, and the rest is grey.

    Raises KDError if the file cannot be run, or an image is larger than the file's fixed size.
    """

    def __init__(self, file: Path, batch_size: int = 8) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what fails is raised
        try:
            self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common class
            raise KDError(f"onnxruntime cannot open the exported file: {_reason(error)}") from error
        shape = self._session.get_inputs()[0].shape
        self.batch: int | None = shape[0] if isinstance(shape[0], int) else None
        self.size: Size | None = (shape[2], shape[3]) if isinstance(shape[2], int) else None
        self._batch_size = self.batch or batch_size

    def forward(self, images: Sequence[Tensor]) -> list[Detections]:
        """Detect in images (3, H, W) float32 in [0, 1]."""
        found: list[Detections] = []
        start = 0
        while start < len(images):
            end = start + 1
            while end < min(len(images), start + self._batch_size) and images[end].shape == images[start].shape:
                end += 1
            found += self.run(torch.stack([*images[start:end]]))
            start = end
        return found

    def run(self, images: Tensor) -> list[Detections]:
        """Detect in images (N, 3, H, W); a smaller batch than a fixed one is filled up."""
        count = len(images)
        images = self.batch_of(images)
        try:
            outputs = self._session.run(OUTPUTS, {INPUT: images.numpy()})
        except Exception as error:  # onnxruntime's errors have no common class
            raise KDError(f"onnxruntime cannot run it on {tuple(images.shape)}: {_reason(error)}") from error
        rows = zip(*(torch.from_numpy(output[:count]) for output in outputs), strict=True)
        return [
            Detections(boxes=boxes[scores > 0], scores=scores[scores > 0], labels=labels[scores > 0])
            for boxes, scores, labels in rows
        ]

    def batch_of(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) as the file takes them: on its canvas and in its batch size, where these are fixed."""
        if self.size is not None:
            images = on_canvas(images, self.size)
        if self.batch is not None:
            images = torch.cat([images, images[:1].expand(self.batch - len(images), -1, -1, -1)])
        return images.contiguous()


def on_canvas(images: Tensor, size: Size) -> Tensor:
    """Pad images (N, 3, H, W) with grey at the right and bottom. Raises KDError if they are larger than `size`."""
    down, right = (fixed - own for fixed, own in zip(size, images.shape[-2:], strict=True))
    if down < 0 or right < 0:
        raise KDError(
            f"the exported file takes images of {size[1]} x {size[0]} px; one has "
            f"{images.shape[-1]} x {images.shape[-2]}: scale it down"
        )
    return F.pad(images, (0, right, 0, down), value=GREY)


def metadata(name: str, class_names: Sequence[str] | None, size: Size, version: str) -> dict[str, str]:
    """What the file says about itself: JSON, or plain text."""
    about = {"model": name, "image_size": json.dumps(list(size)), "kdtoolkit": version}
    if class_names is not None:
        about["class_names"] = json.dumps(list(class_names), ensure_ascii=False)
    return about


Detect = Callable[[Sequence[Tensor]], Sequence[Detections]]


def detector_of(adapter: DetectorAdapter) -> Detect:
    """The detector in PyTorch, as kdtoolkit runs it."""

    @torch.no_grad()
    def detect(images: Sequence[Tensor]) -> Sequence[Detections]:
        batch = adapter.prepare(images)
        return adapter.detections(adapter.head(adapter.features(batch), batch), batch)

    return detect
