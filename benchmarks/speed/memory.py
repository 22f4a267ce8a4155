"""The memory of a distillation step, with the heads' passes kept and with them computed again.

    python -m benchmarks.speed.memory [--pair gfl-r18-r50] [--size 320] [--images 2] [--methods CrossKD PKD]

Each row is the peak of what a step allocates for tensors, in MB of 2^20 bytes, and the whole: that peak and the weights
of both detectors, divided by the plain step's peak, the same weights and the teacher's state that CrossKD takes. On a
CPU the allocations of torch are recorded one by one, so the numbers do not depend on the machine's load.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.speed.parts import PAIRS, PLAIN, SETTINGS, Parts, Scene, methods_named
from kdtoolkit import Distiller
from kdtoolkit.testing.memory import peak_bytes

MB = 2**20


def peak_mb(parts: Parts, step: Callable[[], object]) -> float:
    """The peak of a step's second run: the first one makes what is kept for later steps."""
    parts.reset()
    step()
    parts.reset()
    return peak_bytes(step, parts.device) / MB


def step_of(distiller: Distiller, parts: Parts) -> None:
    """Forward and backward of a step, computed as training does by default."""
    with parts.arithmetic.forward_pass():
        losses = distiller(parts.images, parts.targets)
    losses.total.backward()


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", choices=PAIRS, default=next(iter(PAIRS)))
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--methods", nargs="*", default=["CrossKD", "PKD", "CrossKD+PKD"], help="joined by +")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    scene = Scene(size=(args.size, args.size), images=args.images)
    parts = Parts(PAIRS[args.pair], scene, SETTINGS["default"], ["CrossKD"], torch.device(args.device))
    plain, weights = peak_mb(parts, parts.works[PLAIN]), sum(parts.weights_mb)
    print(f"{args.pair}, {args.size} px, {args.images} images, {args.device}: plain step {plain:.1f} MB")
    print(f"weights {weights:.1f} MB, state {parts.state_mb:.1f} MB\n")
    print("| methods | recompute | peak, MB | whole / (plain step + weights + state) |")
    print("|---|---|--:|--:|")
    for name in args.methods:
        for recompute in (False, True):
            torch.manual_seed(2)
            distiller = Distiller(parts.teacher, parts.student, methods_named(name), recompute=recompute).train()
            peak = peak_mb(parts, partial(step_of, distiller, parts))
            share = (peak + weights) / (plain + weights + parts.state_mb)
            print(f"| {name} | {recompute} | {peak:.1f} | {share:.2f} |", flush=True)


if __name__ == "__main__":
    main()
