"""Files of detections, to be spoilt by tests."""

import json


def entry(image=7, class_id=3, box=(2.5, 4, 10, 20.25), score=0.9, **more):
    """A detection; `image` is an id, or a file name."""
    return {"image_id": image, "category_id": class_id, "bbox": [*box], "score": score, **more}


def write(path, content):
    """Write what becomes JSON, or text as it is."""
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path
