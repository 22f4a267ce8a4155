"""`kd probe`: what each loss of a distillation does to the student, and which weights to set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from kdtoolkit.distiller import Distiller
from kdtoolkit.engine import group
from kdtoolkit.engine.inputs import beside_teacher
from kdtoolkit.engine.measuring import probe_batches
from kdtoolkit.engine.optim import frozen
from kdtoolkit.engine.precision import resolve_precision
from kdtoolkit.engine.train import train
from kdtoolkit.errors import KDError
from kdtoolkit.method_use import MethodUse
from kdtoolkit.probe_words import Verdict, sentences, table, verdicts
from kdtoolkit.probing import ONE_PROCESS, Probe
from kdtoolkit.words import counted, duration
from kdtoolkit.workflow.auto import scaled
from kdtoolkit.workflow.batch import with_memory
from kdtoolkit.workflow.detecting import found_device
from kdtoolkit.workflow.display import Clock, Display
from kdtoolkit.workflow.options import ProbeOptions
from kdtoolkit.workflow.prepare import Prepared, prepare

AFTER = 50  # steps that a student with a new head is trained before: its first gradients are like no later ones


@dataclass(frozen=True)
class Found:
    """What `kd probe` found.

    `uses`: the methods as they were, by name. `proposed`: the same with weights for the share.
    """

    probe: Probe
    uses: dict[str, MethodUse]
    proposed: dict[str, MethodUse]
    after: int
    notes: tuple[str, ...]

    @property
    def fine(self) -> bool:
        """Whether no method drowns the task, does nothing or pulls against the task."""
        return all(found == [Verdict.FINE] for found in verdicts(self.probe).values())

    def lines(self) -> Iterator[str]:
        """The table, the sentences and the proposals."""
        yield ""
        yield from table(self.probe)
        yield ""
        yield from (f"{sentence}." for sentence in sentences(self.probe))
        yield ""
        yield from self._proposals()

    def _proposals(self) -> Iterator[str]:
        share = f"{100 * self.probe.share:g} %"
        if held := [str(use) for use in self.uses.values() if "share" in use.args]:
            yield f"The share is held in training, so the weights do not matter: {', '.join(held)}"
        free = {
            name: use
            for name, use in self.uses.items()
            if "share" not in use.args and self.probe.factor(name) is not None
        }
        if all(self.proposed[name] == use for name, use in free.items()):
            return
        found = verdicts(self.probe)
        if any(found[name] == [Verdict.FINE] for name in free):
            yield "A method that neither drowns the task nor does nothing may keep its weights."
        weights = {name: self.proposed[name] for name in free if "share" not in self.proposed[name].args}
        if weights:
            yield f"Weights for a share of {share} each at this point:"
            yield f"  {_options(weights)}"
        yield f"{'Or let' if weights else 'Let'} the share of {share} be held from the first step to the last:"
        yield f"  {_options({name: _held(use, self.probe.share) for name, use in free.items()})}"


def run(options: ProbeOptions, *, quiet: bool = False) -> Found:
    """Prepare a distillation as `kd distill` does, and probe it. Raises KDError."""
    if group.started() > 1:
        raise KDError(ONE_PROCESS)
    console, loud = Console(quiet=quiet), Console(stderr=True)
    device = found_device(options.device)
    with with_memory(), Display(console, loud) as display:
        prepared = prepare(options, device, display.counting)
        config = prepared.config
        default = 0 if prepared.student.trained else AFTER
        after = default if options.after is None else options.after
        if after:
            _train_alone(prepared, after, display)
        with frozen(prepared.student.model, config) as set_training:
            set_training(prepared.distiller)
            found = probe_batches(
                prepared.distiller,
                beside_teacher(prepared.distiller, prepared.images.train),
                config,
                seed=options.seed,
                precision=resolve_precision(config.precision, device),
                device=device,
                count=options.batches,
                start=after * config.accumulation,  # the student was trained on those before
                share=options.share,
            )
        size = config.batch_size // config.accumulation
        when = f"after {counted(after, 'step')} without methods" if after else "before the first step"
        images = counted(found.batches * size, "image")
        display.line(f"probed {images} in batches of {size}, {when}, in {duration(found.seconds)}")
        for note in prepared.notes:
            display.line(f"note: {note}")
    uses = dict(zip(prepared.distiller.names, prepared.methods, strict=True))
    return Found(found, uses, proposed(found, uses), after, prepared.notes)


def to_json(found: Found) -> dict[str, Any]:
    """All that was found, for programs."""
    probed = found.probe
    return {
        "share": probed.share,
        "batches": probed.batches,
        "after": found.after,
        "seconds": probed.seconds,
        "fine": found.fine,
        "agreement": dict(probed.agreement),
        "losses": {
            row.name: {
                "value": row.value,
                "parts": {part: asdict(m) | {"share": m.share} for part, m in row.parts.items()},
            }
            for row in probed.rows
        },
        "methods": {
            name: {
                "method": str(found.uses[name]),
                "held": probed.held.get(name),
                "verdicts": [verdict.value for verdict in each],
                "factor": probed.factor(name),
                "proposed": str(found.proposed[name]),
            }
            for name, each in verdicts(probed).items()
        },
        "sentences": list(sentences(probed)),
        "notes": list(found.notes),
    }


def _train_alone(prepared: Prepared, steps: int, display: Display) -> None:
    """Train the student without the methods, as a run begins."""
    config = prepared.config.model_copy(update={"steps": steps, "schedule": "constant", "ema": 0.0})
    train(
        Distiller(None, prepared.student.model),
        prepared.images.train,
        config,
        seed=prepared.options.seed,
        report=display.training("training without methods", Clock(steps, 0, 0.0)),
    )


def proposed(found: Probe, uses: Mapping[str, MethodUse]) -> dict[str, MethodUse]:
    """The methods with weights for the share, by name; held at the share if their weights cannot be given.

    A method is as it was if its weights have the share already, if its share is held, or if it has no gradient.
    """
    return {name: _proposed(use, found.factor(name), found.share) for name, use in uses.items()}


def _proposed(use: MethodUse, factor: float | None, share: float) -> MethodUse:
    if "share" in use.args or factor is None:
        return use
    try:
        before, after = _rounded(scaled(use, 1.0)), _rounded(scaled(use, factor))
    except KDError:
        return _held(use, share)
    return use if before == after else after


def _rounded(use: MethodUse) -> MethodUse:
    """The method with its weights in two digits."""
    rounded = {
        name: float(f"{value:.2g}") if name.endswith("weight") and isinstance(value, float) else value
        for name, value in use.args.items()
    }
    return MethodUse.model_validate({use.name: rounded})


def _held(use: MethodUse, share: float) -> MethodUse:
    return MethodUse.model_validate({use.name: {**use.args, "share": share}})


def _options(uses: dict[str, MethodUse]) -> str:
    return " ".join(f'--method "{use}"' for use in uses.values())
