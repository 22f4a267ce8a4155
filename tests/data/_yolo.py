"""The data set of `_coco.py` in YOLO's format, to be spoilt by tests."""

from PIL import Image

from tests.data._coco import pixels

YAML = "path: .\ntrain: images/train\nval: images/train\nnames: [ball, cube]\n"
BALL = "0 0.1875 0.470833333333 0.25 0.675"  # [2.5, 4, 10, 20.25] of 40x30
WHOLE = "1 0.5 0.5 1 1"


def write(root, yaml=YAML, *, labels=None, images="images/train"):
    """Write a data set; `labels` are texts by image number, of which None means no file."""
    labels = {7: BALL, 9: WHOLE} | (labels or {})
    folder = root / images
    folder.mkdir(parents=True, exist_ok=True)
    (root / "data.yaml").write_text(yaml)
    for number, text in labels.items():
        Image.fromarray(pixels(number)).save(folder / f"{number}.png")
        label = root / f"labels/{images.removeprefix('images/')}/{number}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.unlink(missing_ok=True)
        if text is not None:
            label.write_bytes(text if isinstance(text, bytes) else text.encode())
    return root
