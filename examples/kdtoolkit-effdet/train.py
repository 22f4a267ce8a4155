"""Train an EfficientDet with the help of a kdtoolkit FCOS, on drawn shapes of 128 px: some minutes on one core.

Prints the loss terms as they fall, and average precision: python train.py [STEPS]
"""

import sys
from collections.abc import Sequence

import torch
from effdet import EfficientDet
from effdet.config import get_efficientdet_config
from kdtoolkit import Distiller
from kdtoolkit.contract import Detections, DetectorAdapter
from kdtoolkit.data import ProceduralShapes
from kdtoolkit.detectors import FCOS
from kdtoolkit.engine.evaluate import evaluate
from kdtoolkit.engine.train import Progress, TrainConfig, train
from kdtoolkit.libraries import adapt
from kdtoolkit.methods import PKD, CrossKD
from torch import Tensor, nn


class Inference(nn.Module):
    """A detector called as torchvision's are, which is what `evaluate` wants and effdet's does not offer."""

    def __init__(self, adapter: DetectorAdapter) -> None:
        super().__init__()
        self.adapter = adapter
        self.model = adapter.model

    def forward(self, images: Sequence[Tensor]) -> list[Detections]:
        """Detections of images (3, H, W) in [0, 1]."""
        batch = self.adapter.prepare(images)
        return self.adapter.detections(self.adapter.head(self.adapter.features(batch), batch), batch)


def show(progress: Progress) -> None:
    """Print one line: the step and its losses."""
    losses = "  ".join(f"{name} {value:.3f}" for name, value in progress.losses.items())
    print(f"step {progress.step}/{progress.steps}  {losses}", flush=True)


steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
data, held_out = ProceduralShapes(400, image_size=128), ProceduralShapes(50, image_size=128, seed=1_000_000)
classes = len(data.class_names)

torch.manual_seed(0)
teacher = FCOS(classes, backbone="resnet10t", neck_channels=32, head_channels=32, head_blocks=2, head_groups=8)
config = get_efficientdet_config("efficientdet_d0")
config.update({"image_size": (128, 128), "num_classes": classes, "backbone_name": "test_efficientnet"})
config.update({"fpn_channels": 32, "fpn_cell_repeats": 2, "box_class_repeats": 2})
student = EfficientDet(config, pretrained_backbone=False)

settings = TrainConfig(steps=steps, batch_size=8, warmup_steps=10)
train(Distiller(None, teacher), data, settings, seed=0, report=show)
result = train(Distiller(teacher, student, [CrossKD.for_fcos(), PKD()]), data, settings, seed=0, report=show)
for name, detector in (("teacher", teacher), ("student", Inference(adapt(student)))):
    print(f"{name}: AP50 {evaluate(detector, held_out).ap50:.1f} %")
print(f"{result.step_ms:.0f} ms a step of distillation")
