"""How to train: the options of a run. Options about its folder are not here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kdtoolkit.data import Augmentation, DetectionDataset, InputSize
from kdtoolkit.engine.scoring import MAX_DETECTIONS
from kdtoolkit.errors import KDError

Share = Annotated[float, Field(ge=0, le=1)]


class TrainConfig(BaseModel):
    """How to train. The defaults suit AdamW from scratch; `sgd`, lr 0.01 and `step` give the published schedules.

    `lr_factors`, `no_decay`, `frozen` and `frozen_statistics` name parts of the student: `backbone` or
    `backbone.layer1` stands for all parameters below a module of that name, `norms` for the parameters of
    normalisation layers, `biases` for the biases of all other layers, and `backbone norms` for what is both.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: int = Field(gt=0, description="optimiser steps")
    batch_size: int = Field(default=16, gt=0, description="images per step, counted over all processes")
    accumulation: int = Field(
        default=1, gt=0, description="parts that each process's batch is divided into, to save memory"
    )
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(default=3e-3, gt=0, description="peak learning rate")
    lr_factors: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="factor of lr by part, as in {backbone: 0.1}; factors of several parts multiply"
    )
    weight_decay: float = Field(default=1e-4, ge=0)
    no_decay: tuple[str, ...] = Field(default=(), description="parts without weight decay, as in [norms, biases]")
    frozen: tuple[str, ...] = Field(
        default=(), description="parts that are not trained, as in [backbone.conv1, backbone.layer1]"
    )
    frozen_statistics: tuple[str, ...] = Field(
        default=(), description="parts whose batch norms keep their mean and variance, as in [backbone]"
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of SGD")
    warmup_steps: int = Field(default=50, ge=0, description="steps of warm-up")
    warmup: Literal["linear", "constant"] = "linear"
    warmup_factor: Share = Field(default=0.0, description="factor of lr at the start of the warm-up")
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    milestones: tuple[Share, ...] = Field(
        default=(2 / 3, 11 / 12), description="shares of the steps, from 0 to 1, where `step` divides lr by 10"
    )
    clip_norm: float = Field(default=35.0, ge=0, description="largest gradient norm; 0 switches clipping off")
    ema: float = Field(
        default=0.0, ge=0, lt=1, description="decay of the weights' moving average, which is kept at the end; 0: off"
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="auto: bfloat16 where the hardware has it, else float32; float16 scales the gradients",
    )
    unlabelled_share: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of the steps whose images have no labels, if the run has such images; None: their share of "
        "all images, at most half",
    )
    channels_last: Literal["auto"] | bool = Field(
        default="auto", description="memory format; auto: what is faster on the hardware (docs/speed.md)"
    )
    winograd: bool = Field(
        default=True,
        description="on a CPU in float32, compute large 3x3 convolutions by Winograd's algorithm, which is faster; "
        "false: directly",
    )
    tf32: Literal["auto"] | bool = Field(
        default="auto",
        description="float32 on a GPU in TF32; auto: as torch has it, which is convolutions alone",
    )
    recompute: bool = Field(
        default=False,
        description="compute the heads' passes again in the backward pass, to save memory; losses stay the same",
    )
    compile: bool = Field(default=False, description="run the step through torch.compile")
    teacher_cache: Literal["auto", "off", "memory", "disk"] = Field(
        default="off",
        description="keep what the teacher computes for each image, and reuse it in later epochs: off, memory, disk or "
        "auto, which is disk where that pays on a CPU, else off (docs/teacher_cache.md)",
    )
    teacher_cache_gb: float = Field(
        default=4.0, gt=0, description="the most that the teacher cache takes, in 10^9 bytes; in memory of each process"
    )
    teacher_cache_precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="how the teacher cache keeps numbers; bfloat16 takes half the space and rounds"
    )
    workers: int = Field(default=0, ge=0, description="processes that read ahead; the images are the same with any")
    input_size: InputSize | None = Field(
        default=None, description="what images are resized to, with one size a step; None leaves them as they are"
    )
    augmentation: Augmentation = Augmentation()

    @model_validator(mode="after")
    def _batch_has_parts(self) -> TrainConfig:
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of accumulation ({self.accumulation}): each step "
                "splits its batch into that number of parts"
            )
        return self

    @model_validator(mode="after")
    def _cache_finds_views_again(self) -> TrainConfig:
        if self.teacher_cache in ("memory", "disk") and (never := self.never_repeat):
            several = len(never) > 1
            raise ValueError(
                f"teacher_cache is {self.teacher_cache}, and {' and '.join(never)} {'give' if several else 'gives'} an "
                "image different pixels each time, so nothing would be found in it. Leave "
                f"{'them' if several else 'it'} out (flip and a range of sizes may stay), or write teacher_cache: off"
            )
        return self

    @property
    def never_repeat(self) -> tuple[str, ...]:
        """The options that are on and show an image with different pixels each time."""
        crop = self.input_size is not None and self.input_size.crop > 0
        return (*(f"augmentation.{name}" for name in self.augmentation.never_repeat), *(["input_size.crop"] * crop))


@dataclass(frozen=True)
class Validation:
    """The data that a run is evaluated on, and when: after some steps or epochs, and at the end.

    With `at`, a run is evaluated after exactly these steps, and at the end only if its last step is one of them.
    `max_detections`: how many detections of an image and class count.
    """

    dataset: DetectionDataset
    every_steps: int | None = None
    every_epochs: float | None = None
    at: tuple[int, ...] | None = None
    batch_size: int = 32
    max_detections: int = MAX_DETECTIONS

    def __post_init__(self) -> None:
        if sum(when is not None for when in (self.every_steps, self.every_epochs, self.at)) > 1:
            raise KDError("every_steps, every_epochs and at cannot be used together: choose one of them")
        if any(every is not None and every <= 0 for every in (self.every_steps, self.every_epochs)):
            raise KDError(
                "every_steps is a whole number from 1, every_epochs a number above 0; leave out both to evaluate only "
                "at the end"
            )
        if self.batch_size < 1:
            raise KDError(f"batch_size ({self.batch_size}) is the number of images in a batch: it must be 1 or more")

    def due(self, step: int, batch_size: int, images: int, *, last: bool) -> bool:
        """Whether to evaluate after this step, with batches of `batch_size` from this number of training images.

        `last`: it is the run's last step.
        """
        if self.at is not None:
            return step in self.at
        if last:
            return True
        if self.every_steps is not None:
            return step % self.every_steps == 0
        if self.every_epochs is None:
            return False
        shown = [done * batch_size // (self.every_epochs * images) for done in (step - 1, step)]
        return shown[0] < shown[1]
