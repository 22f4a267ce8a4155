"""What is taken from a checkpoint of Ultralytics: the description of the layers, and tensors.

The library evaluates parts of a description as Python when it builds a model. A file may hold any text in that place,
so only known layers and plain values are handed on. No object of the file is used: its attributes may be anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from kdtoolkit.errors import KDError

_HEADS = ("Detect", "v10Detect")
# The layers of the library's own detectors.
_LAYERS = """
    A2C2f AConv ADown Bottleneck BottleneckCSP C1 C2 C2PSA C2f C2fCIB C2fPSA C3 C3Ghost C3k2 C3x CBFuse CBLinear
    Concat Conv ConvTranspose DWConv ELAN1 Focus GhostBottleneck GhostConv PSA RepC3 RepNCSPELAN4 SCDown SPP SPPELAN
    SPPF Silence nn.BatchNorm2d nn.ConvTranspose2d nn.Identity nn.MaxPool2d nn.Upsample nn.ZeroPad2d
    Detect v10Detect
"""
_WORDS = ("None", "True", "False", "nc", "nearest", "bilinear")  # texts among the arguments of layers
_VALUES = ("nc", "scales", "depth_multiple", "width_multiple", "reg_max", "end2end")
_ACTIVATION = re.compile(r"(torch\.)?nn\.(SiLU|ReLU6?|LeakyReLU|Hardswish|GELU|Mish|ELU)\((\d*\.?\d+)?\)")


def checked_config(config: object) -> dict[str, Any]:
    """The part of a model's YAML that says how to build it.

    Raises KDError for a layer, an activation or a value that is not known to be harmless.
    """
    if not isinstance(config, dict) or not all(
        isinstance(config.get(part), list) and config[part] for part in ("backbone", "head")
    ):
        raise KDError("it does not describe its layers")
    kept = {key: config[key] for key in _VALUES if key in config}
    for key, value in kept.items():
        _check_plain(key, value)
    if type(kept.get("nc")) is not int:
        raise KDError("it does not say how many classes it has")
    for part in ("backbone", "head"):
        kept[part] = config[part]
        for row in config[part]:
            _check_row(row)
    if config["head"][-1][2] not in _HEADS:
        raise KDError("it is no detector of boxes alone")
    for key in ("scale", "yaml_file"):  # names, which are never evaluated
        if isinstance(config.get(key), str):
            kept[key] = config[key]
    if activation := config.get("activation"):
        if not isinstance(activation, str) or not _ACTIVATION.fullmatch(activation):
            raise KDError(f"its activation {_shown(activation)} is not one of torch's usual ones")
        kept["activation"] = activation
    return kept


def tensors_of(module: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The state dict of a module that nobody trusts: no method of it is called."""
    own: Mapping[str, Any] = vars(module)
    for name, value in {**own["_parameters"], **own["_buffers"]}.items():
        if isinstance(value, Tensor) and name not in own.get("_non_persistent_buffers_set", ()):
            yield f"{prefix}{name}", value.detach()
    for name, child in own["_modules"].items():
        if isinstance(child, nn.Module):
            yield from tensors_of(child, f"{prefix}{name}.")


def _check_row(row: object) -> None:
    if not isinstance(row, list | tuple) or len(row) != 4:
        raise KDError(f"its description has the layer {_shown(row)}, which is no [from, repeats, module, arguments]")
    *numbers, layer, args = row
    if not isinstance(layer, str) or layer not in _LAYERS.split():
        raise KDError(f"its layer {_shown(layer)} is in none of the library's own detectors of boxes")
    _check_plain(layer, [*numbers, args])


def _check_plain(name: str, value: object) -> None:
    """Check that a value holds only numbers and known words."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            _check_plain(name, each)
    elif not (value is None or type(value) in (int, float, bool) or (type(value) is str and value in _WORDS)):
        raise KDError(f"{name} has the value {_shown(value)}, which is no number")


def _shown(value: object) -> str:
    """A value of the file for a message, on one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
