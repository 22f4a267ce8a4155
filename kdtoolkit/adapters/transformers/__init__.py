"""Adapters of transformers' DETR and its relatives, and these detectors by name."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_session
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForObjectDetection
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
from transformers.utils import logging
from transformers.utils.hub import cached_file

from kdtoolkit.adapters.transformers import processing
from kdtoolkit.adapters.transformers.base import TransformersAdapter
from kdtoolkit.adapters.transformers.conditional_detr import ConditionalDetrAdapter
from kdtoolkit.adapters.transformers.dab_detr import DabDetrAdapter
from kdtoolkit.adapters.transformers.deformable_detr import DeformableDetrAdapter
from kdtoolkit.adapters.transformers.detr import DetrAdapter
from kdtoolkit.adapters.transformers.dfine import Deimv2Adapter, DFineAdapter
from kdtoolkit.adapters.transformers.rfdetr import LwDetrAdapter, RfDetrAdapter
from kdtoolkit.adapters.transformers.rtdetr import RTDetrAdapter, RTDetrV2Adapter
from kdtoolkit.contract import DetectorAdapter
from kdtoolkit.detector import Detector, Opened, named
from kdtoolkit.errors import KDError
from kdtoolkit.libraries import adapt
from kdtoolkit.yaml_text import with_arguments

ADAPTERS: tuple[type[TransformersAdapter], ...] = (
    DetrAdapter,
    ConditionalDetrAdapter,
    DabDetrAdapter,
    DeformableDetrAdapter,
    RTDetrAdapter,
    RTDetrV2Adapter,
    DFineAdapter,
    Deimv2Adapter,
    RfDetrAdapter,
    LwDetrAdapter,
)

_auto_model: Any = AutoModelForObjectDetection  # without types in the library
_logging: Any = logging

# Arguments that configs take besides their fields, to describe a backbone.
_BACKBONE = {"backbone", "use_timm_backbone", "use_pretrained_backbone", "backbone_kwargs"}


def build_model(name: str, num_classes: int, args: Mapping[str, object]) -> nn.Module:
    """Build a detector of transformers.

    Args:
        name: a model type, such as "deformable_detr", for random weights. Or a folder that `save_pretrained` wrote, or
            a name on the Hugging Face hub, for the weights there (safetensors only). If the number of classes differs,
            the class head is new. The adapter prepares images as the image processor in that place says.
        num_classes: without background.
        args: fields of the config. They override the config's defaults, or what the folder's config says.

    Raises:
        KDError: there is no such detector, its config has no such fields, or the hub is needed and does not answer.
    """
    if "num_labels" in args:
        raise KDError(f"model 'hf/{name}': num_labels follows from the data's classes; leave it out")
    model_type = _model_type(name)
    try:
        if model_type is not None:
            _check_fields(name, model_type, args)
            config = AutoConfig.for_model(model_type, num_labels=num_classes, **args)
            model: nn.Module = _auto_model.from_config(config)
            return model
    except KDError:
        raise
    except Exception as error:  # configs raise errors of all kinds
        raise _failure(name, " ".join(str(error).split()).rstrip(".")) from error
    return _loaded(name, {**args, "num_labels": num_classes})[0]


def _model_type(name: str) -> str | None:
    types = {model_type.replace("-", "_"): model_type for model_type in MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES}
    return types.get(name.replace("-", "_"))


def _loaded(name: str, args: Mapping[str, object]) -> tuple[nn.Module, list[str]]:
    """Load a detector from a folder or the hub. `args` are fields of the config that replace those there.

    Returns it with the names of the tensors that the file lacks or has in different shapes: these are random.
    """
    try:
        source: dict[str, Any] = {"trust_remote_code": False, "local_files_only": _is_local(name)}
        config, unused = AutoConfig.from_pretrained(name, return_unused_kwargs=True, **source, **args)
        if unused:
            raise KDError(f"model 'hf/{name}': its config has no {', '.join(unused)}")
        # In float32, which every adapter needs, in whatever precision they were saved.
        with _without_bars():
            model, found = _auto_model.from_pretrained(
                name,
                config=config,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
                output_loading_info=True,
                **source,
            )
        random = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
        # Loads it into the hub's cache, where the adapter looks for it. Without one, the class's defaults hold.
        cached_file(
            name,
            processing.FILE,
            local_files_only=source["local_files_only"],
            _raise_exceptions_for_missing_entries=False,
        )
        if getattr(config, "share_bbox_head", False):
            random -= _load_shared_heads(model, name)
    except KDError:
        raise
    except Exception as error:  # errors of configs, the hub and its HTTP client have no closer base class in common
        raise _failure(name, " ".join(str(error).split()).rstrip(".")) from error
    return model, sorted(key for key in random if not key.endswith("num_batches_tracked"))


def open_published(name: str, args: Mapping[str, object], weights: str | None) -> Opened | None:
    """Open a detector from a folder of `save_pretrained` or from the hub; None if `name` is a model type.

    Raises KDError if it cannot be loaded, or if `weights` asks for others.
    """
    if _model_type(name) is not None:
        if weights is None:
            return None
        raise KDError(f"hf/{name} has no weights {weights!r}: name a detector on the hub, as hf/OWNER/NAME, or a file")
    if weights not in (None, "pretrained"):
        raise KDError(f"hf/{name} has no weights {weights!r}: leave them out to take its own")
    loaded, random = _loaded(name, args)
    model: Any = loaded
    adapter, config = adapt(model), model.config
    count = config.num_labels
    names = named([str(config.id2label[i]) for i in range(count)])

    def build(num_classes: int) -> nn.Module:
        other = copy.deepcopy(config)
        other.num_labels = num_classes
        built: nn.Module = _auto_model.from_config(other, dtype=torch.float32)
        return built

    return Opened(
        model=model.train(),
        build=build,
        num_classes=count,
        name=with_arguments(f"hf/{name}", args),
        class_names=None if names == tuple(f"LABEL_{i}" for i in range(count)) else names,
        weights=f"hf/{name}",
        trained=not random,
        notes=(_note(name, random),) if random else (),
        image_size=_image_size(adapter),
    )


def _note(name: str, random: Sequence[str]) -> str:
    """What to say of a detector with tensors that its files do not have."""
    more = f" and {len(random) - 3} more" if len(random) > 3 else ""
    return (
        f"hf/{name} lacks weights that its config asks for, or has them in different shapes, so these are random: "
        f"{', '.join(random[:3])}{more}. Train the detector, or correct its config.json"
    )


def _image_size(adapter: DetectorAdapter) -> int | None:
    """The longest side that the image processor of a loaded model resizes images to, in pixels."""
    processing = adapter.processing if isinstance(adapter, TransformersAdapter) else None
    if processing is None or not processing.processor.do_resize:
        return None
    sides = dict(processing.processor.size)
    return max((sides[key] for key in ("longest_edge", "height", "width") if key in sides), default=None)


def save_model(detector: Detector, folder: Path) -> tuple[str, str]:
    """Save the folder of `save_pretrained`: config, weights, and the image processor that prepares images likewise."""
    model: Any = detector.model
    if detector.class_names is not None:
        model.config.id2label = dict(enumerate(detector.class_names))
        model.config.label2id = {name: label for label, name in enumerate(detector.class_names)}
    with _without_bars():
        model.save_pretrained(folder)
    if getattr(model.config, "share_bbox_head", False):
        # The library saves the head of the last layer, and loads that of the first: so each layer gets its own.
        state = {key: value.detach().cpu().clone().contiguous() for key, value in model.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    adapter = adapt(model)
    assert isinstance(adapter, TransformersAdapter)
    processor = adapter.image_processor()
    processor.save_pretrained(folder)
    size = (
        ""
        if processor.do_resize or detector.image_size is None
        else (f"# Images were at most {detector.image_size} px long in training: scale larger ones down first.\n")
    )
    return "model.safetensors", (
        f"from transformers import AutoImageProcessor, AutoModelForObjectDetection\n\n{size}"
        'processor = AutoImageProcessor.from_pretrained(".")\n'
        'model = AutoModelForObjectDetection.from_pretrained(".")\n'
    )


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep the library from drawing bars while it reads and writes weights, which takes a second."""
    shown = _logging.is_progress_bar_enabled()
    _logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            _logging.enable_progress_bar()


def _failure(name: str, reason: str) -> KDError:
    adapted = {cls.kind.__name__ for cls in ADAPTERS}
    types = [model_type for model_type, kind in MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES.items() if kind in adapted]
    known = ", ".join(types).replace("-", "_")
    return KDError(
        f"model 'hf/{name}' cannot be built: {reason}. Give a model type ({known}), a folder with config.json and "
        "model.safetensors, or the name of a detector on huggingface.co, which needs a network the first time"
    )


def _is_local(name: str) -> bool:
    """Whether to look for files on this machine only, in a folder or in the hub's cache.

    Without a network the library asks the hub again and again, for more than a minute. Raises KDError if the name is
    neither a folder nor a name on the hub.
    """
    if Path(name).is_dir():
        return True
    if name.count("/") != 1:  # OWNER/NAME
        raise _failure(name, "there is no such model type, and no such folder")
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # the HTTP client's own, or that of offline mode
        return True
    return False


def _load_shared_heads(model: nn.Module, name: str) -> set[str]:
    """Load weights as they stand in the file. Returns the names of all that fit.

    If layers share their box head, the library (5.24) saves that of the last layer and loads that of the first: the
    head would stay random.
    """
    own = model.state_dict()
    state = load_file(str(cached_file(name, "model.safetensors", local_files_only=True)))
    fitting = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    model.load_state_dict(fitting, strict=False)
    return set(fitting)


def _check_fields(name: str, model_type: str, args: Mapping[str, object]) -> None:
    """Raise KDError for unknown fields of the config. The library accepts any argument, even a misspelt one."""
    config = CONFIG_MAPPING[model_type]
    fields = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map) | _BACKBONE
    if unknown := sorted(set(args) - fields):
        raise KDError(f"model 'hf/{name}': its config has no {', '.join(unknown)}. It has {', '.join(sorted(fields))}")
