"""The training loop: reads from top to bottom."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, NoReturn

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdtoolkit.data import Augmentation, DetectionDataset, batches
from kdtoolkit.distiller import Distiller
from kdtoolkit.engine.inputs import check_dataset, resolve_device
from kdtoolkit.engine.precision import resolve_precision
from kdtoolkit.engine.watch import DeadParts, SilenceDetector
from kdtoolkit.errors import KDError, NonFiniteLossError

HISTORY_POINTS = 100
UNTIMED_STEPS = 5  # the first steps are slower, and are left out of the median


class TrainConfig(BaseModel):
    """How to train. The defaults suit AdamW from scratch; `sgd`, lr 0.01 and `step` give the published schedules."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: int = Field(gt=0, description="optimiser steps")
    batch_size: int = Field(default=16, gt=0)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(default=3e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(default=1e-4, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of SGD")
    warmup_steps: int = Field(default=50, ge=0, description="steps of linear warm-up")
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    milestones: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        default=(2 / 3, 11 / 12), description="shares of the steps, from 0 to 1, where `step` divides lr by 10"
    )
    clip_norm: float = Field(default=35.0, ge=0, description="largest gradient norm; 0 switches clipping off")
    ema: float = Field(
        default=0.0, ge=0, lt=1, description="decay of the weights' moving average, which is kept at the end; 0: off"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="float32", description="auto: bfloat16 where the hardware has it, else float32"
    )
    channels_last: bool = Field(
        default=False, description="memory format; faster convolutions if channels are multiples of 8"
    )
    augmentation: Augmentation = Augmentation()


@dataclass(frozen=True)
class Progress:
    """Where a run is: `losses` are means since the last report, `seconds` the time since its start.

    `warnings`: one line for each loss term that has taught the student nothing so far, and for each part of it that
    has died.
    """

    step: int
    steps: int
    losses: dict[str, float]
    seconds: float
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainResult:
    """What a run cost and how it went.

    `history` has about 100 points of step, lr and every loss term (means). `warnings` are those of `Progress`, for the
    whole run.
    """

    steps: int
    seconds: float
    step_ms: float
    history: list[dict[str, float]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def lr_factor(step: int, config: TrainConfig) -> float:
    """Factor of the learning rate at a step counted from 0: linear warm-up times the schedule."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule == "cosine":
        return warmup * 0.5 * (1 + math.cos(math.pi * step / config.steps))
    if config.schedule == "step":
        return warmup * 0.1 ** sum(step >= share * config.steps for share in config.milestones)
    return warmup


def train(
    distiller: Distiller,
    dataset: DetectionDataset,
    config: TrainConfig,
    *,
    seed: int,
    device: str | torch.device | None = None,
    report: Callable[[Progress], None] | None = None,
) -> TrainResult:
    """Train the distiller's student in place; `report` is called at the first step, about every second, at the end.

    `device` is where the models lie; None asks the student itself. Same seed, same machine, same result.

    Raises KDError before the first step where an argument is of another type, where nothing of the student is to be
    trained, where its number of classes is not the data set's, and where it lies on another device. Raises
    NonFiniteLossError where a loss term is NaN or infinite; the student then has the weights of the last good step.
    """
    _check_arguments(distiller, config)
    check_dataset(dataset, distiller.student_adapter.spec)
    dataset = dataset.in_memory()  # before the clock starts
    device = resolve_device(distiller.student, device)
    torch.manual_seed(seed)
    student = distiller.student
    if config.channels_last:
        student.to(memory_format=torch.channels_last)
        if distiller.teacher_adapter is not None:
            distiller.teacher_adapter.model.to(memory_format=torch.channels_last)
    trained = {name: p for name, p in distiller.named_parameters() if p.requires_grad}
    names, parameters = list(trained), list(trained.values())
    optimizer = _optimizer(parameters, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, config))
    average = None
    if config.ema:
        ema = get_ema_multi_avg_fn(config.ema)  # type: ignore[no-untyped-call]
        average = AveragedModel(student, multi_avg_fn=ema, use_buffers=True)
    precision = resolve_precision(config.precision, device)
    silence = SilenceDetector(student, distiller.vanishing)
    dead = DeadParts(student, names, patience=min(max(config.steps // 10, 5), 50), device=device)
    with_boxes = 0
    window, history = _Window(), _Window()
    points: list[dict[str, float]] = []
    durations: list[float] = []
    started = reported = time.perf_counter()

    distiller.train()
    data = batches(dataset, batch_size=config.batch_size, steps=config.steps, seed=seed, augment=config.augmentation)
    for step, (images, targets) in enumerate(data):
        begun = time.perf_counter()
        images = [image.to(device) for image in images]
        buffers = [buffer.clone() for buffer in student.buffers()]  # batch norm's change in a forward already
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
        with autocast:
            losses = distiller(images, targets)
        values = dict(
            zip(losses, torch.stack([loss.detach().float() for loss in losses.values()]).tolist(), strict=True)
        )
        if bad := _non_finite(values):
            with autocast:
                where = distiller.locate_non_finite(images, targets)
            _stop(student, buffers, step, bad, where)
        if has_boxes := any(len(target["boxes"]) for target in targets):
            with_boxes += 1
            silence.observe(losses, values)
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        norms = _gradient_norms(parameters)
        dead.observe(norms, has_boxes)
        norm = torch.linalg.vector_norm(norms)
        if bad := _non_finite({"gradient norm": norm.item()}):
            _stop(student, buffers, step, bad, "all losses are finite, their gradient is not")
        if config.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, config.clip_norm, norm)
        optimizer.step()
        schedule.step()
        if average is not None:
            average.update_parameters(student)

        now = time.perf_counter()
        durations.append(now - begun)
        window.add(values)
        history.add(values)
        last = step + 1 == config.steps
        if report is not None and (now - reported > 1 or step == 0 or last):
            warnings = (*silence.warnings(), *dead.warnings())
            report(Progress(step + 1, config.steps, window.flush(), now - started, warnings))
            reported = now
        if (step + 1) % max(1, config.steps // HISTORY_POINTS) == 0 or last:
            points.append({"step": step + 1, "lr": optimizer.param_groups[0]["lr"], **history.flush()})

    if average is not None:
        student.load_state_dict(average.module.state_dict())
    warnings = (*silence.warnings(final=True), *dead.warnings())
    if not with_boxes:
        warnings = (f"none of the images of the {config.steps} steps has a box: the student has seen background alone",)
    return TrainResult(
        steps=config.steps,
        seconds=time.perf_counter() - started,
        step_ms=1000 * statistics.median(durations[min(UNTIMED_STEPS, len(durations) - 1) :]),
        history=points,
        warnings=list(warnings),
    )


class _Window:
    """Means of loss terms since the last flush."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._values.setdefault(name, []).append(value)

    def flush(self) -> dict[str, float]:
        means = {name: statistics.fmean(values) for name, values in self._values.items()}
        self._values = {}
        return means


def _check_arguments(distiller: object, config: object) -> None:
    if not isinstance(distiller, Distiller):
        raise KDError(
            f"train takes a Distiller, not a {type(distiller).__name__}: write Distiller(teacher, student, methods) "
            "or, to train alone, Distiller(None, student)"
        )
    if not isinstance(config, TrainConfig):
        raise KDError(f"config is a {type(config).__name__}; it must be a TrainConfig, as in TrainConfig(steps=1000)")
    if not any(p.requires_grad for p in distiller.student.parameters()):
        raise KDError(
            "nothing of the student is to be trained: all its parameters are frozen. Call student.requires_grad_(True)"
        )


def _gradient_norms(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The norm of each parameter's gradient (P,), 0 where it has none. Waits for no result of the device."""
    # A private name that torch's own get_total_norm rests on; it takes all gradients at once.
    norms = iter(torch._foreach_norm([p.grad for p in parameters if p.grad is not None]))
    none = torch.zeros((), device=parameters[0].device)
    return torch.stack([none if p.grad is None else next(norms) for p in parameters])


def _optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay, fused=True)


def _non_finite(values: dict[str, float]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in values.items() if not math.isfinite(value))


def _stop(student: nn.Module, buffers: list[Tensor], step: int, bad: str, where: str) -> NoReturn:
    """Give the student's buffers back their values of before the step, and raise."""
    with torch.no_grad():
        for buffer, kept in zip(student.buffers(), buffers, strict=True):
            buffer.copy_(kept)
    raise NonFiniteLossError(
        f"step {step + 1}: {bad} ({where}). Lower the learning rate (lr) or clip_norm, lengthen warmup_steps, "
        "or lower the weight of the method it belongs to."
    )
