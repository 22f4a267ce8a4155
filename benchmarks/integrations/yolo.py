"""Distillation in Ultralytics' own trainer, beside plain training and beside its own `distill_model`.

    python benchmarks/integrations/yolo.py DATA --out runs/ultralytics

DATA is a data set that kdtoolkit can read. All students start from the same random weights of a seed, and have the same
schedule and the same augmentation. A finished run is kept in OUT and never repeated, so the command can be stopped and
given again; `--runs 1` ends after one run. At the end it prints a table.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("YOLO_OFFLINE", "1")

import torch
import yaml
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils.torch_utils import init_seeds

from kdtoolkit.benchmark.stats import paired_difference, spread
from kdtoolkit.contract import Method
from kdtoolkit.data.tools.convert import convert
from kdtoolkit.integrations.ultralytics import DistillationTrainer
from kdtoolkit.methods import PKD, CrossKD

METHODS: dict[str, Callable[[], list[Method]]] = {
    "CrossKD": lambda: [CrossKD()],
    "PKD": lambda: [PKD()],
    "CrossKD+PKD": lambda: [CrossKD(), PKD()],
}
PLAIN, OWN = "plain training", "its own distill_model"
ROWS = (PLAIN, OWN, *METHODS)
TEACHER = "teacher"
AP = "metrics/mAP50-95(B)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/ultralytics"))
    parser.add_argument("--teacher", default="yolo11s")
    parser.add_argument("--student", default="yolo11n")
    parser.add_argument("--image-size", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--teacher-epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=int, help="end after so many runs")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    data = prepared(args.data, args.out.resolve())
    pending = [(row, seed) for seed in range(args.seeds) for row in ROWS if result(args.out, row, seed) is None]
    if result(args.out, TEACHER, 0) is None:
        pending.insert(0, (TEACHER, 0))
    for row, seed in pending[: args.runs]:
        run(args, data, row, seed)
    print(table(args))


def prepared(source: Path, out: Path) -> Path:
    """The data in Ultralytics' format, with an absolute path, which it needs."""
    folder = out / "data"
    if not folder.is_dir():
        convert(source, folder, "yolo", progress=lambda done, total: None)
    file = folder / "data.yaml"
    content = yaml.safe_load(file.read_text("utf-8"))
    file.write_text(yaml.safe_dump({**content, "path": str(folder)}, sort_keys=False), "utf-8")
    return file


def place(out: Path, row: str, seed: int) -> Path:
    return out.resolve() / row.replace(" ", "_") / f"seed{seed}"


def result(out: Path, row: str, seed: int) -> dict[str, Any] | None:
    file = place(out, row, seed) / "result.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else None


def run(args: argparse.Namespace, data: Path, row: str, seed: int) -> None:
    """Train one student, or the teacher, and write its AP and losses."""
    folder = place(args.out, row, seed)
    teacher = place(args.out, TEACHER, 0) / "weights" / "last.pt"
    settings: dict[str, Any] = {
        "data": str(data),
        "imgsz": args.image_size,
        "epochs": args.teacher_epochs if row == TEACHER else args.epochs,
        "batch": args.batch_size,
        "nbs": args.batch_size,  # a step for each batch, not for each 64 images
        "optimizer": "AdamW",
        "lr0": 1.5e-3,
        "cos_lr": True,
        "warmup_epochs": 1.0,
        "warmup_bias_lr": 0.0,
        "close_mosaic": 3,
        "val": False,  # the last epoch is evaluated all the same
        "plots": False,
        "pretrained": False,
        "device": "cpu",
        "seed": seed,
        "project": str(folder.parent),
        "name": folder.name,
        "exist_ok": True,
        "verbose": False,
    }
    trainer: type[DetectionTrainer] = DetectionTrainer
    if row == OWN:
        settings["distill_model"] = str(teacher)
    elif row in METHODS:
        trainer = DistillationTrainer.of(YOLO(teacher), METHODS[row]())
    began, last = time.time(), folder / "weights" / "last.pt"
    if row == TEACHER and last.is_file():  # longer than the others, so it goes on where it was stopped
        YOLO(last).train(resume=True)
    else:
        init_seeds(seed)
        YOLO(f"{args.teacher if row == TEACHER else args.student}.yaml").train(trainer=trainer, **settings)
    with (folder / "results.csv").open(newline="") as file:
        epochs = list(csv.DictReader(file))
    losses = {name: [float(epoch[name]) for epoch in epochs] for name in epochs[0] if name.startswith("train/")}
    found = {"ap": float(epochs[-1][AP]), "losses": losses, "seconds": time.time() - began}
    (folder / "result.json").write_text(json.dumps(found, indent=1), "utf-8")


def table(args: argparse.Namespace) -> str:
    """What has finished, in Markdown: AP in percent, and paired differences with their 95 % t-interval."""
    found = {
        row: {seed: each for seed in range(args.seeds) if (each := result(args.out, row, seed))}
        for row in (TEACHER, *ROWS)
    }
    aps = {row: {seed: 100 * each["ap"] for seed, each in runs.items()} for row, runs in found.items()}
    lines = ["| row | AP by seed | mean | beside plain | beside its own | minutes | losses, first and last epoch |"]
    lines.append("|---|---|---:|---:|---:|---:|---|")
    for row, runs in found.items():
        if not runs:
            continue
        mean = spread(aps[row].values())
        assert mean is not None
        cells = [
            row,
            ", ".join(f"{ap:.1f}" for ap in aps[row].values()),
            f"{mean.mean:.1f}",
            "-" if row in (TEACHER, PLAIN) else compared(aps[row], aps[PLAIN]),
            "-" if row not in METHODS else compared(aps[row], aps[OWN]),
            # The teacher may have been stopped and continued, and only its last part is timed.
            "-" if row == TEACHER else f"{sum(each['seconds'] for each in runs.values()) / len(runs) / 60:.1f}",
            "; ".join(falls(runs)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def compared(values: dict[int, float], reference: dict[int, float]) -> str:
    found = paired_difference(values, reference)
    if found is None:
        return "-"
    if found.low is None or found.high is None:
        return f"{found.mean:+.1f} (1 seed)"
    verdict = "" if found.low > 0 or found.high < 0 else ": cannot be told apart"
    return f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}]{verdict}"


def falls(runs: dict[int, dict[str, Any]]) -> list[str]:
    """The mean over seeds of each distillation loss in the first and the last epoch."""
    names = [name for name in next(iter(runs.values()))["losses"] if "/" in name[6:] or name == "train/dis_loss"]
    ends = {name: [[run["losses"][name][i] for run in runs.values()] for i in (0, -1)] for name in names}
    return [
        f"{name.removeprefix('train/').removesuffix('_loss')} "
        + " → ".join(f"{sum(values) / len(values):.3g}" for values in both)
        for name, both in ends.items()
    ]


if __name__ == "__main__":
    main()
