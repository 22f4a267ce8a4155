"""One search from data to winner on drawn shapes, as docs/tune.md shows it.

python benchmarks/tune/shapes.py [--out runs/tune-shapes] [--steps 400] [--teacher-steps 1200] [--seeds 5]

It writes the images, trains a teacher on more of them than the student has, and runs `kd tune` with three methods.
The confirmation evaluates on the test images as well. A search that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

import kdtoolkit
from kdtoolkit.data import ProceduralShapes

COUNTS = {"train": 200, "val": 200, "test": 200}
TEACHER_COUNTS = {"train": 1200, "val": 200}
# The detectors of the suite `quick`: the student has a third of the teacher's size.
DETECTOR = (
    "kdtoolkit/gfl?backbone=resnet10t&strides=[8, 16, 32]&neck_channels=48&head_channels=48&head_blocks=2"
    "&head_groups=16&bins=9&backbone_args={{channels: {}, stem_width: {}, stem_type: deep}}"
)
TEACHER = DETECTOR.format([48, 80, 112, 128], 16)
STUDENT = DETECTOR.format([16, 24, 32, 48], 8)
IMAGE_SIZE = 64


def write_shapes(root: Path, counts: Mapping[str, int], seed: int) -> None:
    """Write drawn images in COCO's format."""
    (root / "annotations").mkdir(parents=True)
    (root / "images").mkdir()
    for place, (split, count) in enumerate(counts.items()):
        data = ProceduralShapes(count, image_size=IMAGE_SIZE, seed=seed + place)
        truth = data.coco()
        for index, about in enumerate(truth["images"]):
            about["file_name"] = f"{split}{index}.png"
            Image.fromarray(data[index][0].permute(1, 2, 0).numpy()).save(root / "images" / about["file_name"])
        (root / "annotations" / f"{split}.json").write_text(json.dumps(truth))


def main() -> None:
    """Make what is missing, and search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tune-shapes"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--teacher-steps", type=int, default=1200)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    data, more = args.out / "shapes", args.out / "teachers-shapes"
    if not more.exists():
        write_shapes(data, COUNTS, 0)
        write_shapes(more, TEACHER_COUNTS, 100)
    teacher = kdtoolkit.train(
        TEACHER, more, out=args.out / "teacher", steps=args.teacher_steps, weights="none", quiet=True
    )
    kdtoolkit.tune(
        teacher.folder,
        STUDENT,
        data,
        student_weights="none",
        method=["CrossKD", "PKD", "FGD"],
        steps=args.steps,
        seeds=args.seeds,
        confirm_data=[data],
        out=args.out / "search",
    )


if __name__ == "__main__":
    main()
