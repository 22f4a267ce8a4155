"""Compare the training loops of two checkouts: python benchmarks/speed/loop.py OTHER [--rounds 5] [--steps 60].

OTHER is a second checkout of the project, as `git worktree add OTHER main~20` makes one. In each round both train the
student of the suite `quick` with CrossKD and PKD, in a process each, in turn, so that drift of the machine cancels.
Prints the median step of each round, the processor time a step (which a busy machine disturbs less), the medians of
their ratios, and whether both trained the same weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

TRAIN = """
import hashlib, json, sys, tempfile, time, torch
torch.set_num_threads(1)
from kdtoolkit import Distiller
from kdtoolkit.benchmark.suite_file import load_suite
from kdtoolkit.data import ProceduralShapes
from kdtoolkit.engine.train import train
from kdtoolkit.methods import PKD, CrossKD
from kdtoolkit.models import build_model

suite = load_suite("quick")
data = ProceduralShapes(64, image_size=suite.data.image_size, seed=0)
models = []
for section in (suite.teacher, suite.student):
    torch.manual_seed(len(models))
    models.append(build_model(section.model, len(data.class_names), section.args))
options = {}
try:
    from kdtoolkit.engine.folder import RunFolder
    options["folder"] = RunFolder(tempfile.mkdtemp(), save_seconds=60)  # as in a benchmark's cell
except ImportError:
    pass  # a checkout from before there were folders
config = suite.student.train.model_copy(update={"steps": int(sys.argv[1]), "precision": "float32"})
begun = time.process_time()
result = train(Distiller(*models, [CrossKD(), PKD()]), data, config, seed=0, **options)
used = time.process_time() - begun
digest = hashlib.sha256(b"".join(x.numpy().tobytes() for x in models[1].state_dict().values())).hexdigest()
print(json.dumps([result.step_ms, 1000 * used / result.steps, digest]))
"""


def step(tree: Path, steps: int) -> tuple[float, float, str]:
    """Of a checkout: milliseconds of the median step, processor time of a step, and a digest of the weights."""
    found = subprocess.run(
        [sys.executable, "-c", TRAIN, str(steps)],
        env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
        cwd=tree,
        capture_output=True,
        text=True,
        check=True,
    )
    median, used, digest = json.loads(found.stdout.splitlines()[-1])
    return median, used, digest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    trees = {"other": args.other.resolve(), "this": Path(__file__).resolve().parents[2]}
    medians, used = [], []
    for number in range(args.rounds):
        order = list(trees)[:: 1 if number % 2 else -1]
        found = {name: step(trees[name], args.steps) for name in order}
        medians.append(found["this"][0] / found["other"][0])
        used.append(found["this"][1] / found["other"][1])
        same = "the same weights" if found["this"][2] == found["other"][2] else "different weights"
        shown = ", ".join(f"{name} {found[name][0]:.1f} ms (processor {found[name][1]:.1f})" for name in trees)
        print(f"round {number + 1}: {shown}; {same}", flush=True)
    print(f"this / other: median step {statistics.median(medians):.3f}, processor time {statistics.median(used):.3f}")


if __name__ == "__main__":
    main()
