"""Static int8 quantisation of an exported file, by onnxruntime."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from kdtoolkit.deploy.onnx_file import INPUT, OnnxDetector, quiet

LAYERS = ("Conv", "Gemm", "MatMul")  # what is quantised; all else stays float32
REPEATS = 15  # of each file, for latency


def quantise(source: Path, target: Path, images: Sequence[Tensor]) -> None:
    """Quantise the layers of `source` with weights, and write `target`.

    Activations get the ranges that they have on `images`, tensors (1, 3, H, W). Weights have a scale per channel.
    These stay float32: the last layers, which predict classes and boxes, products without weights, as in attention, and
    all post-processing.
    """
    prepared = target.with_name(f"{target.stem}.prepared.onnx")
    try:
        with quiet():
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                target,
                _Images(images),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(LAYERS),
                per_channel=True,
                # Weights of 7 bits: with 8, sums overflow on CPUs without int8 instructions.
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=last_layers(onnx.load(prepared)),
                calibrate_method=CalibrationMethod.MinMax,
                extra_options={"MatMulConstBOnly": True},
            )
    finally:
        prepared.unlink(missing_ok=True)


def last_layers(model: Any) -> list[str]:
    """The names of the layers from whose outputs no further layer computes."""
    takers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            takers.setdefault(name, []).append(node)
    leads: dict[str, bool] = {}  # whether a layer computes from this node's outputs, by the node's name

    for node in reversed(model.graph.node):  # in ONNX each node comes before those that take its outputs
        followers = [taker for name in node.output for taker in takers.get(name, ())]
        leads[node.name] = any(taker.op_type in LAYERS or leads[taker.name] for taker in followers)
    return [node.name for node in model.graph.node if node.op_type in LAYERS and not leads[node.name]]


def latencies(detectors: Sequence[OnnxDetector], images: Tensor) -> list[float]:
    """Median seconds of each detector on the same images (N, 3, H, W). They take turns, so that load hits all alike."""
    for detector in detectors:
        detector.run(images)
    seconds: list[list[float]] = [[] for _ in detectors]
    for _ in range(REPEATS):
        for detector, taken in zip(detectors, seconds, strict=True):
            start = time.perf_counter()
            detector.run(images)
            taken.append(time.perf_counter() - start)
    return [statistics.median(each) for each in seconds]


class _Images(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, images: Sequence[Tensor]) -> None:
        self._images: Iterator[Tensor] = iter(images)

    def get_next(self) -> dict[str, Any] | None:
        image = next(self._images, None)
        return None if image is None else {INPUT: image.contiguous().numpy()}
