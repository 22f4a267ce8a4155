"""Write a distillation method and use it beside a published one.

    python examples/own_method.py --data birds --teacher runs/train-birds

docs/own_method.md explains more kinds of methods, and how to test one.
"""

import argparse
from pathlib import Path

from torch import Tensor
from torch.nn.functional import cosine_similarity

from kdtoolkit import Distiller
from kdtoolkit.data import open_dataset
from kdtoolkit.detectors import GFL
from kdtoolkit.engine.evaluate import evaluate
from kdtoolkit.engine.train import Progress, TrainConfig, train
from kdtoolkit.methods import CrossKD
from kdtoolkit.methods.features import FeatureMethod, Level
from kdtoolkit.models import open_detector


class CosineFeatures(FeatureMethod):
    """One minus the cosine of the student's and the teacher's channels, mean over the cells of each level."""

    vanishing = ("feature",)
    paper = "none: an example"

    def loss(self, student: Tensor, teacher: Tensor, level: Level) -> Tensor:
        """The loss of one level: both maps are (N, C, H, W) of one shape. The base class applies the weight."""
        return (1 - cosine_similarity(student, teacher, dim=1)).mean()


def show(progress: Progress) -> None:
    """Print one line: the step and its losses."""
    print(f"step {progress.step}", *(f"{name} {value:.3f}" for name, value in progress.losses.items()))


def main() -> None:
    """Distil with both methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder in COCO, YOLO or Pascal VOC format")
    parser.add_argument("--teacher", type=Path, required=True, help="a trained detector, as kd train writes it")
    parser.add_argument("--steps", type=int, default=500)
    given = parser.parse_args()
    opened = open_detector(given.teacher)
    train_images, val_images = (
        open_dataset(given.data, split, max_size=opened.image_size, class_names=opened.class_names)
        for split in ("train", "val")
    )
    student = GFL(
        len(train_images.class_names), backbone="resnet10t", neck_channels=32, head_channels=32, head_groups=8
    )
    distiller = Distiller(opened.model, student, [CrossKD(), CosineFeatures(weight=2)])
    train(distiller, train_images, TrainConfig(steps=given.steps, batch_size=8), seed=0, report=show)
    print(f"student: AP50 {evaluate(student, val_images).ap50:.1f}")


if __name__ == "__main__":
    main()
