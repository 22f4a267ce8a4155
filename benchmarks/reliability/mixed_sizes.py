"""Train pairs across libraries on photos of mixed sizes: python benchmarks/reliability/mixed_sizes.py DIR.

Each pair trains for some steps with PKD, and with CrossKD if it applies. The long side of each photo is drawn at random
in each step; torchvision's students also draw the size that they resize to. Detectors are the tiny examples of the
adapters. A pair fails if a step is refused, or if a loss is not finite. Prints a line for each pair.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtoolkit import Distiller, KDError, adapt
from kdtoolkit.compatibility import why_refused
from kdtoolkit.contract import Target
from kdtoolkit.data import PhotoDataset, open_dataset
from kdtoolkit.matrix import families
from kdtoolkit.methods import PKD, CrossKD

LONG_SIDES = 200, 640  # pixels
MIN_SIZES = 160, 224, 320  # what torchvision's students draw from


def photos(data: PhotoDataset, count: int, generator: torch.Generator) -> tuple[list[Tensor], list[Target]]:
    """Photos drawn at random, each scaled to a long side of its own."""
    images, targets = [], []
    for index in torch.randint(len(data), (count,), generator=generator).tolist():
        image, sample = data[index]
        longest = int(torch.randint(LONG_SIDES[0], LONG_SIDES[1] + 1, (), generator=generator))
        height, width = (max(32, round(side * longest / max(image.shape[1:]))) for side in image.shape[1:])
        factors = torch.tensor([width / image.shape[2], height / image.shape[1]]).repeat(2)
        images.append(F.interpolate(image[None].float() / 255, (height, width), mode="bilinear", antialias=True)[0])
        targets.append(Target(boxes=sample["boxes"] * factors, labels=sample["labels"]))
    return images, targets


def detector(family: str, classes: int, seed: int, *, scales: bool) -> nn.Module:
    """A tiny detector; with `scales`, one of torchvision's that resizes draws to what."""
    torch.manual_seed(seed)
    model: Any = families()[family](classes)
    transform = getattr(model, "transform", None)
    if scales and transform is not None and not transform.fixed_size:
        transform.min_size, transform.max_size = MIN_SIZES, LONG_SIDES[1]
    return model  # type: ignore[no-any-return]


def train(student: str, teacher: str, data: PhotoDataset, steps: int, batch: int) -> str:
    """What became of a pair, in a line. Raises KDError or FloatingPointError where it fails."""
    classes = len(data.class_names)
    models = detector(teacher, classes, 1, scales=False), detector(student, classes, 0, scales=True)
    theirs, ours = (adapt(model).spec for model in models)
    methods = [method for method in (PKD(), CrossKD()) if why_refused(method, ours, theirs) is None]
    if not methods:
        return "nothing applies"
    distiller = Distiller(*models, methods).train()
    optimizer = torch.optim.AdamW([p for p in distiller.parameters() if p.requires_grad], lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        losses = distiller(*photos(data, batch, generator))
        if broken := [name for name, loss in losses.items() if not loss.isfinite()]:
            raise FloatingPointError(f"step {step}: {', '.join(broken)} not finite")
        optimizer.zero_grad()
        losses.total.backward()
        nn.utils.clip_grad_norm_(distiller.parameters(), 1.0)
        optimizer.step()
    return f"{steps} steps with {', '.join(type(method).__name__ for method in methods)}"


def main() -> None:
    """Train the pairs; the exit code is 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder in COCO format")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--students", nargs="*", default=None)
    parser.add_argument("--teachers", nargs="*", default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = open_dataset(args.data, "train")
    failed = 0
    for student, teacher in itertools.product(args.students or families(), args.teachers or families()):
        try:
            outcome = train(student, teacher, data, args.steps, args.batch)
        except (KDError, FloatingPointError, RuntimeError) as error:
            failed += 1
            outcome = f"FAILED: {type(error).__name__}: {error}"
        print(f"{student} <- {teacher}: {outcome}", flush=True)
    print(f"{failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
