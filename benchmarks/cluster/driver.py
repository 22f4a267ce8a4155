"""What a run's own process costs for each cell: the real runner, with cells that are done at once.

    python benchmarks/cluster/driver.py [--rows 19 --seeds 5 --weights 10]

No cell is trained: an executor stores made-up results of a usual size. What is left is the driver's work: storing,
reading, estimating, boards. All times are CPU time, which programs beside it hardly change. `simulate.py` takes its
numbers from here.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

from kdtoolkit.benchmark import runner
from kdtoolkit.benchmark.cell import Report, Task
from kdtoolkit.benchmark.datasets import DataSets
from kdtoolkit.benchmark.executor import Ended, Hardware
from kdtoolkit.benchmark.keys import key_of
from kdtoolkit.benchmark.report import View, write_report
from kdtoolkit.benchmark.store import CellResult, write_atomic
from kdtoolkit.benchmark.suite import Suite, change
from kdtoolkit.benchmark.suite_file import load_suite
from kdtoolkit.engine.evaluate import METRICS

STEPS, TERMS, CLASSES = 12_000, 6, 80  # a row of history every hundredth of the steps
SLOTS = 100


class Instant:
    """An executor whose cells are done at once."""

    threads = 1
    slots = SLOTS

    def __init__(self, weights_mb: float) -> None:
        self.hardware = Hardware.here("cpu")
        self._weights = {"w": torch.zeros(int(weights_mb * 2**18))}
        self._started: list[Task] = []
        self.stored = 0.0

    def __len__(self) -> int:
        return len(self._started)

    def begin(self, sets: DataSets) -> None:
        """The data is not used."""

    def start(self, task: Task) -> None:
        self._started.append(task)

    def events(self, timeout: float) -> Iterator[tuple[Task, Report | Ended]]:
        if not self._started:
            return
        task = self._started.pop(0)
        yield task, Report("training", 100, {f"term/{i}": 0.5 for i in range(TERMS)}, 10.0)
        begun = time.process_time()
        content = io.BytesIO()
        torch.save(self._weights, content)
        write_atomic(task.weights, content.getvalue())
        write_atomic(task.result, _made_up(task).model_dump_json(indent=1).encode())
        self.stored += time.process_time() - begun
        yield task, Ended(None)

    def stop(self) -> None:
        """Nothing runs."""


def _made_up(task: Task) -> CellResult:
    ap = 30.0 + 0.01 * (hash(task.name) % 1000)
    row = {"lr": 1e-3, **{f"term/{i}": 0.123456789 for i in range(TERMS)}}
    return CellResult(
        entry=task.entry,
        seed=task.seed,
        key=key_of(task.parts),
        key_parts=task.parts,
        data="made-up",
        evaluation=dict.fromkeys(METRICS, ap),
        per_class={f"class {i}": ap for i in range(CLASSES)},
        steps=STEPS,
        stretch=task.stretch,
        train_seconds=600.0,
        cpu_seconds=600.0,
        step_ms=50.0,
        peak_memory_mb=1000.0,
        parameters=1,
        history=[{"step": float(step), **row} for step in range(STEPS // 100, STEPS + 1, STEPS // 100)],
        warnings=[],
        versions={"kdtoolkit": "0"},
        machine="made-up",
        device="cpu",
        threads=1,
        date="2026-01-01T00:00:00+00:00",
    )


def suite_of(rows: int, seeds: int) -> Suite:
    suite = load_suite("quick")
    data = {"teacher_images": 8, "student_images": 8, "val_images": 8}
    return change(
        suite,
        data=data,
        seeds=seeds,
        entries={f"PKD {i}": [{"PKD": {"weight": 1.0 + i}}] for i in range(rows)},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=19)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--weights", type=float, default=10.0, help="MB of a student")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "run"
        executor = Instant(asked.weights)
        boards: list[float] = []
        write = runner._Run._write_board

        def timed(run: runner._Run, *, last: bool = False) -> None:
            begun = time.process_time()
            write(run, last=last)
            boards.append(time.process_time() - begun)

        runner._Run._write_board = timed  # type: ignore[method-assign]
        begun = time.process_time()
        runner.run_suite(
            suite_of(asked.rows, asked.seeds), root, console=Console(file=io.StringIO()), executor=executor
        )
        whole = time.process_time() - begun
        cells = len(list(root.glob("cells/*/*.json")))
        size = sum(path.stat().st_size for path in root.glob("cells/*/*.json")) / cells
        begun = time.process_time()
        view = View.of(root)
        built = time.process_time() - begun
        write_report([view], root)
        written = time.process_time() - begun - built
        print(
            json.dumps(
                {
                    "cells": cells,
                    "result_kb": round(size / 1000),
                    "seconds": round(whole, 2),
                    "stored_s_per_cell": round(executor.stored / cells, 4),
                    "boards": round(sum(boards), 2),
                    "rest_s_per_cell": round((whole - executor.stored - sum(boards)) / cells, 4),
                    "last_board_s_per_cell": round((built + written) / cells, 5),
                },
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
