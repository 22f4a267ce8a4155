"""The data set of `_coco.py` in VOC's format, to be spoilt by tests."""

from PIL import Image

from tests.data._coco import pixels

SIZE = "<size><width>40</width><height>30</height><depth>3</depth></size>"
BALL = ("ball", (3.5, 5, 12.5, 24.25))
CROWD = ("cube", (21, 1, 40, 30), "<difficult>1</difficult>")
WHOLE = ("cube", (1, 1, 40, 30))


def thing(name, corners, more=""):
    """An object's XML."""
    sides = "".join(f"<{s}>{v}</{s}>" for s, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
    return f"<object><name>{name}</name>{more}\n<bndbox>{sides}</bndbox></object>"


def xml(*things, size=SIZE, file_name=""):
    """An annotation file."""
    inner = "\n".join(thing(*each) for each in things)
    return f"<annotation>\n<filename>{file_name}</filename>{size}\n{inner}</annotation>"


def write(root, *, files=None, listed="7\n9\n"):
    """Write a data set; `files` are texts by name, instead of the two good ones."""
    files = {"7": xml(BALL, CROWD), "9": xml(WHOLE)} | (files or {})
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        if text is not None:
            path = root / "Annotations" / f"{name}.xml"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for number in (7, 9):
        Image.fromarray(pixels(number)).save(root / "JPEGImages" / f"{number}.png")
    for split in ("train", "val"):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(listed)
    return root
