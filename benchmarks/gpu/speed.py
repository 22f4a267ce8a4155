"""Measures on a GPU what a distillation step costs, GFL R50 from R101 at 800 x 1216; takes at most 8 minutes.

    python benchmarks/gpu/speed.py                             # on a GPU; installed with the dev extra
    python benchmarks/gpu/speed.py --device cpu --small        # the script itself, on a tiny pair

It compares our modules in eager float32 with the channels first and the teacher asked in each step (`reference`, which
was measured equal to the published code), the defaults of training, bfloat16, a warm cache of the teacher's answers,
and the compiled step. Each part is a call of `benchmarks/speed/step.py` in its own process, with a time limit: a part
that fails or hangs does not stop the others. If a batch of 16 does not fit, 8 and 4 are tried. The report is printed as
it grows, and is written to OUT/speed.md; each part's samples lie in OUT/PART/step.json.

It has never run on a GPU. On a CPU (the second command), without time limits, the parts `step` and `two` have
run to their end.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.check import environment, run_command, say

LIMIT = 480  # seconds, of all parts together
NO_LIMIT = 3600.0  # of a part on a CPU
BATCHES = (16, 8, 4)


@dataclass(frozen=True)
class Part:
    """A call of step.py: its title, its arguments, and the most seconds that it may take."""

    title: str
    arguments: Sequence[str]
    limit: float


MOST = ("CrossKD", "PKD", "CrossKD+PKD", "CrossKD+PKD+FGD")
PARTS = {
    "step": Part(
        "Float32 and bfloat16, with waits and memory",
        ["--settings", "reference", "default", "bfloat16", "bfloat16-cache", "--methods", *MOST, "--rounds", "7"],
        180,
    ),
    "profile": Part(
        "What exceeds the parts in bfloat16",
        ["--settings", "bfloat16", "--methods", "CrossKD+PKD", "CrossKD+PKD+FGD", "--rounds", "3", "--profile"],
        90,
    ),
    "two": Part(
        "Two images, as in the published schedule: the host may be slower than the GPU",
        ["--settings", "reference", "bfloat16", "--methods", "CrossKD", "CrossKD+PKD", "--rounds", "7"],
        60,
    ),
    "compiled": Part(
        "The compiled step",
        ["--settings", "reference", "bfloat16", "bfloat16-compiled", "--methods", "CrossKD+PKD", "--rounds", "5"],
        240,
    ),
}


def command(part: str, images: int, args: argparse.Namespace) -> list[str]:
    """The call of step.py for a part."""
    scene = ["--pair", "gfl-r50-r101", "--size", "800x1216"]
    if args.small:
        scene = ["--pair", "gfl-tiny", "--size", "64", "--classes", "3"]
    return [
        *(sys.executable, "-m", "benchmarks.speed.step", "--device", args.device, "--images", str(images)),
        *(*scene, *PARTS[part].arguments, "--out", str(args.out / part)),
    ]


def batches(part: str, small: bool) -> tuple[int, ...]:
    """The batch sizes to try until one fits into memory."""
    return (2,) if part == "two" or small else BATCHES


def run_part(part: str, args: argparse.Namespace, left: float) -> tuple[str, bool]:
    """Run a part: its report, and whether it ended well."""
    text, good = "", False
    for images in batches(part, args.small):
        limit = min(PARTS[part].limit, left) if args.device == "cuda" else NO_LIMIT
        text, good = run_command(command(part, images, args), args.out / f"{part}.log", limit)
        written = args.out / part / "step.md"
        if good and written.exists():
            return written.read_text("utf-8"), True
        if "more memory than the device has" not in text:
            break
    return text, good


def sections(args: argparse.Namespace) -> Iterator[tuple[str, str, bool]]:
    """The parts as they end: name, report, and whether it ended well."""
    begun = time.monotonic()
    for part, facts in PARTS.items():
        say(f"... {part}")
        text, good = run_part(part, args, max(LIMIT - (time.monotonic() - begun), 30))
        yield part, f"## {facts.title}\n\n{text.strip()}\n", good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny pair, to try the script")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-speed"))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: there is no CUDA GPU here; --device cpu --small runs the script itself on a CPU")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    environment(args.device)
    begun, failed = time.monotonic(), []
    with (args.out / "speed.md").open("w", encoding="utf-8") as file:
        for part, section, good in sections(args):
            failed += [] if good else [part]
            file.write(section + "\n")
            file.flush()
            say(section)
    say(f"{time.monotonic() - begun:.0f} s; {'failed: ' + ', '.join(failed) if failed else 'all parts ran'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
