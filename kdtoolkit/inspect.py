"""Detectors and pairs of them as the toolkit sees them, for `kd inspect` and `kd adapters`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kdtoolkit.compatibility import why_refused
from kdtoolkit.contract import Capability, DetectorAdapter, DetectorSpec, Method
from kdtoolkit.errors import KDError
from kdtoolkit.libraries import adapt
from kdtoolkit.listing import columns, definitions
from kdtoolkit.methods import all_methods

Pair = tuple[DetectorSpec, DetectorSpec]
"""Student and teacher."""


@dataclass(frozen=True)
class Inspection:
    """What a detector shows: its spec, and sizes measured on one image.

    `grids` are (H, W) of each level and `priors` their number on the image that the detector makes of a square one of
    `image_size` pixels, which is `canvas` (H, W) large. `multiply_adds` are of one such pass up to the predictions.
    """

    adapter: str
    spec: DetectorSpec
    parameters: int
    trainable: int
    image_size: int
    canvas: tuple[int, int]
    grids: tuple[tuple[int, int], ...]
    priors: int
    multiply_adds: int


@torch.no_grad()
def inspect_detector(model: nn.Module | DetectorAdapter, image_size: int = 256) -> Inspection:
    """Look at a detector, in eval mode, by one pass over a random image of `image_size` pixels.

    Raises KDError where no adapter knows the class, or where the detector cannot be run on such an image.
    """
    adapter = adapt(model)
    training = adapter.model.training
    learned = [p for p in adapter.model.parameters() if p.requires_grad]
    adapter.model.eval().requires_grad_(False)  # windowed attention trips the counter where it may need gradients
    try:
        device = next(adapter.model.parameters()).device
        image = torch.rand(3, image_size, image_size, generator=torch.Generator().manual_seed(0)).to(device)
        with FlopCounterMode(display=False) as counter:
            batch = adapter.prepare([image])
            features = adapter.features(batch)
            trace = adapter.head(features, batch)
    except KDError:
        raise
    except Exception as error:  # whatever arguments that its library does not check lead to
        raise KDError(
            f"{type(adapter.model).__name__} cannot be run on an image of {image_size} x {image_size} px "
            f"({type(error).__name__}: {str(error)[:300]}): check its arguments and the image size"
        ) from error
    finally:
        adapter.model.train(training)
        for parameter in learned:
            parameter.requires_grad_(True)
    return Inspection(
        adapter=type(adapter).__name__,
        spec=adapter.spec,
        parameters=sum(p.numel() for p in adapter.model.parameters()),
        trainable=sum(p.numel() for p in learned),
        image_size=image_size,
        canvas=(batch.images.shape[-2], batch.images.shape[-1]),
        grids=tuple((level.shape[-2], level.shape[-1]) for level in features),
        priors=trace.predictions.priors.boxes.shape[-2],
        multiply_adds=counter.get_total_flops() // 2,  # torch counts both
    )


@dataclass(frozen=True)
class Verdict:
    """Whether a method can distil a pair: `reason` says why not, `mends` what the two would have to have in common.

    `mends` are the fewest changes that are enough; there are none where only another kind of detector would do.
    """

    reason: str | None = None
    mends: tuple[str, ...] = ()


def judge_pair(student: DetectorSpec, teacher: DetectorSpec) -> dict[str, Verdict]:
    """Whether each method, with its default settings, can distil this pair."""
    verdicts = {}
    for name, method in all_methods().items():
        reason = why_refused(method, student, teacher)
        verdicts[name] = Verdict(reason, () if reason is None else _mends(method, student, teacher))
    return verdicts


def _mends(method: type[Method], student: DetectorSpec, teacher: DetectorSpec) -> tuple[str, ...]:
    """What makes the method's own check pass when the two detectors agree in it, found by trying."""
    differ = {what: change for what, change in _AGREEMENTS.items() if change(student, teacher) != (student, teacher)}
    for count in range(1, len(differ) + 1):
        for chosen in combinations(differ, count):
            changed = student, teacher
            for what in chosen:
                changed = differ[what](*changed)
            if why_refused(method, *changed) is None:
                return chosen
    return ()


def _equal_levels(student: DetectorSpec, teacher: DetectorSpec) -> Pair:
    levels = len(teacher.strides)
    stages = (
        replace(stage, channels={branch: each[:1] * levels for branch, each in stage.channels.items()})
        if stage.spatial
        else stage
        for stage in student.stages
    )
    return (
        replace(
            student,
            strides=teacher.strides,
            channels=student.channels[:1] * levels,
            priors_per_cell=student.priors_per_cell[:1] * levels,
            stages=tuple(stages),
        )
        if student.strides != teacher.strides
        else student
    ), teacher


def _equal_bins(student: DetectorSpec, teacher: DetectorSpec) -> Pair:
    bins = teacher.bins or student.bins
    if not bins:
        return student, teacher
    shown = frozenset({Capability.DISTRIBUTIONS})
    ours, theirs = (replace(spec, bins=bins, capabilities=spec.capabilities | shown) for spec in (student, teacher))
    return ours, theirs


# What two detectors can be made to agree in: their specs, changed so that they do. Levels come before what is counted
# in each of them.
_AGREEMENTS: Mapping[str, Callable[[DetectorSpec, DetectorSpec], Pair]] = {
    "equal class counts": lambda s, t: (replace(s, num_classes=t.num_classes), t),
    "equal pyramid levels": _equal_levels,
    "equal numbers of priors a cell": lambda s, t: (replace(s, priors_per_cell=t.priors_per_cell), t),
    "sigmoid scores in both": lambda s, t: (replace(s, activation="sigmoid"), replace(t, activation="sigmoid")),
    "box distributions over equal bins": _equal_bins,
}


def print_inspection(found: Inspection, console: Console) -> None:
    """Print a detector's sizes, capabilities, levels, stages, and the methods that apply."""
    spec = found.spec
    facts = definitions()
    for title, fact in _facts(found).items():
        facts.add_row(title, Text(fact))
    console.print(facts)

    height, width = found.canvas
    _print_title("levels", console)
    levels = columns("level", "stride", "channels", f"grid at {width} x {height}", "priors a cell")
    each = spec.priors_per_cell or ("",) * len(spec.strides)
    for i, (stride, channels, grid, count) in enumerate(
        zip(spec.strides, spec.channels, found.grids, each, strict=True)
    ):
        levels.add_row(str(i), str(stride), str(channels), f"{grid[1]} x {grid[0]}", str(count))
    console.print(levels)
    for title, part in (("stages of the head", spec), ("stages of the first stage", spec.first_stage)):
        if part is not None and part.stages:
            _print_title(title, console)
            console.print(_stages(part))

    _print_title("methods, for a twin of itself as the teacher", console)
    _print_verdicts(judge_pair(spec, spec), console)


def print_pair(student: Inspection, teacher: Inspection, console: Console) -> None:
    """Print both detectors side by side, what they have in common, and each method that works, or why it does not."""
    ours, theirs = _facts(student), _facts(teacher)
    table = Table(box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column("student", overflow="fold")
    table.add_column("teacher", overflow="fold")
    for title in dict.fromkeys([*ours, *theirs]):
        table.add_row(title, Text(ours.get(title, "-")), Text(theirs.get(title, "-")))
    console.print(table)
    common = [stride for stride in student.spec.strides if stride in teacher.spec.strides]
    shared = definitions()
    shared.add_row("common strides", ", ".join(map(str, common)) or "none")
    if student.spec.num_classes != teacher.spec.num_classes:
        shared.add_row("class counts", f"{student.spec.num_classes} and {teacher.spec.num_classes}: they differ")
    console.print()
    console.print(shared)
    _print_title("methods", console)
    _print_verdicts(judge_pair(student.spec, teacher.spec), console)


def print_families(families: Mapping[str, Callable[[int], nn.Module]], console: Console) -> None:
    """Print each family of detectors, what it predicts at, and what it shows to methods."""
    table = columns("family", "predicts at", "shows")
    for name, example in families.items():
        spec = adapt(example(3)).spec
        table.add_row(Text(name), str(spec.priors), ", ".join(sorted(spec.capabilities)))
    console.print(table)


def _print_title(text: str, console: Console) -> None:
    console.print(Text(f"\n{text}", style="bold"))


def _print_verdicts(verdicts: Mapping[str, Verdict], console: Console) -> None:
    table = definitions()
    works = [name for name, verdict in verdicts.items() if verdict.reason is None]
    table.add_row(Text("work", style="green"), Text(", ".join(works) or "none"))
    for name, verdict in verdicts.items():
        if verdict.reason is not None:
            mend = f"\nwould work with {', '.join(verdict.mends)}" if verdict.mends else ""
            table.add_row(Text(name), Text(f"refused: {verdict.reason}").append(mend, style="dim"))
    console.print(table)
    if any(verdict.reason and not verdict.mends for verdict in verdicts.values()):
        line = "Where no mend is named, it takes a detector of another kind: `kd adapters --matrix`."
        console.print(Text(f"\n{line}"))


def _facts(found: Inspection) -> dict[str, str]:
    spec = found.spec
    frozen = "" if found.trainable == found.parameters else f", of which {found.trainable / 1e6:.2f} M are trained"
    height, width = found.canvas
    facts = {
        "detector": f"{spec.name} ({found.adapter})",
        "classes": f"{spec.num_classes}, {spec.activation} scores",
        "parameters": f"{found.parameters / 1e6:.2f} M{frozen}",
        "multiply-adds": f"{found.multiply_adds / 1e9:.2f} G for an image of {width} x {height} px",
        "strides": ", ".join(map(str, spec.strides)),
        "priors": _priors(found),
    }
    if spec.bins:
        facts["box sides"] = f"distributions over {len(spec.bins)} bins, {spec.bins[0]:g} to {spec.bins[-1]:g}"
    return {**facts, "shows": ", ".join(sorted(spec.capabilities))}


def _priors(found: Inspection) -> str:
    spec = found.spec
    if spec.priors.on_grid:
        return f"{found.priors} {spec.priors}"
    return f"{found.priors} {spec.priors} (of the make: {spec.prior_form})"


def _stages(spec: DetectorSpec) -> Table:
    table = columns("stage", "state after", "shape", "channels of its branches")
    for i, stage in enumerate(spec.stages):
        channels = "; ".join(
            f"{branch} {', '.join(map(str, dict.fromkeys(each)))}" for branch, each in stage.channels.items()
        )
        table.add_row(str(i), Text(stage.name), "maps" if stage.spatial else "vectors", Text(channels))
    return table
