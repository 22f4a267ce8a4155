"""Time each method's loss, forward and backward, and compare it with a plain reading of its formula (plain.py).

python benchmarks/speed/methods.py [--method FGD] [--repeat 7] [--threads 1]

The shapes are those of an 800 x 1216 image: five levels of 256 channels, strides 8 to 128, batch 2, 20 boxes an
image. Predictions have 80 classes and 17 bins; 40 priors are positive. First value and gradient are compared. Then both
run in turn in one process, so that drift of the machine cancels. The ratio is the median over the pairs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from plain import CASES, Shapes, exchange, fgd_masks
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kdtoolkit.methods.fgd import cells_of_content, region_masks

Run = Callable[[], list[Tensor]]
MASKS = "FGD, masks alone"


def method_runs(name: str, shapes: Shapes) -> tuple[Run, Run]:
    """The method and its reading; a run gives the loss, its gradients, and those of learned layers in one."""
    build, reading = CASES[name]
    method = build()
    seen, leaves = exchange(method, shapes)
    parameters = list(method.parameters())

    def run(losses: Callable[[], Mapping[str, Tensor]]) -> list[Tensor]:
        torch.manual_seed(0)  # for masks drawn at random
        total = sum(losses().values())
        found = torch.autograd.grad(total, leaves + parameters, allow_unused=True, materialize_grads=True)
        learned = [x.flatten() for x in found[len(leaves) :]]
        return [total.detach(), *found[: len(leaves)], *([torch.cat(learned)] if learned else [])]

    return lambda: run(lambda: method(seen)), lambda: run(lambda: reading(method, seen))


def mask_runs(shapes: Shapes) -> tuple[Run, Run]:
    """FGD's region masks of all levels, by themselves."""
    build, _ = CASES["FGD"]
    batch = exchange(build(), shapes)[0].teacher.batch

    def run(masks: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        return [mask for hw in shapes.grid for mask in masks(batch.boxes, batch.sizes, *hw)]

    def ours(
        boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]], height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        padded = pad_sequence(list(boxes), batch_first=True, padding_value=torch.nan)
        return region_masks(cells_of_content(padded, sizes, height, width), height, width)

    return lambda: run(ours), lambda: run(fgd_masks)


def check(name: str, ours: Run, plain: Run) -> None:
    """Whether both give the same, up to 1e-4 of the largest entry; SystemExit if not. It warms both up."""
    for i, (a, b) in enumerate(zip(ours(), plain(), strict=True)):
        scale = max(float(b.abs().max()), 1e-12)
        if float((a - b).abs().max()) > 1e-4 * scale:
            raise SystemExit(f"{name}: {'gradient' if i else 'value'} {i} differs, by {float((a - b).abs().max()):g}")


def milliseconds(run: Run) -> float:
    begun = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - begun)


def main() -> None:
    names = (*CASES, MASKS)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=names, help="this one alone")
    parser.add_argument("--repeat", type=int, default=7, help="pairs of runs")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes = Shapes()
    table = Table(title=f"loss, forward and backward: {args.threads} thread(s), medians of {args.repeat} pairs")
    for title in ("method", "ours, ms", "plain, ms", "plain / ours", "of single pairs"):
        table.add_column(title, justify="left" if title == "method" else "right")
    for name in [args.method] if args.method else names:
        runs = mask_runs(shapes) if name == MASKS else method_runs(name, shapes)
        check(name, *runs)
        times = [(milliseconds(runs[0]), milliseconds(runs[1])) for _ in range(args.repeat)]
        ratios = [plain / ours for ours, plain in times]
        ours, plain = (statistics.median(each) for each in zip(*times, strict=True))
        span = f"{min(ratios):.2f} to {max(ratios):.2f}"
        table.add_row(name, f"{ours:.1f}", f"{plain:.1f}", f"{statistics.median(ratios):.2f} x", span)
    Console().print(table)


if __name__ == "__main__":
    main()
