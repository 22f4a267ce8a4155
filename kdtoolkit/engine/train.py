"""The training loop: reads from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdtoolkit import processes
from kdtoolkit.checks import without_recorded
from kdtoolkit.contract import RecordedAlone, Target
from kdtoolkit.data import DetectionDataset, LoadedBatch, batches, check_same_classes
from kdtoolkit.distiller import Distiller, Losses
from kdtoolkit.engine import group
from kdtoolkit.engine.arithmetic import Arithmetic
from kdtoolkit.engine.caching import resolve_cache, teacher_cache
from kdtoolkit.engine.checkpoint import Checkpoint
from kdtoolkit.engine.config import TrainConfig, Validation
from kdtoolkit.engine.folder import Keeper, RunFolder, opened
from kdtoolkit.engine.identity import identity
from kdtoolkit.engine.inputs import (
    beside_teacher,
    check_arguments,
    check_dataset,
    check_on_device,
    check_trainable,
    check_unlabelled,
    resolve_device,
    single_values_told,
)
from kdtoolkit.engine.interrupt import Interrupt, deferred
from kdtoolkit.engine.locate import locate_non_finite
from kdtoolkit.engine.measuring import evaluate_now, probe_now
from kdtoolkit.engine.memory import PeakMemory
from kdtoolkit.engine.mixture import alternate, unlabelled_steps
from kdtoolkit.engine.optim import frozen, lr_factor, set_rates
from kdtoolkit.engine.result import CacheUse, Progress, TrainResult, mean_metrics
from kdtoolkit.engine.state import RunState, Window, seed_step
from kdtoolkit.engine.stopwatch import Stopwatch
from kdtoolkit.errors import KDError, NonFiniteLossError
from kdtoolkit.probing import check_can_probe
from kdtoolkit.tf32 import tensor_float32

__all__ = ["Progress", "RunFolder", "TrainConfig", "TrainResult", "Validation", "lr_factor", "train"]

HISTORY_POINTS = 100
MIN_SCALE = 2.0**-24  # of float16 gradients: if they overflow at this scale, no scale suits them


def train(
    distiller: Distiller,
    dataset: DetectionDataset,
    config: TrainConfig,
    *,
    seed: int,
    device: str | torch.device | None = None,
    folder: RunFolder | None = None,
    validation: Validation | None = None,
    unlabelled: DetectionDataset | None = None,
    probe_at: Sequence[int] = (),
    report: Callable[[Progress], None] | None = None,
    until: int | None = None,
) -> TrainResult:
    """Train the distiller's student in place. Same seed, same machine, same result.

    Args:
        distiller: student, teacher and methods.
        dataset: the images to train on.
        config: how to train.
        seed: decides the order of images, their augmentation and everything else that is random.
        device: where the models lie; None asks the student itself.
        folder: where the run is kept. If a stopped run lies there, it goes on from its last checkpoint, and ends with
            the same weights and the same log as if it had not been stopped. None keeps nothing.
        validation: what to evaluate on, and how often; the weights of the best evaluation are kept in the folder.
        unlabelled: images without labels, such as `open_images(folder)`; labels that they have are not used. Some of
            the steps show these images, and in such a step the student learns from the teacher alone. The config's
            `unlabelled_share` says how many.
        probe_at: the steps after which to probe the methods (docs/probe.md): `TrainResult.probes`. Training does not
            change by it, and its time and memory do not count. In one process only.
        report: called in the first process, at the first step, about every second, and at the end.
        until: stop after this step of the schedule, with an evaluation and a checkpoint. The same call with a later
            step, or with None, goes on from there in the folder. None trains to the end.

    Several processes, started by torchrun, train as one: call `kdtoolkit.engine.group.join` before.

    Ctrl-C in a run with a folder ends it after the step that has begun, with a checkpoint; a second Ctrl-C ends it at
    once. If several processes train together, and without a folder, the first one ends it at once.

    Raises KDError before the first step in these cases. An argument has a wrong type, or the seed over 64 bits. All of
    the student is frozen. Its number of classes differs from that of a data set, or the two data sets have different
    classes. The models lie on different devices, or not on `device`. No method can teach by `unlabelled`, or there is
    nothing to probe. The folder holds a different run, is in use or cannot be written.

    Raises NonFiniteLossError if a loss term is NaN or infinite. The student then has the weights of the last good step.
    """
    check_arguments(distiller, config)
    if not -(2**63) <= seed < 2**63:
        raise KDError(f"seed is {seed}; torch takes 64 bits: choose a smaller one")
    check_dataset(dataset, distiller.student_adapter.spec)
    group.check_joined()
    rank, count = group.rank(), processes.count()
    if config.batch_size % (count * config.accumulation):
        raise KDError(
            f"batch_size ({config.batch_size}) must be a multiple of {count * config.accumulation}: of processes "
            f"({count}) times accumulation ({config.accumulation})"
        )
    if probe_at:
        check_can_probe(distiller)
    if unlabelled is not None:
        check_unlabelled(distiller, unlabelled)
        unlabelled = beside_teacher(distiller, unlabelled)
    dataset = beside_teacher(distiller, dataset)
    distiller.run_steps = config.steps
    end = config.steps if until is None else until
    if not 1 <= end <= config.steps:
        raise KDError(f"until ({until}) is a step of the schedule: it must be from 1 to {config.steps}")
    without = unlabelled_steps(distiller, config, dataset, unlabelled)[:end]
    dataset = dataset.in_memory()  # before the clock starts
    unlabelled = None if unlabelled is None else unlabelled.in_memory()
    device = resolve_device(distiller.student, device)
    check_on_device(distiller, device)
    arithmetic = Arithmetic.of_config(distiller, config, device)
    precision = arithmetic.precision
    seed_step(seed, 0, rank)
    config = resolve_cache(
        distiller, dataset, unlabelled, config, seed=seed, device=device, has_folder=folder is not None
    )
    student = distiller.student
    distiller.accumulation = config.accumulation
    distiller.recompute |= config.recompute
    distiller.restart()  # schedules and shares of methods begin with this run
    arithmetic.lay_out(distiller)

    if validation is not None:
        check_dataset(validation.dataset, distiller.student_adapter.spec)
        check_same_classes(dataset, validation.dataset)
        validation = replace(validation, dataset=validation.dataset.in_memory())

    with ExitStack() as stack:
        stack.enter_context(tensor_float32(config.tf32))
        set_training = stack.enter_context(frozen(student, config))
        check_trainable(student)  # with the parts that the config freezes
        state = RunState.begin(distiller, config, precision, device)
        keeper = Keeper()

        def enter() -> Checkpoint | None:
            nonlocal keeper
            assert folder is not None  # entered only then
            made_of = identity(distiller, config, dataset, unlabelled, validation, seed, device, arithmetic)
            keeper, found = stack.enter_context(opened(folder, made_of))
            return found

        if folder is not None and (found := group.from_first(enter)) is not None:
            state.load(found)
        place = None if folder is None else folder.cache_folder
        cache = stack.enter_context(teacher_cache(distiller, config, place))
        model = _wrapped(distiller, config, device)
        optimizer, average, scaler = state.optimizer, state.average, state.scaler
        parameters = state.trained
        window = Window()
        first = state.step
        set_training(distiller)

        def read(images: DetectionDataset, chosen: bool) -> Iterator[LoadedBatch]:
            return batches(
                images,
                batch_size=config.batch_size,
                steps=without.count(chosen),
                seed=seed,
                augment=config.augmentation,
                input_size=config.input_size,
                workers=config.workers,
                start=without[:first].count(chosen),
                share=(rank, count),
                pin=device.type == "cuda",
                keys=cache is not None,
            )

        data = alternate(without[first:], read(dataset, False), read(unlabelled, True) if unlabelled else iter(()))
        images_in_all = len(dataset) + (0 if unlabelled is None else len(unlabelled))
        if cache is not None:
            earlier = state.cache_hits - cache.hits, state.cache_misses - cache.misses  # a cache may be older
        watch = Stopwatch(state.seconds, state.cpu_seconds or 0.0)
        memory = PeakMemory(device)
        interrupt = stack.enter_context(deferred()) if folder is not None and count == 1 else Interrupt()
        reported = ended = time.perf_counter()
        for step, (images, targets, keys) in enumerate(data, first):
            begun = time.perf_counter()
            waited = begun - ended
            seed_step(seed, step, rank)
            lr = set_rates(optimizer, step, config)
            buffers = [buffer.clone() for buffer in student.buffers()]  # batch norm's change in a forward already
            optimizer.zero_grad(set_to_none=True)
            parts, boxes = Window(), False
            for last_part, some, their_targets, their_keys in _parts(images, targets, keys, config.accumulation):
                shown = [image.to(device, non_blocking=True) for image in some]
                with nullcontext() if last_part or count == 1 else model.no_sync():
                    with arithmetic.forward_pass(), single_values_told():
                        losses = model(shown, their_targets, their_keys)
                    values, has_boxes = _values(losses, their_targets)
                    if bad := _non_finite({name: values[name] for name in losses}):
                        with arithmetic.forward_pass():
                            where = locate_non_finite(distiller, shown, their_targets)
                        _stop(student, buffers, step, bad, where)
                    values = {name: value for name, value in values.items() if math.isfinite(value)}
                    if has_boxes:
                        state.silence.observe(losses, values)
                    scaler.scale(losses.total / config.accumulation).backward()
                parts.add(values)
                boxes = boxes or has_boxes
            scaler.unscale_(optimizer)
            norms = _gradient_norms(parameters)
            norm = torch.linalg.vector_norm(norms)
            if overflow := not math.isfinite(norm_value := norm.item()):
                if precision != "float16" or scaler.get_scale() < MIN_SCALE:
                    bad = f"gradient norm = {norm_value}"
                    _stop(student, buffers, step, bad, "all losses are finite, their gradient is not")
            else:
                state.dead.observe(norms, boxes)
                if config.clip_norm:
                    nn.utils.clip_grads_with_norm_(parameters, config.clip_norm, norm)
            scaler.step(optimizer)  # leaves a step out where float16 gradients overflowed
            scaler.update()
            if average is not None:
                average.update_parameters(student)

            now = time.perf_counter()
            state.durations.append(now - begun)
            last = step + 1 == end
            values = parts.flush()  # of loss terms and metrics
            state.step = step + 1
            state.seconds, cpu_seconds = watch.read()
            state.cpu_seconds = None if state.cpu_seconds is None else cpu_seconds
            state.with_boxes += boxes
            if cache is not None:
                state.cache_hits, state.cache_misses = earlier[0] + cache.hits, earlier[1] + cache.misses
            window.add({name: value for name, value in values.items() if name in losses})
            state.window.add(values)
            if (step + 1) % max(1, config.steps // HISTORY_POINTS) == 0 or last:
                state.history.append({"step": step + 1, "lr": lr, **state.window.flush()})
            keeper.log(step + 1, {"lr": lr, **values} | ({} if overflow else {"gradient_norm": norm_value}))
            keeper.speed(step + 1, now - begun, waited, config.batch_size, device)
            if validation is not None and validation.due(step + 1, config.batch_size, images_in_all, last=last):
                with watch.paused(), memory.paused():
                    evaluate_now(state, validation, config, device, keeper)
                    set_training(distiller)
            if step + 1 in probe_at:
                with watch.paused(), memory.paused():
                    probe_now(state, dataset, seed=seed, precision=precision, device=device, keeper=keeper)
            keeper.save(state, last=last or interrupt.asked)
            if interrupt.asked:
                raise KeyboardInterrupt
            if report is not None and rank == 0 and (now - reported > 1 or step == first or last):
                warnings = (*state.silence.warnings(), *state.dead.warnings(), *_not_held(distiller))
                warnings += (*keeper.notices, *(() if cache is None else cache.notices))
                evaluated = tuple((int(row["step"] or 0), row["eval/ap"]) for row in state.evaluations)
                report(Progress(step + 1, config.steps, window.flush(), state.seconds, warnings, evaluated))
                reported = now
            ended = time.perf_counter()

        group.alike(student)
        if average is not None:
            student.load_state_dict(average.module.state_dict())
            group.alike(student)
        keeper.finish(student)
        warnings = (*state.silence.warnings(final=True), *state.dead.warnings(), *_not_held(distiller))
        if not state.with_boxes:
            warnings = (f"none of the images of the {end} steps has a box: the student has seen background alone",)
        return TrainResult(
            steps=state.step,
            seconds=state.seconds,
            step_ms=state.step_ms,
            cpu_seconds=state.cpu_seconds,
            peak_memory_mb=memory.read(),
            history=state.history,
            warnings=list(warnings),
            notices=[*keeper.notices, *([] if cache is None else cache.notices)],
            evaluations=state.evaluations,
            probes=state.probes,
            metrics=mean_metrics(distiller.metrics, state.history),
            cache=None if cache is None else CacheUse(state.cache_hits, state.cache_misses, cache.bytes),
        )


def _wrapped(distiller: Distiller, config: TrainConfig, device: torch.device) -> Any:
    """What is called in each step: the distiller, compiled and joined with other processes where that is asked for."""
    model = torch.compile(distiller) if config.compile else distiller
    if processes.count() == 1:
        return model
    devices = None if device.index is None else [device.index]
    # Otherwise gradients are put together anew after the first step, in the order in which they came. More than two
    # processes then add them up in another order than before, and a run that goes on would differ in the last bits.
    return DistributedDataParallel(model, device_ids=devices, find_unused_parameters=processes.count() > 2)


def _parts(
    images: list[Tensor],
    targets: list[Target] | list[RecordedAlone] | None,
    keys: list[str] | None,
    count: int,
) -> Iterator[tuple[bool, list[Tensor], list[Target] | list[RecordedAlone] | None, list[str] | None]]:
    """A process's batch in `count` parts of one size, each with whether it is the last."""
    size = len(images) // count
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        own = None if targets is None else targets[part]
        yield start + size == len(images), images[part], own, None if keys is None else keys[part]


def _values(
    losses: Losses, targets: Sequence[Target] | Sequence[RecordedAlone] | None
) -> tuple[dict[str, float], bool]:
    """Loss terms, metrics and whether there is a box, over all processes: means, which are those of the whole batch."""
    names = [*losses, *losses.metrics]
    terms = torch.stack([value.detach().float() for value in (*losses.values(), *losses.metrics.values())])
    boxes = any(len(target["boxes"]) for target in without_recorded(targets)[0] or ())
    if processes.count() > 1:
        *terms_, boxes_ = group.means(torch.cat([terms, terms.new_tensor([float(boxes)])])).tolist()
        return dict(zip(names, terms_, strict=True)), boxes_ > 0
    return dict(zip(names, terms.tolist(), strict=True)), boxes


def _gradient_norms(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The norm of each parameter's gradient (P,), 0 where it has none. Does not wait for the device."""
    # A private name that torch's own get_total_norm rests on; it takes all gradients at once.
    norms = iter(torch._foreach_norm([p.grad for p in parameters if p.grad is not None]))
    none = torch.zeros((), device=parameters[0].device)
    return torch.stack([none if p.grad is None else next(norms) for p in parameters])


def _not_held(distiller: Distiller) -> Iterator[str]:
    """A warning for each method whose share was to be held and is not."""
    return (f"{name}: {held.warning}" for name, held in distiller.held.items() if held.warning)


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
