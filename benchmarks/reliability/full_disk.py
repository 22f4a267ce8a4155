"""Train on a disk that fills up: python benchmarks/reliability/full_disk.py FOLDER.

FOLDER lies on a small file system of its own: `mount -t tmpfs -o size=1700k tmpfs FOLDER`. A run of 8 steps stores a
checkpoint every 2. The disk has room for two of them, then it is full. Prints what the run says, what lies there, and
whether it ends with the weights of a run elsewhere once there is space again.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from kill_resume import detector

from kdtoolkit import Distiller, KDError
from kdtoolkit.data import ProceduralShapes
from kdtoolkit.engine.folder import RunFolder
from kdtoolkit.engine.train import TrainConfig, train
from kdtoolkit.methods import PKD, CrossKD


def run(folder: Path) -> torch.Tensor:
    """Train; gives the student's weights."""
    student = detector(8, 2)
    distiller = Distiller(detector(16, 1), student, [CrossKD(), PKD()])
    train(
        distiller,
        ProceduralShapes(8, image_size=64, seed=0),
        TrainConfig(steps=8, batch_size=4),
        seed=0,
        folder=RunFolder(folder, save_steps=2),
    )
    return torch.cat([parameter.detach().flatten() for parameter in student.parameters()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    filler = args.folder / "filler"
    with tempfile.TemporaryDirectory() as elsewhere:
        expected = run(Path(elsewhere))
        two = sum(path.stat().st_size for path in Path(elsewhere).glob("checkpoints/*"))
    disk = shutil.disk_usage(args.folder)
    filler.write_bytes(bytes(disk.free - two * 5 // 4))  # room for two checkpoints and half of a third
    try:
        run(args.folder / "run")
        print("the disk did not fill up")
    except KDError as error:
        print(error)
    print(*sorted(path.name for path in (args.folder / "run" / "checkpoints").iterdir()))
    filler.unlink()
    same = torch.equal(run(args.folder / "run"), expected)
    print(f"after space was freed: {'the same weights' if same else 'DIFFERENT weights'}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
