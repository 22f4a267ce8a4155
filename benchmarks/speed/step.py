"""What a distillation step costs, beside the steps and passes that it consists of.

    python benchmarks/speed/step.py                             # GFL, ResNet-18 from ResNet-50, 320 px; some minutes
    python benchmarks/speed/step.py --pair all --size 128
    python benchmarks/speed/step.py --device cuda --pair gfl-r50-r101 --size 800x1216 --images 16 --profile

It measures the plain step (a), the teacher's pass (b), the continuation through the teacher's head (c) and the KD step
(d) of each combination of methods, in each setting; `parts.py` says what each is. All parts run in turn in one process,
round by round, so drift of the machine cancels: a ratio is the median over the rounds, with the smallest and the
largest in brackets. Losses are compared with those of the first setting.

On a CPU with one thread the clock is CPU time, which programs beside it disturb less; with more threads it is wall
time, and on a GPU the time between two events. --out FOLDER writes step.md and step.json, which has all samples.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity

from benchmarks.speed.parts import (
    CONTINUATION,
    FEATURES,
    PAIRS,
    PLAIN,
    SETTINGS,
    TEACHER,
    Detector,
    Observed,
    Pair,
    Parts,
    Scene,
    Work,
    observe,
    profiling,
)
from kdtoolkit.engine.hardware import machine
from kdtoolkit.engine.precision import has_bfloat16
from kdtoolkit.errors import KDError

SHOWN_OPERATIONS = 12
PROFILED_RUNS = 5
NONE = "-"
ALONE = (PLAIN, FEATURES, TEACHER, CONTINUATION)


@dataclass
class Measured:
    """A part of a pair in a setting. `ms`: the clock's samples, one a round; `wall_ms`: the same by the wall clock."""

    pair: str
    size: tuple[int, int]
    settings: str
    part: str
    observed: Observed
    continued: int = 0
    beyond_features: bool = True
    ms: list[float] = field(default_factory=list)
    wall_ms: list[float] = field(default_factory=list)


@dataclass
class Run:
    """All parts of a pair at one size, by (setting, part). `refused`: why combinations of methods do not work."""

    scene: Scene
    measured: dict[tuple[str, str], Measured]
    settings: list[str]
    refused: dict[str, str]
    weights_mb: float  # of both detectors
    state_mb: float  # that CrossKD takes of the teacher's head
    profiles: list[tuple[str, list[list[str]]]] = field(default_factory=list)

    @property
    def first(self) -> str:
        """The setting that the others are compared with."""
        return self.settings[0]

    def steps(self) -> Iterator[tuple[str, Measured]]:
        """The KD steps: all settings of a combination, then the next."""
        for part in dict.fromkeys(part for _, part in self.measured):
            if part not in ALONE:
                yield from ((name, self.measured[name, part]) for name in self.settings)

    def arithmetic(self, settings: str) -> str:
        """The setting whose plain step and passes are those of this setting too: one without a cache, if there is."""
        plain = replace(SETTINGS[settings], cache=False)
        return next((each for each in self.settings if SETTINGS[each] == plain), settings)

    def beyond(self, settings: str, step: Measured) -> list[float]:
        """(d) / ((a) + (b) + (c)) in each round."""
        settings = self.arithmetic(settings)
        teacher = self.measured[settings, TEACHER if step.beyond_features else FEATURES].ms
        parts = [self.measured[settings, PLAIN].ms, teacher]
        parts += [self.measured[settings, CONTINUATION].ms] * step.continued
        return [d / sum(each) for d, each in zip(step.ms, zip(*parts, strict=True), strict=True)]

    def memory(self, settings: str, step: Measured) -> float:
        """The peak of a KD step, divided by the plain step's peak, both detectors' weights and the kept state."""
        plain = self.measured[self.arithmetic(settings), PLAIN].observed.peak_mb
        state = self.state_mb if step.continued else 0.0
        return (self.weights_mb + step.observed.peak_mb) / (self.weights_mb + plain + state)

    def beside(self, step: Measured, part: str, settings: str) -> list[float]:
        """(d) divided by a part in a setting, in each round."""
        settings = self.arithmetic(settings) if part == PLAIN else settings
        return [d / other for d, other in zip(step.ms, self.measured[settings, part].ms, strict=True)]


def sample(parts: Parts, work: Work, threads: int) -> tuple[float, float]:
    """Milliseconds of a part by its clock, and by the wall clock."""
    parts.reset()
    if parts.device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(parts.device)
        begun = time.perf_counter()
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end), 1000 * (time.perf_counter() - begun)
    begun, used = time.perf_counter(), time.process_time()
    work()
    wall, cpu = time.perf_counter() - begun, time.process_time() - used
    return 1000 * (cpu if threads == 1 else wall), 1000 * wall


def measure(
    name: str,
    pair: Pair,
    scene: Scene,
    settings: Sequence[str],
    methods: Sequence[str],
    *,
    rounds: int,
    device: torch.device,
    profiled: bool = False,
    say: Console | None = None,
) -> Run:
    """Measure a pair: `rounds` rounds of all parts in all settings, after one in which each part is looked at."""
    every = {each: Parts(pair, scene, SETTINGS[each], methods, device) for each in settings}
    one = next(iter(every.values()))
    run = Run(scene, {}, list(settings), one.refused, sum(one.weights_mb), one.state_mb)
    works: list[tuple[Measured, Parts, Work]] = []
    begun = time.perf_counter()
    for setting, parts in every.items():
        for part, work in parts.works.items():
            if part in ALONE and run.arithmetic(setting) != setting:
                continue
            known = (parts.continued.get(part, 0), parts.beyond_features.get(part, True))
            parts.warm_up(work)
            parts.reset()
            found = Measured(name, scene.size, setting, part, observe(parts, work), *known)
            run.measured[setting, part] = found
            works.append((found, parts, work))
    if say is not None:
        seconds = time.perf_counter() - begun
        height, width = scene.size
        say.print(
            f"{name}, {height} x {width} px: {len(works)} parts, {seconds:.0f} s a round or less, {rounds} rounds"
        )
    threads = torch.get_num_threads()
    for number in range(rounds):
        for found, parts, work in works if number % 2 else works[::-1]:
            ms, wall_ms = sample(parts, work, threads)
            found.ms.append(ms)
            found.wall_ms.append(wall_ms)
    if profiled:
        setting, parts = next(iter(every.items()))
        run.profiles = [(step.part, excess(parts, step)) for where, step in run.steps() if where == setting]
    return run


def excess(parts: Parts, step: Measured) -> list[list[str]]:
    """The operations on which a KD step spends more than its parts: name, ms more, and ms of the step and the parts."""
    whole = operations(parts, [step.part])
    names = [PLAIN, TEACHER if step.beyond_features else FEATURES, *[CONTINUATION] * step.continued]
    alone = operations(parts, names)
    found = sorted(whole.keys() | alone.keys(), key=lambda key: alone.get(key, 0.0) - whole.get(key, 0.0))
    rows = [
        [
            key,
            *(
                f"{ms:.1f}"
                for ms in (whole.get(key, 0.0) - alone.get(key, 0.0), whole.get(key, 0.0), alone.get(key, 0.0))
            ),
        ]
        for key in found[:SHOWN_OPERATIONS]
    ]
    totals = sum(whole.values()), sum(alone.values())
    return [["all operations", *(f"{ms:.1f}" for ms in (totals[0] - totals[1], *totals))], *rows]


def operations(parts: Parts, names: Iterable[str]) -> dict[str, float]:
    """Milliseconds of each of torch's operations in these parts together, without the operations that it calls."""
    cuda = parts.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    found: dict[str, float] = {}
    for name in names:
        runs: list[dict[str, float]] = []
        for _ in range(PROFILED_RUNS):
            parts.reset()
            with profiling(activities) as profiled:
                parts.works[name]()
            events = profiled.key_averages()
            runs.append({e.key: (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1000 for e in events})
        for key in runs[0]:  # the smallest: what runs beside it makes single operations longer
            found[key] = found.get(key, 0.0) + min(run.get(key, 0.0) for run in runs)
    return found


def largest_difference(found: Observed, other: Observed) -> float:
    """The largest relative difference of a loss term."""
    return max((abs(found.losses[k] - x) / max(abs(x), 1e-6) for k, x in other.losses.items()), default=0.0)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median, with the smallest and the largest value."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def parts_table(run: Run) -> list[list[str]]:
    """Milliseconds and memory of the parts in each setting."""
    rows = [
        ["setting", "a: plain step, ms", "b: teacher features", "b: teacher pass", "c: continuation", "a, MB", "c, MB"]
    ]
    for name in dict.fromkeys(map(run.arithmetic, run.settings)):
        each = [run.measured.get((name, part)) for part in (PLAIN, FEATURES, TEACHER, CONTINUATION)]
        shown = [NONE if x is None else spread(x.ms, 0 if median(x.ms) >= 100 else 1) for x in each]
        memory = [NONE if x is None else f"{x.observed.peak_mb:.0f}" for x in (each[0], each[3])]
        rows.append([name, *shown, *memory])
    return rows


def steps_table(run: Run) -> list[list[str]]:
    """The KD steps: a row for each combination of methods and setting."""
    first = run.first
    titles = [
        "methods",
        "setting",
        "d: KD step, ms",
        "d / (a+b+c)",
        "d / a",
        f"d / {first}",
        "images/s",
        "peak MB",
        "memory",
        "syncs",
        "loss off",
    ]
    rows = [titles]
    for name, step in run.steps():
        plain = run.measured[run.arithmetic(name), PLAIN].observed
        syncs = step.observed.syncs
        more = NONE if syncs is None or plain.syncs is None else f"{plain.syncs}+{syncs - plain.syncs}"
        rows.append(
            [
                step.part,
                name,
                spread(step.ms, 0 if median(step.ms) >= 100 else 1),
                spread(run.beyond(name, step)),
                f"{median(run.beside(step, PLAIN, name)):.2f}",
                NONE if name == first else spread(run.beside(step, step.part, first)),
                f"{1000 * run.scene.images / median(step.ms):.2f}",
                f"{step.observed.peak_mb:.0f}",
                f"{run.memory(name, step):.2f}",
                more,
                NONE
                if name == first
                else f"{largest_difference(step.observed, run.measured[first, step.part].observed):.0e}",
            ]
        )
    return rows


def title(name: str, run: Run) -> str:
    height, width = run.scene.size
    return (
        f"{name}: {run.scene.images} images of {height} x {width} px, {run.scene.boxes} boxes each, "
        f"{run.scene.classes} classes"
    )


def facts(device: torch.device, rounds: int) -> str:
    """What was measured where, in one line."""
    if device.type == "cuda":
        clock, where = "events", f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        clock = "CPU time" if torch.get_num_threads() == 1 else "wall time"
        where = f"{machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"
        where += "" if has_bfloat16() else ", no bfloat16"
        where += f", oneDNN held to {isa}" if (isa := os.environ.get("ONEDNN_MAX_CPU_ISA")) else ""
    return f"{where}; torch {torch.__version__}, Python {platform.python_version()}; {clock}, {rounds} rounds"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def sections(name: str, run: Run) -> Iterator[tuple[str, list[list[str]]]]:
    """The tables of a pair, with their titles."""
    yield f"{title(name, run)}: the parts", parts_table(run)
    if any(True for _ in run.steps()):
        yield f"{name}: KD steps", steps_table(run)
    for methods, rows in run.profiles:
        yield f"{name}, {methods}: ms beyond the parts, {run.first}", [["operation", "more", "step", "parts"], *rows]


def show(console: Console, name: str, run: Run) -> None:
    for heading, (head, *rows) in sections(name, run):
        table = Table(title=heading, title_justify="left")
        for i, column in enumerate(head):
            table.add_column(column, justify="right" if i and column != "setting" else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for methods, reason in run.refused.items():
        console.print(f"{methods}: {reason}")


def write(folder: Path, told: str, runs: dict[tuple[str, tuple[int, int]], Run]) -> None:
    """Write step.md and step.json."""
    folder.mkdir(parents=True, exist_ok=True)
    text = [told]
    for (name, _), run in runs.items():
        text += [f"### {heading}\n\n{markdown(rows)}" for heading, rows in sections(name, run)]
        text += [f"- {methods}: {reason}\n" for methods, reason in run.refused.items()]
    (folder / "step.md").write_text("\n\n".join(text), "utf-8")
    stored = [{**asdict(each), "scene": asdict(run.scene)} for run in runs.values() for each in run.measured.values()]
    (folder / "step.json").write_text(json.dumps({"facts": told, "measured": stored}, indent=1), "utf-8")


def size_of(text: str) -> tuple[int, int]:
    """`320`, or `800x1216` as height x width."""
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pair",
        nargs="+",
        choices=[*PAIRS, "all"],
        default=["gfl-r18-r50"],
        metavar="PAIR",
        help=f"{', '.join(PAIRS)}, or all but gfl-tiny",
    )
    parser.add_argument("--teacher", help="a model's name as in a suite, with --student, instead of --pair")
    parser.add_argument("--student")
    parser.add_argument("--size", nargs="+", type=size_of, default=[(320, 320)], help="pixels: 320, or 800x1216")
    parser.add_argument("--images", type=int, default=2, help="in a batch")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--boxes", type=int, default=7, help="of each image")
    parser.add_argument("--methods", nargs="+", help="combinations such as CrossKD+PKD; left out: those of the pair")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["reference", "default", "cache"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--profile", action="store_true", help="show where a KD step exceeds its parts")
    parser.add_argument("--out", type=Path, help="folder for step.md and step.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pairs = dict.fromkeys(name for name in PAIRS if name != "gfl-tiny") if "all" in args.pair else args.pair
    chosen = {name: PAIRS[name] for name in pairs}
    if args.teacher or args.student:
        if not (args.teacher and args.student):
            parser.error("--teacher and --student belong together: name both")
        chosen = {f"{args.teacher} -> {args.student}": Pair(Detector(args.teacher), Detector(args.student))}
    device = torch.device(args.device)
    console = Console(width=None if Console().is_terminal else 160)
    told = facts(device, args.rounds)
    console.print(told)
    runs = {}
    for name, pair in chosen.items():
        for size in args.size:
            scene = Scene(size, args.images, args.classes, args.boxes)
            try:
                run = measure(
                    name,
                    pair,
                    scene,
                    args.settings,
                    args.methods or pair.methods,
                    rounds=args.rounds,
                    device=device,
                    profiled=args.profile,
                    say=console,
                )
            except KDError as error:
                parser.exit(1, f"error: {error}\n")
            except torch.OutOfMemoryError:
                parser.exit(1, f"error: {name} needs more memory than the device has: hand in fewer --images\n")
            runs[name, size] = run
            show(console, name, run)
            if args.out:
                write(args.out, told, runs)


if __name__ == "__main__":
    main()
