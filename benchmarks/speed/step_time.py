"""Time a training step of each method, and of the plain student.

They run in turn in one process, so that drift of the machine cancels.

python benchmarks/speed/step_time.py [SUITE] [--steps 30]
"""

import argparse
import statistics
import time

import torch

from kdtoolkit import Distiller
from kdtoolkit.benchmark.cell import build_detector
from kdtoolkit.benchmark.datasets import load_data
from kdtoolkit.benchmark.suite import BASELINE
from kdtoolkit.benchmark.suite_file import load_suite
from kdtoolkit.data import batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", nargs="?", default="quick")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    suite = load_suite(args.suite)
    images = load_data(suite.data).student
    classes = images.class_names
    config = suite.student.train
    teacher = build_detector(suite.teacher, classes, 0).model
    rows = {}
    for row in (BASELINE, *suite.entries):
        student = build_detector(suite.student, classes, 0).model
        methods = [use.build() for use in suite.methods(row)]
        distiller = Distiller(teacher if methods else None, student, methods).train()
        parameters = [p for p in distiller.parameters() if p.requires_grad]
        rows[row] = (distiller, torch.optim.AdamW(parameters, config.lr, fused=True), [])
        if config.channels_last:
            student.to(memory_format=torch.channels_last)
            teacher.to(memory_format=torch.channels_last)
    data = batches(images, batch_size=config.batch_size, steps=args.steps, seed=0, augment=config.augmentation)
    for shown, targets in data:
        for distiller, optimizer, times in rows.values():
            begun = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
                losses = distiller(shown, targets)
            optimizer.zero_grad()
            losses.total.backward()
            optimizer.step()
            times.append(time.perf_counter() - begun)
    plain = rows[BASELINE][2]
    print(
        f"suite {suite.name}, batch {config.batch_size}, {config.precision}, 1 thread, {args.steps} steps each, medians"
    )
    for row, (_, _, times) in rows.items():
        ratio = statistics.median(t / p for t, p in zip(times, plain, strict=True))
        print(f"{row:14s} {1000 * statistics.median(times):6.1f} ms  {ratio:.2f} x the plain step")


if __name__ == "__main__":
    main()
