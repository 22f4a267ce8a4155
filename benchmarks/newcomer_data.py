"""Writes the data set of docs/results/newcomer.md: 150 photos of chess boards with three classes, in YOLO's format.

    python benchmarks/newcomer_data.py PATH/chess NEW_FOLDER

PATH/chess is a data set in COCO's format with the twelve kinds of pieces. 110 of its training images and 40 of its
validation images are copied.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import yaml

from kdtoolkit.data import open_dataset

NAMES = ("pawn", "officer", "royal")
COUNTS = {"train": 110, "val": 40}


def main(source: Path, target: Path) -> None:
    for split, count in COUNTS.items():
        photos = open_dataset(source, split).subset(count, seed=0).coco()
        kinds = {category["id"]: kind(category["name"]) for category in photos["categories"]}
        for image in photos["images"]:
            path = target / "images" / split / image["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / "images" / image["file_name"], path)
            lines = [
                line(kinds[each["category_id"]], each["bbox"], image["width"], image["height"])
                for each in photos["annotations"]
                if each["image_id"] == image["id"]
            ]
            labels = target / "labels" / split / f"{path.stem}.txt"
            labels.parent.mkdir(parents=True, exist_ok=True)
            labels.write_text("".join(lines))
    about = {split: f"images/{split}" for split in COUNTS} | {"names": list(NAMES)}
    (target / "data.yaml").write_text(yaml.safe_dump(about, sort_keys=False))


def kind(name: str) -> int:
    return 0 if "pawn" in name else 2 if "king" in name or "queen" in name else 1


def line(label: int, box: list[float], width: int, height: int) -> str:
    x, y, w, h = box
    return f"{label} {(x + w / 2) / width:.6f} {(y + h / 2) / height:.6f} {w / width:.6f} {h / height:.6f}\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
