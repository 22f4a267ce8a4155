"""torchvision's detectors: RetinaNet, FCOS, SSD, SSDlite, Faster R-CNN, and the box part of Mask and Keypoint R-CNN.

The adapters call the submodules of a head in the order of the library's own forward. Losses, matching, anchors, box
coders, transforms and post-processing are the library's functions. They follow torchvision/models/detection/*.py of
0.29.

Private names used: RetinaNet's `_loss_type`, only in an example. Undocumented names used: ImageList, resize_boxes,
permute_and_flatten, fastrcnn_loss, and the parts of the heads and of RoIHeads. `TwoTowersAdapter` relies on one
detail: FCOS.compute_loss gives its matches to `self.head.compute_loss`.

In the library, class 0 of SSD and of the R-CNN detectors is background. Here background comes last. Under autocast,
anchors, regression and losses stay in float32. The library's own forward rounds anchors to the precision of the
feature maps.
"""

from __future__ import annotations

from kdtoolkit.adapters.torchvision.base import TorchvisionAdapter
from kdtoolkit.adapters.torchvision.dense import FCOSAdapter, RetinaNetAdapter
from kdtoolkit.adapters.torchvision.models import TimmPyramid, build_model, on_timm, open_published, save_model
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
    "open_published",
    "save_model",
]

ADAPTERS: tuple[type[TorchvisionAdapter], ...] = (RetinaNetAdapter, FCOSAdapter, SSDAdapter, FasterRCNNAdapter)
