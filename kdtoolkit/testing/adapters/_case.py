"""The adapter that is checked, with its images, and what its library says about them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kdtoolkit.canvas import scaled
from kdtoolkit.contract import Batch, Detections, DetectorAdapter, DetectorSpec, Target, View
from kdtoolkit.testing._batch import observe

Own = Callable[[Any, Sequence[Tensor]], list[Detections]]
"""The library's own inference: takes a model in eval mode and images. Labels in [0, K); boxes in original pixels."""

OwnLosses = Callable[[Any, Sequence[Tensor], Sequence[Target]], Mapping[str, Tensor] | Tensor]
"""The library's own training losses: takes a model in train mode, images and targets. By name, or their sum."""

PIXELS = 1e-2  # boxes that went to relative coordinates and back


@dataclass(frozen=True)
class Case:
    adapter: DetectorAdapter
    images: tuple[Tensor, ...]
    targets: tuple[Target, ...]
    own: Own | str = ""
    own_losses: OwnLosses | str = ""
    proposes: bool = False  # a first stage: it has one class, so labels of the ground truth do not count

    @property
    def spec(self) -> DetectorSpec:
        return self.adapter.spec

    def fresh(self, *, train: bool = False) -> DetectorAdapter:
        adapter = copy.deepcopy(self.adapter)
        adapter.model.train(train)
        return adapter

    def show(self, adapter: DetectorAdapter | None = None, targets: Sequence[Target] | None = None) -> View:
        """What the adapter shows of the batch; by default a fresh adapter in eval mode."""
        return observe(adapter or self.fresh(), self.images, self.targets if targets is None else targets)

    @property
    def like(self) -> Batch:
        """A student's batch of the images: they have other sizes and proportions there, and the canvas more padding."""
        originals = tuple((image.shape[-2], image.shape[-1]) for image in self.images)
        sizes = tuple((height + 9, 2 * width) for height, width in originals)
        padded = tuple(max(sides) + 23 for sides in zip(*sizes, strict=True))
        boxes = tuple(
            scaled(target["boxes"], size, original)
            for target, size, original in zip(self.targets, sizes, originals, strict=True)
        )
        return Batch(self.images[0].new_zeros(len(sizes), 3, *padded), sizes, sizes, originals, boxes)

    def shows(self, adapter: DetectorAdapter) -> dict[str, View]:
        """What the adapter shows of the images as it prepares them itself, and beside a student. In words, by which."""
        beside = adapter.prepare(self.images, like=self.like)
        features = adapter.features(beside)
        return {
            "": observe(adapter, self.images),
            ", prepared like a student's batch": View(adapter, beside, features, adapter.head(features, beside)),
        }

    def losses(self, adapter: DetectorAdapter, targets: Sequence[Target] | None = None) -> dict[str, Tensor]:
        view = self.show(adapter, targets)
        return adapter.task_losses(view.head, view.batch)[0]

    def detections(self, adapter: DetectorAdapter) -> list[Detections]:
        view = observe(adapter, self.images)
        return adapter.detections(view.head, view.batch)


def mode(train: bool) -> str:
    """The mode of a model, in words."""
    return f"{'train' if train else 'eval'} mode"
