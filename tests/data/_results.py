"""Files of detections, to be spoilt by tests."""

import json

from kdtoolkit.data import open_dataset


def entry(image=7, class_id=3, box=(2.5, 4, 10, 20.25), score=0.9, **more):
    """A detection; `image` is an id, or a file name."""
    return {"image_id": image, "category_id": class_id, "bbox": [*box], "score": score, **more}


def write(path, content):
    """Write what becomes JSON, or text as it is."""
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def found_in(root, *splits, **more):
    """The data's own objects as detections, which name their files."""
    found = []
    for split in splits:
        truth = open_dataset(root, split).coco()
        files = {image["id"]: image["file_name"] for image in truth["images"]}
        found += [
            entry(None, a["category_id"], a["bbox"], 0.75, file_name=files[a["image_id"]], **more)
            for a in truth["annotations"]
        ]
    return found
