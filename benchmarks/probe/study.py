"""What gradients say about methods and weights: conflict over training, and FGD and PKD at equal shares.

python benchmarks/probe/study.py --data FOLDER --weights FOLDER [--out runs/probe] [--minutes 20] [--seeds 2]

`--data` holds the data sets `bccd` and `playing-cards`; `--weights` holds `lite0.safetensors` and `lite2.safetensors`,
ImageNet weights of timm's tf_efficientnet_lite0 and lite2. Each training is one cell with a file of its own. So the
same command goes on where it was stopped, and with `--minutes` no cell begins after that time. At the end, and with
`--report` alone, it prints the tables of docs/results/probe.md.

Two questions:

1. conflict: does mimicking the teacher's predictions (Mimic) pull against the task where CrossKD does not? Both are
   probed on the same student, while it is trained by one of them.
2. weights: what share has FGD with its published weights, which of its terms is it, and do PKD and FGD come out alike
   if both are held at the same share?
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from kdtoolkit import Distiller, KDError, probe
from kdtoolkit.benchmark.datasets import DataSets, load_data
from kdtoolkit.benchmark.suite import DataSection
from kdtoolkit.data import Augmentation, LoadedBatch, batches
from kdtoolkit.engine.config import TrainConfig
from kdtoolkit.engine.evaluate import evaluate
from kdtoolkit.engine.folder import RunFolder
from kdtoolkit.engine.optim import build_optimizer, frozen, set_rates
from kdtoolkit.engine.state import seed_step
from kdtoolkit.engine.train import train
from kdtoolkit.files import write_atomic
from kdtoolkit.method_use import MethodUse
from kdtoolkit.models import open_detector
from kdtoolkit.probing import Probe
from kdtoolkit.workflow.auto import scaled

SHARE = 0.1
LARGE_SHARE = 0.8  # about what PKD has with its published weights on the drawn shapes
PROBE_BATCHES = 4


@dataclass(frozen=True)
class Setting:
    """Images, the two detectors and their schedules, and the steps at which the student is probed."""

    data: DataSection
    teacher: dict[str, Any]
    student: dict[str, Any]
    teacher_config: TrainConfig
    config: TrainConfig
    probed: tuple[int, ...]


@dataclass(frozen=True)
class Cell:
    """One training: its setting, methods and seed. `watched`: probed on its student besides its own methods."""

    setting: str
    entry: str
    seed: int
    methods: tuple[str, ...]
    watched: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.setting}-{self.entry.replace(' ', '_')}-{self.seed}"


def settings(data: Path, weights: Path) -> dict[str, Setting]:
    """The settings by name: drawn shapes and BCCD with the detectors of suite `quick`; two real sets with lite ones."""
    tiny = {"backbone": "resnet10t", "strides": [8, 16, 32], "neck_channels": 48, "head_channels": 48, "bins": 9}
    tiny |= {"head_blocks": 2, "head_groups": 16}
    wide, narrow = (
        {**tiny, "backbone_args": {"channels": list(channels), "stem_width": width, "stem_type": "deep"}}
        for channels, width in (((48, 80, 112, 128), 16), ((16, 24, 32, 48), 8))
    )
    scratch = {"batch_size": 8, "channels_last": True}

    def small(section: DataSection) -> Setting:
        return Setting(
            section,
            wide,
            narrow,
            TrainConfig(steps=2000, lr=3e-3, **scratch),
            TrainConfig(steps=800, lr=4e-3, **scratch),
            (0, 25, 100, 400, 800),
        )

    def photos(name: str, images: int, flip: float) -> Setting:
        args = {"strides": [8, 16, 32, 64]}
        recipe = {
            "lr": 2e-3,
            "lr_factors": {"backbone": 0.25},
            "frozen": ("backbone.conv_stem", "backbone.bn1", "backbone.blocks.0"),
            "frozen_statistics": ("backbone.bn1", "backbone.blocks.0"),
            "channels_last": True,
            "augmentation": Augmentation(flip=flip),
        }
        big, little = (
            args | {"backbone": f"tf_efficientnet_{name}", "pretrained": str(weights / f"{name}.safetensors")} | widths
            for name, widths in (
                ("lite2", {"neck_channels": 96, "head_channels": 96}),
                ("lite0", {"neck_channels": 48, "head_channels": 48, "head_groups": 8}),
            )
        )
        return Setting(
            DataSection(root=data / name, image_size=160, student_images=images),
            big,
            little,
            TrainConfig(steps=400, batch_size=8, **recipe),
            TrainConfig(steps=200, batch_size=4, **recipe),
            (0, 25, 75, 200),
        )

    shapes = DataSection(image_size=64, teacher_images=1500, student_images=200, val_images=500)
    return {
        "shapes": small(shapes),
        "bccd-small": small(DataSection(root=data / "bccd", image_size=64)),
        "bccd": photos("bccd", 52, 0.5),
        "playing-cards": photos("playing-cards", 74, 0.0),
    }


def cells(seeds: int) -> Iterator[Cell]:
    """All cells in the order in which they matter."""
    yield from _weights("shapes", 0)
    both = ("Mimic", "CrossKD")
    for setting in ("bccd", "playing-cards"):
        for entry in both:
            yield Cell(setting, entry, 0, (entry,), both)
    yield from _weights("bccd-small", 0)
    for seed in range(1, seeds):
        yield from _weights("shapes", seed)
        yield from _weights("bccd-small", seed)


def _weights(setting: str, seed: int) -> Iterator[Cell]:
    """FGD and PKD with published weights, held at two shares, and with weights that a probe of step 100 proposes."""
    both = ("FGD", "PKD")
    yield Cell(setting, "baseline", seed, (), ("PKD", "FGD"))
    for name in both:
        yield Cell(setting, name, seed, (name,))
    for share in (SHARE, LARGE_SHARE):
        for name in both:
            yield Cell(setting, f"{name} held at {share}", seed, (f"{name}?share={share}",))
    for name in both:
        yield Cell(setting, f"{name} scaled", seed, (name,))


class Study:
    """Trains teachers and cells, and keeps what they found in a folder."""

    def __init__(self, out: Path, of: dict[str, Setting], console: Console) -> None:
        self._out = out
        self._settings = of
        self._console = console

    def result(self, cell: Cell) -> dict[str, Any] | None:
        path = self._out / "cells" / f"{cell.name}.json"
        return json.loads(path.read_bytes()) if path.exists() else None

    def run(self, cell: Cell) -> None:
        """Train a cell's student, probe it, measure its AP, and write all of it."""
        setting = self._settings[cell.setting]
        sets = load_data(setting.data, self._out / "pictures")
        teacher = self._teacher(cell.setting, sets)
        student = _detector(setting.student, sets, cell.seed)
        uses = [MethodUse.model_validate(name) for name in cell.methods]
        if cell.entry.endswith("scaled"):
            uses = [scaled(use, self._factor(cell, use)) for use in uses]
        torch.manual_seed(cell.seed)
        distiller = Distiller(teacher if uses else None, student, [use.build() for use in uses])
        watched = None
        if cell.watched:
            watched = Distiller(teacher, student, [MethodUse.model_validate(name).build() for name in cell.watched])
        begun = time.process_time()
        probes = _train(distiller, watched or distiller, setting, sets, cell.seed)
        seconds = time.process_time() - begun
        found = evaluate(student, sets.val)
        self._write(
            self._out / "cells" / f"{cell.name}.json",
            {
                "cell": asdict(cell),
                "methods": [str(use) for use in uses],
                "ap": found.ap,
                "ap50": found.ap50,
                "cpu_seconds": seconds,
                "probes": probes,
                "torch": torch.__version__,
            },
        )
        self._console.print(f"{cell.name}: {found.ap:.1f} AP, {seconds:.0f} s of CPU time", highlight=False)

    def _factor(self, cell: Cell, use: MethodUse) -> float:
        """What a probe of the baseline's student in its step 100 proposes for a share of 10 %."""
        baseline = self.result(Cell(cell.setting, "baseline", cell.seed, ()))
        if baseline is None:
            raise KDError(f"{cell.name} takes its weights from the baseline of its setting, which has not run yet")
        return float(baseline["probes"]["100"]["factors"][use.name.lower()])

    def _teacher(self, name: str, sets: DataSets) -> nn.Module:
        """The trained teacher of a setting, trained now if it is missing."""
        setting, path = self._settings[name], self._out / "teachers" / f"{name}.pt"
        teacher = _detector(setting.teacher, sets, 0)
        if path.exists():
            teacher.load_state_dict(torch.load(path, weights_only=True))
            return teacher
        self._console.print(f"{name}: training the teacher, {setting.teacher_config.steps} steps", highlight=False)
        folder = RunFolder(self._out / "teachers" / name, save_seconds=60)
        train(Distiller(None, teacher), sets.teacher, setting.teacher_config, seed=0, folder=folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(teacher.state_dict(), path)
        self._write(path.with_suffix(".json"), {"ap": evaluate(teacher, sets.val).ap})
        return teacher

    @staticmethod
    def _write(path: Path, content: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(content, indent=1).encode())


def _detector(args: dict[str, Any], sets: DataSets, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return open_detector("kdtoolkit/gfl", class_names=sets.student.class_names, args=args).model


def _train(
    distiller: Distiller, watched: Distiller, setting: Setting, sets: DataSets, seed: int
) -> dict[str, dict[str, Any]]:
    """Train as `kdtoolkit.engine.train.train` does, and probe `watched` before some steps. Gives the probes by step."""
    config, probes = setting.config, {}
    # The same images for all probes.
    shown = [(batch.images, batch.targets) for batch in _batches(sets, config, seed + 1000, PROBE_BATCHES)]
    with frozen(distiller.student, config) as set_training:
        optimizer = build_optimizer(distiller, config)
        set_training(distiller)
        stream = _batches(sets, config, seed, config.steps)
        for step in range(config.steps + 1):
            if step in setting.probed and watched.methods:
                probes[str(step)] = _facts(probe(watched, shown, SHARE), distiller)
            if step == config.steps:
                return probes
            batch = next(stream)
            seed_step(seed, step, 0)
            set_rates(optimizer, step, config)
            optimizer.zero_grad(set_to_none=True)
            distiller(batch.images, batch.targets).total.backward()
            nn.utils.clip_grad_norm_([p for p in distiller.parameters() if p.requires_grad], config.clip_norm)
            optimizer.step()
    return probes


def _batches(sets: DataSets, config: TrainConfig, seed: int, steps: int) -> Iterator[LoadedBatch]:
    return batches(sets.student, batch_size=config.batch_size, steps=steps, seed=seed, augment=config.augmentation)


def _facts(found: Probe, distiller: Distiller) -> dict[str, Any]:
    """A probe as JSON holds it."""
    return {
        "rows": {
            row.name: {part: asdict(m) | {"share": m.share} for part, m in row.parts.items()} for row in found.rows
        },
        "factors": {name: found.factor(name) for name in found.methods},
        "agreement": dict(found.agreement),
        "held": {name: held.metrics for name, held in distiller.held.items()},
        "seconds": found.seconds,
    }


def report(study: Study, seeds: int, console: Console) -> None:
    """Print the tables of docs/results/probe.md as Markdown."""

    def line(*cells: object) -> None:
        console.print("| " + " | ".join(map(str, cells)) + " |", markup=False, highlight=False, soft_wrap=True)

    done = [(cell, found) for cell in cells(seeds) if (found := study.result(cell))]
    console.print("\n## Conflict\n", markup=False)
    line(
        "set", "trained by", "step", *(f"{m}: head / neck / backbone" for m in ("Mimic", "CrossKD")), "task with itself"
    )
    line("---", "---", *["---:"] * 4)
    for cell, found in done:
        for step, at in found["probes"].items() if len(cell.watched) == 2 and cell.methods else ():
            row = [
                " / ".join(f"{at['rows'][m][p]['cosine']:+.2f}" for p in ("head", "neck", "backbone"))
                for m in ("mimic", "crosskd")
            ]
            line(cell.setting, cell.entry, step, *row, f"{at['agreement'].get('all', 0):+.2f}")
    console.print("\n## Shares of PKD and FGD at their published weights\n", markup=False)
    line("set", "trained by", "step", "method", "share", "cosine", "largest term", "factor for 10 %")
    line("---", "---", "---:", "---", "---:", "---:", "---", "---:")
    for cell, found in done:
        published = cell.entry in ("baseline", "FGD", "PKD") and not cell.seed
        for step, at in found["probes"].items() if published else ():
            for name, factor in at["factors"].items():
                rows, own = at["rows"], at["rows"][name]["all"]
                terms = {key: each["all"]["norm"] for key, each in rows.items() if key.startswith(f"{name}/")}
                largest = max(terms, key=terms.__getitem__)
                shown = f"{largest}, {100 * terms[largest] / sum(terms.values()):.0f} %"
                line(
                    cell.setting,
                    cell.entry,
                    step,
                    name,
                    f"{100 * own['share']:.1f} %",
                    f"{own['cosine']:+.2f}",
                    shown,
                    f"{factor:.3g}",
                )
    console.print("\n## AP\n", markup=False)
    line("set", "row", "methods", "AP of each seed", "mean", "against the baseline")
    line("---", "---", "---", "---", "---:", "---:")
    names = dict.fromkeys((cell.setting, cell.entry) for cell, _ in done)
    aps = {key: {c.seed: f["ap"] for c, f in done if (c.setting, c.entry) == key} for key in names}
    for (setting, entry), own in aps.items():
        base = aps.get((setting, "baseline"), {})
        against = [ap - base[seed] for seed, ap in own.items() if seed in base]
        methods = next(f["methods"] for c, f in done if (c.setting, c.entry) == (setting, entry))
        line(
            setting,
            entry,
            " + ".join(methods) or "none",
            ", ".join(f"{ap:.1f}" for ap in own.values()),
            f"{statistics.fmean(own.values()):.1f}",
            f"{statistics.fmean(against):+.1f}" if against and entry != "baseline" else "",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data sets bccd and playing-cards")
    parser.add_argument(
        "--weights", type=Path, required=True, help="the folder of lite0.safetensors, lite2.safetensors"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/probe"))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no cell begins after this time")
    parser.add_argument("--seeds", type=int, default=2, help="of the part about weights")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="cells whose name begins so")
    parser.add_argument("--report", action="store_true", help="print the tables of what is there, and train nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console = Console()
    study = Study(args.out, settings(args.data.absolute(), args.weights.absolute()), console)
    begun = time.monotonic()
    for cell in () if args.report else cells(args.seeds):
        if study.result(cell) is None and cell.name.startswith(args.only or ""):
            if time.monotonic() - begun > 60 * args.minutes:
                console.print("the time is over: the same command goes on")
                return
            study.run(cell)
    report(study, args.seeds, console)


if __name__ == "__main__":
    main()
