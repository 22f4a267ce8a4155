"""Views: how many images a run shows, and how many of them have pixels and a canvas that no earlier one had.

Nothing is decoded: the run's own draws are made again without the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kdtoolkit.data.augment import Augmentation
from kdtoolkit.data.dataset import DetectionDataset
from kdtoolkit.data.loader import draws_of
from kdtoolkit.data.resize import InputSize

Sizes = Sequence[tuple[int, int]]
"""The (height, width) of each image of a data set."""

_GRID = 32  # pixels: canvases that differ by less are taken for one, because detectors pad them


@dataclass(frozen=True)
class Views:
    """`shown`: how many images a run shows. `different`: how many of these no earlier one was equal to."""

    shown: int
    different: int

    @property
    def repeats(self) -> float:
        """How often each different view is shown, on average."""
        return self.shown / self.different


def sizes_of(images: DetectionDataset) -> Sizes:
    """The sizes of images as a run reads them; it reads all of them."""
    kept = images.in_memory()
    shapes = [kept[place][0].shape for place in range(len(kept))]
    return [(height, width) for _, height, width in shapes]


def count_views(
    sizes: Sizes,
    *,
    batch_size: int,
    steps: int,
    seed: int,
    augment: Augmentation,
    input_size: InputSize | None = None,
    parts: int = 1,
) -> Views:
    """Count the views of the run that `batches` makes of these arguments. No change but `flip` may be on.

    A teacher's maps depend on the canvas too, which is as large as the largest image of a batch. So images of different
    sizes give more different views. A batch that is shown in several `parts` has a canvas for each.
    """
    in_part = max(1, batch_size // parts)
    generator = torch.Generator()
    found = set()
    for draws in draws_of(len(sizes), batch_size, steps, seed, input_size):
        resized = [sizes[draw.image] for draw in draws]
        if input_size is not None:
            resized = [input_size.size_of(*size, draw.short) for size, draw in zip(resized, draws, strict=True)]
        canvases = [
            tuple(-(-max(side) // _GRID) for side in zip(*resized[start : start + in_part], strict=True))
            for start in range(0, batch_size, in_part)
        ]
        for place, (draw, size) in enumerate(zip(draws, resized, strict=True)):
            mirrored = augment.mirrors(generator.manual_seed(draw.seed))
            found.add((draw.image, mirrored, size, canvases[place // in_part]))
    return Views(steps * batch_size, len(found))
