"""timm's models as backbones: the maps that a pyramid takes, the normalisation of images, and the pyramid."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants, get_session, try_to_load_from_cache
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from kdtoolkit.errors import KDError
from kdtoolkit.options import did_you_mean
from kdtoolkit.weights import aligned, fitted, read_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_timms_log = logging.getLogger("timm.models._builder")
_TRIAL = 64, 96  # height and width in pixels: two sizes that no model is built for


@dataclass(frozen=True)
class Levels:
    """The feature maps that a pyramid takes from a backbone.

    `indices` are their places among all maps of the backbone, and `channels` their numbers of channels. With
    `channels_last` the backbone gives maps (N, H, W, C), as Swin Transformers do. `mean` and `std`, three numbers
    each, are what the backbone's own training used to normalise images in [0, 1]. If the backbone names none, they are
    ImageNet's.
    """

    indices: tuple[int, ...]
    channels: tuple[int, ...]
    channels_last: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def of(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Choose the pyramid's maps (N, C, H, W), finest first, from all maps of the backbone."""
        chosen = [maps[index] for index in self.indices]
        return [x.permute(0, 3, 1, 2) for x in chosen] if self.channels_last else chosen


def build_backbone(
    name: str,
    strides: Sequence[int],
    *,
    pretrained: bool | str | os.PathLike[str] = False,
    args: Mapping[str, object] | None = None,
) -> tuple[nn.Module, Levels]:
    """Build a timm model, and find its maps of `strides` (pixels).

    Args:
        name: of the timm model.
        strides: of the maps that the pyramid needs, finest first.
        pretrained: True loads timm's weights, and downloads them the first time. A path loads the state dict of the
            whole timm model from a .safetensors, .pth or .pt file; its classifier may be missing.
        args: further arguments of timm.create_model.

    Raises:
        KDError: timm has no such model or cannot build it, it has no such maps, it runs only on images of its own
            size, or its weights cannot be downloaded or do not fit.
    """
    if not timm.is_model(name):
        raise KDError(f"backbone: timm has no model {name!r}{did_you_mean(name, timm.list_models())}")
    options = {**(args or {}), **_source_of_weights(name, pretrained, args or {})}
    model = _created(name, options)
    reductions = model.feature_info.reduction()
    if missing := [stride for stride in strides if stride not in reductions]:
        raise KDError(
            f"backbone {name!r} gives feature maps of strides {reductions}, and the pyramid needs {tuple(strides)}: "
            f"{missing} missing. Take another backbone, or correct backbone_args (out_indices)."
        )
    if any(getattr(module, "strict_img_size", False) for module in model.modules()):
        # Swin Transformers take images of one size unless told otherwise. A detector's images have any size.
        with suppress(KDError):
            model = _created(name, {"strict_img_size": False, **options})
    indices = tuple(reductions.index(stride) for stride in strides)
    channels = tuple(model.feature_info.channels()[index] for index in indices)
    shapes = _trial_shapes(name, model)
    cells = [tuple(-(-side // stride) for side in _TRIAL) for stride in strides]
    found = [shapes[index] for index in indices]
    channels_last = found == [(*each, count) for each, count in zip(cells, channels, strict=True)]
    if not channels_last and found != [(count, *each) for each, count in zip(cells, channels, strict=True)]:
        raise KDError(
            f"backbone {name!r} gives maps of shapes {found} for images of {_TRIAL[0]} x {_TRIAL[1]} px, which do not "
            f"fit strides {tuple(strides)} and {channels} channels. Take another backbone."
        )
    config = getattr(model, "pretrained_cfg", None) or {}
    config.pop("state_dict", None)  # it is in the model
    mean, std = config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)
    return model, Levels(indices, channels, channels_last, tuple(mean), tuple(std))


class Pyramid(FeaturePyramidNetwork):
    """torchvision's feature pyramid, on maps of a timm backbone.

    Args:
        levels: the maps that it takes.
        channels: of each pyramid level.
        extra: computes the levels that are coarser than the backbone's.
    """

    def __init__(self, levels: Levels, channels: int, extra: ExtraFPNBlock) -> None:
        super().__init__(list(levels.channels), channels, extra_blocks=extra)
        self.levels = levels

    def of(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Compute pyramid levels (N, C, H, W) by name, finest first, from all maps of the backbone."""
        levels: dict[str, Tensor] = self(OrderedDict((str(i), x) for i, x in enumerate(self.levels.of(maps))))
        return levels


def _source_of_weights(
    name: str, pretrained: bool | str | os.PathLike[str], args: Mapping[str, object]
) -> dict[str, Any]:
    """The arguments of timm.create_model that load the weights."""
    if not pretrained:
        return {}
    if pretrained is not True:
        return {
            "pretrained": True,
            "pretrained_cfg_overlay": {"state_dict": _whole_state(name, Path(pretrained), args)},
        }
    check_downloadable(
        name,
        f"backbone {name!r}: its weights cannot be downloaded from the hub, because there is no network. Give a file, "
        "as in pretrained=FILE, or leave out `pretrained`",
    )
    return {"pretrained": True}


def check_downloadable(name: str, problem: str) -> None:
    """Raise KDError(problem) if a timm model's weights lie on the hub alone, and there is no network."""
    repository = getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None)
    cached = repository and isinstance(try_to_load_from_cache(repository, "model.safetensors"), str)
    if repository and not cached and not _reaches_hub():  # the library would try for most of a minute
        raise KDError(problem)


def _whole_state(name: str, file: Path, args: Mapping[str, object]) -> dict[str, Tensor]:
    """The state dict of the whole timm model from a file.

    The classifier is not needed: it comes from a new model, so that all weights can be checked against the model.
    """
    try:
        options: dict[str, Any] = {key: value for key, value in args.items() if key != "out_indices"}
        model: Any = timm.create_model(name, **options)
    except Exception as error:  # models raise errors of all kinds
        raise _not_built(name, args, error) from error
    classifier = model.pretrained_cfg.get("classifier") or ()
    parts = tuple(f"{part}." for part in ((classifier,) if isinstance(classifier, str) else classifier))
    found = aligned(model, read_weights(file), str(file))
    kept = {key: value for key, value in found.items() if not parts or not key.startswith(parts)}
    own = {key: value for key, value in model.state_dict().items() if parts and key.startswith(parts)}
    return fitted(model, {**own, **kept}, str(file), "Name the backbone that the weights are of")


def _reaches_hub() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # the HTTP client's own, or that of offline mode
        return False
    return True


def _created(name: str, args: Mapping[str, Any]) -> Any:
    _timms_log.setLevel(logging.ERROR)  # it warns of weights that a pyramid does not need
    try:
        return timm.create_model(name, features_only=True, **args)
    except Exception as error:  # models and the hub raise errors of all kinds
        raise _not_built(name, {key: args[key] for key in args if not key.startswith("pretrained")}, error) from error
    finally:
        _timms_log.setLevel(logging.NOTSET)


def _not_built(name: str, args: Mapping[str, object], error: Exception) -> KDError:
    given = ", ".join(f"{key}={value!r}" for key, value in args.items()) or "its defaults"
    return KDError(
        f"backbone {name!r} cannot be built from {given}: {_said(error)}. Correct backbone_args, or take another "
        "backbone: one that timm can build with features_only=True"
    )


def _trial_shapes(name: str, model: nn.Module) -> list[tuple[int, ...]]:
    """The shapes of all maps, without the batch dimension, for a small image that is not square."""
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            maps = model.eval()(torch.zeros(1, 3, *_TRIAL, device=device))
    except Exception as error:  # models raise errors of all kinds
        raise KDError(
            f"backbone {name!r} does not run on images of {_TRIAL[0]} x {_TRIAL[1]} px ({_said(error)}), and a "
            "detector's images have any size. Take a backbone that takes any size: most convolutional ones do, and Swin"
        ) from error
    finally:
        model.train()
    return [tuple(x.shape[1:]) for x in maps]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"
