"""Drawn shapes as a data set on disk, and the name of a detector that trains on it in a second."""

import json

from PIL import Image

from kdtoolkit.data import ProceduralShapes

TINY = (
    "kdtoolkit/gfl?backbone=resnet10t&backbone_args={channels: [8, 8, 16, 16], stem_width: 4}&strides=[8, 16, 32]"
    "&neck_channels=16&head_channels=16&head_blocks=2&head_groups=4&bins=5"
)


def write_shapes(root, counts=(("train", 12), ("val", 4))):
    """Write a data set in COCO's format; classes are the shapes' own."""
    (root / "annotations").mkdir(parents=True)
    (root / "images").mkdir()
    for split, count in counts:
        data = ProceduralShapes(count, image_size=64, seed=len(split))
        truth = data.coco()
        for index, about in enumerate(truth["images"]):
            about["file_name"] = f"{split}{index}.png"
            Image.fromarray(data[index][0].permute(1, 2, 0).numpy()).save(root / "images" / about["file_name"])
        (root / "annotations" / f"{split}.json").write_text(json.dumps(truth))
    return root
