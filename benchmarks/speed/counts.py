"""Passes of heads, matchings and host-device synchronisations of one step: python benchmarks/speed/counts.py.

Student and teacher are of the same family of detectors. The same is counted in the training forward of the student's
own library. All is counted on a CPU: kdtoolkit/testing/syncs.py says what counts as a synchronisation. Prints Markdown.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook
from torchvision.models.detection._utils import Matcher

from kdtoolkit import Distiller, IncompatibleError, adapt
from kdtoolkit.detectors.dense import DenseDetector
from kdtoolkit.matrix import families
from kdtoolkit.methods import all_methods
from kdtoolkit.testing.syncs import count_syncs

CLASSES = 3


def example(count: int) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Images of 64 x 64 px with two boxes each."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 64, 64, generator=generator) for _ in range(count)]
    boxes = torch.tensor([[4.0, 6.0, 30.0, 40.0], [20.0, 20.0, 60.0, 60.0]])
    return images, [{"boxes": boxes.clone(), "labels": torch.tensor([0, 2])} for _ in range(count)]


def counted(call: Callable[..., Any], name: str, found: Counter[str]) -> Callable[..., Any]:
    """`call`, which counts."""

    def run(*args: Any, **kwargs: Any) -> Any:
        found[name] += 1
        return call(*args, **kwargs)

    return run


def count(family: str, methods: list[str], batch: int) -> str:
    """A row of the table."""
    found: Counter[str] = Counter()
    adapters = []
    for role, seed in (("teacher", 1), ("student", 0)):
        torch.manual_seed(seed)
        adapter: Any = adapt(families()[family](CLASSES))
        adapter.head = counted(adapter.head, role, found)
        if adapter.first_stage is not None:
            adapter.first_stage.head = counted(adapter.first_stage.head, f"{role} RPN", found)
        if isinstance(adapter.model, DenseDetector):
            adapter.model.assign = counted(adapter.model.assign, "matchings", found)  # type: ignore[method-assign]
        adapters.append(adapter)
    distiller = Distiller(*adapters, [all_methods()[name]() for name in methods]).train()

    def matcher(module: torch.nn.Module, args: object, output: object) -> None:
        found["matchings"] += "Matcher" in type(module).__name__ or "Assigner" in type(module).__name__

    plain, before = Distiller(None, adapters[1]).train(), Matcher.__call__
    with register_module_forward_hook(matcher):
        Matcher.__call__ = counted(before, "matchings", found)  # type: ignore[method-assign]
        try:
            torch.manual_seed(0)
            plain(*example(batch))
            own = found["matchings"]
            found.clear()
            torch.manual_seed(0)
            with count_syncs() as syncs:
                distiller(*example(batch))
            matchings = found["matchings"]
            passes = ", ".join(
                f"{found[role]} {role}" for role in ("student", "teacher", "student RPN", "teacher RPN") if found[role]
            )
            torch.manual_seed(0)
            with count_syncs() as theirs:
                library(adapters[1], *example(batch))
        finally:
            Matcher.__call__ = before  # type: ignore[method-assign]
    kinds = ", ".join(f"{name} {number}" for name, number in (syncs - theirs).most_common(6))
    return (
        f"| {family} | {' + '.join(methods)} | {passes} | {matchings} ({own}) | "
        f"{syncs.total()} ({theirs.total()}) | {kinds} |"
    )


def library(adapter: Any, images: list[torch.Tensor], targets: list[dict[str, torch.Tensor]]) -> None:
    """The detector's own training step: what a Distiller without methods does, which is the library's code."""
    batch = adapter.prepare(images, targets)
    adapter.task_losses(adapter.head(adapter.features(batch), batch), batch)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--families", nargs="*")
    parser.add_argument("--methods", nargs="*", action="append", help="methods of one step; may be given again")
    args = parser.parse_args()
    print("| family | methods | passes of heads | matchings (own) | syncs (own) | more than own |")
    print("|---|---|---|--:|--:|---|")
    for family in args.families or families():
        for methods in args.methods or [["CrossKD"], ["LogitKD"], ["LD"], ["Mimic"]]:
            try:
                print(count(family, methods, args.batch), flush=True)
            except IncompatibleError:
                continue


if __name__ == "__main__":
    main()
