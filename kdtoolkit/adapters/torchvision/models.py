"""torchvision's detectors by name, and on any timm backbone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from kdtoolkit.adapters.torchvision.base import LIBRARY
from kdtoolkit.detectors.backbone import Pyramid, build_backbone
from kdtoolkit.detectors.precision import without_autocast
from kdtoolkit.errors import KDError
from kdtoolkit.models import construct
from kdtoolkit.options import did_you_mean


class TimmPyramid(nn.Module):
    """A timm backbone with torchvision's feature pyramid: what RetinaNet, FCOS and Faster R-CNN take as `backbone`.

    Args:
        name: of a timm model with feature maps of all `strides`.
        strides: of the levels that the pyramid takes from the backbone, in pixels, finest first.
        out_channels: of the pyramid's levels.
        extra: computes the coarser levels.
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
    pretrained: bool = False,
    out_channels: int = 256,
    min_size: int = 800,
    max_size: int = 1333,
) -> nn.Module:
    """Build one of torchvision's detectors on a timm backbone: `on_timm(FCOS, 20, backbone="resnet18")`.

    Args:
        detector: torchvision's class.
        num_classes: without background.
        backbone: name of the timm model.
        backbone_args: further arguments of timm.create_model.
        pretrained: load timm's ImageNet weights (downloads them).
        out_channels: of the feature pyramid's levels.
        min_size: the detector scales images until their shorter side has this length, in pixels.
        max_size: the largest length of the longer side, in pixels. It takes precedence over `min_size`.

    Raises:
        KDError: timm has no such model, or the model has no such levels or takes images of one size only.
    """
    two_stage = issubclass(detector, FasterRCNN)
    strides = (4, 8, 16, 32) if two_stage else (8, 16, 32)
    extra = LastLevelMaxPool() if two_stage else CoarserLevels(out_channels, out_channels)
    levels = TimmPyramid(backbone, strides, out_channels, extra, pretrained=pretrained, args=backbone_args)
    build = cast(Callable[..., nn.Module], detector)
    return build(levels, num_classes + two_stage, min_size=min_size, max_size=max_size, **levels.normalisation)


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
    full = f"torchvision/{name}"
    if name in _ON_TIMM:
        return construct(_ON_TIMM[name], full, num_classes, args)
    names = [*_ON_TIMM, *LIBRARY.list_models(module=detection)]
    if name not in names:
        raise KDError(f"unknown model {full!r}{did_you_mean(name, names)}. There are {', '.join(names)}")
    builder = LIBRARY.get_model_builder(name)
    signature = inspect.signature(builder)
    detector = signature.return_annotation
    # The transform ignores arguments that it does not know, so names are checked here.
    taken = {**signature.parameters, **inspect.signature(detector.__init__).parameters}
    allowed = sorted(taken.keys() - {"self", "kwargs", "backbone", "num_classes", "size"})
    if unknown := sorted(args.keys() - set(allowed)):
        raise KDError(
            f"model {full!r} takes no argument {unknown[0]!r}{did_you_mean(unknown[0], allowed)}. Its arguments are "
            f"{', '.join(allowed)}"
        )
    outputs = num_classes + (0 if issubclass(detector, RetinaNet | FCOS) else 1)
    options: dict[str, Any] = {"weights": None, "weights_backbone": None, **args}
    try:
        return cast(nn.Module, builder(num_classes=outputs, **options))
    except (
        TypeError,
        ValueError,
        KeyError,
        OSError,
    ) as error:  # weights that are unknown or for other classes, or no network
        raise KDError(f"model {full!r}: {error}") from error
