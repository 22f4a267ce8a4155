"""How much faster two workers of a Ray cluster are than one, and what a cell costs besides its training.

    python benchmarks/cluster/scaling.py [--steps 150 --seeds 4 --local]

It needs 2 cores that nothing else uses for about 6 minutes (`--steps 150 --seeds 4`), and 4 GB of memory. Each run is
new: teacher, baselines and PKD of the suite `quick` at 64 px, one thread a cell, with 1 and with 2 cells at a time.
`--local` runs the same with processes of this machine instead of Ray. Printed are the seconds of the cells alone, from
the first to the last; the start of the cluster is told beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from rich.console import Console

from kdtoolkit.benchmark.executor import Executor
from kdtoolkit.benchmark.runner import run_suite
from kdtoolkit.benchmark.store import read_result
from kdtoolkit.benchmark.suite import Suite, change
from kdtoolkit.benchmark.suite_file import load_suite
from kdtoolkit.benchmark.workers import Workers
from kdtoolkit.engine.hardware import machine


def suite_of(steps: int, seeds: int) -> Suite:
    quick = load_suite("quick")
    sections = {}
    for name in ("teacher", "student"):
        section = getattr(quick, name)
        assert section.train is not None
        train = {**section.train.model_dump(exclude_unset=True), "steps": steps, "precision": "float32"}
        sections[name] = {**section.model_dump(exclude_unset=True), "train": train}
    data = {"image_size": 64, "teacher_images": 200, "student_images": 200, "val_images": 200}
    return change(quick, data=data, seeds=seeds, entries={"PKD": ["PKD"]}, **sections)


def measured(suite: Suite, executor: Executor, folder: Path) -> dict[str, float]:
    begun = time.monotonic()
    outcome = run_suite(
        suite, folder / suite.name, console=Console(quiet=True), executor=executor, long_baselines=False
    )
    whole = time.monotonic() - begun
    assert not outcome.failures, outcome.failures
    paths = [*folder.glob("teachers/*.json"), *folder.glob(f"{suite.name}/cells/*/*.json")]
    results = [result for path in paths if (result := read_result(path)) is not None]
    trained = sum(result.train_seconds for result in results)
    return {
        "slots": executor.slots,
        "seconds": round(whole, 1),
        "cells": len(results),
        "training_s": round(trained, 1),
        "around_s_per_cell": round((executor.slots * whole - trained) / len(results), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--local", action="store_true")
    asked = parser.parse_args()
    suite = suite_of(asked.steps, asked.seeds)
    found = []
    with tempfile.TemporaryDirectory() as place:
        if asked.local:
            for slots in (1, 2):
                found.append(measured(suite, Workers("cpu", slots, 1), Path(place) / str(slots)))
        else:
            import ray

            from kdtoolkit.benchmark.ray_workers import RayWorkers

            os.environ["TMPDIR"] = place  # the nodes' disk: no run finds files of an earlier one
            begun = time.monotonic()
            ray.init(
                address="local",
                num_cpus=2,
                object_store_memory=200 * 2**20,
                include_dashboard=False,
                log_to_driver=False,
            )
            print(f"the cluster started in {time.monotonic() - begun:.1f} s")
            for slots in (1, 2):
                with RayWorkers(slots=slots, threads=1) as workers:
                    found.append(measured(suite, workers, Path(place) / str(slots)))
            ray.shutdown()
    one, two = found
    print(f"{machine()}, {'processes' if asked.local else 'Ray'}")
    print(json.dumps(found, indent=1))
    print(f"2 at a time: {one['seconds'] / two['seconds']:.2f} times as fast as 1")


if __name__ == "__main__":
    main()
