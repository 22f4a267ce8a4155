"""Distil in a loop of your own.

    python examples/plain_loop.py TEACHER STUDENT DATA --steps 500

TEACHER is a detector with weights, such as best.pt or a folder that kdtoolkit wrote. STUDENT is a detector by name,
such as ultralytics/yolo11n. DATA is a data set in COCO, YOLO or Pascal VOC format. The student's weights go to
student.safetensors, under the names that its own library gives them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
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
            print(step, *(f"{name} {loss.item():.3f}" for name, loss in losses.items()))
            if step == args.steps:
                break
    save_model(student, str(args.out))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
