"""Eight images of 64 px with a red or a green box each, and tiny detectors for them."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

os.environ.setdefault("YOLO_OFFLINE", "1")


@pytest.fixture(scope="session")
def boxes():
    """For each image its class and its box: x, y, width, height in pixels."""
    generator = np.random.default_rng(0)
    return [(i % 2, *generator.integers(4, 30, 2).tolist(), *generator.integers(16, 30, 2).tolist()) for i in range(8)]


@pytest.fixture(scope="session")
def pictures(boxes):
    """Images (64, 64, 3), uint8."""
    generator = np.random.default_rng(1)
    made = []
    for label, x, y, width, height in boxes:
        image = (generator.random((64, 64, 3)) * 80).astype("uint8")
        image[y : y + height, x : x + width, label] = 255
        made.append(image)
    return made


@pytest.fixture(scope="session")
def batch(boxes, pictures):
    """The first four images and their ground truth, as kdtoolkit takes them."""
    images = [torch.from_numpy(picture).permute(2, 0, 1) / 255 for picture in pictures[:4]]
    targets = [
        {"boxes": torch.tensor([[x, y, x + width, y + height]], dtype=torch.float32), "labels": torch.tensor([label])}
        for label, x, y, width, height in boxes[:4]
    ]
    return images, targets


@pytest.fixture(scope="session")
def yolo_data(boxes, pictures, tmp_path_factory):
    """The images in Ultralytics' format, for training and validation."""
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i, (picture, (label, x, y, width, height)) in enumerate(zip(pictures, boxes, strict=True)):
            Image.fromarray(picture).save(root / "images" / split / f"{i}.png")
            shares = ((x + width / 2) / 64, (y + height / 2) / 64, width / 64, height / 64)
            (root / "labels" / split / f"{i}.txt").write_text(f"{label} {' '.join(map(str, shares))}\n")
    file = root / "data.yaml"
    file.write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames: [red, green]\n")
    return file
