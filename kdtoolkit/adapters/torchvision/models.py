"""torchvision's detectors by name, and on any timm backbone."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from kdtoolkit.adapters.torchvision.base import LIBRARY
from kdtoolkit.build import architecture, construct
from kdtoolkit.detector import Detector, Opened, named
from kdtoolkit.detectors.backbone import Pyramid, build_backbone
from kdtoolkit.detectors.precision import without_autocast
from kdtoolkit.errors import KDError
from kdtoolkit.libraries import adapt
from kdtoolkit.options import did_you_mean
from kdtoolkit.yaml_text import split_name, with_arguments

_EPS = 1e-5  # of torch's and torchvision's batch norms
# The arguments of torchvision's classes that `on_timm` sets.
_OF_ON_TIMM = {"backbone", "num_classes", "min_size", "max_size", "image_mean", "image_std", "kwargs"}


class TimmPyramid(nn.Module):
    """A timm backbone with torchvision's feature pyramid: what RetinaNet, FCOS and Faster R-CNN take as `backbone`.

    Args:
        name: of a timm model with feature maps of all `strides`.
        strides: of the levels that the pyramid takes from the backbone, in pixels, finest first.
        out_channels: of the pyramid's levels.
        extra: computes the coarser levels.
        pretrained: True loads timm's ImageNet weights of the backbone, and downloads them the first time. A path loads
            them from a file.
        args: further arguments of timm.create_model.

    Raises:
        KDError: timm has no such model, or the model has no such levels or takes images of one size only.
    """

    def __init__(
        self,
        name: str,
        strides: Sequence[int],
        out_channels: int,
        extra: ExtraFPNBlock,
        *,
        pretrained: bool | str = False,
        args: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        self.body, levels = build_backbone(name, strides, pretrained=pretrained, args=args)
        self.fpn = Pyramid(levels, out_channels, extra)
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute pyramid levels (N, C, H, W) by name, finest first, from images (N, 3, H, W)."""
        return self.fpn.of(self.body(images))

    @property
    def normalisation(self) -> dict[str, Any]:
        """The mean and std of images in the backbone's own training, as arguments of a detector."""
        return {"image_mean": list(self.fpn.levels.mean), "image_std": list(self.fpn.levels.std)}


class CoarserLevels(LastLevelP6P7):
    """P6 and P7 in float32 even under autocast. The reason stands in `kdtoolkit.detectors.dense.ExtraLevels`."""

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Append P6 and P7 to the pyramid's levels `p`."""
        with without_autocast(p[-1]):
            levels: tuple[list[Tensor], list[str]] = super().forward(
                [*p[:-1], p[-1].float()], [*c[:-1], c[-1].float()], names
            )
            return levels


def on_timm(
    detector: type[RetinaNet] | type[FCOS] | type[FasterRCNN],
    num_classes: int,
    *,
    backbone: str = "resnet50",
    backbone_args: Mapping[str, object] | None = None,
    pretrained: bool | str = False,
    out_channels: int = 256,
    min_size: int = 800,
    max_size: int = 1333,
    detector_args: Mapping[str, object] | None = None,
) -> nn.Module:
    """Build one of torchvision's detectors on a timm backbone: `on_timm(FCOS, 20, backbone="resnet18")`.

    Args:
        detector: torchvision's class.
        num_classes: without background.
        backbone: name of the timm model.
        backbone_args: further arguments of timm.create_model.
        pretrained: True loads timm's ImageNet weights of the backbone, and downloads them the first time. A path loads
            them from a file.
        out_channels: of the feature pyramid's levels.
        min_size: the detector scales images until their shorter side has this length, in pixels.
        max_size: the largest length of the longer side, in pixels. It takes precedence over `min_size`.
        detector_args: further arguments of torchvision's class, such as `box_batch_size_per_image` of FasterRCNN.

    Raises:
        KDError: timm has no such model, the model has no such levels or takes images of one size only, or torchvision's
            class has no such argument.
    """
    further = dict(detector_args or {})
    _check("detector_args", further, inspect.signature(detector).parameters, without=_OF_ON_TIMM)
    two_stage = issubclass(detector, FasterRCNN)
    strides = (4, 8, 16, 32) if two_stage else (8, 16, 32)
    extra = LastLevelMaxPool() if two_stage else CoarserLevels(out_channels, out_channels)
    levels = TimmPyramid(backbone, strides, out_channels, extra, pretrained=pretrained, args=backbone_args)
    build = cast(Callable[..., nn.Module], detector)
    return build(
        levels, num_classes + two_stage, min_size=min_size, max_size=max_size, **levels.normalisation, **further
    )


_ON_TIMM: Mapping[str, Callable[..., nn.Module]] = {
    "retinanet": partial(on_timm, RetinaNet),
    "fcos": partial(on_timm, FCOS),
    "fasterrcnn": partial(on_timm, FasterRCNN),
}


def build_model(name: str, num_classes: int, args: Mapping[str, object]) -> nn.Module:
    """Build one of torchvision's detectors.

    Args:
        name: of one of torchvision's builders, such as "fcos_resnet50_fpn", which loads no weights unless `args` say
            so. Or "retinanet", "fcos" or "fasterrcnn", which take any timm backbone.
        num_classes: without background.
        args: further arguments of the builder, or of the detector that it builds.

    Raises:
        KDError: there is no such builder, or it does not take such arguments.
    """
    if name in _ON_TIMM:
        return construct(_ON_TIMM[name], f"torchvision/{name}", num_classes, args)
    outputs = num_classes + _background(name)
    return _built(name, {"weights": None, "weights_backbone": None, **args, "num_classes": outputs})


def _background(name: str) -> int:
    """How many outputs a detector has for background: 1 or 0."""
    return 0 if issubclass(_detector(name), RetinaNet | FCOS) else 1


def _detector(name: str) -> type[nn.Module]:
    """The class of detectors that a builder of torchvision returns. Raises KDError if there is no such builder."""
    full = f"torchvision/{name}"
    names = [*_ON_TIMM, *LIBRARY.list_models(module=detection)]
    if name not in names:
        raise KDError(f"unknown model {full!r}{did_you_mean(name, names)}. There are {', '.join(names)}")
    return cast(type[nn.Module], inspect.signature(LIBRARY.get_model_builder(name)).return_annotation)


def _built(name: str, args: Mapping[str, Any]) -> nn.Module:
    """Call one of torchvision's builders. Raises KDError if it does not take such arguments."""
    full, builder = f"torchvision/{name}", LIBRARY.get_model_builder(name)
    # The transform ignores arguments that it does not know, so names are checked here.
    taken = {**inspect.signature(builder).parameters, **inspect.signature(_detector(name).__init__).parameters}
    further = {key: value for key, value in args.items() if key != "num_classes"}
    _check(f"model {full!r}", further, taken, without={"self", "kwargs", "backbone", "num_classes", "size"})
    try:
        return cast(nn.Module, builder(**args))
    except (
        TypeError,
        ValueError,
        KeyError,
        OSError,
    ) as error:  # weights that are unknown or for other classes, or no network
        raise KDError(f"model {full!r}: {error}") from error


def _check(
    what: str, args: Mapping[str, object], parameters: Mapping[str, inspect.Parameter], *, without: Set[str]
) -> None:
    """Raise KDError if `what` has no such argument, or if one of them is text where the library takes a number.

    `parameters`: what the library takes, and `without`: what cannot be chosen. The library has no type hints.
    """
    allowed = sorted(parameters.keys() - without)
    if unknown := sorted(args.keys() - {*allowed}):
        raise KDError(
            f"{what} takes no argument {unknown[0]!r}{did_you_mean(unknown[0], allowed)}. Its arguments are "
            f"{', '.join(allowed)}"
        )
    for name, value in args.items():
        if isinstance(value, str) and isinstance(parameters[name].default, int | float):
            raise KDError(f"{what}: {name} is {value!r}: it must be a number")


def open_published(name: str, args: Mapping[str, object], weights: str | None) -> Opened | None:
    """Open a detector with weights that torchvision publishes; None if `weights` is None.

    Args:
        name: of one of torchvision's builders.
        args: its further arguments.
        weights: the name of its weights, such as "COCO_V1"; "pretrained" and "DEFAULT" are the best ones.

    Raises:
        KDError: torchvision has no such weights, or they are not on this machine and no network is there.
    """
    if weights is None:
        return None
    if name in _ON_TIMM:
        raise KDError(
            f"torchvision publishes no weights of {name!r} on timm backbones: name a file, or take ImageNet weights of "
            f"the backbone with torchvision/{name}?pretrained=true"
        )
    background, full = _background(name), f"torchvision/{name}"
    entries = LIBRARY.get_model_weights(name)
    known = [*entries.__members__]
    entry = entries.__members__.get("DEFAULT" if weights == "pretrained" else weights.rpartition(".")[2])
    if entry is None:
        raise KDError(f"{full} has no weights {weights!r}{did_you_mean(weights, known)}: there are {', '.join(known)}")
    try:
        model: Any = _built(name, {**args, "weights": entry})
    except KDError as error:
        raise KDError(
            f"the weights {entry} cannot be loaded ({error.__cause__ or error}). torchvision downloads them once, into "
            f"{torch.hub.get_dir()}/checkpoints; without a network, put {entry.url.rpartition('/')[2]} there"
        ) from error
    settle(model.backbone)
    names = entry.meta["categories"]
    backbone = model.backbone

    def build(num_classes: int) -> nn.Module:
        # The library freezes norms and the first stages of a trained backbone, which is why it is handed on.
        plain: Any = build_model(name, num_classes, args)
        plain.backbone = backbone
        return plain  # type: ignore[no-any-return]

    return Opened(
        model=model,
        build=build,
        num_classes=len(names) - background,
        name=with_arguments(full, args),
        class_names=named(names[background:]),
        weights=f"torchvision's {entry}",
        image_size=max(model.transform.max_size, max(model.transform.fixed_size or (0,))),
    )


def settle(backbone: nn.Module) -> None:
    """Give frozen batch norms the `eps` of others, and keep what they compute.

    The library sets it to 0 for some published weights. A model that is built without these has the usual one, and
    would compute something slightly different with the same state dict.
    """
    for module in backbone.modules():
        if isinstance(module, FrozenBatchNorm2d) and module.eps != _EPS:
            cast(Tensor, module.running_var).add_(module.eps - _EPS)
            module.eps = _EPS


def save_model(detector: Detector, folder: Path) -> tuple[str, str]:
    """Save the state dict, as torchvision's users do. Returns the file's name, and how to open it with torchvision."""
    model: Any = detector.model
    state = OrderedDict((key, value.detach().cpu().clone()) for key, value in model.state_dict().items())
    for path, module in model.named_modules():
        if isinstance(module, FrozenBatchNorm2d):  # a model that is built without weights has plain ones, which count
            state[f"{path}.num_batches_tracked"] = torch.tensor(0)
    torch.save(state, folder / "model.pth")
    name, args = split_name(architecture(detector.name))
    builder = name.partition("/")[2]
    if name != f"torchvision/{builder}" or builder in _ON_TIMM:
        how = "# The backbone's module is part of kdtoolkit.\nfrom kdtoolkit.models import build_model\n"
        call = f"build_model({architecture(detector.name)!r}, {len(detector.class_names or ())})"
    else:
        how = f"from torchvision.models.detection import {builder}\n"
        outputs = adapt(model).spec.num_classes + _background(builder)
        options = {"weights": None, "weights_backbone": None, "num_classes": outputs, **args}
        call = f"{builder}({', '.join(f'{key}={value!r}' for key, value in options.items())})"
    first = "label 1 is" if builder not in _ON_TIMM and _background(builder) else "label 0 is"
    return "model.pth", (
        f"import torch\n{how}\nmodel = {call}\n"
        f'model.load_state_dict(torch.load("model.pth", weights_only=True))\n'
        f"model.eval()  # {first} the first class\n"
    )
