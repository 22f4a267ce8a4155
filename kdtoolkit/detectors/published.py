"""Weights published by the authors' projects, and how their parameters are called here."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kdtoolkit.detectors.dense import BACKBONE_STRIDES, DenseDetector
from kdtoolkit.weights import load_state, read_weights
from kdtoolkit.yaml_text import with_arguments

# (published name, our name); the first that fits counts.
_RENAMINGS = (
    (r"backbone\.(.+)", r"backbone.\1"),
    (r"neck\.lateral_convs\.(\d+)\.conv\.(weight|bias)", r"neck.inner_blocks.\1.0.\2"),
    (r"neck\.fpn_convs\.([012])\.conv\.(weight|bias)", r"neck.layer_blocks.\1.0.\2"),
    (r"bbox_head\.(cls|reg)_convs\.(\d+)\.conv\.(weight|bias)", r"towers.\1.\2.0.\3"),
    (r"bbox_head\.(cls|reg)_convs\.(\d+)\.gn\.(weight|bias)", r"towers.\1.\2.1.\3"),
)
_EXTRA_LEVEL = re.compile(r"neck\.fpn_convs\.(\d+)\.conv\.(weight|bias)")
_PREDICTOR = re.compile(r"bbox_head\.(\w+)\.(weight|bias)")
_SCALE = "bbox_head.scales.{}.scale"
_BINS = "bbox_head.integral.project"


def load_published(model: DenseDetector, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> None:
    """Load a published checkpoint of the model's detector into `model`, in place.

    The layout is that of the authors' projects: `backbone.*` with torchvision's names for a ResNet,
    `neck.lateral_convs.*` and `neck.fpn_convs.*`, finest level first, and `bbox_head.*`. In a file they may be under
    "state_dict", and behind a prefix that all names share. Build the model with the class count, backbone and sizes of
    the checkpoint. Every parameter must be found, and every entry be used; only `num_batches_tracked` may be missing.

    Names alone do not show whether a file fits. Backbones in Caffe's style (many FCOS checkpoints: BGR images in [0,
    255], stride in the first convolution of a block) load without complaint but detect badly, because timm's ResNets
    have the stride in the second convolution.

    Args:
        model: GFL, ATSS, FCOS, RetinaNet or another DenseDetector.
        source: a .pth or .safetensors file (no code in it is run), or its state dict.

    Raises:
        KDError: the file cannot be read, or keys are missing, unexpected or of a wrong shape.
    """
    if isinstance(source, (str, os.PathLike)):
        published, name = read_weights(Path(source)), str(source)
    else:
        published, name = dict(source), "the state dict"
    load_state(model, published, name)


# The predictor of the classes in each detector's published weights, and the detector.
_DETECTORS = {"gfl_cls": "gfl", "atss_cls": "atss", "retina_cls": "retinanet", "conv_cls": "fcos"}
# ResNets by the number of blocks in each stage, and whether these have three convolutions.
_RESNETS: Mapping[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}


def published_name(state: Mapping[str, Tensor]) -> str | None:
    """The name of the detector that published weights are for, with its arguments; None for all other weights.

    Weights show kind, backbone and sizes. They do not show how a detector was trained.
    """
    heads = [key for key in state if "bbox_head." in key]
    prefix = heads[0].partition("bbox_head.")[0] if heads else ""
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    kinds = [kind for name, kind in _DETECTORS.items() if f"bbox_head.{name}.weight" in own]
    blocks = [_count(own, rf"backbone\.layer{i}\.(\d+)\..*") for i in range(1, 5)]
    backbone = _RESNETS.get((tuple(blocks), "backbone.layer1.0.conv3.weight" in own))
    levels, depth = _count(own, r"neck\.fpn_convs\.(\d+)\..*"), _count(own, r"bbox_head\.cls_convs\.(\d+)\..*")
    if len(kinds) != 1 or backbone is None or levels < len(BACKBONE_STRIDES) or not depth:
        return None
    kind, tower = kinds[0], own["bbox_head.cls_convs.0.conv.weight"]
    found = {
        "strides": [8 * 2**i for i in range(levels)],
        "neck_channels": tower.shape[1],
        "head_channels": tower.shape[0],
        "head_blocks": depth,
    }
    usual = {"strides": [8, 16, 32, 64, 128], "neck_channels": 256, "head_channels": 256, "head_blocks": 4}
    args: dict[str, object] = {key: value for key, value in found.items() if value != usual[key]}
    if kind == "gfl":
        args["bins"] = len(own["bbox_head.gfl_reg.weight"]) // 4
    return with_arguments(f"kdtoolkit/{kind}", {"backbone": backbone, **args})


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers the names of weights have at the group of `pattern`."""
    return len({match[1] for key in state if (match := re.fullmatch(pattern, key))})


def rename_published(model: DenseDetector, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename published parameters to our names. A parameter without a name here keeps its published one."""
    renamed = {rename(model, key): value for key, value in published.items()}
    scales = [_SCALE.format(level) for level in range(len(model.strides))]
    if all(key in renamed for key in scales):
        renamed["scales"] = torch.stack([renamed.pop(key).reshape(()) for key in scales])
    # The bins' distances are a constant here: 0, 1, 2, ... Different ones stay in the dict, and `fitted` refuses them.
    if model.bins and _BINS in renamed and torch.equal(renamed[_BINS].float().cpu(), torch.arange(float(model.bins))):
        del renamed[_BINS]
    return renamed


def rename(model: DenseDetector, key: str) -> str:
    """Our name for one published parameter."""
    for pattern, ours in _RENAMINGS:
        if match := re.fullmatch(pattern, key):
            return match.expand(ours)
    if match := _EXTRA_LEVEL.fullmatch(key):
        return f"neck.extra_blocks.convs.{int(match[1]) - len(BACKBONE_STRIDES)}.{match[2]}"
    if (match := _PREDICTOR.fullmatch(key)) and match[1] in model.published_predictors:
        return f"predictors.{model.published_predictors[match[1]]}.{match[2]}"
    return key
