"""The training loop: reads from top to bottom."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, NoReturn

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdtoolkit.data import Augmentation, DetectionDataset, batches
from kdtoolkit.data.dataset import read_in
from kdtoolkit.distiller import Distiller, Losses
from kdtoolkit.engine.precision import resolve_precision
from kdtoolkit.errors import NonFiniteLossError

SILENT_STEPS = 5  # a term that says nothing in all of the first steps is reported
HISTORY_POINTS = 100


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
    milestones: tuple[float, ...] = Field(
        default=(2 / 3, 11 / 12), description="shares of the steps where `step` divides lr by 10"
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

    `warnings` are the loss terms found to do nothing so far.
    """

    step: int
    steps: int
    losses: dict[str, float]
    seconds: float
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainResult:
    """What a run cost and how it went: `history` has about 100 points of step, lr and every loss term (means)."""

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
    device: str | torch.device = "cpu",
    report: Callable[[Progress], None] | None = None,
) -> TrainResult:
    """Train the distiller's student in place; `report` is called at the first step, about every second, at the end.

    Same seed, same machine, same result. Raises NonFiniteLossError where a loss term is NaN or infinite; the student
    then has the weights of the last good step.
    """
    dataset = read_in(dataset)  # before the clock starts
    torch.manual_seed(seed)
    student = distiller.student
    if config.channels_last:
        student.to(memory_format=torch.channels_last)
        if distiller.teacher_adapter is not None:
            distiller.teacher_adapter.model.to(memory_format=torch.channels_last)
    parameters = [p for p in distiller.parameters() if p.requires_grad]
    optimizer = _optimizer(parameters, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, config))
    average = None
    if config.ema:
        ema = get_ema_multi_avg_fn(config.ema)  # type: ignore[no-untyped-call]
        average = AveragedModel(student, multi_avg_fn=ema, use_buffers=True)
    precision = resolve_precision(config.precision, device)
    silence = SilenceDetector(student)
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
        autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16")
        with autocast:
            losses = distiller(images, targets)
        values = dict(
            zip(losses, torch.stack([loss.detach().float() for loss in losses.values()]).tolist(), strict=True)
        )
        if bad := _non_finite(values):
            with autocast:
                where = distiller.locate_non_finite(images, targets)
            _stop(student, buffers, step, bad, where)
        if step < SILENT_STEPS:
            silence.observe(losses)
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
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
            warnings = silence.warnings() if step + 1 >= SILENT_STEPS else []
            report(Progress(step + 1, config.steps, window.flush(), now - started, tuple(warnings)))
            reported = now
        if (step + 1) % max(1, config.steps // HISTORY_POINTS) == 0 or last:
            points.append({"step": step + 1, "lr": optimizer.param_groups[0]["lr"], **history.flush()})

    if average is not None:
        student.load_state_dict(average.module.state_dict())
    return TrainResult(
        steps=config.steps,
        seconds=time.perf_counter() - started,
        step_ms=1000 * statistics.median(durations[min(SILENT_STEPS, len(durations) - 1) :]),
        history=points,
        warnings=silence.warnings(),
    )


class SilenceDetector:
    """Finds methods' loss terms that teach the student nothing: exactly zero, or without gradient to it."""

    def __init__(self, student: nn.Module) -> None:
        self._parameters = [p for p in student.parameters() if p.requires_grad]
        self._reasons: dict[str, set[str]] = {}

    def observe(self, losses: Losses) -> None:
        """Look at one step's terms, before `backward`; leaves their graph and all gradients as they are."""
        for name, loss in losses.items():
            if not name.startswith("task/"):
                self._reasons.setdefault(name, set()).add(self._silence(loss))

    def _silence(self, loss: Tensor) -> str:
        if loss.item() == 0:
            return "is exactly zero"
        if not loss.requires_grad:
            return "has no gradient"
        gradients = torch.autograd.grad(loss, self._parameters, retain_graph=True, allow_unused=True)
        return "" if any(g is not None and bool(g.any()) for g in gradients) else "has no gradient to the student"

    def warnings(self) -> list[str]:
        """One line for each term that was silent in every step observed."""
        return [
            f"loss term {name} {' or '.join(sorted(reasons))} in each of the first {SILENT_STEPS} steps: "
            "the method does nothing here"
            for name, reasons in self._reasons.items()
            if "" not in reasons
        ]


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
