import io
import json
import re

import pytest
from rich.console import Console

from kdtoolkit import KDError
from kdtoolkit.data import open_dataset
from kdtoolkit.data.tools.check import check, print_report
from tests.data import _coco, _voc, _yolo


def run(path, **options):
    options = {"image_size": 640, "stride": 8, "queries": 300} | options
    return check(path, progress=lambda done, total: None, **options)


def printed(report):
    console = Console(file=io.StringIO(), width=200, highlight=False)
    print_report(report, console)
    return console.file.getvalue()


def distinct(root):
    """The small set, with splits that share no image, and no crowd."""
    doc, val = _coco.document(), _coco.document()
    doc["annotations"].pop(1)
    doc["annotations"].append({"id": 5, "image_id": 7, "category_id": 8, "bbox": [10, 10, 9, 9]})
    val["images"] = [{"id": 1, "file_name": "v.png", "width": 40, "height": 30}]
    val["annotations"] = [{"image_id": 1, "category_id": c, "bbox": [5, 5, 20, 20]} for c in (3, 8)]
    _coco.write(_coco.write(root, doc), val, "val")
    (root / "images" / "v.png").write_bytes((root / "images" / "7.png").read_bytes() + b"\0")
    return root


def test_a_good_set(tmp_path):
    report = run(distinct(tmp_path))
    assert report.is_good
    assert report.warnings == ()
    train = report.splits["train"]
    assert (train.images, train.images_without_boxes, train.boxes, train.crowds) == (2, 0, 3, 0)
    assert train.per_class == {"ball": 1, "cube": 2}
    assert train.sizes == {"small": 3, "medium": 0, "large": 0}
    assert train.image_sizes == ("40x30", "40x30")
    assert train.boxes_an_image == (1.5, 2)
    text = printed(report)
    for part in (f"{tmp_path}: COCO", "40x30", "ball", "No faults."):
        assert part in text
    assert json.loads(json.dumps(report.to_json()))["splits"]["val"]["boxes"] == 2


def test_all_faults_are_listed_with_what_training_does(tmp_path):
    doc = _coco.document()
    doc["annotations"] += [{"id": 10 + i, "image_id": 7, "category_id": 3, "bbox": [0, 0, 0, 0]} for i in range(7)]
    doc["images"].append({"id": 50, "file_name": "none.png", "width": 4, "height": 4})
    path = _coco.write(tmp_path, doc) / "images" / "9.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + bytes(50) + whole[250:])  # both ends are good
    report = run(tmp_path)
    assert not report.is_good
    text = printed(report)
    for number in range(10, 17):
        assert f"train: annotation {number} (image 7): bbox [0, 0, 0, 0] has no area" in text
    assert "train: image 50 (none.png): there is no file" in text
    assert "train: image 9 (9.png): the file cannot be decoded" in text
    assert (
        "9 faults. Training stops at them; with --skip-bad it leaves out 2 images with their boxes, and 7 single"
        in text
    )
    faults = report.to_json()["splits"]["train"]["faults"]
    assert [fault["loses"] for fault in faults] == ["box"] * 7 + ["image"] * 2
    assert faults[0]["file"] == str(tmp_path / "annotations" / "train.json")


def test_a_split_that_cannot_be_read_does_not_hide_the_others(tmp_path):
    (distinct(tmp_path) / "annotations" / "val.json").write_text("{")
    report = run(tmp_path)
    assert not report.is_good
    assert report.splits["train"].boxes == 3
    assert "val: cannot be read: " in printed(report)
    assert "not valid JSON" in report.splits["val"].error
    with pytest.raises(KDError, match="is no data set that is known"):
        run(tmp_path / "images")


def test_a_test_split_decides_nothing(tmp_path):
    _yolo.write(tmp_path / "y", f"{_yolo.YAML}test: ../test/images\n")
    report = run(tmp_path / "y")
    assert report.is_good
    text = printed(report)
    assert "warning: test, which training does not open, cannot be read: " in text
    assert f"there is no folder and no .txt list {tmp_path}/test/images; correct test, or path" in text
    assert "No faults but those of test." in text
    test = _coco.document()
    test["categories"].pop()
    test["annotations"] = [{"id": 1, "image_id": 7, "category_id": 8, "bbox": [0, 0, 0, 0]}]
    _coco.write(distinct(tmp_path / "c"), test, "test")
    report = run(tmp_path / "c")
    assert report.is_good
    assert report.refusals == ()
    text = printed(report)
    for part in (", has 1 fault", ": the classes of train and test differ", ": test has no usable box"):
        assert f"warning: test, which training does not open{part}" in text
    assert "test: annotation 1 (image 7): bbox [0, 0, 0, 0] has no area" in text
    (tmp_path / "c" / "annotations" / "train.json").unlink()
    (tmp_path / "c" / "annotations" / "val.json").unlink()
    assert not run(tmp_path / "c").is_good


def warnings(root, **options):
    return "\n".join(run(root, **options).warnings)


def test_classes_without_a_box(tmp_path):
    doc = _coco.document()
    doc["categories"].append({"id": 9, "name": "dice"})
    doc["annotations"] = [{"image_id": 7, "category_id": 3, "bbox": [1, 1, 20, 20]}]
    _coco.write(_coco.write(tmp_path, doc), doc, "val")
    text = warnings(tmp_path)
    assert "train: no box of cube, dice: what has no box cannot be learnt" in text
    assert "val: no box of cube, dice: what has no box gets no AP" in text
    doc["categories"][0]["name"] = "die"
    _coco.write(tmp_path, doc, "val")
    report = run(tmp_path)
    assert not report.is_good
    assert report.refusals == report.to_json()["refusals"]
    text = printed(report)
    assert "training refuses this: the classes of train and val differ: ball, cube, dice; ball, die, dice. Give" in text
    assert "No faults." not in text


def test_a_split_without_a_box_is_refused(tmp_path):
    val = _coco.document()
    val["annotations"] = [val["annotations"][1]]  # a crowd
    _coco.write(distinct(tmp_path), val, "val")
    report = run(tmp_path)
    assert not report.is_good
    assert "training refuses this: val has no usable box" in printed(report)
    with pytest.raises(KDError, match="nothing can be trained or scored on it"):
        open_dataset(tmp_path, "val")


def test_a_set_without_splits_is_refused(tmp_path):
    (_coco.write(tmp_path / "c") / "annotations" / "train.json").rename(tmp_path / "c" / "annotations" / "birds.json")
    with pytest.raises(
        KDError, match=r"no file .*train.json \(but birds.json\)\. Expected .* and val.json .* Or name .*/birds.json as"
    ):
        run(tmp_path / "c")
    (_voc.write(tmp_path / "v") / "ImageSets" / "Main" / "val.txt").unlink()
    (tmp_path / "v" / "ImageSets" / "Main" / "train.txt").rename(tmp_path / "v" / "ImageSets" / "Main" / "all.txt")
    with pytest.raises(KDError, match=r"no file .*train.txt\. Expected .* and val.txt"):
        run(tmp_path / "v")


def test_more_objects_than_detections_or_queries(tmp_path):
    doc = _coco.document()
    doc["annotations"] += [{"image_id": 9, "category_id": 3, "bbox": [i % 30, 1, 9, 9]} for i in range(100)]
    text = warnings(_coco.write(tmp_path, doc), queries=50)
    assert (
        "train: 1 images have more than 100 boxes (up to 101, in image 9 (9.png)), and COCO scores at most 100" in text
    )
    assert "1 images have more than 50 boxes" in text
    assert "a detector with queries finds at most 50 objects" in text
    assert "1 images have the same box twice (image 9 (9.png))" in text


def test_small_boxes(tmp_path):
    assert "side below" not in warnings(_coco.write(tmp_path), stride=10)
    assert "train: 1 of 3 boxes have a side below 11 px" in warnings(tmp_path, stride=11)


def test_images_in_several_splits(tmp_path):
    _coco.write(_coco.write(tmp_path), split="val")
    text = warnings(tmp_path)
    assert "2 images are in several splits (train: 7.png = val: 7.png; train: 9.png = val: 9.png): scores" in text
    (tmp_path / "images" / "9.png").write_bytes((tmp_path / "images" / "7.png").read_bytes())
    assert "images are there twice in a split" in warnings(tmp_path)


def test_what_is_odd_but_read(tmp_path):
    text = warnings(_yolo.write(tmp_path / "y", labels={7: None}))
    assert "train: 1 of 2 images have no label file (the first is 7.png): they count as images without objects" in text
    (tmp_path / "y" / "labels" / "train" / "x.txt").write_text("")
    assert "1 label files belong to no image; the first is labels/train/x.txt" in warnings(tmp_path / "y")
    (tmp_path / "y" / "images" / "train" / "9.bmp").write_bytes(
        (tmp_path / "y" / "images" / "train" / "9.png").read_bytes()
    )
    assert "9.bmp and 9.png share the label file labels/train/9.txt" in warnings(tmp_path / "y")
    text = warnings(_voc.write(tmp_path / "v", files={"7": _voc.xml(("ball", (0, 3, 9, 9)))}))
    assert "train: 1 boxes begin at pixel 0, and VOC counts from 1" in text
    assert "train: 1 boxes reach up to 1 px beyond their image" in text
    text = warnings(_voc.write(tmp_path / "w", files={"7": _voc.xml(_voc.BALL, ("Ball", (1, 1, 9, 9)))}))
    assert "train: the classes 'Ball', 'ball' differ by case or spaces alone" in text
    doc = _coco.document()
    doc["annotations"][0]["segmentation"] = [[1, 2, 3, 4, 5, 6]]
    text = warnings(_coco.write(tmp_path / "c", doc))
    assert "train: 1 segmentations are not used" in text
    assert "there is no split val; `kd benchmark run` needs train and val" in text


def test_names_cannot_command_the_terminal(tmp_path):
    labels = _yolo.write(tmp_path / "y") / "labels" / "train"
    (labels / "\x1b[31mX.txt").write_text("")
    text = printed(run(tmp_path / "y"))
    assert r"the first is labels/train/\x1b[31mX.txt" in text
    _yolo.write(tmp_path / "z", 'path: "/nope\\e[31mX"\ntrain: none\nnames: [ball, cube]\n')
    text += printed(run(tmp_path / "z"))
    assert r"(path, /nope\x1b[31mX, is no folder" in text
    assert "\x1b" not in text


def test_names_are_no_markup(tmp_path):
    doc = _coco.document()
    doc["categories"][0]["name"] = "[red]cube[/red]"
    assert "[red]cube[/red]" in printed(run(_coco.write(tmp_path, doc)))


def test_long_names_are_whole(tmp_path):
    doc = _coco.document()
    doc["categories"][0]["name"] = "cube" * 50
    assert "cube" * 50 in re.sub(r"[\s\d]", "", printed(run(_coco.write(tmp_path, doc))))
