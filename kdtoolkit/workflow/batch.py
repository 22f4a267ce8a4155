"""How many images fit into the memory of a GPU: found by a trial step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from kdtoolkit.data import DetectionDataset
from kdtoolkit.data.recorded import Carrier
from kdtoolkit.distiller import Distiller
from kdtoolkit.engine.inputs import beside_teacher, single_values_told
from kdtoolkit.engine.precision import autocast_type, resolve_precision
from kdtoolkit.errors import KDError


@contextmanager
def with_memory(more: str = "") -> Iterator[None]:
    """Turn a GPU that is out of memory into a KDError of one sentence. `more`: what to do besides, as its end."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise KDError(f"the GPU is out of memory: use half the --batch-size or a smaller --image-size{more}") from error


def fitting(trial: Callable[[int], None], largest: int, parts: int = 1) -> int:
    """The largest batch up to `largest`, its half, its quarter ... whose `trial` does not run out of memory.

    `parts`: the number of equal parts that a step splits its batch into. The trial is of one part, so the result is a
    multiple of it.

    Raises KDError if not even one image fits.
    """
    size = max(1, largest // parts)
    while True:
        try:
            trial(size)
            return size * parts
        except torch.OutOfMemoryError:
            if size == 1:
                raise KDError(
                    "the GPU has too little memory for a single image: use a smaller --image-size, a smaller teacher, "
                    "or --device cpu"
                ) from None
        size //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def trial_step(
    distiller: Distiller, dataset: DetectionDataset, size: int, device: torch.device, precision: str
) -> None:
    """One step with the images that have the most boxes, and room for AdamW's state. The distiller is spoilt by it."""
    dataset = beside_teacher(distiller, dataset)
    counts = [0] * len(dataset)
    truth = dataset.coco()
    places = {image["id"]: place for place, image in enumerate(truth["images"])}
    for annotation in truth["annotations"]:
        counts[places[annotation["image_id"]]] += 1
    fullest = sorted(range(len(dataset)), key=lambda place: -counts[place])[:size]
    items = [dataset[place] for place in fullest]
    images = [image.to(device).float().div_(255) for image, _ in items]
    targets = [Carrier.unchanged(sample) for _, sample in items]
    resolved = resolve_precision(precision, device)  # type: ignore[arg-type]
    distiller.train()
    with torch.autocast(device.type, autocast_type(resolved), enabled=resolved != "float32"), single_values_told():
        losses = distiller(images, targets)
    losses.total.backward()
    parameters = [p for p in distiller.parameters() if p.requires_grad]
    kept = [torch.empty_like(p) for p in parameters for _ in range(3)]  # AdamW's two moments, and the averaged weights
    del kept
