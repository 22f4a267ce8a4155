"""Check on a GPU machine what the tests cannot check without one; takes about 8 minutes.

    python benchmarks/gpu/check.py                                     # on a GPU; installed with the dev extra
    python benchmarks/gpu/check.py --device cpu --suite SUITE.yaml     # the script itself, with a suite of seconds

Each part runs in its own process, with a time limit: a part that fails or hangs does not stop the others. The report is
printed as it grows, and is written to OUT/check.md.

So far it has run from start to end on a CPU only (the second command). It has never run on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kdtoolkit import Distiller, adapt
from kdtoolkit.adapters import torchvision
from kdtoolkit.benchmark.suite_file import load_suite
from kdtoolkit.compatibility import why_refused
from kdtoolkit.detectors import ATSS, FCOS, GFL, RetinaNet
from kdtoolkit.errors import KDError
from kdtoolkit.methods import FGD, LD, PKD, CrossKD

ROOT = Path(__file__).parents[2]
LIMIT = 480  # seconds, of all parts together
STEPS = 20  # timed, after WARM_UP untimed ones
WARM_UP = 5
CLASSES = 20
NOT_MEASURED = "-"


def say(line: str) -> None:
    print(line, flush=True)


def images_and_targets(count: int, side: int, device: str) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Random images with eight boxes each."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, side, side, generator=generator).to(device) for _ in range(count)]
    targets = []
    for _ in range(count):
        corners = torch.rand(8, 2, generator=generator) * side * 0.7
        sizes = (0.05 + 0.25 * torch.rand(8, 2, generator=generator)) * side
        labels = torch.randint(CLASSES, (8,), generator=generator)
        targets.append({"boxes": torch.cat([corners, corners + sizes], 1).to(device), "labels": labels.to(device)})
    return images, targets


def gfl_pair(device: str) -> Distiller:
    """A ResNet-50 GFL into a ResNet-18 GFL on a GPU; on a CPU both narrow and shallow. Random weights."""
    small: dict[str, Any] = {
        "backbone_args": {"channels": (8, 8, 16, 16), "stem_width": 4},
        "neck_channels": 16,
        "head_channels": 16,
        "head_blocks": 2,
        "head_groups": 4,
    }
    real = device == "cuda"
    torch.manual_seed(0)
    teacher, student = (
        GFL(CLASSES, backbone=name, **({} if real else small))
        for name in (("resnet50", "resnet18") if real else ("resnet10t", "resnet10t"))
    )
    return Distiller(teacher, student, [CrossKD(), PKD(), FGD(), LD()]).train()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def environment(device: str) -> None:
    say(f"torch {torch.__version__}, python {platform.python_version()}, {platform.system()}, {os.cpu_count()} cores")
    if device == "cuda":
        for i in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(i)
            say(f"GPU {i}: {facts.name}, {facts.total_memory / 2**30:.0f} GiB, capability {facts.major}.{facts.minor}")
        say(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    else:
        say("On a CPU: this run checks the script, and tells nothing about a GPU.")


def tests(device: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "KDTOOLKIT_TEST_DEVICE": device}, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def measure(
    distiller: Distiller, step: Callable[..., Any], batch: Any, device: str, dtype: torch.dtype | None
) -> tuple[dict[str, float], float, str]:
    """The losses of the first step, the median time of a step in ms, and the peak GPU memory in MiB."""
    optimizer = torch.optim.AdamW([p for p in distiller.parameters() if p.requires_grad], 1e-5)
    scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16)
    first: dict[str, float] = {}
    times = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for i in range(WARM_UP + STEPS):
        synchronize(device)
        begun = time.perf_counter()
        with torch.autocast(device, dtype, enabled=dtype is not None):
            losses = step(*batch)
        optimizer.zero_grad()
        scaler.scale(losses.total).backward()
        scaler.step(optimizer)
        scaler.update()
        synchronize(device)
        if i >= WARM_UP:
            times.append(1000 * (time.perf_counter() - begun))
        if not first:
            first = {name: loss.item() for name, loss in losses.items()}
    memory = f"{torch.cuda.max_memory_allocated() / 2**20:.0f}" if device == "cuda" else NOT_MEASURED
    if not all(p.isfinite().all() for p in distiller.parameters()):
        raise RuntimeError("weights are not finite after the steps")
    return first, statistics.median(times), memory


def report_steps(device: str, rows: list[tuple[str, torch.dtype | None, bool, bool]]) -> None:
    """One row each: name, type under autocast, channels last, compiled."""
    side, count = (512, 8) if device == "cuda" else (64, 2)
    batch = images_and_targets(count, side, device)
    whole = gfl_pair(device)
    expected: dict[str, float] = {}
    say(f"{count} images of {side} px; CrossKD, PKD, FGD and LD")
    say("| step | ms | memory MiB | largest difference of a first loss from float32 |")
    say("|---|---:|---:|---:|")
    for name, dtype, channels_last, compiled in rows:
        distiller = copy.deepcopy(whole).to(device)
        if channels_last:
            distiller.to(memory_format=torch.channels_last)
        # Without a GPU the graph is only traced: to compile it takes a CPU minutes.
        backend = "inductor" if device == "cuda" else "aot_eager"
        step = torch.compile(distiller, backend=backend) if compiled else distiller
        begun = time.perf_counter()
        first, ms, memory = measure(distiller, step, batch, device, dtype)
        expected = expected or first
        worst = max(first, key=lambda term: abs(first[term] - expected[term]) / (abs(expected[term]) + 1e-6))
        off = abs(first[worst] - expected[worst]) / (abs(expected[worst]) + 1e-6)
        say(f"| {name} | {ms:.1f} | {memory} | {off:.1%} ({worst}) |")
        if compiled:
            say(f"\ncompiled, first steps included, in {time.perf_counter() - begun:.0f} s\n")


def precision(device: str) -> None:
    report_steps(
        device,
        [
            ("float32", None, False, False),
            ("float32, channels last", None, True, False),
            ("bfloat16", torch.bfloat16, False, False),
            ("bfloat16, channels last", torch.bfloat16, True, False),
            ("float16 with a scaler", torch.float16, False, False),
        ],
    )


def compilation(device: str) -> None:
    report_steps(device, [("float32", None, False, False), ("float32, torch.compile", None, False, True)])


@contextmanager
def synchronisations(device: str) -> Iterator[list[str]]:
    """The places that wait for the GPU, one line for each time. On a CPU nothing waits, and nothing is counted."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    found += [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]


def waits(forward: Callable[..., object], batch: Any, device: str) -> list[str]:
    forward(*batch)  # the first pass fills caches
    with synchronisations(device) as places:
        forward(*batch)
    return places


def syncs(device: str) -> None:
    narrow: dict[str, Any] = {"backbone": "resnet10t", "neck_channels": 32, "head_channels": 32, "head_blocks": 2}
    families: dict[str, Callable[[], torch.nn.Module]] = {
        kind.__name__: partial(kind, CLASSES, **narrow) for kind in (GFL, ATSS, FCOS, RetinaNet)
    }
    examples = {name: build for cls in torchvision.ADAPTERS for name, build in cls.examples().items()}
    # Mask R-CNN's own forward pass asks for masks.
    families |= {name: partial(build, CLASSES) for name, build in examples.items() if "Mask" not in name}
    batch = images_and_targets(8, 128, device)
    say("How often a forward pass waits for the GPU, in a batch of 8: the detector's own, Distiller's without methods,")
    say("Distiller's with CrossKD, PKD, FGD and LD, and what the last has beyond the first.\n")
    say("| family | own | no method | methods | beyond | where most |")
    say("|---|---:|---:|---:|---:|---|")
    for name, build in families.items():
        torch.manual_seed(0)
        teacher, student = build().to(device), build().to(device).train()
        specs = adapt(student).spec, adapt(teacher).spec
        methods = [method for method in (CrossKD(), PKD(), FGD(), LD()) if why_refused(method, *specs) is None]
        own, plain, full = (
            waits(forward, batch, device)
            for forward in (student, Distiller(None, student), Distiller(teacher, student, methods))
        )
        added = {place: full.count(place) - own.count(place) for place in dict.fromkeys(full)}
        most = [f"{place} x{n}" for place, n in sorted(added.items(), key=lambda item: -item[1])[:4] if n > 0]
        found = [len(own), len(plain), len(full), len(full) - len(own)]
        counts = " | ".join(map(str, found) if device == "cuda" else [NOT_MEASURED] * len(found))
        say(f"| {name} | {counts} | {', '.join(most)} |")


def benchmark(device: str, suite: str, out: Path) -> None:
    """Run the suite with one seed, three cells at a time. Print its AP beside that of the board in docs/results."""
    folder = out / "runs"
    command = [sys.executable, "-m", "kdtoolkit", "benchmark", "run", suite, "--device", device, "--seeds", "1"]
    done = subprocess.run([*command, "--jobs", "3", "--out", str(folder)], cwd=ROOT, stdout=sys.stderr, check=False)
    name = load_suite(suite).name
    boards = sorted(folder.glob(f"{name}*/leaderboard.json"))
    if not boards:
        raise KDError(f"the benchmark left no board in {folder} (exit code {done.returncode})")
    ours = json.loads(boards[0].read_text("utf-8"))
    stored = ROOT / "docs" / "results" / name / "leaderboard.json"
    theirs = json.loads(stored.read_text("utf-8")) if stored.exists() else {"facts": {}, "rows": []}
    for title, facts in (("here", ours["facts"]), ("docs/results", theirs["facts"])):
        say(f"{title}: {facts.get('machine', 'none')}; {facts.get('data', '')}; {facts.get('student', '')}\n")
    other = {row["entry"]: row for row in theirs["rows"]}
    say("| entry | AP here, one seed | AP in docs/results |")
    say("|---|---:|---:|")
    for row in ours["rows"]:
        say(f"| {row['entry']} | {average_precision(row)} | {average_precision(other.get(row['entry']))} |")
    if done.returncode:
        raise SystemExit(done.returncode)


def average_precision(row: dict[str, Any] | None) -> str:
    found = row["metrics"]["ap"] if row else None
    return f"{found['mean']:.1f}" if found else "-"


# Name -> title, and the most seconds the part may take. The last parts get no more than what is left of LIMIT.
PARTS = {
    "environment": ("The machine", 60),
    "tests": ("tests/gpu", 150),
    "precision": ("Steps by precision", 60),
    "syncs": ("Synchronisations", 60),
    "benchmark": ("The benchmark, beside docs/results", 300),
    "compilation": ("torch.compile", 240),
}


def run_part(name: str, args: argparse.Namespace) -> None:
    """Run one part in this process."""
    if name == "benchmark":
        benchmark(args.device, args.suite, args.out)
        return
    parts = {
        "environment": environment,
        "tests": tests,
        "precision": precision,
        "compilation": compilation,
        "syncs": syncs,
    }
    parts[name](args.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--suite", default="quick", help="what to run on the GPU (quick), or a suite's YAML file")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--part", choices=PARTS, help="run this part alone, without a time limit")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: there is no CUDA GPU here; --device cpu runs the script itself on a CPU")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        run_part(args.part, args)
        return
    begun, failed = time.monotonic(), []
    with (args.out / "check.md").open("w", encoding="utf-8") as file:
        for name, (title, limit) in PARTS.items():
            say(f"... {name}")
            left = LIMIT - (time.monotonic() - begun)
            text, good = run_apart(name, args, min(limit, max(left, 60)))
            failed += [] if good else [name]
            section = f"## {title}\n\n{text.strip()}\n"
            file.write(section + "\n")
            file.flush()
            say(section)
    say(f"{time.monotonic() - begun:.0f} s; {'failed: ' + ', '.join(failed) if failed else 'all parts ran'}")
    sys.exit(bool(failed))


def run_apart(name: str, args: argparse.Namespace, limit: float) -> tuple[str, bool]:
    """Run a part in its own process: what it printed, and whether it ended well."""
    command = [sys.executable, __file__, "--part", name, "--device", args.device, "--suite", args.suite]
    return run_command([*command, "--out", str(args.out)], args.out / f"{name}.log", limit)


def run_command(command: list[str], log: Path, limit: float) -> tuple[str, bool]:
    """Run a command for at most `limit` seconds: what it printed and the end of its errors; whether it ended well.

    `log`: where its errors are kept.
    """
    begun = time.monotonic()
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True, cwd=ROOT
        )
        try:
            text, _ = process.communicate(timeout=limit)
            ending = "" if process.returncode == 0 else f"\n\nended with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            text, _ = process.communicate()
            ending = f"\n\nstopped after {limit:.0f} s"
    if ending:
        ending += "; the end of what it said:\n\n```\n" + log.read_text("utf-8")[-2000:] + "\n```"
    return f"{text}{ending}\n\n{time.monotonic() - begun:.0f} s", not ending


if __name__ == "__main__":
    main()
