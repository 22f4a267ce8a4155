"""torchvision's detectors by name, and above any timm backbone."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, cast

from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from kdtoolkit.adapters.torchvision.base import LIBRARY
from kdtoolkit.detectors.backbone import build_backbone, without_autocast
from kdtoolkit.errors import KDError
from kdtoolkit.models import construct


class TimmPyramid(nn.Module):
    """A timm backbone with torchvision's feature pyramid: what RetinaNet, FCOS and Faster R-CNN take as `backbone`.

    Args:
        name: of a timm model with feature maps of all `strides`.
        strides: of the levels that the pyramid is made of, in pixels, finest first.
        out_channels: of the pyramid.
        extra: makes the coarser levels.
        pretrained: load timm's ImageNet weights (downloads them).
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
        pretrained: bool = False,
        args: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        self.body, self.levels = build_backbone(name, strides, pretrained=pretrained, args=args)
        self.fpn = FeaturePyramidNetwork(list(self.levels.channels), out_channels, extra_blocks=extra)
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Pyramid levels (N, C, H, W) by name, finest first, of images (N, 3, H, W)."""
        maps = self.levels.of(self.body(images))
        levels: dict[str, Tensor] = self.fpn(OrderedDict((str(i), x) for i, x in enumerate(maps)))
        return levels

    @property
    def normalisation(self) -> dict[str, Any]:
        """The detector's arguments that let it normalise images as the backbone's own training did."""
        return {"image_mean": list(self.levels.mean), "image_std": list(self.levels.std)}


class _CoarserLevels(LastLevelP6P7):
    """P6 and P7 in float32 whatever autocast says; why: `kdtoolkit.detectors.dense.ExtraLevels`."""

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Append levels to the pyramid's."""
        with without_autocast(p[-1]):
            levels: tuple[list[Tensor], list[str]] = super().forward(
                [*p[:-1], p[-1].float()], [*c[:-1], c[-1].float()], names
            )
            return levels


def retinanet(
    num_classes: int,
    *,
    backbone: str = "resnet50",
    backbone_args: Mapping[str, object] | None = None,
    pretrained: bool = False,
    out_channels: int = 256,
    min_size: int = 800,
    max_size: int = 1333,
) -> RetinaNet:
    """The library's RetinaNet above a timm backbone. Arguments are those of `TimmPyramid` and of the detector."""
    extra = _CoarserLevels(out_channels, out_channels)
    levels = TimmPyramid(backbone, (8, 16, 32), out_channels, extra, pretrained=pretrained, args=backbone_args)
    sizes = {"min_size": min_size, "max_size": max_size}
    return cast(RetinaNet, LIBRARY.detection.RetinaNet(levels, num_classes, **sizes, **levels.normalisation))


def fcos(
    num_classes: int,
    *,
    backbone: str = "resnet50",
    backbone_args: Mapping[str, object] | None = None,
    pretrained: bool = False,
    out_channels: int = 256,
    min_size: int = 800,
    max_size: int = 1333,
) -> FCOS:
    """The library's FCOS above a timm backbone. Arguments are those of `TimmPyramid` and of the detector."""
    extra = _CoarserLevels(out_channels, out_channels)
    levels = TimmPyramid(backbone, (8, 16, 32), out_channels, extra, pretrained=pretrained, args=backbone_args)
    return FCOS(levels, num_classes, min_size=min_size, max_size=max_size, **levels.normalisation)


def fasterrcnn(
    num_classes: int,
    *,
    backbone: str = "resnet50",
    backbone_args: Mapping[str, object] | None = None,
    pretrained: bool = False,
    out_channels: int = 256,
    min_size: int = 800,
    max_size: int = 1333,
) -> FasterRCNN:
    """The library's Faster R-CNN above a timm backbone; `num_classes` is without background.

    Arguments are those of `TimmPyramid` and of the detector.
    """
    extra = LastLevelMaxPool()
    levels = TimmPyramid(backbone, (4, 8, 16, 32), out_channels, extra, pretrained=pretrained, args=backbone_args)
    sizes = {"min_size": min_size, "max_size": max_size}
    return cast(FasterRCNN, LIBRARY.detection.FasterRCNN(levels, num_classes + 1, **sizes, **levels.normalisation))


_TIMM_MODELS: Mapping[str, Callable[..., nn.Module]] = {"retinanet": retinanet, "fcos": fcos, "fasterrcnn": fasterrcnn}


def build_model(name: str, num_classes: int, args: Mapping[str, object]) -> nn.Module:
    """Build one of torchvision's detectors.

    Args:
        name: of a builder of torchvision's, such as "fcos_resnet50_fpn", which loads no weights unless `args` say so;
            or "retinanet", "fcos" or "fasterrcnn", which take any timm backbone.
        num_classes: without background.
        args: further arguments of the builder, or of the detector that it builds.

    Raises:
        KDError: there is no such builder, or it takes no such arguments.
    """
    full = f"torchvision/{name}"
    if name in _TIMM_MODELS:
        return construct(_TIMM_MODELS[name], full, num_classes, args)
    names = [*_TIMM_MODELS, *LIBRARY.list_models(module=detection)]
    if name not in names:
        raise KDError(f"unknown model {full!r}" + _meant(name, names) + f" There are {', '.join(names)}")
    builder = LIBRARY.get_model_builder(name)
    signature = inspect.signature(builder)
    detector = signature.return_annotation
    # The transform takes any argument and ignores those it does not know, so names are looked at here.
    taken = {**signature.parameters, **inspect.signature(detector.__init__).parameters}
    allowed = sorted(taken.keys() - {"self", "kwargs", "backbone", "num_classes", "size"})
    if unknown := sorted(args.keys() - set(allowed)):
        raise KDError(
            f"model {full!r} takes no argument {unknown[0]!r}"
            + _meant(unknown[0], allowed)
            + f" Its arguments are {', '.join(allowed)}"
        )
    outputs = num_classes + (0 if issubclass(detector, RetinaNet | FCOS) else 1)
    options: dict[str, Any] = {"weights": None, "weights_backbone": None, **args}
    try:
        return cast(nn.Module, builder(num_classes=outputs, **options))
    except (TypeError, ValueError, KeyError, OSError) as error:  # weights of other classes, unknown, or no network
        raise KDError(f"model {full!r}: {error}") from error


def _meant(name: str, names: Iterable[str]) -> str:
    close = get_close_matches(name, names)
    return f"; did you mean {' or '.join(close)}?" if close else "."
