"""What a run does if the user does not say: each choice with its reason, which the plan shows.

docs/distill.md has the rules as tables, and where the numbers come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from kdtoolkit.engine.hardware import cores

Begin = Literal["trained", "started", "random"]
"""The weights that training begins with: a whole detector's, some (a backbone, or all but the class layers), none."""

SMALLEST_SIZE = 32  # pixels: no detector has fewer in a cell of its coarsest level
LARGEST_BATCH = 16
LONG_EPOCHS = 30  # from here on images repeat so often that colour and size must change
BATCH_ON_CPU = 8
FEW_PARAMETERS = 5e6  # a detector with fewer takes twice the learning rate, as on our boards
_IMAGES_SHOWN: dict[Begin, int] = {"trained": 10_000, "started": 15_000, "random": 20_000}
_EPOCHS: dict[Begin, tuple[int, int]] = {"trained": (12, 60), "started": (24, 100), "random": (36, 150)}
_BEGIN_IN_WORDS = {"trained": "trained weights", "started": "weights for a part of it", "random": "random weights"}


@dataclass(frozen=True)
class Choice:
    """A value and why it was chosen."""

    value: Any
    why: str


@dataclass(frozen=True)
class Situation:
    """What choices depend on.

    `images`, `val_images`: how many; `longest`: the longest side of all images in pixels. `library`: the prefix of the
    detector's name. `parameters`: how many it has. `begin`: the weights it begins with. `device`: "cpu" or "cuda".
    `processes`: how many train together.
    """

    images: int
    val_images: int
    longest: int
    library: str
    parameters: int
    begin: Begin
    device: str
    processes: int = 1


def image_size(longest: int, teacher: int | None, student: int | None) -> Choice:
    """The longest side of images: the size that the teacher or the weights were trained at, else 640."""
    size, why = next(
        (
            (size, why)
            for size, why in ((teacher, "as the teacher was trained"), (student, "as its weights were trained"))
            if size
        ),
        (640, "usual size"),
    )
    if longest < SMALLEST_SIZE:
        return Choice(SMALLEST_SIZE, f"the smallest size; no image has more than {longest} px")
    if longest < size:
        return Choice(longest, f"the largest image; {size} ({why}) would add nothing")
    return Choice(size, why)


def epochs(about: Situation) -> Choice:
    """How often each image is shown: more often if there are few images, or if the detector knows nothing yet."""
    fewest, most = _EPOCHS[about.begin]
    chosen = min(max(round(_IMAGES_SHOWN[about.begin] / about.images), fewest), most)
    return Choice(chosen, f"{about.images} images, {_BEGIN_IN_WORDS[about.begin]}")


def steps_of(epochs: float, images: int, batch_size: int, without_labels: float = 0.0) -> int:
    """The optimiser steps of a number of epochs of the labelled images.

    `without_labels`: the share of the steps that show images without labels instead.
    """
    labelled = math.ceil(epochs * images / batch_size)
    return max(1, math.ceil(round(labelled / (1 - without_labels), 6)))  # rounded: 60 / (1 - 0.4) is just above 100


def epochs_of(steps: int, images: int, batch_size: int, without_labels: float = 0.0) -> float:
    """How often each labelled image is shown in a number of steps."""
    return steps * (1 - without_labels) * batch_size / images


def learning_rate(about: Situation, batch_size: int) -> Choice:
    """AdamW's peak learning rate, for batches of 8 times the square root of how much larger the batch is."""
    few = about.parameters < FEW_PARAMETERS
    rate = {"trained": 2e-4, "started": 5e-4, "random": 2e-3 if few else 1e-3}[about.begin]
    why = _BEGIN_IN_WORDS[about.begin]
    if about.begin == "random":
        why += f", {'under' if few else 'over'} {FEW_PARAMETERS / 1e6:.0f} M parameters"
    if about.library == "hf":
        rate, why = (5e-4 if about.begin == "random" else 1e-4), f"{_BEGIN_IN_WORDS[about.begin]}, transformers"
    return Choice(float(f"{rate * math.sqrt(batch_size / BATCH_ON_CPU):.2g}"), f"{why}, batch {batch_size}")


def training(about: Situation, steps: int, epochs: float, *, cached: bool = False) -> dict[str, Choice]:
    """The further options of `TrainConfig`, for so many steps, which show each labelled image `epochs` times.

    `cached`: whether the user asks for a teacher cache, so that images must come again with the same pixels.
    """
    if cached:
        augmentation = Choice({"flip": 0.5}, "a teacher cache finds nothing if colour or size change")
    elif epochs >= LONG_EPOCHS:
        augmentation = Choice({"flip": 0.5, "colour": 0.2, "zoom": [0.67, 1.5]}, f"{LONG_EPOCHS} epochs or more")
    else:
        augmentation = Choice({"flip": 0.5}, f"fewer than {LONG_EPOCHS} epochs")
    chosen = {
        "warmup_steps": Choice(max(min(500, steps // 10, max(50, steps // 20)), 1), "some heads die without it"),
        "ema": Choice(round(1 - 1 / max(10, min(steps / 50, 5000)), 5), "evens out the last steps"),
        "precision": Choice("auto", "bfloat16 where the hardware has it"),
        "workers": Choice(0 if about.device == "cpu" else min(4, cores() - 1), "processes that read images"),
        "augmentation": augmentation,
    }
    if about.library == "hf":
        chosen["clip_norm"] = Choice(0.5, "DETR's relatives need it")
        if about.begin != "random":
            chosen["lr_factors"] = Choice({"backbone": 0.1}, "as DETR is published")
    return chosen


def evaluations(about: Situation, images_shown: float) -> Choice:
    """How often to evaluate during training: up to 10 times, if that takes little beside the training itself."""
    count = max(1, min(10, int(0.3 * images_shown / about.val_images)))
    return Choice(count, "the best of them is kept")
