"""What a teacher cache takes for one view, by detector, method and size of the image.

python benchmarks/speed/cache_size.py
"""

from __future__ import annotations

import torch

from kdtoolkit import Distiller
from kdtoolkit.data import ProceduralShapes
from kdtoolkit.engine.caching import bytes_of_view
from kdtoolkit.engine.train import TrainConfig
from kdtoolkit.method_use import MethodUse
from kdtoolkit.models import open_detector
from kdtoolkit.words import size

SMALL = "strides=[8, 16, 32]&head_blocks=2&head_groups=16&bins=9"
PAIRS = (
    ("suite photos, ResNet-18", f"kdtoolkit/gfl?backbone=resnet18&neck_channels=64&head_channels=64&{SMALL}", 256),
    ("GFL, ResNet-50", "kdtoolkit/gfl?backbone=resnet50", 320),
    ("GFL, ResNet-50", "kdtoolkit/gfl?backbone=resnet50", 640),
    ("YOLO11m", "ultralytics/yolo11m", 640),
)
METHODS = (("CrossKD",), ("PKD",), ("CrossKD", "PKD"))


def main() -> None:
    """Print a table in Markdown."""
    print(f"| teacher | image | {' | '.join('+'.join(names) for names in METHODS)} | in bfloat16 |")
    print(f"|---|---|{'---:|' * (len(METHODS) + 1)}")
    for name, model, side in PAIRS:
        images = ProceduralShapes(1, image_size=side)
        found = []
        for names, precision in ((names, "float32") for names in METHODS):
            found.append(_measured(model, names, precision, images))
        found.append(_measured(model, METHODS[-1], "bfloat16", images))
        print(f"| {name} | {side} px | {' | '.join(map(size, found))} |", flush=True)


def _measured(model: str, names: tuple[str, ...], precision: str, images: ProceduralShapes) -> int:
    torch.manual_seed(0)
    teacher, student = (open_detector(model, class_names=images.class_names).model for _ in range(2))
    distiller = Distiller(teacher, student, [MethodUse.model_validate(name).build() for name in names])
    config = TrainConfig(steps=1, teacher_cache_precision=precision)  # type: ignore[arg-type]
    return bytes_of_view(distiller, images, config, torch.device("cpu"))


if __name__ == "__main__":
    main()
