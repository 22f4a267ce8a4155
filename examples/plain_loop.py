"""Distil a detector into a smaller one in a training loop of your own.

    python examples/plain_loop.py --data birds --steps 500

The teacher is trained first, by the same loop without a teacher. Replace both detectors by yours: any detector of the
table in the README, or one with an adapter of your own.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from kdtoolkit import Distiller
from kdtoolkit.contract import Method
from kdtoolkit.data import Augmentation, DetectionDataset, batches, open_dataset
from kdtoolkit.detectors import FCOS, GFL
from kdtoolkit.engine.evaluate import evaluate
from kdtoolkit.methods import PKD, CrossKD


def fit(
    teacher: nn.Module | None, student: nn.Module, methods: list[Method], data: DetectionDataset, steps: int
) -> None:
    """Train the student in place."""
    distiller = Distiller(teacher, student, methods)
    optimizer = torch.optim.AdamW([p for p in distiller.parameters() if p.requires_grad], lr=1e-3)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=max(1, min(500, steps // 5)))
    shown = batches(data, batch_size=8, steps=steps, seed=0, augment=Augmentation())
    for step, (images, targets) in enumerate(shown, 1):
        losses = distiller(images, targets)  # {"task/cls": ..., "crosskd/cls": ..., "pkd/feature": ...}
        optimizer.zero_grad()
        losses.total.backward()
        nn.utils.clip_grad_norm_(distiller.parameters(), 35)
        optimizer.step()
        warmup.step()
        if step == steps or step % 50 == 0:
            print(f"step {step}", *(f"{name} {loss.item():.3f}" for name, loss in losses.items()))


def main() -> None:
    """Train a teacher and a student, and compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder in COCO, YOLO or Pascal VOC format")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--width", type=int, default=64, help="channels of neck and heads")
    given = parser.parse_args()
    train, val = (open_dataset(given.data, split, max_size=given.image_size) for split in ("train", "val"))
    classes, head = (
        len(train.class_names),
        {"neck_channels": given.width, "head_channels": given.width, "head_groups": 8},
    )
    teacher = GFL(classes, backbone="resnet18", **head)
    student = FCOS(classes, backbone="resnet10t", **head)

    fit(None, teacher, [], train, given.steps)
    fit(teacher, student, [CrossKD(), PKD()], train, given.steps)

    for name, detector in (("teacher", teacher), ("student", student)):
        print(f"{name}: AP50 {evaluate(detector, val).ap50:.1f}")
    torch.save(student.state_dict(), "student.pt")  # loads into the plain student, without kdtoolkit


if __name__ == "__main__":
    main()
