"""Tiny detectors with random weights: a few thousand weights, for images of 64 px."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from kdtoolkit.adapters.torchvision.base import LIBRARY
from kdtoolkit.adapters.torchvision.models import TimmPyramid

_TINY_BACKBONE = {"channels": (8, 8, 16, 16), "stem_width": 4}
# Multiples of the coarsest stride, because the library rounds the steps between anchors down.
_TINY_SIZES: Mapping[str, Any] = {"min_size": 128, "max_size": 128, "size_divisible": 128}


def _tiny_levels(strides: Sequence[int], channels: int, extra: ExtraFPNBlock) -> TimmPyramid:
    return TimmPyramid("resnet10t", strides, channels, extra, args=_TINY_BACKBONE)


def _enliven(head: nn.Module) -> None:
    """Give a head larger random weights, so that its outputs differ from place to place. The library's are near 0."""
    for layer in head.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)


def tiny_retinanet(num_classes: int, *, norm_groups: int = 0, loss: str = "l1") -> RetinaNet:
    """Build a narrow RetinaNet. With `norm_groups` its towers have group norm, as in the second version."""
    sizes = tuple((4 * stride, 5 * stride, 6 * stride) for stride in (8, 16, 32, 64, 128))
    anchors = LIBRARY.detection.anchor_utils.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    norm = partial(nn.GroupNorm, norm_groups) if norm_groups else None
    head = RetinaNetHead(16, 9, num_classes, norm_layer=norm)
    head.regression_head._loss_type = loss
    _enliven(head)
    levels = _tiny_levels((8, 16, 32), 16, LastLevelP6P7(16, 16))
    options = {"anchor_generator": anchors, "head": head, "score_thresh": 0.001, **_TINY_SIZES}
    return cast(RetinaNet, LIBRARY.detection.RetinaNet(levels, num_classes, **options))


def tiny_fcos(num_classes: int) -> FCOS:
    """Build a narrow FCOS."""
    levels = _tiny_levels(
        (8, 16, 32), 64, LastLevelP6P7(64, 64)
    )  # the head has 32 groups, of two for a map of one cell
    head = FCOSHead(64, 1, num_classes, num_convs=2)
    _enliven(head)
    nn.init.constant_(cast(Tensor, head.regression_head.bbox_reg.bias), 6.0)  # below 0 boxes are empty
    return FCOS(levels, num_classes, head=head, score_thresh=0.001, **_TINY_SIZES)


class _TinyMaps(nn.Module):
    """Three levels of strides 8, 16 and 32 with different numbers of channels, without a pyramid."""

    def __init__(self) -> None:
        super().__init__()
        self.out_channels = [8, 12, 16]
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.ReLU())
        widths = [8, *self.out_channels]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU())
            for before, after in pairwise(widths)
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x, maps = self.stem(images), OrderedDict()
        for i, block in enumerate(self.blocks):
            x = maps[str(i)] = block(x)
        return maps


def tiny_ssd(num_classes: int, *, lite: bool = False) -> SSD:
    """Build a narrow SSD; with `lite`, an SSDlite."""
    backbone = _TinyMaps()
    boxes = DefaultBoxGenerator([[2], [2, 3], [2]], steps=[8, 16, 32])
    per_cell = boxes.num_anchors_per_location()
    head: nn.Module
    if lite:
        head = SSDLiteHead(backbone.out_channels, per_cell, num_classes + 1, nn.BatchNorm2d)
    else:
        head = SSDHead(backbone.out_channels, per_cell, num_classes + 1)
    _enliven(head)
    return SSD(backbone, boxes, (64, 64), num_classes + 1, head=head)


def tiny_fasterrcnn(num_classes: int, *, kind: Callable[..., FasterRCNN] = FasterRCNN, **parts: Any) -> FasterRCNN:
    """Build a narrow Faster R-CNN, or another `kind` of it with further `parts`."""
    sizes = ((16,), (24,), (32,), (48,), (64,))
    library = LIBRARY.detection
    options = {
        "rpn_anchor_generator": library.anchor_utils.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        "rpn_head": RPNHead(16, 3),
        "box_head": library.faster_rcnn.TwoMLPHead(16 * 7 * 7, 24),
        "box_predictor": library.faster_rcnn.FastRCNNPredictor(24, num_classes + 1),
        **{f"rpn_{when}_nms_top_n_{mode}": 50 for when in ("pre", "post") for mode in ("train", "test")},
        "rpn_post_nms_top_n_test": 250,  # more than there are, so that images have different numbers of proposals
        "box_batch_size_per_image": 32,
        "box_score_thresh": 0.01,
        **_TINY_SIZES,
        **parts,
    }
    model = kind(_tiny_levels((4, 8, 16, 32), 16, LastLevelMaxPool()), **options)
    _enliven(cast(nn.Module, model.rpn.head))
    _enliven(model.roi_heads)
    return model


def tiny_fasterrcnn_v2(num_classes: int) -> FasterRCNN:
    """Build a narrow Faster R-CNN with a convolutional box head, as in the second version."""
    return tiny_fasterrcnn(
        num_classes,
        rpn_head=RPNHead(16, 3, conv_depth=2),
        box_head=FastRCNNConvFCHead((16, 7, 7), [16, 16], [24], norm_layer=nn.BatchNorm2d),
    )


def tiny_maskrcnn(num_classes: int) -> FasterRCNN:
    """Build a narrow Mask R-CNN."""
    library = LIBRARY.detection.mask_rcnn
    return tiny_fasterrcnn(
        num_classes,
        kind=detection.MaskRCNN,
        mask_head=library.MaskRCNNHeads(16, (8,), 1),
        mask_predictor=library.MaskRCNNPredictor(8, 8, num_classes + 1),
    )
