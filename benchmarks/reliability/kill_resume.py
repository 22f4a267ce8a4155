"""Kill training runs by SIGKILL, start them again, and compare them with runs that were never stopped.

python benchmarks/reliability/kill_resume.py [--runs 50] [--first 0]

Each run trains a tiny GFL for 24 steps with a teacher and two methods. It stores a checkpoint every 3 steps and is
evaluated every 8. It is killed up to three times, then left to its end. Its weights, its log and its best weights
must then be those of the run that was never stopped, to the last byte. A third of the runs are killed at a random
moment of a random step, a third while they write a file (half of it is there), and a third run in two processes (gloo),
of which one is killed at a random moment. Four recipes take turns. Prints a line a run and a table; exits with 1 where
one differs.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch import nn

from kdtoolkit import Distiller
from kdtoolkit.data import Augmentation, InputSize, ProceduralShapes
from kdtoolkit.detectors.gfl import GFL
from kdtoolkit.engine import group
from kdtoolkit.engine.folder import RunFolder
from kdtoolkit.engine.train import TrainConfig, Validation, train
from kdtoolkit.methods import FBKD, MGD, PKD, CrossKD

STEPS, SAVE, EVALUATE = 24, 3, 8
STEP_SECONDS = 0.1  # about what a step takes
RECIPES: dict[str, dict[str, object]] = {
    "AdamW, moving average": {"ema": 0.9},
    "SGD, frozen parts": {
        "optimizer": "sgd",
        "lr": 0.01,
        "frozen": ("backbone.conv1",),
        "frozen_statistics": ("backbone",),
    },
    "float16, accumulation": {"precision": "float16", "accumulation": 2},
    "reader process, sizes, mosaic": {
        "workers": 1,
        "input_size": InputSize(short=(64, 96), long=128),
        "augmentation": Augmentation(mosaic=0.5, mixup=0.5, photometric=0.5),
    },
}
KILLS = ("at a random moment", "while a file is written", "one of two processes, at a random moment")
KEPT = ("student.safetensors", "best.safetensors", "log.jsonl")


def detector(channels: int, seed: int) -> GFL:
    torch.manual_seed(seed)
    return GFL(
        num_classes=6,
        backbone="resnet10t",
        backbone_args={"channels": [8, 8, 16, 16], "stem_width": 8},
        strides=(8, 16, 32),
        neck_channels=channels,
        head_channels=channels,
        head_blocks=1,
        head_groups=4,
    )


def work(folder: Path, recipe: str, writes: int, moment: float, rank: int, count: int, port: int) -> None:
    """One process of a run.

    It kills itself in the middle of write number `writes`, or after `moment` steps of this start, if that is not 0.
    """
    torch.set_num_threads(1)
    if writes or moment or count > 1:
        sys.stderr = open(folder.with_suffix(".log"), "a")  # noqa: SIM115 - what one says when the other one was killed
    if count > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
        group.join("cpu")
    sync, flushed = os.fsync, []
    sizes: dict[str, int] = {}  # of files, when they were last flushed

    def interrupted(handle: int) -> None:
        path, size = os.readlink(f"/proc/self/fd/{handle}"), os.fstat(handle).st_size
        flushed.append(path)
        if len(flushed) == writes:
            if os.path.isfile(path):  # half of what is new reaches the disk
                before = sizes.get(path, size if path.endswith(".jsonl") else 0)  # logs are appended to
                os.ftruncate(handle, (before + size) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        sync(handle)
        sizes[path] = size

    os.fsync = interrupted
    teacher, student = detector(16, 1), detector(8, 2)
    data = ProceduralShapes(32, image_size=64, seed=0)
    methods = [FBKD(), MGD()] if recipe.startswith("AdamW") else [CrossKD(), PKD()]
    calls = [0]

    def count_down(module: nn.Module, inputs: object) -> None:
        calls[0] += 1
        if calls[0] == int(moment):
            threading.Timer(moment % 1 * STEP_SECONDS, os.kill, (os.getpid(), signal.SIGKILL)).start()

    distiller = Distiller(teacher, student, methods)
    distiller.register_forward_pre_hook(count_down)
    train(
        distiller,
        data,
        TrainConfig(**{"steps": STEPS, "batch_size": 4, "warmup_steps": 4, **RECIPES[recipe]}),  # type: ignore[arg-type]
        seed=0,
        folder=RunFolder(folder, save_steps=SAVE),
        validation=Validation(data, every_steps=EVALUATE),
    )


def start(
    context: BaseContext, folder: Path, recipe: str, count: int, writes: int = 0, moment: float = 0, victim: int = 0
) -> list[BaseProcess]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = [
        context.Process(target=work, args=(folder, recipe, writes, moment * (rank == victim), rank, count, port))  # type: ignore[attr-defined]
        for rank in range(count)
    ]
    for process in found:
        process.start()
    return found


def finish(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(f"a run that was not killed ended with exit code {process.exitcode}")


def digests(folder: Path) -> list[str]:
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in KEPT]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="number of the first run; each draws by its number")
    args = parser.parse_args()
    context = multiprocessing.get_context("forkserver")  # each run in a fresh process, without importing torch anew
    context.set_forkserver_preload([__name__, "kdtoolkit.engine.train", "accelerate.utils"])
    root = Path(tempfile.mkdtemp(prefix="kill_resume"))
    expected: dict[tuple[str, int], list[str]] = {}
    table = {kind: [0, 0, 0] for kind in KILLS}
    for number in range(args.first, args.first + args.runs):
        draw = random.Random(number)
        kind, recipe = KILLS[number % 3], list(RECIPES)[number // 3 % len(RECIPES)]
        count = 2 if kind == KILLS[2] else 1
        if (recipe, count) not in expected:
            folder = root / f"whole{len(expected)}"
            finish(start(context, folder, recipe, count))
            expected[recipe, count] = digests(folder)
        folder, kills = root / f"run{number}", 0
        for _ in range(draw.randint(1, 3)):
            writes = draw.randint(2, 20) if kind == KILLS[1] else 0
            moment = 0 if writes else draw.uniform(1, 9)
            processes = start(context, folder, recipe, count, writes, moment, draw.randrange(count))
            wait([process.sentinel for process in processes])
            if any(process.exitcode for process in processes):
                for process in processes:  # as torchrun does
                    process.kill()
            for process in processes:
                process.join()
            kills += any(process.exitcode == -signal.SIGKILL for process in processes)
        finish(start(context, folder, recipe, count))
        same = digests(folder) == expected[recipe, count]
        for place, value in enumerate((1, kills, int(same))):
            table[kind][place] += value
        print(
            f"run {number}: {recipe}; {kind}; killed {kills} times; {'identical' if same else 'DIFFERENT'}", flush=True
        )
        shutil.rmtree(folder)
    print("\n| killed | runs | kills | identical at the end |\n|---|---|---|---|")
    for kind, (runs, kills, same) in table.items():
        print(f"| {kind} | {runs} | {kills} | {same} |")
    shutil.rmtree(root)
    sys.exit(sum(row[0] - row[2] for row in table.values()) > 0)


if __name__ == "__main__":
    main()
