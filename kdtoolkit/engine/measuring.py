"""What a run measures in the middle of training: AP, and the gradients of its methods. Training goes on unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from kdtoolkit.contract import Method
from kdtoolkit.data import DetectionDataset, batches
from kdtoolkit.distiller import Distiller
from kdtoolkit.engine import group
from kdtoolkit.engine.caching import with_cache
from kdtoolkit.engine.config import TrainConfig, Validation
from kdtoolkit.engine.evaluate import METRICS, evaluate
from kdtoolkit.engine.folder import Keeper
from kdtoolkit.engine.inputs import single_values_told
from kdtoolkit.engine.precision import Precision
from kdtoolkit.engine.state import RunState
from kdtoolkit.errors import NonFiniteLossError
from kdtoolkit.probing import ALL, TASK, Probe, probe

PROBE_BATCHES = 4  # enough for most, as in `kd probe`


def equal_shares(steps: int, count: int) -> tuple[int, ...]:
    """The steps after which 1, 2 ... `count` equal shares of a run are done. The last one is the run's last step."""
    return tuple(dict.fromkeys(-(-steps * share // count) for share in range(1, count + 1)))


def evaluate_now(
    state: RunState, validation: Validation, config: TrainConfig, device: torch.device, keeper: Keeper
) -> None:
    """Evaluate the student as it would be kept if the run ended here; store its weights if none was better so far."""
    student = state.distiller.student
    with state.averaged():
        group.alike(student)
        found = evaluate(
            state.distiller.student_adapter,
            validation.dataset,
            batch_size=validation.batch_size,
            device=device,
            input_size=config.input_size,
            together=True,
            max_detections=validation.max_detections,
        )
        keeper.evaluated(found.ap, student)
    row = {f"eval/{name}": getattr(found, name) for name in METRICS}
    state.evaluations.append({"step": state.step, **row})
    keeper.log(state.step, row)


def probe_now(
    state: RunState, dataset: DetectionDataset, *, seed: int, precision: Precision, device: torch.device, keeper: Keeper
) -> None:
    """Probe the methods on the run's first batches, so that all points of a run are measured on the same images.

    Values are None if a loss was not finite.
    """
    distiller, config = state.distiller, state.config
    names = [f"{kind}/{name}" for name in distiller.names for kind in ("conflict", "share")]
    row: dict[str, float | None] = dict.fromkeys(names)
    try:
        found = probe_batches(
            distiller, dataset, config, seed=seed, precision=precision, device=device, count=PROBE_BATCHES
        )
    except NonFiniteLossError:
        pass
    else:
        row |= dict(_effects(found, distiller, state.step - 1))
    state.probes.append({"step": state.step, **row})
    keeper.log(state.step, row)


def probe_batches(
    distiller: Distiller,
    dataset: DetectionDataset,
    config: TrainConfig,
    *,
    seed: int,
    precision: Precision,
    device: torch.device,
    count: int,
    start: int = 0,
    share: float = 0.1,
) -> Probe:
    """Probe a distiller on `count` batches that a run would show it, from batch `start` on.

    With accumulation, a batch is what the memory takes at once. Gradients of float16 would need a scale, so they are
    measured in float32. Raises the errors of `probe`.
    """
    shown = batches(
        dataset,
        batch_size=config.batch_size // config.accumulation,
        start=start,
        steps=start + count,
        seed=seed,
        augment=config.augmentation,
        input_size=config.input_size,
    )
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
    with autocast, single_values_told(), with_cache(distiller, None):
        return probe(distiller, ((batch.images, batch.targets) for batch in shown), share)


def _effects(found: Probe, distiller: Distiller, step: int) -> Iterator[tuple[str, float]]:
    """The cosine of each method's gradient with the task's, and its share with the weights that it has in this step.

    A method that runs in every second step has the share of the steps in which it runs. The task's own cosine is
    between two batches: what to expect of two losses that want the same.
    """
    if ALL in found.agreement:
        yield f"conflict/{TASK}", found.agreement[ALL]
    for name, method in zip(distiller.names, distiller.methods, strict=True):
        assert isinstance(method, Method)
        factor = replace(method.schedule, every=1).factor(step, distiller.run_steps)
        if method.held is not None:
            factor *= method.held.factor
        if ALL in (parts := found.methods[name].times(factor).parts):
            yield f"conflict/{name}", parts[ALL].cosine
            yield f"share/{name}", parts[ALL].share
