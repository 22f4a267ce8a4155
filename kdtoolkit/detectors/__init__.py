"""kdtoolkit's own detectors on any timm backbone with a feature pyramid: plain torch modules."""

from kdtoolkit.detectors.atss import ATSS
from kdtoolkit.detectors.fcos import FCOS
from kdtoolkit.detectors.gfl import GFL
from kdtoolkit.detectors.published import load_published
from kdtoolkit.detectors.retinanet import RetinaNet

__all__ = ["ATSS", "FCOS", "GFL", "RetinaNet", "load_published"]
