"""Data sets, checked when they are opened, and the batches made of them."""

from kdtoolkit.data.augment import Augmentation
from kdtoolkit.data.dataset import DetectionDataset, Sample, check_same_classes
from kdtoolkit.data.detections import read_detections
from kdtoolkit.data.loader import LoadedBatch, batches
from kdtoolkit.data.opening import CocoDetection, open_dataset
from kdtoolkit.data.photos import PhotoDataset
from kdtoolkit.data.recorded import attach
from kdtoolkit.data.resize import InputSize
from kdtoolkit.data.shapes import ProceduralShapes
from kdtoolkit.data.unlabelled import UnlabelledImages, open_images

__all__ = [
    "Augmentation",
    "CocoDetection",
    "DetectionDataset",
    "InputSize",
    "LoadedBatch",
    "PhotoDataset",
    "ProceduralShapes",
    "Sample",
    "UnlabelledImages",
    "attach",
    "batches",
    "check_same_classes",
    "open_dataset",
    "open_images",
    "read_detections",
]
