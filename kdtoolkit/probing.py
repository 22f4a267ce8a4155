"""The probe: what each loss term does to the student, measured on some batches before a run, or in the middle of one.

A loss can act on a student only through its gradient. For each term the probe measures this gradient at the parameters
that the term and the student's own loss (the task) both train: how large it is beside the task's, and whether it points
in the same direction. `kdtoolkit.probe_words` turns the numbers into sentences and weights.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdtoolkit import processes
from kdtoolkit.contract import DetectorAdapter, Method, Schedule, Target
from kdtoolkit.distiller import Distiller, Losses
from kdtoolkit.errors import KDError, NonFiniteLossError
from kdtoolkit.gradients import Gradient
from kdtoolkit.inherit import within
from kdtoolkit.modes import modes_kept

TASK = "task"
ONE_PROCESS = "a probe runs in one process: start it without torchrun"
ALL, BACKBONE, NECK, HEAD = PARTS = ("all", "backbone", "neck", "head")


@dataclass(frozen=True)
class Measured:
    """A term's gradient at the parameters of one part of the student that the term and the task both train.

    `norm`, `task_norm`: the norms of the term's gradient and of the task's, means over the batches. `cosine`: between
    the two gradients, the mean over the batches. `margin`: half the width of that mean's 95 % interval, by Student's t;
    None with one batch.

    `gain`: how much a small plain gradient step on this loss at these parameters lowers the task's loss, divided by
    what a step on the task's loss at all its parameters lowers it by. It is negative where the step raises the task's
    loss. The mean over the batches.
    """

    norm: float
    task_norm: float
    cosine: float
    margin: float | None
    gain: float

    @property
    def share(self) -> float:
        """The term's norm, divided by the sum of both norms: 0.5 if they are equal."""
        return self.norm / (self.norm + self.task_norm) if self.norm else 0.0

    def times(self, factor: float) -> Measured:
        """The same of the term multiplied by a factor."""
        return replace(self, norm=factor * self.norm, gain=factor * self.gain)


@dataclass(frozen=True)
class Row:
    """A loss: of the task or of a method (`pkd`), or one term of it (`pkd/feature`).

    `value`: the mean over the batches. `parts`: what was measured in the whole student ("all") and in its "backbone",
    "neck" and "head"; a part that the loss does not reach is missing.
    """

    name: str
    value: float
    parts: Mapping[str, Measured]

    @property
    def method(self) -> str:
        """The name of the method that it belongs to, or `task`."""
        return self.name.partition("/")[0]

    @property
    def is_sum(self) -> bool:
        """Whether it is the sum of all terms of a method or of the task."""
        return "/" not in self.name

    def times(self, factor: float) -> Row:
        """The row of the loss multiplied by a factor."""
        parts = {name: part.times(factor) for name, part in self.parts.items()}
        return replace(self, value=factor * self.value, parts=parts)


@dataclass(frozen=True)
class Probe:
    """What a probe measured.

    `rows`: the task, its terms, then each method and its terms. `agreement`: the cosine between the task's own
    gradients of two batches, by part; empty with one batch. It says what cosine to expect of two losses that want the
    same. `share`: the share that weights are proposed for. `held`: the shares that are held in training, by method.
    """

    rows: tuple[Row, ...]
    agreement: Mapping[str, float]
    share: float
    batches: int
    seconds: float
    held: Mapping[str, float] = field(default_factory=dict)

    @property
    def methods(self) -> dict[str, Row]:
        """The row of each method, by name."""
        return {row.name: row for row in self.rows if row.is_sum and row.name != TASK}

    def factor(self, method: str, share: float | None = None) -> float | None:
        """What to multiply a method's weights by, for a share, or for that of the probe.

        None if the method has no gradient.
        """
        part = self.methods[method].parts.get(ALL)
        if part is None or not part.norm or not part.task_norm:
            return None
        share = self.share if share is None else share
        return share / (1 - share) * part.task_norm / part.norm

    def in_training(self, method: str) -> list[Row]:
        """A method's row and those of its terms as they are in training: at the share, if one is held."""
        factor = self.factor(method, self.held[method]) if method in self.held else None
        rows = [row for row in self.rows if row.method == method]
        return rows if factor is None else [row.times(factor) for row in rows]

    def __str__(self) -> str:
        from kdtoolkit.probe_words import sentences, table

        return "\n".join([*table(self), "", *sentences(self)])


def probe(
    distiller: Distiller, batches: Iterable[tuple[Sequence[Tensor], Sequence[Target]]], share: float = 0.1
) -> Probe:
    """Measure what each loss term does to the student. It changes nothing: no weight, statistic or random state.

    Methods are measured with their full weights, whatever their schedule says, and as if no share were held. Frozen
    parameters are left out. If the student is in training mode, its batch norms in eval mode keep their statistics.

    Args:
        distiller: student, teacher and methods, before or after any number of steps.
        batches: images and ground truth, as `Distiller` takes them. All of them are used; four are enough for most.
        share: of the gradient, for which `Probe.factor` proposes weights: between 0 and 1.

    Raises KDError if there is no method or no batch, if a batch has no labels, if `share` is out of range, or if
    several processes train together; NonFiniteLossError if a loss is not finite.
    """
    check_can_probe(distiller)
    if not 0 < share < 1:
        raise KDError(f"share={share:g}: it must be above 0 and below 1; 0.1 is usual")
    begun = time.perf_counter()
    names = [name for name, p in distiller.student.named_parameters() if p.requires_grad]
    parameters = [p for p in distiller.student.parameters() if p.requires_grad]
    device = parameters[0].device
    found: list[dict[str, tuple[float, dict[str, _Numbers]]]] = []
    agreement: list[dict[str, _Numbers]] = []
    earlier: Gradient | None = None
    with _untouched(distiller):
        parts: Tensor | None = None
        for images, targets in batches:
            if targets is None:
                raise KDError("a probe compares with the student's own loss: hand in images with labels")
            shown = [image.to(device) for image in images]
            if parts is None:
                parts = _parts(distiller.student_adapter, shown, names, parameters)
            losses = _with_full_weights(distiller, distiller(shown, targets))
            task = Gradient.of(reduce(torch.add, _of(losses, TASK).values()), parameters)
            found.append(_measured(losses, task, parameters, parts))
            if earlier is not None:
                agreement.append(_beside(task, earlier, parts))
            earlier = task
    if not found:
        raise KDError("a probe needs at least one batch of images with labels")
    means = {
        part: statistics.fmean(numbers[part].cosine for numbers in agreement if part in numbers)
        for part in PARTS
        if any(part in numbers for numbers in agreement)
    }
    rows = tuple(_row(name, [batch[name] for batch in found if name in batch]) for name in _ordered(found))
    held = {name: each.share for name, each in distiller.held.items()}
    return Probe(rows, means, share, len(found), time.perf_counter() - begun, held)


def check_can_probe(distiller: Distiller) -> None:
    """Raise KDError if there is no method to probe, or if several processes train together."""
    if not distiller.methods:
        raise KDError("a probe compares methods with the student's own loss: name a teacher and a method")
    if processes.count() > 1:
        raise KDError(ONE_PROCESS)


@dataclass(frozen=True)
class _Numbers:
    """What `Measured` has, of one batch."""

    norm: float
    task_norm: float
    cosine: float
    gain: float


def _measured(
    losses: Losses, task: Gradient, parameters: list[nn.Parameter], parts: Tensor
) -> dict[str, tuple[float, dict[str, _Numbers]]]:
    """Value and numbers of each row, in the order of rows."""
    found: dict[str, tuple[float, dict[str, _Numbers]]] = {}
    for owner in dict.fromkeys(name.partition("/")[0] for name in losses):
        terms = _of(losses, owner)
        values = {name: loss.item() for name, loss in terms.items()}
        if bad := [name for name, value in values.items() if not np.isfinite(value)]:
            raise NonFiniteLossError(f"{bad[0]} is {values[bad[0]]} in a batch of the probe: it has no gradient")
        found[owner] = 0.0, {}  # so that the sum stands before its terms
        total: Gradient | None = None
        for name, loss in terms.items():
            own = Gradient.of(loss, parameters)
            found[name] = values[name], _beside(own, task, parts)
            total = own if total is None else total + own
        assert total is not None
        found[owner] = sum(values.values()), _beside(total, task, parts)
    return found


def _beside(own: Gradient, task: Gradient, parts: Tensor) -> dict[str, _Numbers]:
    """The numbers of each part (a column of `parts` (P, 4)) of which both train something."""
    both = (own.reached & task.reached).float()
    whole = task.squares().double().sum().item()  # also of what the other loss does not reach
    products = torch.stack([own.squares(), task.squares(), own.dot(task)]) * both  # (3, P)
    sums = (products.double() @ parts.double()).tolist()
    reached = (both @ parts).tolist()
    found = {}
    for part, own_square, task_square, product, count in zip(PARTS, *sums, reached, strict=True):
        if count:
            norms = own_square**0.5, task_square**0.5
            cosine = product / (norms[0] * norms[1]) if all(norms) else 0.0
            found[part] = _Numbers(*norms, cosine, product / whole if whole else 0.0)
    return found


def _row(name: str, batches: Sequence[tuple[float, dict[str, _Numbers]]]) -> Row:
    values, numbers = zip(*batches, strict=True)
    parts = {}
    for part in PARTS:
        if own := [each[part] for each in numbers if part in each]:
            cosines = [each.cosine for each in own]
            parts[part] = Measured(
                statistics.fmean(each.norm for each in own),
                statistics.fmean(each.task_norm for each in own),
                statistics.fmean(cosines),
                _margin(cosines),
                statistics.fmean(each.gain for each in own),
            )
    return Row(name, statistics.fmean(values), parts)


def _margin(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of the values' mean; None for one value."""
    if len(values) == 1:
        return None
    quantile = float(stdtrit(len(values) - 1, 0.975))  # of Student's t
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def _ordered(found: Sequence[Mapping[str, object]]) -> list[str]:
    """The names of all rows. A term that is missing in some batches stands beside those of its method."""
    names = dict.fromkeys(name for batch in found for name in batch)
    owners = list(dict.fromkeys(name.partition("/")[0] for name in names))
    return sorted(names, key=lambda name: owners.index(name.partition("/")[0]))


def _of(losses: Mapping[str, Tensor], owner: str) -> dict[str, Tensor]:
    """The terms of the task or of a method."""
    return {name: loss for name, loss in losses.items() if name.startswith(f"{owner}/")}


def _with_full_weights(distiller: Distiller, losses: Losses) -> Losses:
    """The losses without the factors that hold shares."""
    held = distiller.held
    return Losses(
        {
            name: loss / held[owner].factor if (owner := name.partition("/")[0]) in held else loss
            for name, loss in losses.items()
        }
    )


def _parts(
    adapter: DetectorAdapter, images: Sequence[Tensor], names: Sequence[str], parameters: list[nn.Parameter]
) -> Tensor:
    """Which part of the student each parameter belongs to: (P, 4), one column for each of `PARTS`.

    The adapter names the backbone. All else that the pyramid depends on is the neck; the rest is the head.
    """
    features = adapter.features(adapter.prepare(images))
    pyramid = Gradient.of(reduce(torch.add, (level.float().sum() for level in features)), parameters).reached.tolist()
    found = torch.zeros(len(names), len(PARTS), device=parameters[0].device)
    for row, (name, in_pyramid) in enumerate(zip(names, pyramid, strict=True)):
        part = BACKBONE if within(name, adapter.backbone) else NECK if in_pyramid else HEAD
        found[row, [PARTS.index(ALL), PARTS.index(part)]] = 1
    return found


@contextmanager
def _untouched(distiller: Distiller) -> Iterator[None]:
    """Put the distiller into training mode with all methods at work. At the end everything is as it was.

    In the middle of training, batch norms in eval mode stay so, because training keeps their statistics.
    """
    teacher, student = distiller.seen[1].model, distiller.student
    still = [m for m in student.modules() if student.training and isinstance(m, _BatchNorm) and not m.training]
    buffers = [(buffer, buffer.clone()) for buffer in (*distiller.buffers(), *teacher.buffers())]
    methods = [method for method in distiller.methods if isinstance(method, Method)]
    schedules = [method.schedule for method in methods]
    held = [(each, each.get_extra_state()) for each in distiller.held.values()]
    calls = distiller.calls
    state: tuple[Any, Any] = random.getstate(), np.random.get_state()  # noqa: NPY002 - libraries draw from it
    devices = {p.device.index or 0 for p in distiller.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices), modes_kept(distiller, teacher):
        try:
            for method in methods:
                method.schedule = Schedule()
            distiller.train()
            for norm in still:
                norm.eval()
            yield
        finally:
            for method, schedule in zip(methods, schedules, strict=True):
                method.schedule = schedule
            for each, kept in held:
                each.set_extra_state(kept)
            distiller.calls = calls
            with torch.no_grad():
                for buffer, content in buffers:
                    buffer.copy_(content)
            random.setstate(state[0])
            np.random.set_state(state[1])  # noqa: NPY002
