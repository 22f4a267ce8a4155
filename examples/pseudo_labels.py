"""Learn from images without labels: a teacher labels them, a student is trained on its labels.

python examples/pseudo_labels.py --data birds --images more_photos --teacher runs/train-birds --out birds_more
"""

import argparse
from pathlib import Path

import kdtoolkit
from kdtoolkit import Distiller
from kdtoolkit.data import open_dataset
from kdtoolkit.detectors import FCOS
from kdtoolkit.engine.evaluate import evaluate
from kdtoolkit.engine.train import TrainConfig, train


def main() -> None:
    """Label, train, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="labelled images, on which scores are chosen")
    parser.add_argument("--images", type=Path, required=True, help="a folder of images without labels")
    parser.add_argument("--teacher", type=Path, required=True, help="a trained detector, as kd train writes it")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--image-size", type=int, default=256)
    given = parser.parse_args()

    labels = kdtoolkit.pseudo_label(given.teacher, given.images, given.data, out=given.out)
    print(labels.to_markdown())

    images = open_dataset(given.out, "train", max_size=given.image_size)
    val = open_dataset(given.data, "val", max_size=given.image_size)
    student = FCOS(len(val.class_names), backbone="resnet10t", neck_channels=32, head_channels=32, head_groups=8)
    train(Distiller(None, student), images, TrainConfig(steps=given.steps, batch_size=8), seed=0)
    print(f"student: AP50 {evaluate(student, val).ap50:.1f}")


if __name__ == "__main__":
    main()
