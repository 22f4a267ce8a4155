"""One small data set, as tools export it: what each writer makes is what `plain` has."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ["ball", "cube"]
SPLITS = {"train": range(1, 7), "val": range(7, 10), "test": range(10, 11)}


def boxes(number):
    """(class, [x, y, width, height]) of an image of 40x30; every third one is empty."""
    found = [(number % 2, [number, 2, 8, 12]), (1 - number % 2, [20, 3, 10, 6 + number])]
    return found[: number % 3]


def picture(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text))


def coco(numbers, name="{}.png", superclass=None, supercategory="thing"):
    """COCO's document."""
    categories = [{"id": i, "name": each, "supercategory": supercategory} for i, each in enumerate(CLASSES, 1)]
    if superclass:
        categories = [{"id": 0, "name": superclass, "supercategory": "none"}, *categories]
    images = [{"id": i, "file_name": name.format(i), "width": 40, "height": 30} for i in numbers]
    found = [(i, label, box) for i in numbers for label, box in boxes(i)]
    annotations = [
        {"id": n, "image_id": i, "category_id": label + 1, "bbox": box} for n, (i, label, box) in enumerate(found)
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def yolo_lines(number):
    lines = (
        f"{label} {(x + w / 2) / 40:.12f} {(y + h / 2) / 30:.12f} {w / 40:.12f} {h / 30:.12f}"
        for label, (x, y, w, h) in boxes(number)
    )
    return "\n".join(lines)


def voc_xml(number):
    things = "".join(
        f"<object><name>{CLASSES[label]}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax>"
        f"<ymax>{y + h}</ymax></bndbox></object>"
        for label, (x, y, w, h) in boxes(number)
    )
    size = "<size><width>40</width><height>30</height><depth>3</depth></size>"
    return f"<annotation><filename>{number}.png</filename>{size}{things}</annotation>"


def plain(root):
    for split, numbers in SPLITS.items():
        write(root / f"annotations/{split}.json", coco(numbers))
        for i in numbers:
            picture(root / f"images/{i}.png", i)
    return root


def roboflow_coco(root):
    for split, numbers in SPLITS.items():
        folder = root / split.replace("val", "valid")
        write(folder / "_annotations.coco.json", coco(numbers, superclass="things", supercategory="things"))
        for i in numbers:
            picture(folder / f"{i}.png", i)


def roboflow_yolo(root):
    named = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\nnames: ['ball', 'cube']\n"
    write(root / "data.yaml", named)
    for split, numbers in SPLITS.items():
        folder = root / split.replace("val", "valid")
        for i in numbers:
            picture(folder / f"images/{i}.png", i)
            write(folder / f"labels/{i}.txt", yolo_lines(i))


def roboflow_voc(root):
    for split, numbers in SPLITS.items():
        folder = root / split.replace("val", "valid")
        for i in numbers:
            picture(folder / f"{i}.png", i)
            write(folder / f"{i}.xml", voc_xml(i))
    write(root / "README.roboflow.txt", "things")


def coco_own(root, year="2017", images="{}"):
    for split, numbers in SPLITS.items():
        write(root / f"annotations/instances_{split}{year}.json", coco(numbers))
        write(root / f"annotations/captions_{split}{year}.json", {})
        for i in numbers:
            picture(root / images.format(split + year) / f"{i}.png", i)


def coco_own_without_year(root):
    coco_own(root, "")


def coco_own_in_images(root):
    coco_own(root, images="images/{}")


def cvat_coco_subsets(root):
    for split, numbers in SPLITS.items():
        name = {"train": "Train", "val": "Validation", "test": "Test"}[split]
        write(root / f"annotations/instances_{name}.json", coco(numbers))
        for i in numbers:
            picture(root / f"images/{name}/{i}.png", i)


def cvat_yolo_subsets(root):
    write(root / "obj.data", "classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\n")
    cvat_darknet(root, {"train": SPLITS["train"], "valid": SPLITS["val"]})


def cvat_darknet(root, parts):
    write(root / "obj.names", "ball\ncube\n")
    for name, numbers in parts.items():
        write(root / f"{name}.txt", "".join(f"data/obj_{name}_data/{i}.png\n" for i in numbers))
        for i in numbers:
            picture(root / f"obj_{name}_data/{i}.png", i)
            write(root / f"obj_{name}_data/{i}.txt", yolo_lines(i))


EVERY = [i for numbers in SPLITS.values() for i in numbers]


def cvat_coco(root):
    write(root / "annotations/instances_default.json", coco(EVERY))
    for i in EVERY:
        picture(root / f"images/default/{i}.png", i)


def cvat_coco_flat(root):
    write(root / "annotations/instances_default.json", coco(EVERY))
    for i in EVERY:
        picture(root / f"images/{i}.png", i)


def cvat_yolo(root):
    write(root / "obj.data", "classes = 2\ntrain = train.txt\nnames = obj.names\nbackup = backup/\n")
    cvat_darknet(root, {"train": EVERY})


def cvat_ultralytics(root, prefix=""):
    write(root / "data.yaml", "path: ./\ntrain: train.txt\nnames:\n  0: ball\n  1: cube\n")
    write(root / "train.txt", "".join(f"{prefix}images/train/{i}.png\n" for i in EVERY))
    for i in EVERY:
        picture(root / f"images/train/{i}.png", i)
        write(root / f"labels/train/{i}.txt", yolo_lines(i))


def cvat_ultralytics_prefixed(root):
    cvat_ultralytics(root, "data/")


def cvat_voc(root):
    write(root / "ImageSets/Main/default.txt", "".join(f"{i}\n" for i in EVERY))
    write(root / "labelmap.txt", "# label:color_rgb:parts:actions\nball:1,2,3::\ncube:4,5,6::\n")
    for i in EVERY:
        picture(root / f"JPEGImages/{i}.png", i)
        write(root / f"Annotations/{i}.xml", voc_xml(i))


def label_studio_coco(root):
    write(root / "result.json", coco(EVERY, "images\\1/0a1b2c3d-{}.png"))
    for i in EVERY:
        picture(root / f"images/0a1b2c3d-{i}.png", i)


def label_studio_yolo(root):
    write(root / "classes.txt", "ball\ncube\n")
    write(root / "notes.json", {"categories": []})
    for i in EVERY:
        picture(root / f"images/0a1b2c3d-{i}.png", i)
        write(root / f"labels/0a1b2c3d-{i}.txt", yolo_lines(i))


def label_studio_voc(root):
    for i in EVERY:
        picture(root / f"images/{i}.png", i)
        write(root / f"Annotations/{i}.xml", voc_xml(i))


SPLIT = {
    each.__name__: each
    for each in (
        *(roboflow_coco, roboflow_yolo, roboflow_voc, coco_own, coco_own_without_year, coco_own_in_images),
        *(cvat_coco_subsets, cvat_yolo_subsets),
    )
}
ONE_PART = {
    each.__name__: each
    for each in (
        *(cvat_coco, cvat_coco_flat, cvat_yolo, cvat_ultralytics, cvat_ultralytics_prefixed, cvat_voc),
        *(label_studio_coco, label_studio_yolo, label_studio_voc),
    )
}


def samples(data):
    """What training gets: classes, and by the number of each image its pixels' sum and its boxes."""
    truth = data.coco()
    found = {}
    for index, image in enumerate(truth["images"]):
        pixels, sample = data[index]
        number = int(Path(image["file_name"].replace("\\", "/")).stem.removeprefix("0a1b2c3d-"))
        rows = zip(sample["labels"].tolist(), sample["boxes"].tolist(), strict=True)
        found[number] = (int(pixels.sum()), sorted(rows))
    assert len(found) == len(data)
    return data.class_names, found
