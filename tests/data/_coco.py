"""A small data set in COCO's format, to be spoilt by tests."""

import json

import numpy as np
from PIL import Image

from kdtoolkit.data import open_dataset


def document():
    """Two images of 40x30; a ball and a crowd of cubes in the first, a cube in the second."""
    images = [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in (7, 9)]
    annotations = [
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": [2.5, 4, 10, 20.25]},
        {"id": 2, "image_id": 7, "category_id": 8, "bbox": [20, 0, 20, 30], "iscrowd": 1, "area": 123.0},
        {"id": 3, "image_id": 9, "category_id": 8, "bbox": [0, 0, 40, 30], "area": 77.5},
    ]
    categories = [{"id": 8, "name": "cube"}, {"id": 3, "name": "ball"}]  # gaps, and not in the order of ids
    return {"images": images, "annotations": annotations, "categories": categories}


def write(root, doc=None, split="train"):
    """Write a data set; `doc` is text or what becomes JSON. Images are made as the untouched document says."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "images").mkdir(exist_ok=True)
    doc = document() if doc is None else doc
    text = doc if isinstance(doc, str) else json.dumps(doc)
    (root / "annotations" / f"{split}.json").write_text(text)
    for image in document()["images"]:
        Image.fromarray(pixels(image["id"])).save(root / "images" / image["file_name"])
    return root


def pixels(seed):
    return np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)


def expect_samples_of_coco(data, folder):
    """The data set `data` holds what `write` puts into a folder, image by image; returns that one opened."""
    same = open_dataset(write(folder), "train")
    assert data.class_names == same.class_names == ("ball", "cube")
    for i in range(2):
        (image, sample), (other, expected) = data[i], same[i]
        assert np.array_equal(image.numpy(), other.numpy())
        assert sample["original_size"] == expected["original_size"]
        assert sample["boxes"].tolist() == expected["boxes"].tolist()
        assert sample["labels"].tolist() == expected["labels"].tolist()
    return same
