"""What the toolkit sees in a detector or a pair of detectors, for `kd inspect` and `kd adapters`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kdtoolkit.compatibility import why_no_student
from kdtoolkit.contract import Capability, DetectorAdapter, DetectorSpec, PriorKind, Recorded
from kdtoolkit.errors import KDError
from kdtoolkit.libraries import adapt
from kdtoolkit.listing import columns, definitions
from kdtoolkit.modes import in_eval_mode
from kdtoolkit.verdicts import Verdict, judge_pair


@dataclass(frozen=True)
class Inspection:
    """The facts about a detector, and what one pass over a square image of `image_size` pixels shows.

    Attributes:
        adapter: class name of the adapter.
        spec: the detector's facts.
        parameters: number of the model's parameters.
        trainable: number of the parameters that are trained.
        image_size: side of the image in pixels.
        resized: (height, width) of the image after the detector's own resizing.
        canvas: (height, width) of the image after padding, which is what the backbone gets.
        grids: (H, W) of each level.
        priors: number of priors; 0 if the detector shows features alone.
        multiply_adds: multiply-adds of the pass, up to the predictions.
    """

    adapter: str
    spec: DetectorSpec
    parameters: int
    trainable: int
    image_size: int
    resized: tuple[int, int]
    canvas: tuple[int, int]
    grids: tuple[tuple[int, int], ...]
    priors: int
    multiply_adds: int


@torch.no_grad()
def inspect_detector(model: nn.Module | DetectorAdapter, image_size: int = 256) -> Inspection:
    """Run a detector once, in eval mode, on a random square image of `image_size` pixels, and say what it shows.

    Raises KDError if no adapter knows the model's class, or if the detector cannot run on such an image.
    """
    adapter = adapt(model)
    learned = [p for p in adapter.model.parameters() if p.requires_grad]
    adapter.model.requires_grad_(False)  # with gradients, the counter fails on windowed attention
    try:
        device = next(chain(adapter.model.parameters(), adapter.model.buffers())).device
        image = torch.rand(3, image_size, image_size, generator=torch.Generator().manual_seed(0)).to(device)
        with in_eval_mode(adapter.model), FlopCounterMode(display=False) as counter:
            batch = adapter.prepare([image])
            if adapter.spec.priors is PriorKind.DETECTIONS:  # a file has none of this image
                none = Recorded(boxes=image.new_zeros(0, 4), probabilities=image.new_zeros(0, adapter.spec.num_classes))
                batch = replace(batch, recorded=(none,))
            features = adapter.features(batch)
            shows_head = Capability.PREDICTIONS in adapter.spec.capabilities
            priors = adapter.head(features, batch).predictions.priors.boxes.shape[-2] if shows_head else 0
    except KDError:
        raise
    except Exception as error:  # a library may raise anything for arguments that it has not checked
        raise KDError(
            f"{type(adapter.model).__name__} cannot be run on an image of {image_size} x {image_size} px "
            f"({type(error).__name__}: {str(error)[:300]}): check the detector's arguments and the image size"
        ) from error
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
    return Inspection(
        adapter=type(adapter).__name__,
        spec=adapter.spec,
        parameters=sum(p.numel() for p in adapter.model.parameters()),
        trainable=sum(p.numel() for p in learned),
        image_size=image_size,
        resized=batch.sizes[0],
        canvas=(batch.images.shape[-2], batch.images.shape[-1]),
        grids=tuple((level.shape[-2], level.shape[-1]) for level in features),
        priors=priors,
        multiply_adds=counter.get_total_flops() // 2,  # torch counts multiplications and additions
    )


def print_inspection(found: Inspection, console: Console) -> None:
    """Print a detector's facts, levels and stages, and the methods that work for it."""
    spec = found.spec
    facts = definitions()
    for title, fact in _facts(found).items():
        facts.add_row(title, Text(fact))
    console.print(facts)

    if spec.strides:
        _print_title("levels", console)
        console.print(_levels(found))
    for title, part in (("stages of the head", spec), ("stages of the first stage", spec.first_stage)):
        if part is not None and part.stages:
            _print_title(title, console)
            console.print(_stages(part))

    if reason := why_no_student(spec):
        console.print(Text(f"\n{reason}. `kd inspect STUDENT --teacher THIS` shows which methods work."))
        return
    _print_title("methods, with a teacher of the same kind and size", console)
    _print_verdicts(judge_pair(spec, spec), console)


def print_pair(
    student_found: Inspection, teacher_found: Inspection, console: Console, *, teacher_scale: float = 1.0
) -> None:
    """Print both detectors side by side, what they share, which methods work, and why the others do not.

    `teacher_scale`: the size of the teacher's images beside the student's. Raises KDError if the student can only
    teach.
    """
    student_spec, teacher_spec = student_found.spec, teacher_found.spec.on_images_scaled_by(teacher_scale)
    if reason := why_no_student(student_spec):
        raise KDError(reason)
    ours, theirs = _facts(student_found), _facts(teacher_found)
    table = Table(box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column("student", overflow="fold")
    table.add_column("teacher", overflow="fold")
    for title in dict.fromkeys([*ours, *theirs]):
        table.add_row(title, Text(ours.get(title, "-")), Text(theirs.get(title, "-")))
    console.print(table)
    common = [stride for stride in student_spec.strides if stride in teacher_spec.strides]
    shared = definitions()
    if teacher_scale != 1:
        strides = ", ".join(map(str, teacher_spec.strides))
        shared.add_row("teacher's images", f"{teacher_scale:g} times the student's size: its strides count {strides}")
    shared.add_row("common strides", ", ".join(map(str, common)) or "none")
    if teacher_spec.num_classes and student_spec.num_classes != teacher_spec.num_classes:
        shared.add_row("class counts", f"{student_spec.num_classes} and {teacher_spec.num_classes}, which differ")
    console.print()
    console.print(shared)
    _print_title("methods", console)
    _print_verdicts(judge_pair(student_spec, teacher_spec), console)


def print_families(families: Mapping[str, Callable[[int], nn.Module]], console: Console) -> None:
    """Print each family of detectors, its adapter, what it predicts at, and what it shows to methods."""
    table = columns("family", "adapter", "predicts at", "shows")
    for name, example in families.items():
        adapter = adapt(example(3))
        spec = adapter.spec
        shows = ", ".join(sorted(spec.capabilities))
        table.add_row(Text(name), Text(type(adapter).__name__), str(spec.priors), shows)
    console.print(table)
    console.print(
        "\n`kd inspect MODEL` shows one detector with its adapter. MODEL is a name such as kdtoolkit/gfl, hf/detr or "
        "package.module:callable for your own or another package's.",
        highlight=False,
    )


def _print_title(text: str, console: Console) -> None:
    console.print(Text(f"\n{text}", style="bold"))


def _print_verdicts(verdicts: Mapping[str, Verdict], console: Console) -> None:
    table = definitions()
    works = [name for name, verdict in verdicts.items() if verdict.reason is None]
    table.add_row(Text("work", style="green"), Text(", ".join(works) or "none"))
    for name, verdict in verdicts.items():
        if verdict.reason is not None:
            mend = f"\nworks if the two have {', '.join(verdict.mends)}" if verdict.mends else ""
            table.add_row(Text(name), Text(f"refused: {verdict.reason}").append(mend, style="dim"))
    console.print(table)
    if settings := [verdict.settings for verdict in verdicts.values() if verdict.settings]:
        named = ", ".join(f"{each}()" for each in settings)
        line = f"Use the published settings for this student's kind: {named}. The defaults are for different detectors."
        console.print(Text(f"\n{line}"))
    if any(verdict.reason and not verdict.mends for verdict in verdicts.values()):
        line = "A refused method without 'works if' needs a different kind of detector: see `kd adapters --matrix`."
        console.print(Text(f"\n{line}"))


def _facts(found: Inspection) -> dict[str, str]:
    spec = found.spec
    shows_head = Capability.PREDICTIONS in spec.capabilities
    frozen = "" if found.trainable == found.parameters else f"; {found.trainable / 1e6:.2f} M of them are trained"
    facts = {
        "detector": f"{spec.name} ({found.adapter})",
        "classes": f"{spec.num_classes}, {spec.activation} scores" if shows_head else "none",
        "parameters": f"{found.parameters / 1e6:.2f} M{frozen}",
        "images": _images(found),
        "multiply-adds": f"{found.multiply_adds / 1e9:.2f} G for this image",
        "strides": ", ".join(map(str, spec.strides)) or "none",
        "priors": _priors(found),
    }
    if spec.bins:
        facts["box sides"] = f"distributions over {len(spec.bins)} bins, {spec.bins[0]:g} to {spec.bins[-1]:g}"
    return {**facts, "shows": ", ".join(sorted(spec.capabilities))}


def _images(found: Inspection) -> str:
    """What the detector does to the image before its backbone."""
    side, (height, width), (canvas_height, canvas_width) = found.image_size, found.resized, found.canvas
    steps = [f"{side} x {side} px"]
    if (height, width) != (side, side):
        steps.append(f"resized by the detector to {width} x {height}")
    if (canvas_height, canvas_width) != (height, width):
        steps.append(f"padded to {canvas_width} x {canvas_height}")
    return ", ".join(steps)


def _priors(found: Inspection) -> str:
    spec = found.spec
    if spec.priors in (PriorKind.DETECTIONS, PriorKind.NONE):
        return str(spec.priors)
    if spec.priors.on_grid:
        return f"{found.priors} {spec.priors}"
    return f"{found.priors} {spec.priors} (form: {spec.prior_form})"


def _levels(found: Inspection) -> Table:
    spec, (height, width) = found.spec, found.canvas
    levels = columns("level", "stride", "channels", f"grid at {width} x {height}", "priors a cell")
    each = spec.priors_per_cell or ("",) * len(spec.strides)
    for i, (stride, channels, grid, count) in enumerate(
        zip(spec.strides, spec.channels, found.grids, each, strict=True)
    ):
        levels.add_row(str(i), str(stride), str(channels), f"{grid[1]} x {grid[0]}", str(count))
    return levels


def _stages(spec: DetectorSpec) -> Table:
    table = columns("stage", "state after", "shape", "channels of its branches")
    for i, stage in enumerate(spec.stages):
        channels = "; ".join(
            f"{branch} {', '.join(map(str, dict.fromkeys(each)))}" for branch, each in stage.channels.items()
        )
        table.add_row(str(i), Text(stage.name), "maps" if stage.spatial else "vectors", Text(channels))
    return table
