"""Round trips between the formats, and what other libraries read from what we write."""

import json
import logging
from pathlib import Path

import pytest
import torch
from globox import AnnotationSet

from kdtoolkit import KDError
from kdtoolkit.data import open_dataset
from kdtoolkit.data.opening import locate
from kdtoolkit.data.tools.convert import convert
from tests.data import _coco, _voc, _yolo

SHARED = Path(__file__).parents[4] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is absent")
SETS = ["playing-cards", "chess", "microcontrollers"]


def run(source, target, to, **options):
    return convert(source, target, to, progress=lambda done, total: None, **options)


def plain(root):
    """A set without crowds, with images in both splits that differ in content and names that need care."""
    doc = _coco.document()
    doc["annotations"].pop(1)
    doc["annotations"][1] |= {"area": 1200}
    doc["annotations"].append({"id": 9, "image_id": 9, "category_id": 3, "bbox": [1.37, 0.001, 38.63, 29.999]})
    doc["categories"] += [{"id": 20, "name": "no"}, {"id": 21, "name": "<b> & été, 'x': {y}"}]
    doc["images"].append({"id": 11, "file_name": "sub/empty image.png", "width": 40, "height": 30})
    _coco.write(_coco.write(root, doc), doc, "val")
    (root / "images" / "sub").mkdir(exist_ok=True)
    (root / "images" / "sub" / "empty image.png").write_bytes((root / "images" / "7.png").read_bytes())
    return root


def samples(root, split):
    """What training gets, by the name of the file: size, classes by name, boxes. Nothing is decoded."""
    data = open_dataset(root, split)
    truth = data.coco()
    names = {category["id"]: category["name"] for category in truth["categories"]}
    found = {}
    for image in truth["images"]:
        mine = [a for a in truth["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]]
        x, y, width, height = torch.tensor([a["bbox"] for a in mine], dtype=torch.float64).reshape(-1, 4).unbind(1)
        found[image["file_name"].removeprefix(f"{split}/")] = (
            (image["width"], image["height"]),
            [names[a["category_id"]] for a in mine],
            torch.stack([x, y, x + width, y + height], 1).float().tolist(),
        )
    assert len(found) == len(data)
    return data.class_names, found


def check_round_trip(source, tmp_path):
    _, place = locate(source)
    splits = locate(source)[0].splits(place)
    path = source
    for to in ("yolo", "voc", "coco", "voc", "yolo", "coco"):
        path, before = tmp_path / f"{to}{len(list(tmp_path.iterdir()))}", path
        outcome = run(before, path, to)
        for split in splits:
            assert samples(path, split) == samples(source, split), (before, to, split)
        assert outcome.boxes == sum(len(found[2]) for split in splits for found in samples(source, split)[1].values())
    areas = [[a["area"] for a in open_dataset(each, "train").coco()["annotations"]] for each in (source, path)]
    assert sorted(areas[0]) == pytest.approx(sorted(areas[1]), abs=0.02)


def test_a_round_trip_gives_the_same_samples(tmp_path):
    source = plain(tmp_path / "source")
    (tmp_path / "out").mkdir()
    check_round_trip(source, tmp_path / "out")


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_a_round_trip_of_real_data_gives_the_same_samples(tmp_path, name):
    check_round_trip(SHARED / name, tmp_path)


def by_name(annotations):
    """Boxes of globox, by the name of the image, rounded: (class, corners)."""
    return {
        Path(a.image_id).stem: sorted(
            (b.label, *(round(v, 3) for v in (b.xmin, b.ymin, b.xmax, b.ymax))) for b in a.boxes
        )
        for a in annotations
    }


def source_of(name, tmp_path):
    return SHARED / name if name else plain(tmp_path / "source")


@pytest.mark.parametrize("name", [None, *(pytest.param(name, marks=[needs_shared, pytest.mark.slow]) for name in SETS)])
def test_globox_reads_the_same_boxes_from_each_format(tmp_path, name):
    source = source_of(name, tmp_path)
    for to in ("coco", "yolo", "voc"):
        run(source, tmp_path / to, to)
    truth = by_name(AnnotationSet.from_coco(source / "annotations" / "val.json"))
    assert by_name(AnnotationSet.from_coco(tmp_path / "coco" / "annotations" / "val.json")) == truth

    names = dict(enumerate(open_dataset(source, "val").class_names))
    labels = tmp_path / "yolo" / "labels" / "val"
    suffix = next((tmp_path / "yolo" / "images" / "val").rglob("*.*")).suffix
    yolo = AnnotationSet.from_yolo_darknet(
        labels, image_folder=tmp_path / "yolo" / "images" / "val", image_extension=suffix, recursive=True
    ).map_labels({str(label): each for label, each in names.items()})
    assert by_name(yolo) == truth

    voc = by_name(AnnotationSet.from_pascal_voc(tmp_path / "voc" / "Annotations", recursive=True))
    shifted = {  # globox takes VOC's numbers as they are; they count pixels from 1
        stem: [(label, round(x1 + 1, 3), round(y1 + 1, 3), x2, y2) for label, x1, y1, x2, y2 in boxes]
        for stem, boxes in truth.items()
    }
    assert {stem: voc[stem] for stem in shifted} == shifted


@pytest.mark.parametrize("name", [None, *(pytest.param(name, marks=[needs_shared, pytest.mark.slow]) for name in SETS)])
def test_ultralytics_reads_the_same_boxes(tmp_path, monkeypatch, name):
    data_utils = pytest.importorskip("ultralytics.data.utils")
    from ultralytics.data.dataset import YOLODataset

    monkeypatch.setattr(data_utils, "check_font", lambda name: None)  # it would be downloaded
    run(source_of(name, tmp_path), tmp_path / "yolo", "yolo")
    described = data_utils.check_det_dataset(tmp_path / "yolo" / "data.yaml", autodownload=False)
    theirs = YOLODataset(img_path=described["val"], data=described, task="detect", augment=False)
    ours = open_dataset(tmp_path / "yolo", "val")
    assert tuple(described["names"].values()) == ours.class_names
    found = {
        Path(each["im_file"]).relative_to(tmp_path / "yolo" / "images" / "val").as_posix(): each
        for each in theirs.labels
    }
    truth = ours.coco()["images"]
    assert sorted(found) == [image["file_name"] for image in truth]
    for index, image in enumerate(truth):
        sample, label = ours[index][1], found[image["file_name"]]
        height, width = label["shape"]
        assert (height, width) == sample["original_size"]
        centre, size = torch.from_numpy(label["bboxes"]).split(2, 1)
        scale = torch.tensor([width, height])
        expected = torch.cat([(centre - size / 2) * scale, (centre + size / 2) * scale], 1)
        rows = sorted(zip(sample["labels"].tolist(), sample["boxes"].tolist(), strict=True))
        others = sorted(zip(label["cls"][:, 0].astype(int).tolist(), expected.tolist(), strict=True))
        assert [row[0] for row in rows] == [row[0] for row in others]
        assert (
            torch.tensor([r[1] for r in rows])
            .reshape(-1, 4)
            .allclose(torch.tensor([r[1] for r in others]).reshape(-1, 4), atol=1e-3)
        )


@pytest.mark.parametrize(
    ("lines", "box"),
    [
        (_yolo.BALL, [2.5, 4, 12.5, 24.25]),
        ("0 0.25 0.2 0.5 0.2 0.5 0.6", [10, 6, 20, 18]),
        ("0 0.25 0.2 0.5 0.2 0.5 0.6 0.25 0.6", [10, 6, 20, 18]),
    ],
)
def test_ultralytics_reads_lines_as_we_do(tmp_path, lines, box):
    data_utils = pytest.importorskip("ultralytics.data.utils")
    root = _yolo.write(tmp_path, labels={7: lines})
    image, label = root / "images/train/7.png", root / "labels/train/7.txt"
    assert data_utils.img2label_paths([str(image)]) == [str(label)]
    _, found, shape, *_ = data_utils.verify_image_label((str(image), str(label), "", False, 2, 0, 0, False))
    (_, cx, cy, width, height), (h, w) = found[0], shape
    corners = [(cx - width / 2) * w, (cy - height / 2) * h, (cx + width / 2) * w, (cy + height / 2) * h]
    assert corners == pytest.approx(box, abs=1e-4)
    assert open_dataset(root, "train")[0][1]["boxes"].tolist() == [pytest.approx(box, abs=1e-4)]


def test_crowds_become_difficult_and_back(tmp_path):
    source = _coco.write(tmp_path / "coco")
    run(source, tmp_path / "voc", "voc")
    run(tmp_path / "voc", tmp_path / "back", "coco")
    for split in ("train",):
        truth, found = (open_dataset(root, split).coco() for root in (source, tmp_path / "back"))
        kept = [(a["bbox"], a["iscrowd"]) for a in truth["annotations"]]
        assert [(a["bbox"], a["iscrowd"]) for a in found["annotations"]] == kept


def test_what_is_lost_is_told(tmp_path):
    doc = _coco.document()
    doc["annotations"][0]["segmentation"] = [[1, 2, 3, 4, 5, 6]]
    source = _coco.write(tmp_path / "source", doc)
    ids, order = "ids of images and categories", "the order of images"
    for to, parts in (
        ("coco", ["1 segmentations"]),
        ("voc", ["1 segmentations", ids, "2 areas of masks"]),
        ("yolo", ["1 segmentations", ids, order, "1 crowds or difficult objects, which are left out", "2 areas"]),
    ):
        losses = run(source, tmp_path / to, to).losses
        assert len(losses) == len(parts)
        assert all(part in loss for part, loss in zip(parts, losses, strict=True))
    _voc.write(tmp_path / "v", files={"7": _voc.xml((*_voc.BALL, "<truncated>1</truncated>"), _voc.CROWD)})
    assert run(tmp_path / "v", tmp_path / "v2", "coco").losses == ("2 truncated flags",)  # of both splits
    _yolo.write(tmp_path / "y", labels={7: "0 0.25 0.2 0.5 0.2 0.5 0.6"})
    losses = run(tmp_path / "y", tmp_path / "y2", "coco").losses
    assert losses == ("2 polygons (the boxes around them are read)",)


def test_a_test_split_that_cannot_be_read_is_left_out_and_told(tmp_path):
    root = _yolo.write(tmp_path / "y", f"{_yolo.YAML}test: ../test/images\n")
    (loss,) = run(root, tmp_path / "out", "coco").losses
    assert loss.startswith("the split test, which cannot be read: ")
    assert open_dataset(tmp_path / "out", "val").class_names == ("ball", "cube")
    _yolo.write(root, _yolo.YAML.replace("train: images/train", "train: none"))
    with pytest.raises(KDError, match="train: there is no folder"):
        run(root, tmp_path / "more", "coco")


def test_a_folder_that_cannot_be_looked_for(tmp_path):
    with pytest.raises(KDError, match=r"cannot write .*name too long; name a different folder"):
        run(_yolo.write(tmp_path / "y"), tmp_path / ("x" * 300), "coco")


@pytest.mark.parametrize(
    ("may_write", "out", "part"),
    [(True, "file/inner/out", "file is no folder"), (False, "none/out", "is not writable")],
)
def test_a_folder_that_cannot_be_made_is_told_before_data_are_read(tmp_path, monkeypatch, may_write, out, part):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("os.access", lambda *_: may_write)
    monkeypatch.setattr("kdtoolkit.data.tools.convert.locate", lambda *_: pytest.fail("the data are read"))
    with pytest.raises(KDError, match=rf"cannot write .*{part}; name a different folder"):
        run(tmp_path / "source", tmp_path / out, "coco")


def test_images_of_one_name_in_two_splits(tmp_path):
    yaml = "train: images/a\nval: images/b\nnames: [ball, cube]"
    root = _yolo.write(tmp_path / "source", yaml, images="images/a")
    _yolo.write(root, yaml, images="images/b", labels={7: _yolo.WHOLE})
    (root / "images" / "b" / "7.png").write_bytes((root / "images" / "b" / "9.png").read_bytes())
    for to in ("coco", "voc", "yolo"):
        run(root, tmp_path / to, to)
        for split in ("train", "val"):
            assert samples(tmp_path / to, split) == samples(root, split)
    assert (tmp_path / "coco" / "images" / "train" / "7.png").exists()


def test_names_with_two_endings(tmp_path):
    doc = _coco.document()
    doc["images"][0]["file_name"] = "9.png.jpg"
    root = _coco.write(tmp_path / "coco", doc)
    (root / "images" / "7.png").rename(root / "images" / "9.png.jpg")
    run(root, tmp_path / "voc", "voc")
    assert samples(tmp_path / "voc", "train") == samples(root, "train")
    assert set(samples(tmp_path / "voc", "train")[1]) == {"9.png", "9.png.jpg"}


def test_folders_called_images_in_names(tmp_path):
    yaml = "train: [images/a, images/b]\nval: images/a\nnames: [ball, cube]"
    root = _yolo.write(_yolo.write(tmp_path / "source", yaml, images="images/a"), yaml, images="images/b")
    run(root, tmp_path / "coco", "coco")
    run(tmp_path / "coco", tmp_path / "yolo", "yolo")
    classes, found = samples(root, "train")
    assert samples(tmp_path / "yolo", "train") == (classes, found)
    assert set(found) == {f"images/{folder}/{number}.png" for folder in "ab" for number in (7, 9)}
    assert all(boxes for _, _, boxes in found.values())


@pytest.mark.parametrize("to", ["coco", "yolo", "voc"])
def test_two_images_of_one_name_in_a_split(tmp_path, to):
    root = _yolo.write(tmp_path / "source", _yolo.YAML.replace("train: images/train", "train: list.txt"))
    (root / "7.png").write_bytes((root / "images" / "train" / "9.png").read_bytes())
    (root / "images" / "7.png").write_bytes((root / "images" / "train" / "7.png").read_bytes())
    (root / "list.txt").write_text("images/7.png\n7.png\nimages/train/9.png\n")
    with pytest.raises(KDError, match=r"image images/7.png and image 7.png would both be 7(.png)? in the new data set"):
        run(root, tmp_path / "out", to)


def test_what_cannot_be_converted(tmp_path, caplog):
    source = _coco.write(tmp_path / "coco")
    with pytest.raises(KDError, match="coco is there already; name a new folder"):
        run(source, source, "yolo")
    (tmp_path / "file").write_text("")
    with pytest.raises(KDError, match="cannot write"):
        run(source, tmp_path / "file" / "inner", "yolo")
    with pytest.raises(KDError, match="there is no file or folder"):
        run(tmp_path / "none", tmp_path / "out", "yolo")

    doc = _coco.document()
    doc["images"][0]["file_name"] = "9.jpg"
    (source / "images" / "9.jpg").write_bytes((source / "images" / "7.png").read_bytes())
    _coco.write(source, doc)
    with pytest.raises(
        KDError, match=r"\(9.jpg\) and image 9 \(9.png\) would both be 9 in the new data set, and share"
    ):
        run(source, tmp_path / "out", "voc")
    doc["images"][0]["file_name"] = "9.gif"
    (source / "images" / "9.gif").write_bytes((source / "images" / "7.png").read_bytes())
    _coco.write(source, doc)
    with pytest.raises(KDError, match=r"image 7 \(9.gif\): readers of YOLO look for images by their endings"):
        run(source, tmp_path / "out", "yolo")

    bad = _coco.document()
    bad["annotations"][0]["bbox"] = [0, 0, 0, 0]
    _coco.write(source, bad)
    with pytest.raises(KDError, match="1 fault"):
        run(source, tmp_path / "out", "yolo")
    with caplog.at_level(logging.WARNING):
        assert run(source, tmp_path / "out", "yolo", on_bad="skip").boxes == 1
    assert "left out, as they are bad: 1 fault" in caplog.text

    other = _coco.document()
    other["categories"][0]["name"] = "dice"
    _coco.write(_coco.write(source), other, "val")
    with pytest.raises(KDError, match="have different classes: ball, cube; ball, dice"):
        run(source, tmp_path / "more", "yolo")
    moved = _coco.document()
    moved["annotations"][0]["bbox"] = [0, 0, 9, 9]
    _coco.write(source, moved, "val")
    with pytest.raises(KDError, match="is in several splits with different boxes"):
        run(source, tmp_path / "more", "voc")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coco", "file", "out"]  # nothing half-written


@pytest.mark.parametrize("name", [" cube", "cube ", "cube\xa0"])
def test_spaces_around_names_of_classes_are_kept_or_refused(tmp_path, name):
    doc = _coco.document()
    doc["categories"][0]["name"] = name
    source = _coco.write(tmp_path / "coco", doc)
    with pytest.raises(KDError, match=r"the class '.*' has spaces around its name, and readers of VOC drop them"):
        run(source, tmp_path / "voc", "voc")
    assert not (tmp_path / "voc").exists()
    run(source, tmp_path / "yolo", "yolo")
    assert open_dataset(tmp_path / "yolo", "train").class_names == ("ball", name)


def test_written_files_are_plain(tmp_path):
    run(plain(tmp_path / "source"), tmp_path / "yolo", "yolo")
    assert (tmp_path / "yolo" / "labels" / "train" / "7.txt").read_text() == "0 0.1875 0.470833333333 0.25 0.675\n"
    run(tmp_path / "source", tmp_path / "coco", "coco")
    written = json.loads((tmp_path / "coco" / "annotations" / "train.json").read_text())
    assert written["annotations"][0] == {
        "id": 1,
        "image_id": 7,
        "category_id": 3,
        "bbox": [2.5, 4, 10, 20.25],
        "area": 202.5,
        "iscrowd": 0,
    }
