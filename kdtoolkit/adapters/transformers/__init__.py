"""Adapters of transformers' DETR kin, and its detectors by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForObjectDetection
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from kdtoolkit.adapters.transformers import detr, dfine, rfdetr, rtdetr
from kdtoolkit.contract import DetectorAdapter
from kdtoolkit.errors import KDError

ADAPTERS: tuple[type[DetectorAdapter], ...] = (
    *detr.ADAPTERS,
    *rtdetr.ADAPTERS,
    *dfine.ADAPTERS,
    *rfdetr.ADAPTERS,
)

_auto_model: Any = AutoModelForObjectDetection  # without types in the library

# What configs take besides their fields to describe a backbone.
_BACKBONE = {"backbone", "use_timm_backbone", "use_pretrained_backbone", "backbone_kwargs"}


def build_model(name: str, num_classes: int, args: Mapping[str, object]) -> nn.Module:
    """Build a detector of transformers.

    Args:
        name: a model type, as "deformable_detr", for random weights; else a folder that `save_pretrained` wrote, or a
            name on the Hugging Face hub, for the weights there (safetensors alone), the class head made anew where
            the number of classes differs.
        num_classes: without background.
        args: fields of the config, which override its defaults or those of the folder.

    Raises:
        KDError: there is no such detector, or its config has no such fields.
    """
    if "num_labels" in args:
        raise KDError(f"model 'hf/{name}': num_labels follows from the data's classes; leave it out")
    types = {model_type.replace("-", "_"): model_type for model_type in MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES}
    model_type = types.get(name.replace("-", "_"))
    try:
        if model_type is not None:
            _check_fields(name, model_type, args)
            config = AutoConfig.for_model(model_type, num_labels=num_classes, **args)
            model: nn.Module = _auto_model.from_config(config)
            return model
        config, unused = AutoConfig.from_pretrained(
            name, num_labels=num_classes, trust_remote_code=False, return_unused_kwargs=True, **args
        )
        if unused:
            raise KDError(f"model 'hf/{name}': its config has no {', '.join(unused)}")
        model = _auto_model.from_pretrained(
            name, config=config, ignore_mismatched_sizes=True, use_safetensors=True, trust_remote_code=False
        )
    except KDError:
        raise
    except Exception as error:  # configs, the hub and its HTTP client share no other base
        reason = " ".join(str(error).split()).rstrip(".")
        raise KDError(
            f"model 'hf/{name}' cannot be built: {reason}. Give a model type ({', '.join(types)}), a "
            "folder with config.json and model.safetensors, or the name of a detector on huggingface.co, which needs a "
            "network the first time"
        ) from error
    return model


def _check_fields(name: str, model_type: str, args: Mapping[str, object]) -> None:
    """The library takes any argument for a field of the config, misspelt ones too."""
    config = CONFIG_MAPPING[model_type]
    fields = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map) | _BACKBONE
    if unknown := sorted(set(args) - fields):
        raise KDError(f"model 'hf/{name}': its config has no {', '.join(unknown)}. It has {', '.join(sorted(fields))}")
