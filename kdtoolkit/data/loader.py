"""From a data set to the batches of a training run."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdtoolkit.contract import Target
from kdtoolkit.data.augment import Augmentation
from kdtoolkit.data.dataset import DetectionDataset, check_is_dataset, checked_item


def batches(
    dataset: DetectionDataset,
    *,
    batch_size: int,
    steps: int,
    seed: int,
    augment: Augmentation,
    workers: int = 0,
) -> Iterator[tuple[list[Tensor], list[Target]]]:
    """Yield exactly `steps` batches of images (3, H, W) float32 in [0, 1] and their targets.

    Epochs follow each other without a break, each shuffled anew, so a batch may hold the end of one and the beginning
    of the next. What comes out depends on `seed`, not on `workers` (processes that read ahead: of use where images are
    large or decoded on access) nor on the global random state. Images are read `in_memory` first.
    """
    check_is_dataset(dataset)
    dataset = dataset.in_memory()
    presented = _Presented(dataset, augment)
    plan = _plan(len(dataset), batch_size, steps, seed)
    if workers == 0:
        for items in plan:
            yield _collate([presented[item] for item in items])
        return
    yield from DataLoader(
        presented,
        batch_sampler=plan,
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # else it draws from the global one
    )


def _plan(size: int, batch_size: int, steps: int, seed: int) -> Iterator[list[tuple[int, int]]]:
    """For each batch the images in it, by index, each with the seed of its augmentation."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[tuple[int, int]] = []
    for _ in range(steps):
        while len(waiting) < batch_size:
            order = torch.randperm(size, generator=generator).tolist()
            waiting += zip(order, torch.randint(2**31, (size,), generator=generator).tolist(), strict=True)
        yield waiting[:batch_size]
        del waiting[:batch_size]


class _Presented(Dataset[tuple[Tensor, Target]]):
    """Images as they are shown: augmented, as floats."""

    def __init__(self, dataset: DetectionDataset, augment: Augmentation) -> None:
        self._dataset = dataset
        self._augment = augment
        self._generator = torch.Generator()

    def __getitem__(self, index_and_seed: tuple[int, int]) -> tuple[Tensor, Target]:
        index, seed = index_and_seed
        image, sample = checked_item(self._dataset, index)
        target: Target = {"boxes": sample["boxes"], "labels": sample["labels"]}
        image, target = self._augment(image, target, self._generator.manual_seed(seed))
        return image.float().div_(255), target


def _collate(items: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    return [image for image, _ in items], [target for _, target in items]
