<<<<<<< HEAD
"""Distil in a loop of your own.

    python examples/plain_loop.py TEACHER STUDENT DATA --steps 500

TEACHER is a detector with weights, such as best.pt or a folder that kdtoolkit wrote. STUDENT is a detector by name,
such as ultralytics/yolo11n. DATA is a data set in COCO, YOLO or Pascal VOC format. The student's weights go to
student.safetensors, under the names that its own library gives them.
"""

from __future__ import annotations

=======
"""Distil a detector into a smaller one in a training loop of your own.

    python examples/plain_loop.py --data birds --steps 500

The teacher is trained first, by the same loop without a teacher. Replace both detectors by yours: any detector of the
table in the README, or one with an adapter of your own.
"""

>>>>>>> main
import argparse
from pathlib import Path

import torch
<<<<<<< HEAD
from safetensors.torch import save_model
from torch.utils.data import DataLoader

from kdtoolkit import Distiller
from kdtoolkit.data import open_dataset
from kdtoolkit.methods import PKD
from kdtoolkit.models import open_detector


def main(arguments: list[str] | None = None) -> None:
    """Train, and write the student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=320)
    parser.add_argument("--out", type=Path, default=Path("student.safetensors"))
    args = parser.parse_args(arguments)

    dataset = open_dataset(args.data, "train", max_size=args.image_size)
    teacher = open_detector(args.teacher).model
    student = open_detector(args.student, class_names=dataset.class_names).model
    distiller = Distiller(teacher, student, methods=[PKD()])

    # What the methods learn is trained too, so the optimiser takes the distiller's parameters, not the student's.
    trained = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=min(100, args.steps))
    loader = DataLoader(
        dataset, args.batch_size, shuffle=True, collate_fn=lambda pairs: tuple(zip(*pairs, strict=True))
    )
    distiller.train()
    step = 0
    while step < args.steps:
        for images, targets in loader:
            losses = distiller([image / 255 for image in images], targets)
            optimizer.zero_grad()
            losses.total.backward()
            torch.nn.utils.clip_grad_norm_(trained, 35.0)
            optimizer.step()
            warmup.step()
            step += 1
            print(step, *(f"{name} {float(loss):.3f}" for name, loss in losses.items()))
            if step == args.steps:
                break
    save_model(student, str(args.out))
    print(f"wrote {args.out}")
=======
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
>>>>>>> main


if __name__ == "__main__":
    main()
