"""`kd methods`, `kd adapters` and `kd inspect`: lists of methods and detectors, and which of them work together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdtoolkit.cli._common import check_known, chosen
from kdtoolkit.errors import KDError


def methods(
    name: Annotated[str | None, typer.Argument(help="Show this method alone, with its arguments and defaults.")] = None,
) -> None:
    """List the distillation methods, or explain one."""
    from rich.console import Console

    from kdtoolkit.listing import all_method_facts, print_method, print_methods

    known = all_method_facts()
    if name is None:
        print_methods(known, Console())
        return
    name = {each.lower(): each for each in known}.get(name.lower(), name)
    check_known([name], known, "method")
    print_method(known[name], Console())


def adapters(
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Run every method on every ordered pair of families: tiny random models.")
    ] = False,
    method: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="With --matrix: this method only; repeat for more.")
    ] = None,
    family: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="With --matrix: this family only; repeat for more.")
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="With --matrix: write the tables, with all reasons, into this file too."),
    ] = None,
) -> None:
    """List detector families, or run all methods on all pairs.

    Families come from kdtoolkit's adapters for installed libraries, and from other packages.
    """
    if not matrix and (method or family or markdown):
        raise KDError("--method, --family and --markdown need --matrix: add it")
    if markdown is not None and not markdown.absolute().parent.is_dir():
        raise KDError(f"cannot write {markdown}: there is no folder {markdown.parent}. Make it first")
    from rich.console import Console

    from kdtoolkit.listing import all_method_facts

    check_known(method or (), all_method_facts(), "method")

    from kdtoolkit.inspect import print_families
    from kdtoolkit.matrix import families, run_matrix
    from kdtoolkit.matrix_tables import print_matrix, to_markdown
    from kdtoolkit.methods import all_methods

    console = Console()
    known = families()
    if not matrix:
        print_families(known, console)
        return
    check_known(family or (), known, "family")
    methods = chosen(all_methods(), method)
    found = run_matrix(chosen(known, family), methods, console=console)
    print_matrix(found, console)
    for name in methods if method else ():
        print_matrix(found, console, name)
    if markdown is not None:
        try:
            markdown.write_text(to_markdown(found), encoding="utf-8")
        except OSError as error:
            raise KDError(f"cannot write {markdown}: {error.strerror}") from error


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="The detector, or the student of a pair: kdtoolkit/gfl?backbone=resnet18, "
            "torchvision/fcos_resnet50_fpn, hf/PATH-OR-NAME, ultralytics/yolo11n; a file or folder that holds one, "
            "such as best.pt; or package.module:callable for one of your own.",
        ),
    ],
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Show the pair: which methods work with this teacher, and why not the rest."
        ),
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default=False,
            help="Number of classes, without background. Left out: those of the weights, or 80.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME",
            help="Weights of the detector: a .safetensors, .pth or .pt file, `pretrained` for those that its library "
            "publishes, or a name of torchvision's such as COCO_V1.",
        ),
    ] = None,
    teacher_weights: Annotated[
        str | None, typer.Option(metavar="FILE|NAME", help="Weights of the teacher, in the same way.")
    ] = None,
    teacher_scale: Annotated[
        float | None,
        typer.Option(
            metavar="1|0.5|0.25",
            show_default=False,
            help="Size of the teacher's images beside the student's. Left out: 1, or what fits the strides of a "
            "teacher that shows features alone.",
        ),
    ] = None,
    image_size: Annotated[int, typer.Option(min=32, help="Side of the image to measure on, in pixels.")] = 256,
) -> None:
    """Show a detector, or what works between student and teacher.

    One detector: levels, stages, priors, capabilities and sizes as the toolkit sees them, and the methods that apply.
    With --teacher: both side by side, which methods work between them, and why the others do not.
    """
    if teacher is None and teacher_weights is not None:
        raise KDError("--teacher-weights needs --teacher NAME: add it")
    if teacher_scale is not None and teacher is None:
        raise KDError("--teacher-scale needs --teacher NAME: add it")
    if teacher_scale not in (None, 1.0, 0.5, 0.25):
        raise KDError(f"--teacher-scale is {teacher_scale:g}: it must be 1, 0.5 or 0.25")
    for file in (weights, teacher_weights):
        if file is not None and file.endswith((".safetensors", ".pth", ".pt")) and not Path(file).exists():
            raise KDError(f"there is no weights file {file}")
    from rich.console import Console

    from kdtoolkit.inspect import inspect_detector, print_inspection, print_pair
    from kdtoolkit.models import UnknownClassesError, open_detector
    from kdtoolkit.workflow.auto import teacher_scale as default_scale

    found, console = [], Console()
    for name, source in ((model, weights), (teacher, teacher_weights)):
        if name is not None:
            try:
                opened = open_detector(name, num_classes=classes, weights=source)
            except UnknownClassesError:  # random weights, which fit any number of classes
                opened = open_detector(name, num_classes=80, weights=source)
            for note in opened.notes:
                console.print(f"note: {note}", style="yellow", soft_wrap=True)
            found.append(inspect_detector(opened.model, image_size))
    if teacher is None:
        print_inspection(found[0], console)
    else:
        scale = default_scale(found[0].spec, found[1].spec).value if teacher_scale is None else teacher_scale
        print_pair(found[0], found[1], console, teacher_scale=scale)
