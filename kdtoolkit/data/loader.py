"""From a data set to the batches of a training run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdtoolkit.contract import Target
from kdtoolkit.data.augment import Augmentation
from kdtoolkit.data.dataset import DetectionDataset, check_is_dataset, checked_item
from kdtoolkit.data.mix import Item
from kdtoolkit.data.recorded import Carrier
from kdtoolkit.data.resize import InputSize, with_boxes
from kdtoolkit.errors import KDError
from kdtoolkit.teacher_cache import digest


class Draw(NamedTuple):
    """An image that is shown: its place in the data set, the seed of its augmentation, its shorter side if resized."""

    image: int
    seed: int
    short: int | None


class LoadedBatch(NamedTuple):
    """Images (3, H, W) float32 in [0, 1], their targets, and the digests of their pixels; None if none are wanted.

    `Distiller` takes all three in this order: `distiller(*batch)`.
    """

    images: list[Tensor]
    targets: list[Target]
    keys: list[str] | None


class _Item(NamedTuple):
    """An image as it is shown, its ground truth, and the digest of its pixels; None if no digests are wanted."""

    image: Tensor
    target: Target
    key: str | None


def batches(
    dataset: DetectionDataset,
    *,
    batch_size: int,
    steps: int,
    seed: int,
    augment: Augmentation,
    input_size: InputSize | None = None,
    workers: int = 0,
    start: int = 0,
    share: tuple[int, int] = (0, 1),
    pin: bool = False,
    keys: bool = False,
) -> Iterator[LoadedBatch]:
    """Yield the batches of the steps `start` to `steps`.

    Epochs follow each other without a break, each shuffled anew, so a batch may hold the end of one and the beginning
    of the next. The batch of a step depends on `seed` and the step, and on nothing else: not on where a run began, on
    `workers` (processes that read ahead, useful if images are large or decoded on access) or on the global random
    state. Images are read `in_memory` first.

    Args:
        dataset: the images.
        batch_size: images per step, counted over all processes.
        steps: of the whole run.
        seed: decides order and augmentation.
        augment: what is changed at random.
        input_size: images are first cropped and resized as it says; a step has one shorter side.
        workers: processes that read ahead.
        start: number of steps already done.
        share: place and number of the processes that train together; each yields its part of each batch.
        pin: whether workers' images are in pinned memory, from which they are copied to a GPU faster. Without workers
            the images are in ordinary memory.
        keys: whether a batch has the digest of each image as it is shown. By these a teacher cache finds what the
            teacher showed of the same pixels before.

    Raises KDError, also from a worker, if an image cannot be read.
    """
    check_is_dataset(dataset)
    dataset = dataset.in_memory()
    place, count = share
    plan = (
        draws[len(draws) * place // count : len(draws) * (place + 1) // count]
        for draws in islice(draws_of(len(dataset), batch_size, steps, seed, input_size), start, None)
    )
    return _read(_Presented(dataset, augment, input_size, keys), plan, workers, pin)


def _read(presented: _Presented, plan: Iterator[list[Draw]], workers: int, pin: bool) -> Iterator[LoadedBatch]:
    """The batches of a plan. Raises KDError, also from a worker, if an image cannot be read."""
    if workers == 0:
        for draws in plan:
            yield _whole(_collate([presented[draw] for draw in draws]))
        return
    loader = DataLoader(
        presented,
        batch_sampler=plan,
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # else it draws from the global one
        pin_memory=pin,
        # Forked readers share the images that are in memory. A benchmark's cells would otherwise start them in the way
        # they were started themselves, and send each reader a copy.
        multiprocessing_context="fork" if sys.platform == "linux" else None,
    )
    for batch in loader:
        yield _whole(batch)


def draws_of(size: int, batch_size: int, steps: int, seed: int, input_size: InputSize | None) -> Iterator[list[Draw]]:
    """For each step the images of its batch."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.Generator().manual_seed(seed)  # apart, so that the order is the same with and without sizes
    waiting: list[tuple[int, int]] = []
    for _ in range(steps):
        while len(waiting) < batch_size:
            order = torch.randperm(size, generator=generator).tolist()
            waiting += zip(order, torch.randint(2**31, (size,), generator=generator).tolist(), strict=True)
        short = None if input_size is None else input_size.draw(sizes)
        yield [Draw(index, seed, short) for index, seed in waiting[:batch_size]]
        del waiting[:batch_size]


class _Presented(Dataset[_Item | KDError]):
    """Images as they are shown: cropped, resized, augmented, as floats. `keys`: with the digests of their pixels.

    A KDError is returned instead of raised, since DataLoader would put a worker's traceback into its message.
    """

    def __init__(
        self, dataset: DetectionDataset, augment: Augmentation, input_size: InputSize | None, keys: bool
    ) -> None:
        self._dataset = dataset
        self._augment = augment
        self._input_size = input_size
        self._keys = keys
        self._generator = torch.Generator()

    def __getitem__(self, draw: Draw) -> _Item | KDError:
        try:
            return self._shown(draw)
        except KDError as error:
            return error

    def _shown(self, draw: Draw) -> _Item:
        generator = self._generator.manual_seed(draw.seed)
        carrier = Carrier()

        def read(index: int) -> Item:
            return self._read(index, draw.short, generator, carrier)

        def another() -> Item:
            return read(int(torch.randint(len(self._dataset), (), generator=generator)))

        image, target = self._augment.of(read(draw.image), another, generator)
        key = digest(image) if self._keys else None
        return _Item(image.float().div_(255), carrier.unladen(target), key)

    def _read(self, index: int, short: int | None, generator: torch.Generator, carrier: Carrier) -> Item:
        image, sample = checked_item(self._dataset, index)
        target = carrier.laden(sample)
        if self._input_size is None:
            return image, target
        image, target = self._input_size.cropped(image, target, generator)
        resized = self._input_size.apply(image, short)
        return resized, with_boxes(target, image, resized)


def _collate(items: list[_Item | KDError]) -> LoadedBatch | KDError:
    """A batch, or the first error."""
    whole: list[_Item] = []
    for item in items:
        if isinstance(item, KDError):
            return item
        whole.append(item)
    keys = [item.key for item in whole if item.key is not None]
    return LoadedBatch([item.image for item in whole], [item.target for item in whole], keys or None)


def _whole(batch: LoadedBatch | KDError) -> LoadedBatch:
    if isinstance(batch, KDError):
        raise batch
    return batch
