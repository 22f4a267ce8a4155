"""Exports of annotation tools: all of them are the plain data set."""

import json

import pytest

from kdtoolkit import KDError
from kdtoolkit.data import open_dataset
from kdtoolkit.data.layouts import split_of
from kdtoolkit.data.licence import licence_of
from kdtoolkit.data.opening import class_names_of, locate, name_of, splits_of
from tests.data import _layouts
from tests.data._layouts import EVERY, SPLITS, coco, picture, plain, samples, write


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The samples of the plain data set by split."""
    root = plain(tmp_path_factory.mktemp("plain"))
    return {split: samples(open_dataset(root, split)) for split in SPLITS}


@pytest.mark.parametrize("layout", _layouts.SPLIT)
def test_splits_are_those_of_the_plain_form(tmp_path, expected, layout):
    root = tmp_path / "birds"
    _layouts.SPLIT[layout](root)
    assert splits_of(root) == [*SPLITS][: len(splits_of(root))]
    for split in splits_of(root):
        assert samples(open_dataset(root, split)) == expected[split]
    assert class_names_of(root) == ("ball", "cube")
    assert name_of(root) == "birds"


@pytest.mark.parametrize("layout", _layouts.ONE_PART)
def test_a_fifth_is_held_out_of_one_part(tmp_path, expected, layout):
    root = tmp_path / "birds"
    _layouts.ONE_PART[layout](root)
    assert splits_of(root) == ["train", "val"]
    everything = {number: found for _, split in expected.values() for number, found in split.items()}
    assert samples(open_dataset(root, "all")) == (("ball", "cube"), everything)
    parts = [open_dataset(root, split) for split in ("train", "val")]
    assert [len(part) for part in parts] == [8, 2]
    assert all("held out" in part.held_out for part in parts)
    assert str(parts[1]).startswith("2 images of ")
    (_, train), (_, val) = map(samples, parts)
    assert train | val == everything
    assert name_of(root) == "birds"
    form, place = locate(root)
    train, val = (form.read(place, split, lambda *_: None).remarks for split in ("train", "val"))
    assert train == []
    assert [remark[:39] for remark in val] == ["these are a fifth of the images, held o"]
    with pytest.raises(KDError, match=r"has no test, only all|there is no file .*test.txt"):
        open_dataset(root, "test")


@pytest.mark.parametrize("path", ["export/result.json", "export/annotations/birds.json", "export/birds_2.json"])
def test_one_json_file_is_one_part(tmp_path, path):
    write(tmp_path / path, coco(EVERY))
    for i in EVERY:
        picture(tmp_path / f"export/images/{i}.png", i)
    assert splits_of(tmp_path / path) == ["train", "val"]
    assert len(open_dataset(tmp_path / path, "all")) == 10
    assert name_of(tmp_path / path) == "export"


def test_one_json_file_of_a_split_is_that_split(tmp_path):
    _layouts.coco_own(tmp_path)
    file = tmp_path / "annotations/instances_val2017.json"
    assert splits_of(file) == ["val"]
    assert len(open_dataset(file, "val")) == 3
    with pytest.raises(KDError, match=r"val2017.json has no train, only val; name the folder of the data set instead"):
        open_dataset(file, "train")
    folder = plain(tmp_path / "plain") / "annotations"
    assert splits_of(folder / "test.json") == ["test"]
    assert splits_of(folder / "train.json") == ["train", "val"]
    (folder / "val.json").unlink()
    with pytest.raises(KDError, match=r"there is no file .*val.json .* Or name .*train.json as the data: then a fifth"):
        open_dataset(folder, "val")


def test_a_superclass_is_a_class_if_something_is_labelled_so(tmp_path):
    """The annotation may be in any split."""
    _layouts.roboflow_coco(tmp_path)
    file = tmp_path / "test/_annotations.coco.json"
    document = json.loads(file.read_text())
    document["annotations"][0]["category_id"] = 0
    write(file, document)
    assert class_names_of(tmp_path) == ("things", "ball", "cube")
    file.write_text("[]")  # training does not open it
    assert open_dataset(tmp_path, "train").class_names == ("ball", "cube")


def test_a_superclass_may_be_called_as_the_one_class(tmp_path):
    document = coco(EVERY)
    document["categories"] = [
        {"id": 0, "name": "ball", "supercategory": "none"},
        {"id": 1, "name": "ball", "supercategory": "ball"},
    ]
    document["annotations"] = [each for each in document["annotations"] if each["category_id"] == 1]
    write(tmp_path / "train/_annotations.coco.json", document)
    for i in EVERY:
        picture(tmp_path / f"train/{i}.png", i)
    assert open_dataset(tmp_path, "train").class_names == ("ball",)
    with pytest.raises(KDError, match=r"no val, only train; export that .* Or name .*/train/_annotations.coco.json as"):
        open_dataset(tmp_path, "val")
    file = tmp_path / "train/_annotations.coco.json"
    assert [len(open_dataset(file, split)) for split in ("train", "val", "all")] == [8, 2, 10]
    assert open_dataset(file, "val").class_names == ("ball",)


@pytest.mark.parametrize(
    "name",
    [
        *("images/0a1b2c3d-{}.png", "images\\0a1b2c3d-{}.png", "images\\1/0a1b2c3d-{}.png"),
        *("..\\..\\label-studio\\media\\upload\\4\\0a1b2c3d-{}.png", "/data/upload/1/0a1b2c3d-{}.png"),
        *("/data/local-files/?d=photos/0a1b2c3d-{}.png", "/data/local-files/?d=photos%2F0a1b2c3d-{}.png"),
    ],
)
@pytest.mark.parametrize("prefix", ["0a1b2c3d-", ""])
def test_images_are_found_by_name(tmp_path, expected, name, prefix):
    """The second time without the digest that Label Studio puts before the names of files that it was sent."""
    write(tmp_path / "result.json", coco(EVERY, name))
    for i in EVERY:
        picture(tmp_path / f"images/sub/{prefix}{i}.png", i)
    data = open_dataset(tmp_path, "all")
    assert [path.rpartition("/")[2] for path in data.files()] == [f"{prefix}{i}.png" for i in EVERY]


def test_names_that_fit_no_image_or_several(tmp_path):
    write(tmp_path / "result.json", coco([1, 2], "/data/upload/1/{}.png"))
    picture(tmp_path / "images/a/1.png", 1)
    picture(tmp_path / "images/b/1.png", 1)
    expected = (
        r"2 faults:\n  image 1 .*: there are 2 files called 1.png, such as .*images/a/1.png and .*images/b/1.png; "
        r"rename them.*\n  image 2 .*: there is no file .2.png. in .*images; export the data with images, or put it"
    )
    with pytest.raises(KDError, match=expected):
        open_dataset(tmp_path, "all")


def test_an_export_without_images(tmp_path):
    write(tmp_path / "annotations/instances_train.json", coco(EVERY))
    expected = r"there is no folder .*images/train or .*/train or .*/images\. Export the data with images, or put them"
    with pytest.raises(KDError, match=expected):
        open_dataset(tmp_path, "train")
    _layouts.cvat_yolo(tmp_path / "yolo")
    for file in (tmp_path / "yolo").glob("*/*.png"):
        file.unlink()
    with pytest.raises(
        KDError, match=r"train.txt, line 1: there is no file 'data/obj_train_data/1.png' in .*; correct"
    ):
        open_dataset(tmp_path / "yolo", "all")


def test_a_file_named_from_within_its_folder(tmp_path, monkeypatch):
    _layouts.roboflow_coco(tmp_path)
    monkeypatch.chdir(tmp_path / "train")
    assert len(open_dataset("_annotations.coco.json", "all")) == 6
    monkeypatch.chdir(tmp_path)
    assert len(open_dataset(".", "train")) == len(open_dataset("train/_annotations.coco.json", "all")) == 6


def test_two_files_of_one_split_are_not_guessed_at(tmp_path):
    for year in ("2014", "2017"):
        _layouts.coco_own(tmp_path, year)
    expected = r"two parts that are test, annotations/instances_test2014.json and .*_test2017.json; move one of them"
    with pytest.raises(KDError, match=expected):
        open_dataset(tmp_path, "train")
    root = plain(tmp_path / "plain")
    write(root / "annotations/train_2.json", {})
    assert len(open_dataset(root, "train")) == 6


def test_darknet_files_that_lack_something(tmp_path):
    _layouts.cvat_yolo(tmp_path)
    (tmp_path / "obj.names").unlink()
    with pytest.raises(KDError, match=r"obj.names cannot be read"):
        open_dataset(tmp_path, "train")
    write(tmp_path / "obj.data", "train = train.txt\n")
    with pytest.raises(KDError, match=r"obj.data has no names; add the line `names = obj.names`"):
        open_dataset(tmp_path, "train")
    write(tmp_path / "obj.data", "train = train.txt\nvalid = valid.txt\nnames = obj.names\n")
    write(tmp_path / "obj.names", "ball\ncube\n")
    with pytest.raises(KDError, match=r"obj.data: val: there is no folder and no .txt list .*valid.txt"):
        open_dataset(tmp_path, "val")


def test_folders_of_splits_beside_a_list_of_classes(tmp_path, expected):
    write(tmp_path / "classes.txt", "ball\ncube\n")
    for split, numbers in SPLITS.items():
        for i in numbers:
            picture(tmp_path / f"images/{split}/{i}.png", i)
            write(tmp_path / f"labels/{split}/{i}.txt", _layouts.yolo_lines(i))
    for split in SPLITS:
        assert samples(open_dataset(tmp_path, split)) == expected[split]


def test_the_licence_of_an_export(tmp_path):
    _layouts.roboflow_coco(tmp_path)
    file = tmp_path / "test/_annotations.coco.json"
    write(file, json.loads(file.read_text()) | {"licenses": [{"name": "CC BY 4.0"}]})
    assert licence_of(tmp_path) == "CC BY 4.0"


def test_names_of_splits():
    names = ("train2017", "Train", "valid", "validation", "val-2", "test_1", "default", "trainval", "minitrain", "2017")
    assert list(map(split_of, names)) == ["train", "train", "val", "val", "val", "test", "all", None, None, None]
