"""Run what is missing in the evidence suites, the most important cells first.

    python benchmarks/evidence/run.py                            # to the end
    python benchmarks/evidence/run.py --minutes 8                # a slice; the same command goes on
    python benchmarks/evidence/run.py --suite bccd --suite chess # these suites alone

README.md beside this file says where the photos and the weights must lie.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from kdtoolkit.benchmark.datasets import load_data
from kdtoolkit.benchmark.plan import Plan
from kdtoolkit.benchmark.runner import run_suite
from kdtoolkit.benchmark.store import Store
from kdtoolkit.benchmark.suite import BASELINE, Suite
from kdtoolkit.benchmark.suite_file import load_suite
from kdtoolkit.engine.hardware import cores
from kdtoolkit.errors import KDError

SUITES = Path(__file__).parent / "suites"
SETS = ("bccd", "playing-cards", "chess", "sketch-ui")
MAIN = ("CrossKD", "PKD", "CrossKD+PKD")
MAIN_SEEDS, SEEDS = 5, 3


@dataclass(frozen=True)
class Portion:
    """Some cells of a suite that are run together: the first `seeds` seeds of the baseline and of `rows` (empty: all).

    `long_baselines`: the baseline at equal time too and, where the suite asks for it, with twice the steps.
    """

    suite: str
    rows: tuple[str, ...]
    seeds: int
    long_baselines: bool = False


def portions(names: Sequence[str]) -> Iterator[Portion]:
    """All portions of these suites, the most important ones first.

    The main rows of the four sets come first, one seed after the other, so that all sets can be compared early. Their
    baselines with longer schedules follow, then all other rows. One of these may be slower than all main rows, so the
    baselines with longer schedules come again: they are run only if they are too short. All other suites come last.
    """
    sets, others = [name for name in SETS if name in names], [name for name in names if name not in SETS]
    for seeds in range(1, MAIN_SEEDS + 1):
        yield from (Portion(name, MAIN, seeds) for name in sets)
    long_baselines = [Portion(name, MAIN, MAIN_SEEDS, long_baselines=True) for name in sets]
    yield from long_baselines
    for seeds in range(1, SEEDS + 1):
        yield from (Portion(name, (), seeds) for name in sets)
    yield from long_baselines
    for seeds in range(1, SEEDS + 1):
        yield from (Portion(name, (), seeds) for name in others)
    yield from (Portion(name, (), SEEDS, long_baselines=True) for name in others)


class Evidence:
    """The runs of the suites in a folder, and how they are run. `end`: when to stop, by time.monotonic; None: never."""

    def __init__(self, suites: Path, out: Path, *, device: str, jobs: int, end: float | None) -> None:
        self._suites = suites
        self._out = out
        self._device = device
        self._jobs = jobs
        self._end = end
        self._opened: dict[str, tuple[Suite, Plan]] = {}
        self.problems: dict[str, str] = {}

    def run(self, work: Sequence[Portion], console: Console) -> bool:
        """Run the portions in order. Returns whether all are done.

        A suite that cannot be run, or that has a failed cell, is left alone from then on; `problems` says why.
        """
        for portion in work:
            if portion.suite in self.problems:
                continue
            left = None if self._end is None else self._end - time.monotonic()
            if left is not None and left <= 0:
                return False
            try:
                if not self._run(portion, left, console):
                    return False
            except KDError as error:
                self.problems[portion.suite] = str(error)
        return not self.problems

    def _run(self, portion: Portion, seconds: float | None, console: Console) -> bool:
        """Run a portion. Returns False if time is up or the user has stopped the run."""
        if portion.suite not in self._opened:
            suite = load_suite(str(self._suites / f"{portion.suite}.yaml"))
            store = Store(self._out / suite.name)
            sets = load_data(suite.data, store.pictures)
            threads = max(1, cores() // self._jobs)
            plan = Plan(suite, store, sets, device=self._device, threads=threads, any_version=True)
            self._opened[portion.suite] = suite, plan
        suite, plan = self._opened[portion.suite]
        plan.seeds = range(min(portion.seeds, suite.seeds))
        rows = [BASELINE, *(portion.rows or suite.entries)]
        if plan.complete(rows, long_baselines=portion.long_baselines):
            return True
        console.rule(f"{portion.suite}: {', '.join(rows)}; seeds {', '.join(map(str, plan.seeds))}")
        outcome = run_suite(
            suite,
            plan.store.root,
            console=console,
            jobs=self._jobs,
            device=self._device,
            only=rows,
            any_version=True,
            seeds=range(portion.seeds),
            long_baselines=portion.long_baselines,
            seconds=seconds,
        )
        if outcome.failures:
            self.problems[portion.suite] = "; ".join(f"{name}: {why}" for name, why in outcome.failures.items())
        return not (outcome.interrupted or outcome.out_of_time)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code: 0 when all is done, 3 when something is left, 1 after a failure."""
    started = time.monotonic()
    names = [path.stem for path in sorted(SUITES.glob("*.yaml"))]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="stop after this time; cells go on at their last checkpoint")
    parser.add_argument(
        "--suite", action="append", choices=names, help="run this suite; repeat for more (default: all)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where results go (default: runs)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--jobs", type=int, help="cells at a time (default: one a core on a CPU, 1 on a GPU)")
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    evidence = Evidence(
        SUITES,
        options.out,
        device=device,
        jobs=options.jobs or (cores() if device == "cpu" else 1),
        end=None if options.minutes is None else started + 60 * options.minutes,
    )
    done = evidence.run(list(portions(options.suite or names)), Console())
    for suite, why in evidence.problems.items():
        sys.stderr.write(f"{suite}: {why}\n")
    if evidence.problems:
        return 1
    print("all is done" if done else "the same command goes on from here")
    return 0 if done else 3


if __name__ == "__main__":
    sys.exit(main())
