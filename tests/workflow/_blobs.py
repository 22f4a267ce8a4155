"""A detector that is right by its making: it finds rectangles of pure colours. Pictures and data sets for it."""

import json

import torch
from PIL import Image, ImageDraw
from torch import nn

from kdtoolkit.models import Detector

COLOURS = ("red", "green", "blue")


class Blobs(nn.Module):
    """Finds at most one rectangle of each colour in an image. The score is how bright the colour is."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        assert not self.training
        return [self._of(image) for image in images]

    def _of(self, image):
        found = []
        for label in range(3):
            rest = image[[i for i in range(3) if i != label]].amax(0)
            ys, xs = torch.nonzero((image[label] > 0.1) & (rest < 0.05), as_tuple=True)
            if len(xs):
                box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
                found.append((float(image[label, ys, xs].max()), [float(side) for side in box], label))
        found.sort(reverse=True)
        return {
            "boxes": torch.tensor([box for _, box, _ in found]).reshape(-1, 4) * self.scale,
            "scores": torch.tensor([score for score, _, _ in found]),
            "labels": torch.tensor([label for _, _, label in found], dtype=torch.int64),
        }


def detector(class_names=COLOURS, **changes):
    return Detector(Blobs(), "tests:Blobs", class_names, **{"weights": "by its making", "trained": True, **changes})


def picture(path, *blobs, size=(100, 80)):
    """Write a picture with rectangles (colour, brightness in [0, 1], xyxy)."""
    image = Image.new("RGB", size)
    for colour, brightness, (x1, y1, x2, y2) in blobs:
        pixel = [0, 0, 0]
        pixel[COLOURS.index(colour)] = round(255 * brightness)
        ImageDraw.Draw(image).rectangle((x1, y1, x2 - 1, y2 - 1), fill=tuple(pixel))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def dataset(root, pictures, class_names=COLOURS, split="val"):
    """Write a data set in COCO's format; `pictures`: for each image its blobs and the true objects (class, xyxy)."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number, (blobs, objects) in enumerate(pictures, 1):
        picture(root / "images" / f"{split}{number}.png", *blobs)
        images.append({"id": number, "file_name": f"{split}{number}.png", "width": 100, "height": 80})
        for name, (x1, y1, x2, y2) in objects:
            box = [x1, y1, x2 - x1, y2 - y1]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": class_names.index(name) + 1,
                    "bbox": box,
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(class_names, 1)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"{split}.json").write_text(json.dumps(document))
    return root


BOX, FAR = (10, 10, 50, 40), (60, 45, 90, 75)


def right(colour, brightness, box=BOX):
    """An object that is found with this score."""
    return ([(colour, brightness, box)], [(colour, box)])
