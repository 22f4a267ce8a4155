"""Distil inside Ultralytics' own trainer. Its augmentation, averaged weights, validation and export go on working.

    python examples/ultralytics_trainer.py --data birds/data.yaml --teacher best.pt --student yolo11n.pt

Ultralytics is AGPL-3.0, which binds what is built with it.
"""

import argparse

from ultralytics import YOLO

from kdtoolkit.integrations.ultralytics import DistillationTrainer
from kdtoolkit.methods import PKD, CrossKD


def main() -> None:
    """Train the student with the teacher."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a YAML file of Ultralytics")
    parser.add_argument("--teacher", required=True, help="a trained YOLO")
    parser.add_argument("--student", default="yolo11n.pt", help="weights, or a model's YAML file")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--image-size", type=int, default=640)
    parser.add_argument("--project", default=None, help="where the library puts its runs")
    given = parser.parse_args()

    teacher = YOLO(given.teacher).model
    student = YOLO(given.student)
    student.train(
        trainer=DistillationTrainer.of(teacher, [CrossKD(), PKD()]),
        data=given.data,
        epochs=given.epochs,
        imgsz=given.image_size,
        project=given.project,
    )
    print(f"the plain student: {student.trainer.best}")  # opens with YOLO(...) where there is no kdtoolkit


if __name__ == "__main__":
    main()
