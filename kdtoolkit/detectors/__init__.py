"""Detectors that no maintained library has, on any timm backbone with a feature pyramid: plain torch modules."""

from kdtoolkit.detectors.atss import ATSS
from kdtoolkit.detectors.gfl import GFL
from kdtoolkit.detectors.published import load_published

__all__ = ["ATSS", "GFL", "load_published"]
