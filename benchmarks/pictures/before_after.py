"""Draws the detections of a student that was trained alone beside those of the same student, distilled.

    python benchmarks/pictures/before_after.py --data PATH/bccd --out docs/results/before_after.jpg

It trains a teacher, then the student twice (`kd train`, `kd distill --compare-baseline`), in runs/before_after. A seed
chooses the images. Each detector shows the detections that have at least the score with the best F1 of their class on
all validation images. A detection is right if it has an IoU of at least 0.5 with an object of its class.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import kdtoolkit
from kdtoolkit.boxes import pairwise_iou
from kdtoolkit.data import DetectionDataset, Sample, open_dataset
from kdtoolkit.data.drawing import draw_boxes
from kdtoolkit.engine.detect import Runner
from kdtoolkit.engine.evaluate import find
from kdtoolkit.engine.thresholds import best_thresholds
from kdtoolkit.models import Detector, open_detector

SIZE = 192  # pixels
HEAD = "strides=[8, 16, 32]&neck_channels=64&head_channels=64&head_blocks=2&head_groups=16&bins=9"
TEACHER = f"kdtoolkit/gfl?backbone=resnet18&{HEAD}"
SMALL = "{channels: [16, 24, 32, 48], stem_width: 8, stem_type: deep}"
STUDENT = f"kdtoolkit/gfl?backbone=resnet10t&{HEAD}&backbone_args={SMALL}"
RIGHT, WRONG, MISSED = 2, 0, 1  # which have the colours green, red and blue
LINE = 28  # pixels of a line of text

Kept = tuple[Tensor, Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/before_after"))
    parser.add_argument("--teacher-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="chooses the images")
    given = parser.parse_args()
    kdtoolkit.train(TEACHER, given.data, steps=given.teacher_steps, lr=2e-3, out=given.runs / "teacher", **shared())
    report = kdtoolkit.distill(
        given.runs / "teacher",
        STUDENT,
        given.data,
        steps=given.steps,
        lr=3e-3,
        out=given.runs / "student",
        compare_baseline=True,
        **shared(),
    )
    assert report.student is not None
    assert report.baseline is not None
    alone = open_detector(
        STUDENT, weights=given.runs / "student" / "baseline" / "best.safetensors", class_names=classes(given.data)
    )
    columns = {
        f"trained alone: {report.baseline.evaluation.ap:.1f} AP": alone,
        f"distilled: {report.student.evaluation.ap:.1f} AP": open_detector(given.runs / "student" / "model"),
    }
    draw(given, columns).save(given.out)
    print(given.out)


def shared() -> dict[str, int]:
    return {"image_size": SIZE, "batch_size": 8}


def classes(data: Path) -> tuple[str, ...]:
    return open_dataset(data, "val").class_names


def draw(given: argparse.Namespace, columns: dict[str, Detector]) -> Image.Image:
    """The pictures: one row an image, the ground truth at the left."""
    small, large = (open_dataset(given.data, "val", max_size=size) for size in (SIZE, 512))
    chosen = sorted(random.Random(given.seed).sample(range(len(small)), given.images))
    rows = []
    kept = {title: detections(detector, small) for title, detector in columns.items()}
    for index in chosen:
        pixels, sample = large[index]
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        scale = picture.width / sample["original_size"][1]
        names = [small.class_names[label] for label in sample["labels"].tolist()]
        cells = [draw_boxes(picture, sample["boxes"].tolist(), [RIGHT] * len(names), names)]
        for found in kept.values():
            boxes, labels, scores = found[index]
            cells.append(judged(picture, boxes * scale, labels, scores, sample, small.class_names))
        rows.append(cells)
    width, height = rows[0][0].size
    titles = ["ground truth", *columns]
    whole = Image.new(
        "RGB", (width * len(titles) + 8 * (len(titles) - 1), (height + 8) * len(rows) + 2 * LINE), "white"
    )
    text, font = ImageDraw.Draw(whole), ImageFont.load_default(20)
    for place, title in enumerate(titles):
        left = place * (width + 8)
        text.text((left + 4, 3), title, "black", font)
        for row, cells in enumerate(rows):
            whole.paste(cells[place], (left, LINE + row * (height + 8)))
    legend = "green: right; red: wrong; blue: missed"
    text.text((width + 12, whole.height - LINE), legend, "black", font)
    return whole


def detections(detector: Detector, dataset: DetectionDataset) -> list[Kept]:
    """For each image the boxes (D, 4) xyxy in pixels of the original, labels and scores that count, best first."""
    found = find(Runner.of(detector.model), dataset, batch_size=16)
    scores = [each.score for each in best_thresholds(dataset.coco(), found)]
    least = np.array([np.inf if score is None else score for score in scores])
    kept = found.where(found.scores >= least[found.classes])
    result = []
    for place in range(len(dataset)):
        own = kept.where(kept.images == place)
        order = np.argsort(-own.scores)
        boxes = np.concatenate([own.boxes[:, :2], own.boxes[:, :2] + own.boxes[:, 2:]], 1)[order]
        result.append(tuple(map(torch.from_numpy, (boxes, own.classes[order], own.scores[order]))))
    return result


def judged(
    picture: Image.Image, boxes: Tensor, labels: Tensor, scores: Tensor, sample: Sample, class_names: tuple[str, ...]
) -> Image.Image:
    """A picture with right and wrong detections, and the objects that were missed."""
    free = torch.ones(len(sample["labels"]), dtype=torch.bool)
    marks = []
    overlaps = pairwise_iou(boxes.float(), sample["boxes"])
    for own, label in zip(overlaps, labels, strict=True):
        candidates = own * free * (sample["labels"] == label)
        hit = bool(len(candidates)) and bool(candidates.max() >= 0.5)
        if hit:
            free[candidates.argmax()] = False
        marks.append(RIGHT if hit else WRONG)
    missed = sample["boxes"][free]
    captions = [f"{class_names[label]} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
    return draw_boxes(
        picture,
        [*missed.tolist(), *boxes.tolist()],
        [MISSED] * len(missed) + marks,
        ["missed"] * len(missed) + captions,
    )


if __name__ == "__main__":
    main()
