"""Data sets, checked when they are opened, and the batches made of them."""

from kdtoolkit.data.augment import Augmentation
from kdtoolkit.data.coco import CocoDetection
from kdtoolkit.data.dataset import DetectionDataset, Sample, check_same_classes
from kdtoolkit.data.loader import batches
from kdtoolkit.data.resize import InputSize
from kdtoolkit.data.shapes import ProceduralShapes

__all__ = [
    "Augmentation",
    "CocoDetection",
    "DetectionDataset",
    "InputSize",
    "ProceduralShapes",
    "Sample",
    "batches",
    "check_same_classes",
]
