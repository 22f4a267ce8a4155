"""timm's models as teachers that show features alone: vision transformers such as DINOv2, pyramids such as ConvNeXt.

Such a model has no head, so it can neither detect nor be a student. A vision transformer shows one level, whose stride
is its patch: the tokens after the last block and the final norm, without class and register tokens, as a map. A
convolutional or hierarchical model shows one level for each of its strides.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import timm
import torch
from torch import Tensor, nn

from kdtoolkit.canvas import Layout, lay_out
from kdtoolkit.contract import (
    Assignment,
    Batch,
    Detections,
    DetectorAdapter,
    DetectorSpec,
    HeadTrace,
    PriorKind,
    Priors,
    Target,
)
from kdtoolkit.detector import Opened
from kdtoolkit.detectors.backbone import IMAGENET_MEAN, IMAGENET_STD, check_downloadable
from kdtoolkit.errors import KDError
from kdtoolkit.options import did_you_mean
from kdtoolkit.weights import aligned, fitted, read_weights
from kdtoolkit.yaml_text import with_arguments

# Options by which timm's models take images of any size. A model has one of the first two, or needs none.
_ANY_SIZE: tuple[dict[str, object], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
_OPEN_LICENCES = ("apache-2.0", "mit", "bsd-3-clause")
_DINOV3 = "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"


class FoundationAdapter(DetectorAdapter):
    """Adapter of timm's models. Raises KDError for a model that takes images of one size alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if any(getattr(module, "strict_img_size", False) for module in model.modules()):
            raise KDError(
                f"this {type(model).__name__} takes images of one size alone, and a student's images have any size: "
                "build it with timm.create_model(..., dynamic_img_size=True), or by the name timm/NAME"
            )
        config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
        parts = config.get("architecture") or type(model).__name__, config.get("tag")
        self._name = f"timm/{'.'.join(filter(None, parts))}"
        self._mean = tuple(config.get("mean") or IMAGENET_MEAN)
        self._std = tuple(config.get("std") or IMAGENET_STD)
        # Of each stride the last map, which is the deepest. In a vision transformer all blocks have one stride.
        self._levels = {info["reduction"]: (i, info["num_chs"]) for i, info in enumerate(_feature_info(model))}

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether `model` is a timm model that can show its features."""
        return hasattr(model, "forward_intermediates") and isinstance(getattr(model, "feature_info", None), list)

    def describe(self) -> DetectorSpec:
        """Describe the model. It has no classes."""
        return DetectorSpec(
            name=self._name,
            num_classes=0,
            strides=tuple(self._levels),
            channels=tuple(channels for _, channels in self._levels.values()),
            priors=PriorKind.NONE,
        )

    def prepare(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None, like: Batch | None = None
    ) -> Batch:
        """Normalise the images as the model was trained, and pad them to whole cells of its coarsest level."""
        divisor = max(self._levels)
        layout = Layout.padded(images, divisor) if like is None else Layout.of(like, divisor)
        return lay_out(images, targets, layout, mean=self._mean, std=self._std)

    def features(self, batch: Batch) -> tuple[Tensor, ...]:
        """Run the model. The tokens of a vision transformer are normalised; the maps of a pyramid are as they are."""
        model: Any = self.model
        return tuple(
            model.forward_intermediates(
                batch.images,
                indices=[index for index, _ in self._levels.values()],
                norm=len(self._levels) == 1,
                output_fmt="NCHW",
                intermediates_only=True,
            )
        )

    def head(
        self,
        features: tuple[Tensor, ...],
        batch: Batch,
        priors: Priors | None = None,
        stages: Collection[int] | None = None,
    ) -> HeadTrace:
        """Raise KDError: there is no head."""
        self._refuse()

    def task_losses(self, trace: HeadTrace, batch: Batch) -> tuple[dict[str, Tensor], Assignment | None]:
        """Raise KDError: there is no head."""
        self._refuse()

    def detections(self, trace: HeadTrace, batch: Batch) -> list[Detections]:
        """Raise KDError: there is no head."""
        self._refuse()

    def graph(self) -> nn.Module:
        """Raise KDError: there is no head."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise KDError(
            f"{self._name} shows features alone, so it can neither detect nor be trained as a detector. It can teach "
            "one: kd distill --teacher timm/NAME --student MODEL --data D"
        )


ADAPTERS: tuple[type[DetectorAdapter], ...] = (FoundationAdapter,)


def build_model(name: str, num_classes: int, args: Mapping[str, object]) -> nn.Module:
    """Build a timm model without its classifier, for images of any size; `num_classes` does not matter.

    Raises KDError if timm has no such model, if it does not take these arguments, or if it cannot run on images of any
    size.
    """
    return _built(name, args)


def open_published(name: str, args: Mapping[str, object], weights: str | None) -> Opened | None:
    """Build a model with the weights that timm publishes for it; None if no weights are asked for.

    Raises KDError if there are no such weights, or if they cannot be downloaded.
    """
    if weights is None:
        return None
    if weights != "pretrained":
        raise KDError(
            f"timm/{name}: there are no weights {weights!r}. The name itself says which of timm's weights, as in "
            "timm/vit_small_patch14_dinov2.lvd142m: write pretrained, or name a file"
        )
    _check_known(name)
    check_downloadable(
        name,
        f"the weights of timm/{name} cannot be downloaded from the hub, because there is no network. Name a file of "
        "them, as --teacher-weights FILE or `weights: FILE`",
    )
    return _opened(_built(name, args, pretrained=True), name, args, f"timm's {name}")


def open_weights(name: str, args: Mapping[str, object], file: Path) -> Opened:
    """Build a model with the weights of a file, in timm's names or in those of its publisher, such as Meta's.

    A classifier in the file is left out. Raises KDError if the file cannot be read or does not fit.
    """
    model = _built(name, args)
    state = read_weights(file)
    convert = getattr(importlib.import_module(type(model).__module__), "checkpoint_filter_fn", None)
    if convert is not None:
        try:
            state = convert(state, model)
        except Exception as error:  # it may meet anything in a file of a different model
            raise KDError(f"the weights of {file} are not those of timm/{name}: name the model that they are of") from (
                error
            )
    state, own = aligned(model, state, str(file)), model.state_dict()
    classifier = _config(model).get("classifier") or "head"
    parts = tuple(f"{part}." for part in ((classifier,) if isinstance(classifier, str) else classifier))
    state = {key: value for key, value in state.items() if key in own or not key.startswith(parts)}
    model.load_state_dict(fitted(model, state, str(file), "Name the model that the weights are of"))
    return _opened(model, name, args, str(file))


def _opened(model: nn.Module, name: str, args: Mapping[str, object], source: str) -> Opened:
    licence = _config(model).get("license")
    return Opened(
        model,
        lambda num_classes: _built(name, args),
        0,
        with_arguments(f"timm/{name}", args),
        None,
        f"{source}, licence {licence}" if licence else source,
        notes=_licence_notes(name, licence),
    )


def _licence_notes(name: str, licence: str | None) -> tuple[str, ...]:
    """What to know of weights whose licence is not one of the open ones."""
    if licence is None or licence.lower() in _OPEN_LICENCES:
        return ()
    where = f" ({_DINOV3})" if "dinov3" in licence else ""
    return (
        f"the weights of {name} have a licence of their own, {licence}{where}: read it before you publish or sell what "
        "was trained with them",
    )


def _config(model: nn.Module) -> Mapping[str, Any]:
    return getattr(model, "pretrained_cfg", None) or {}


def _feature_info(model: nn.Module) -> list[dict[str, Any]]:
    found: Any = model.feature_info
    return list(found)


def _check_known(name: str) -> None:
    """Raise KDError if timm has no such model, or no such weights of it."""
    if timm.is_model(name) and ("." not in name or name in timm.list_models(f"{name}*", pretrained=True)):
        return
    hint = did_you_mean(name, timm.list_models(pretrained=True))
    raise KDError(f"timm has no model {name!r}{hint}: `timm.list_models(pretrained=True)` lists those with weights")


def _built(name: str, args: Mapping[str, object], *, pretrained: bool = False) -> nn.Module:
    """Build a model, and run it once on a small image that is not square. It is then in eval mode."""
    _check_known(name)
    if unwanted := sorted({"pretrained", "features_only", "num_classes"} & args.keys()):
        raise KDError(
            f"timm/{name} takes no {unwanted[0]}: weights are named beside the model (--teacher-weights, `weights:`), "
            "and it has no classes"
        )
    model = _created(name, args, pretrained)
    model.eval()
    adapter = FoundationAdapter(model)
    spec = adapter.spec
    cells = [(2 * max(spec.strides) // stride, 3 * max(spec.strides) // stride) for stride in spec.strides]
    expected = [(1, channels, *each) for channels, each in zip(spec.channels, cells, strict=True)]
    try:
        with torch.no_grad():
            batch = adapter.prepare([torch.zeros(3, 2 * max(spec.strides), 3 * max(spec.strides))])
            found = [tuple(x.shape) for x in adapter.features(batch)]
    except Exception as error:  # models raise errors of all kinds
        raise KDError(
            f"timm/{name} does not run on images of any size ({type(error).__name__}: {' '.join(str(error).split())}). "
            "Take a different model: DINOv2, DINOv3, ConvNeXt and Swin do"
        ) from error
    if found != expected:
        raise KDError(
            f"timm/{name} shows maps of the shapes {found}, and its strides {spec.strides} need {expected}: take a "
            "different model"
        )
    return model


def _created(name: str, args: Mapping[str, object], pretrained: bool) -> nn.Module:
    create: Callable[..., nn.Module] = timm.create_model
    for options in _ANY_SIZE:
        try:
            model = create(name, pretrained=pretrained, num_classes=0, **{**options, **args})
        except Exception as error:  # models and the hub raise errors of all kinds
            if isinstance(error, TypeError) and any(option in str(error) for option in options):
                continue
            given = ", ".join(f"{key}={value!r}" for key, value in args.items()) or "its defaults"
            raise KDError(
                f"timm/{name} cannot be built from {given} ({type(error).__name__}: {' '.join(str(error).split())})"
            ) from error
        if FoundationAdapter.matches(model):
            return model
        break
    raise KDError(f"timm/{name} cannot show its features (forward_intermediates): take a different model")
