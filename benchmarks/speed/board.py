"""Where the time of a board goes: python benchmarks/speed/board.py [SUITE] [--steps 160] [--seeds 1] [--data FOLDER].

Runs a suite with few steps a cell, in this process, in one thread and a new folder, and computes from it what the whole
suite costs: the time of a step times the suite's steps, everything else as measured. All numbers are CPU seconds, which
programs that run beside it hardly change. Prints one table. "teacher" is the teacher's own pass in steps of methods;
"KD" is what these steps cost beyond it and a plain step. If the suite has a teacher cache, the teacher's pass counts
once; the steps must be so many (four times the images, divided by the batch) that nearly all views are in it by half of
them. The time of a step is that of the second half; what the first half took beyond it counts once for each cell.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

IMPORTS = ("kdtoolkit.benchmark.runner", "kdtoolkit.benchmark.workers")  # of the run, and of the server of its cells


def import_seconds(module: str) -> float:
    """CPU seconds of a new process that imports a module."""
    code = f"import time, {module}; print(time.process_time())"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", nargs="?", default="quick")
    parser.add_argument("--steps", type=int, default=160, help="of each training")
    parser.add_argument("--seeds", type=int, default=1, help="of each row; the suite's number is computed")
    parser.add_argument(
        "--images", type=int, help="for the student, instead of the suite's, so that fewer steps will do"
    )
    parser.add_argument("--data", type=Path)
    args = parser.parse_args()
    spent = Counter({"import": sum(sorted(import_seconds(name) for _ in range(3))[1] for name in IMPORTS)})

    import torch
    from rich.console import Console

    import kdtoolkit.benchmark.cell as cells
    from kdtoolkit.benchmark.cell import Report, Task
    from kdtoolkit.benchmark.datasets import DataSets, load_data
    from kdtoolkit.benchmark.executor import Ended, Hardware
    from kdtoolkit.benchmark.report import View, write_report
    from kdtoolkit.benchmark.runner import run_suite
    from kdtoolkit.benchmark.store import Store, read_result
    from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME, TEACHER, change
    from kdtoolkit.benchmark.suite_file import load_suite
    from kdtoolkit.distiller import Distiller
    from kdtoolkit.engine.train import train

    torch.set_num_threads(1)
    whole = load_suite(args.suite)
    if args.data is not None:
        whole = change(whole, data={"root": args.data.resolve()})
    if args.images is not None:
        whole = change(whole, data={"student_images": args.images})
    sections = {
        name: section.model_copy(update={"train": section.train.model_copy(update={"steps": args.steps})})
        for name, section in (("teacher", whole.teacher), ("student", whole.student))
        if section.train is not None
    }
    suite = whole.model_copy(update={**sections, "seeds": args.seeds})
    has_cache = getattr(whole.student.train, "teacher_cache", "off") != "off"
    own = Counter[str]()  # seconds inside the teacher's pass, by cell
    now: list[str] = []  # the cell that runs

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def run(*args: Any, **options: Any) -> Any:
            begun = time.process_time()
            try:
                return call(*args, **options)
            finally:
                own[now[-1]] += time.process_time() - begun

        return run

    class Timed(Distiller):
        """A distiller that counts the time of its teacher's pass."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            if self.teacher_adapter is not None:
                self.teacher_adapter.features = timed(self.teacher_adapter.features)
                self.teacher_adapter.head = timed(self.teacher_adapter.head)

    def training(*args: Any, **options: Any) -> Any:
        begun = time.process_time()
        try:
            return train(*args, **options)
        finally:
            trained[now[-1]] += time.process_time() - begun

    trained = Counter[str]()
    cells.Distiller, cells.train = Timed, training  # type: ignore[assignment, misc]
    phases: dict[str, Counter[str]] = {}  # of each cell, seconds by what it did
    marks: dict[str, list[tuple[int, float]]] = {}  # of each cell, steps that were done at a time

    class Here:
        """Runs one cell at a time, in this process."""

        threads, slots, hardware = 1, 1, Hardware.here("cpu")
        task: Task | None = None

        def __len__(self) -> int:
            return self.task is not None

        def begin(self, sets: DataSets) -> None:
            pass  # they were made ready before

        def start(self, task: Task) -> None:
            self.task = task

        def events(self, timeout: float) -> Iterator[tuple[Task, Report | Ended]]:
            task, self.task = self.task, None
            if task is None:
                return
            now.append(task.name)
            seconds = phases.setdefault(task.name, Counter())
            last = ["start of a cell", time.process_time()]

            def report(seen: Report) -> None:
                at = time.process_time()
                seconds[str(last[0])] += at - float(last[1])
                if seen.phase == "training":
                    marks.setdefault(task.name, []).append((seen.step, at))
                word = seen.phase.partition(" ")[0]
                last[:] = ["start of a cell" if word == "reading" else word, at]

            cells.run(task, report)
            seconds[str(last[0])] += time.process_time() - float(last[1])
            yield task, Ended(None)

        def stop(self) -> None:
            pass

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "runs" / suite.name
        begun = time.process_time()
        sets = load_data(suite.data, Store(root).pictures)
        for images in (sets.teacher, sets.student, sets.val):
            _ = images.in_memory()[0]
        spent["drawing or decoding"] += time.process_time() - begun
        begun = time.process_time()
        outcome = run_suite(suite, root, console=Console(quiet=True), executor=Here())  # type: ignore[arg-type]
        assert not outcome.failures, outcome.failures
        in_all = time.process_time() - begun
        spent["plan, boards, pictures"] = in_all - sum(sum(each.values()) for each in phases.values())
        rows = {name: read_result(path) for name, path in _results(root)}
        begun = time.process_time()
        write_report([View.of(root)], root)
        spent["report"] = time.process_time() - begun
    spent["plan, boards, pictures"] -= spent["report"]

    def a_step(row: str) -> float:
        """Seconds of a step in the second half of a row's trainings."""
        found = []
        for name in [name for name in marks if name.partition(",")[0] == row]:
            end, until = marks[name][-1]
            half, since = next((mark for mark in marks[name] if end / 2 <= mark[0] < end), marks[name][0])
            found.append((until - since) / (end - half))
        return sum(found) / len(found)

    plain = a_step(BASELINE)
    steps = whole.student.train.steps
    stretch = max(1.0, *(a_step(row) / plain for row in whole.entries))
    for row in (TEACHER, BASELINE, *whole.entries, EQUAL_TIME):
        names = [name for name in phases if name.partition(",")[0] == row]
        count = 1 if row == TEACHER else whole.seeds
        share = count / len(names)
        for name in names:
            for what, seconds in phases[name].items():
                if what != "training":
                    spent[what] += share * seconds
            spent["start of a cell"] += share * max(0.0, phases[name]["training"] - trained[name])
            first = trained[name] - rows[name].steps * a_step(row) - (own[name] if has_cache else 0)
            spent["first steps, checkpoints"] += share * max(0.0, first)
        if row == TEACHER:
            spent["training of the teacher"] += (
                0 if whole.teacher.train is None else whole.teacher.train.steps * a_step(row)
            )
            continue
        in_row = count * (math.ceil(steps * stretch) if row == EQUAL_TIME else steps)
        spent["students"] += in_row * plain
        if row in whole.entries:
            teacher = sum(own[name] / rows[name].steps for name in names) / len(names)
            spent["teacher"] += 0 if has_cache else in_row * teacher
            spent["KD"] += in_row * (a_step(row) - plain - teacher)
    if has_cache:
        spent["teacher"] = sum(own.values())
    total = sum(spent.values())
    print(f"{whole.name}: {total:.0f} CPU s; steps of {plain * 1000:.1f} ms, the slowest method's {stretch:.2f} of it")
    print("| part | CPU s | share |\n|---|--:|--:|")
    for name, seconds in spent.most_common():
        print(f"| {name} | {seconds:.1f} | {seconds / total:.1%} |")


def _results(root: Path) -> Iterator[tuple[str, Path]]:
    yield "teacher", root / "teacher.json"
    for path in sorted(root.glob("cells/*/seed*.json")):
        yield f"{path.parent.name}, seed {path.stem.removeprefix('seed')}", path


if __name__ == "__main__":
    main()
