"""What six methods cost on one board, with a live teacher and with a teacher cache that their cells share.

    python benchmarks/speed/cached_board.py --steps 200

For each method the student of a suite is trained twice from the same weights, on the same images: once with a live
teacher, once with the cache. The cache is empty at first, so the first method pays for it. Which of the two comes first
alternates. The first number is the CPU time of the training (`TrainResult.cpu_seconds`), the second the median step by
the clock. At the end the plain student is trained once: what a step costs without a teacher.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from kdtoolkit import Distiller
from kdtoolkit.benchmark.cell import build_detector
from kdtoolkit.benchmark.datasets import load_data
from kdtoolkit.benchmark.suite import change
from kdtoolkit.benchmark.suite_file import load_suite
from kdtoolkit.engine.result import TrainResult
from kdtoolkit.engine.train import RunFolder, train
from kdtoolkit.method_use import MethodUse

METHODS = ("CrossKD", "PKD", "FGD", "LD", "MGD", "Mimic")


def main() -> None:
    """Train, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="quick")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--images", type=int, help="of the student, instead of the suite's number")
    args = parser.parse_args()
    torch.set_num_threads(1)
    suite = load_suite(args.suite)
    sizes = {"image_size": args.image_size, "student_images": args.images, "val_images": 1}
    suite = change(suite, data={name: value for name, value in sizes.items() if value is not None})
    images = load_data(suite.data).student
    _ = images[0]  # drawn before anything is measured
    names = images.class_names

    with tempfile.TemporaryDirectory() as folder:

        def run(number: int, method: str | None, *, cached: bool) -> TrainResult:
            teacher = build_detector(suite.teacher, names, 0).model
            student = build_detector(suite.student, names, 1).model
            methods = [] if method is None else [MethodUse.model_validate(method).build()]
            changes = {
                "steps": args.steps,
                "precision": args.precision,
                "teacher_cache": "disk" if cached else "off",
            }
            config = suite.student.train.model_copy(update=changes)
            kept = RunFolder(Path(folder, f"{number}-{cached}"), save_seconds=1e9, teacher_cache=Path(folder, "cache"))
            torch.manual_seed(0)
            distiller = Distiller(teacher if methods else None, student, methods)
            return train(distiller, images, config, seed=0, folder=kept)

        print("| method | live: CPU s, ms a step | cached: CPU s, ms a step | cached / live | asked the teacher |")
        print("|---|---:|---:|---:|---:|")
        totals = {False: 0.0, True: 0.0}
        for number, method in enumerate(args.methods):
            found = {cached: run(number, method, cached=cached) for cached in (number % 2 == 0, number % 2 == 1)}
            live, cached = (found[each].cpu_seconds or 0.0 for each in (False, True))
            totals[False] += live
            totals[True] += cached
            use = found[True].cache
            assert use is not None
            told = (f"{seconds:.1f}, {found[each].step_ms:.1f}" for each, seconds in ((False, live), (True, cached)))
            asked = f"{use.misses:,} of {use.hits + use.misses:,}"
            print(f"| {method} | {' | '.join(told)} | {cached / live:.2f} | {asked} |", flush=True)
        ratio = totals[True] / totals[False]
        print(f"| all | {totals[False]:.1f} | {totals[True]:.1f} | {ratio:.2f} | |")
        plain = run(len(args.methods), None, cached=False)
        print(f"| no teacher | {plain.cpu_seconds:.1f}, {plain.step_ms:.1f} | | | |")


if __name__ == "__main__":
    main()
