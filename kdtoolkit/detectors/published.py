"""Weights published by the authors' projects, and how their parameters are called here."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kdtoolkit.detectors.dense import BACKBONE_STRIDES, DenseDetector
from kdtoolkit.weights import fitted, read_weights

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
    own = model.state_dict()

    def known(key: str) -> bool:
        return rename(model, key) in own

    model.load_state_dict(fitted(model, published, name, known, partial(rename_published, model)))


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
