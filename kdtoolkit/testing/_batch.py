"""The example images of all checks, and what a detector shows of images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdtoolkit.contract import DetectorAdapter, Target, View
from kdtoolkit.testing.report import SEED


def example_batch(
    num_classes: int,
    device: torch.device | str = "cpu",
    sizes: tuple[tuple[int, int], tuple[int, int]] = ((64, 64), (50, 60)),
) -> tuple[list[Tensor], list[Target]]:
    """Two random images, (3, height, width) with the given sizes, and their targets: small and large boxes."""
    generator = torch.Generator().manual_seed(SEED)
    images = [torch.rand(3, *size, generator=generator).to(device) for size in sizes]
    boxes = [
        [[4.0, 6.0, 30.0, 40.0], [20.0, 20.0, 60.0, 60.0], [40.0, 2.0, 56.0, 18.0]],
        [[10.0, 10.0, 40.0, 45.0], [2.0, 3.0, 58.0, 48.0]],
    ]
    labels = [torch.arange(i, i + len(each), device=device) % num_classes for i, each in enumerate(boxes)]
    return images, [{"boxes": torch.tensor(b, device=device), "labels": k} for b, k in zip(boxes, labels, strict=True)]


def observe(adapter: DetectorAdapter, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> View:
    """What a detector shows of a batch, its head included. The model stays in its mode; nothing is assigned."""
    batch = adapter.prepare(images, targets)
    features = adapter.features(batch)
    return View(adapter, batch, features, adapter.head(features, batch))


def without_objects(targets: Sequence[Target], images: Sequence[int]) -> list[Target]:
    """The targets, but without objects in the given images."""
    return [
        {"boxes": target["boxes"][:0], "labels": target["labels"][:0]} if i in images else target
        for i, target in enumerate(targets)
    ]
