"""The state of a run: what a checkpoint must hold for the run to go on as if it had not been stopped.

The batch, the random numbers and the learning rate of a step depend only on the seed and the step. They need no state.
"""

from __future__ import annotations

import copy
import random
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdtoolkit.distiller import Distiller
from kdtoolkit.engine.checkpoint import Checkpoint
from kdtoolkit.engine.config import TrainConfig
from kdtoolkit.engine.diagnose import DeadParts, SilenceDetector
from kdtoolkit.engine.optim import build_optimizer, load_named_state, named_state
from kdtoolkit.engine.precision import Precision
from kdtoolkit.errors import KDError

UNTIMED_STEPS = 5  # the first steps are slower, and are left out of the median
_EXTRA = "_extra_state"  # what modules keep besides tensors; Distiller's is the number of steps


@dataclass
class Window:
    """Means of values since the last flush."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, values: Mapping[str, float]) -> None:
        """Take values by name."""
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def flush(self) -> dict[str, float]:
        """The means by name; begins anew."""
        means = {name: statistics.fmean(values) for name, values in self.values.items()}
        self.values = {}
        return means


@dataclass
class RunState:
    """A run's modules and counters.

    `step`: steps done; `seconds`, `cpu_seconds`: time spent in training, over all starts, by the clock and of the CPU
    (None if an earlier version, which did not measure it, began the run); `durations`: seconds of each step since this
    start. `cache_hits`, `cache_misses`: images that this process found in the teacher cache, and that it asked the
    teacher about, over all starts.
    """

    distiller: Distiller
    config: TrainConfig
    optimizer: torch.optim.Optimizer
    average: AveragedModel | None
    scaler: torch.amp.GradScaler
    silence: SilenceDetector
    dead: DeadParts
    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float | None = 0.0
    cache_hits: int = 0
    cache_misses: int = 0
    with_boxes: int = 0
    window: Window = field(default_factory=Window)
    history: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float | None]] = field(default_factory=list)
    probes: list[dict[str, float | None]] = field(default_factory=list)
    durations: list[float] = field(default_factory=list)
    earlier_step_ms: float = 0.0

    @classmethod
    def begin(cls, distiller: Distiller, config: TrainConfig, precision: Precision, device: torch.device) -> RunState:
        """A run before its first step. Raises KDError if the config names parts that the student does not have."""
        names = [name for name, p in distiller.named_parameters() if p.requires_grad]
        average = None
        if config.ema:
            ema = get_ema_multi_avg_fn(config.ema)  # type: ignore[no-untyped-call]
            average = AveragedModel(distiller.student, multi_avg_fn=ema, use_buffers=True)
        patience = min(max(config.steps // 10, 5), 50)
        return cls(
            distiller,
            config,
            build_optimizer(distiller, config),
            average,
            torch.amp.GradScaler(device.type, enabled=precision == "float16"),
            SilenceDetector(distiller.student, distiller.vanishing, with_gradients=not config.compile),
            DeadParts(distiller.student, names, patience, device),
        )

    @property
    def step_ms(self) -> float:
        """Milliseconds of the median step since this start; if it has hardly begun, of the start before."""
        if len(self.durations) <= UNTIMED_STEPS and self.earlier_step_ms:
            return self.earlier_step_ms
        timed = self.durations[min(UNTIMED_STEPS, len(self.durations) - 1) :]
        return 1000 * statistics.median(timed) if timed else 0.0

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [parameter for parameter in self.distiller.parameters() if parameter.requires_grad]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the student the averaged weights, if there are such, until the block ends."""
        if self.average is None:
            yield
            return
        student = self.distiller.student
        kept = copy.deepcopy(student.state_dict())
        student.load_state_dict(self.average.module.state_dict())
        try:
            yield
        finally:
            student.load_state_dict(kept)

    def checkpoint(self, facts: Mapping[str, Any]) -> Checkpoint:
        """The run as it is now, with further `facts`."""
        counts, alive = self.dead.state()
        tensors = {f"model/{name}": value for name, value in self._model_state().items()}
        tensors |= {f"optimizer/{name}": value for name, value in named_state(self.optimizer, self._names).items()}
        if self.average is not None:
            tensors |= {f"average/{name}": value for name, value in self.average.state_dict().items()}
        return Checkpoint(
            self.step,
            tensors | {"alive": alive},
            {
                "seconds": self.seconds,
                "cpu_seconds": self.cpu_seconds,
                "cache_hits": self.cache_hits,
                "cache_misses": self.cache_misses,
                "with_boxes": self.with_boxes,
                "step_ms": self.step_ms,
                "window": self.window.values,
                "history": self.history,
                "evaluations": self.evaluations,
                "probes": self.probes,
                "scaler": self.scaler.state_dict(),
                "silence": self.silence.state(),
                "dead": counts,
                **facts,
            },
        )

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint. Raises KDError if its tensors do not fit these models."""
        tensors, facts = checkpoint.tensors, checkpoint.facts
        try:
            self.distiller.load_state_dict({**_below("model/", tensors), _EXTRA: {"step": checkpoint.step}})
            if self.average is not None:
                self.average.load_state_dict(_below("average/", tensors))
            load_named_state(self.optimizer, self._names, _below("optimizer/", tensors))
            counts, alive = facts["dead"], tensors["alive"]
            self.dead.load(counts, alive)
        except (RuntimeError, KeyError) as error:
            raise KDError(
                f"the checkpoint of step {checkpoint.step} does not fit these models or methods: {error}. Build "
                "them as before, or choose another folder"
            ) from error
        self.scaler.load_state_dict(facts["scaler"])
        self.silence.load(facts["silence"])
        self.step = checkpoint.step
        self.seconds = facts["seconds"]
        self.cpu_seconds = facts.get("cpu_seconds")
        self.cache_hits, self.cache_misses = facts.get("cache_hits", 0), facts.get("cache_misses", 0)
        self.with_boxes = facts["with_boxes"]
        self.earlier_step_ms = facts["step_ms"]
        self.window = Window(facts["window"])
        self.history = facts["history"]
        self.evaluations = facts["evaluations"]
        self.probes = facts.get("probes", [])  # earlier versions had none

    def _model_state(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.distiller.state_dict().items() if name != _EXTRA}

    @property
    def _names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in self.distiller.named_parameters()}


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed all that detectors and methods may draw from, for one step in one process."""
    number = int.from_bytes(sha256(f"{seed} {step} {rank}".encode()).digest()[:8], "big")
    torch.manual_seed(number % 2**63)
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002 - libraries draw from it
