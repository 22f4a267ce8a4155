"""Detectors and methods as the toolkit sees them, for `kd inspect` and `kd methods NAME`."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kdtoolkit.contract import DetectorAdapter, DetectorSpec, Method, adapt
from kdtoolkit.distiller import refusal
from kdtoolkit.errors import KDError
from kdtoolkit.methods import all_methods, published_settings


@dataclass(frozen=True)
class Inspection:
    """What a detector shows: its spec, sizes measured on one image, and each method's reason to refuse it (or None).

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
    methods: dict[str, str | None]


@torch.no_grad()
def inspect_detector(model: nn.Module | DetectorAdapter, image_size: int = 256) -> Inspection:
    """Look at a detector, in eval mode, by one pass over a random image of `image_size` pixels.

    `methods` are those that can distil it from a twin of itself. Raises KDError where no adapter knows the class.
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
    parameters = list(adapter.model.parameters())
    spec = adapter.spec
    return Inspection(
        adapter=type(adapter).__name__,
        spec=spec,
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in learned),
        image_size=image_size,
        canvas=(batch.images.shape[-2], batch.images.shape[-1]),
        grids=tuple((level.shape[-2], level.shape[-1]) for level in features),
        priors=trace.predictions.priors.boxes.shape[-2],
        multiply_adds=counter.get_total_flops() // 2,  # torch counts both
        methods={name: refusal(cls, spec, spec) for name, cls in all_methods().items()},
    )


def print_inspection(found: Inspection, console: Console) -> None:
    """Print levels, stages, priors, capabilities, methods and sizes."""
    spec = found.spec
    facts = Table(box=None, show_header=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    facts.add_row("detector", f"{spec.name} ({found.adapter})")
    facts.add_row("classes", f"{spec.num_classes}, {spec.activation} scores")
    frozen = "" if found.trainable == found.parameters else f", of which {found.trainable / 1e6:.2f} M are trained"
    facts.add_row("parameters", f"{found.parameters / 1e6:.2f} M{frozen}")
    height, width = found.canvas
    facts.add_row("multiply-adds", f"{found.multiply_adds / 1e9:.2f} G for an image of {width} x {height} px")
    facts.add_row("priors", _priors(found))
    if spec.bins:
        facts.add_row("box sides", f"distributions over {len(spec.bins)} bins, {spec.bins[0]:g} to {spec.bins[-1]:g}")
    facts.add_row("shows", ", ".join(sorted(spec.capabilities)))
    console.print(facts)

    console.print("\n[bold]levels[/]")
    levels = Table("level", "stride", "channels", f"grid at {width} x {height}", "priors a cell", box=None)
    each = spec.priors_per_cell or ("",) * len(spec.strides)
    for i, (stride, channels, grid, count) in enumerate(
        zip(spec.strides, spec.channels, found.grids, each, strict=True)
    ):
        levels.add_row(str(i), str(stride), str(channels), f"{grid[1]} x {grid[0]}", str(count))
    console.print(levels)
    for title, part in (("stages of the head", spec), ("stages of the first stage", spec.first_stage)):
        if part is not None and part.stages:
            console.print(f"\n[bold]{title}[/]")
            console.print(_stages(part))

    console.print("\n[bold]methods, for a twin of itself as the teacher[/]")
    methods = Table(box=None, show_header=False)
    for name, reason in found.methods.items():
        methods.add_row(name, "applies" if reason is None else f"refused: {reason}")
    console.print(methods)


def default_arguments(method: type[Method]) -> dict[str, object]:
    """The arguments of a method with their defaults: all have one, so that any method can be had by its name."""
    return {name: parameter.default for name, parameter in inspect.signature(method).parameters.items()}


def print_method(method: type[Method], console: Console) -> None:
    """Print a method's idea, paper, needs, loss terms, arguments with their defaults, and other published settings."""
    console.print(f"[bold]{method.__name__}[/]", highlight=False)
    console.print(_reflow(sys.modules[method.__module__].__doc__), highlight=False, markup=False)
    facts = Table(box=None, show_header=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_row("paper", method.paper)
    facts.add_row("needs", ", ".join(sorted(method.needs)))
    facts.add_row("loss terms", ", ".join(method.terms))
    console.print(facts)
    summary, _, rest = inspect.cleandoc(method.__doc__ or "").partition("\n\nArgs:\n")
    console.print(f"\n{_reflow(summary)}\n", highlight=False, markup=False)
    described = {name: " ".join(text.split()) for name, text in _ARGUMENT.findall(rest)}
    arguments = Table("argument", "default", "what it is", box=None)
    for name, value in default_arguments(method).items():
        arguments.add_row(name, repr(value), described.get(name, ""))
    if arguments.row_count:
        console.print(arguments)
    if settings := published_settings(method):
        console.print("\nPublished settings for other detectors, by these names in suites too:\n", highlight=False)
        table = Table(box=None, show_header=False)
        for name, make in settings.items():
            table.add_row(name, inspect.getdoc(make))
        console.print(table)


def _reflow(doc: str | None) -> str:
    """Paragraphs in one line each, for the terminal to break; what is indented stays as it is."""
    paragraphs = inspect.cleandoc(doc or "").split("\n\n")
    return "\n\n".join(p if "\n  " in p or p.startswith(" ") else " ".join(p.split()) for p in paragraphs)


# `    name: text`, and deeper lines that go on with it.
_ARGUMENT = re.compile(r"^    (\w+): (.*(?:\n {5,}.*)*)", re.MULTILINE)


def _priors(found: Inspection) -> str:
    spec = found.spec
    if spec.priors.on_grid:
        return f"{found.priors} {spec.priors}"
    return f"{found.priors} {spec.priors} (of the make: {spec.prior_form})"


def _stages(spec: DetectorSpec) -> Table:
    table = Table("stage", "state after", "channels of its branches", "shape", box=None)
    for i, stage in enumerate(spec.stages):
        channels = "; ".join(
            f"{branch} {', '.join(map(str, dict.fromkeys(each)))}" for branch, each in stage.channels.items()
        )
        table.add_row(str(i), stage.name, channels, "maps" if stage.spatial else "vectors")
    return table
