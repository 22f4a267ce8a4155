"""torchvision's detectors: RetinaNet, FCOS, SSD, SSDlite, Faster R-CNN, and the box part of Mask and Keypoint R-CNN.

Heads are walked along the submodules that the library's own forward runs, in its order; losses, matching, anchors, box
coders, transforms and post-processing are the library's functions. Followed: torchvision/models/detection/*.py of
0.29. Underscored names: RetinaNet's `_loss_type`, in an example alone. Undocumented ones: ImageList, resize_boxes,
permute_and_flatten, fastrcnn_loss, the heads' and RoIHeads' parts, and that FCOS.compute_loss hands its matches to
`self.head.compute_loss` (see FCOSAdapter.assign).

Class 0 of SSD and the R-CNN kind is background; here it comes last. Under autocast anchors, regression and losses stay
in float32, where the library's own forward rounds anchors to the precision of the feature maps.
"""

from __future__ import annotations

from kdtoolkit.adapters.torchvision.base import TorchvisionAdapter
from kdtoolkit.adapters.torchvision.dense import FCOSAdapter, RetinaNetAdapter
from kdtoolkit.adapters.torchvision.models import TimmPyramid, build_model, on_timm
from kdtoolkit.adapters.torchvision.rcnn import FasterRCNNAdapter, RPNAdapter
from kdtoolkit.adapters.torchvision.ssd import SSDAdapter

__all__ = [
    "ADAPTERS",
    "FCOSAdapter",
    "FasterRCNNAdapter",
    "RPNAdapter",
    "RetinaNetAdapter",
    "SSDAdapter",
    "TimmPyramid",
    "build_model",
    "on_timm",
]

ADAPTERS: tuple[type[TorchvisionAdapter], ...] = (RetinaNetAdapter, FCOSAdapter, SSDAdapter, FasterRCNNAdapter)
