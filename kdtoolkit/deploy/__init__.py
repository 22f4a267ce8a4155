"""Writes detectors for deployment: `export` writes ONNX files that run without kdtoolkit and PyTorch."""

from kdtoolkit.deploy.check import Comparison
from kdtoolkit.deploy.exporting import Exported, Int8, export

__all__ = ["Comparison", "Exported", "Int8", "export"]
