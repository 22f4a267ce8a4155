"""What the operators of `kdtoolkit.graph` become in ONNX, for torch's exporter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import opset18

from kdtoolkit import graph

op: Any = opset18


def _pad(images: Any, multiple: int, square: bool, value: float) -> Any:
    size = op.Shape(images, start=2)
    step = op.Constant(value_ints=[multiple])
    wanted = op.ReduceMax(size, keepdims=1) if square else size
    wanted = op.Mul(op.Div(op.Add(wanted, op.Constant(value_ints=[multiple - 1])), step), step)
    amounts = op.Concat(op.Constant(value_ints=[0] * 6), op.Sub(wanted, size), axis=0)
    return op.Pad(images, amounts, op.Constant(value_float=value))


def _resize(images: Any, shortest: float, longest: float) -> Any:
    size = op.Cast(op.Shape(images, start=2), to=_DOUBLE)  # in float64, as torchvision computes in Python
    scale = op.Min(
        op.Div(_double(shortest), op.ReduceMin(size, keepdims=1)),
        op.Div(_double(longest), op.ReduceMax(size, keepdims=1)),
    )
    wanted = op.Cast(op.Floor(op.Mul(size, scale)), to=_INT64)
    sizes = op.Concat(op.Shape(images, start=0, end=2), wanted, axis=0)
    return op.Resize(images, None, None, sizes, mode="linear", coordinate_transformation_mode="half_pixel")


def _pool(
    maps: Sequence[Any], boxes: Any, levels: Any, scales: Sequence[float], size: Sequence[int], sampling: int
) -> Any:
    flat = op.Reshape(boxes, op.Constant(value_ints=[-1, 4]))
    shape = op.Shape(levels)
    images = op.Range(op.Constant(value_int=0), op.Squeeze(op.Shape(levels, end=1)), op.Constant(value_int=1))
    rows = op.Reshape(op.Expand(op.Unsqueeze(images, op.Constant(value_ints=[1])), shape), op.Constant(value_ints=[-1]))
    levels = op.Reshape(levels, op.Constant(value_ints=[-1]))
    channels = op.Shape(maps[0], start=1, end=2)
    sizes = op.Concat(op.Shape(levels), channels, op.Constant(value_ints=list(size)), axis=0)
    pooled = op.Expand(op.Constant(value_float=0.0), sizes)
    for level, (features, scale) in enumerate(zip(maps, scales, strict=True)):
        own = op.Transpose(op.NonZero(op.Equal(levels, op.Constant(value_int=level))), perm=[1, 0])
        values = op.RoiAlign(
            features,
            op.GatherND(flat, own),
            op.GatherND(rows, own),
            coordinate_transformation_mode="output_half_pixel",
            output_height=size[0],
            output_width=size[1],
            sampling_ratio=sampling,
            spatial_scale=scale,
        )
        pooled = op.ScatterND(pooled, own, values)
    return pooled


def _suppress(boxes: Any, scores: Any, iou: float, limit: int) -> Any:
    chosen = op.NonMaxSuppression(
        boxes,
        scores,
        op.Constant(value_ints=[limit]),
        op.Constant(value_floats=[iou]),
        op.Constant(value_floats=[0.0]),
    )
    nothing = op.Expand(op.Constant(value_float=0.0), op.Shape(scores))
    return op.ScatterND(nothing, chosen, op.GatherND(scores, chosen))


def _is_all_true(x: Any) -> Any:
    return op.Cast(op.ReduceMin(op.Cast(x, to=_INT64), keepdims=0), to=_BOOL)


_INT64, _BOOL, _DOUBLE = 7, 9, 11  # of onnx.TensorProto


def _double(value: float) -> Any:
    return op.Cast(op.Constant(value_float=value), to=_DOUBLE)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    graph.pad._opoverload: _pad,
    graph.resize._opoverload: _resize,
    graph.pool._opoverload: _pool,
    graph.suppress._opoverload: _suppress,
    torch.ops.aten._is_all_true.default: _is_all_true,  # of transformers' own checks
}
