"""What is sent of a data set can be read on a machine that has nothing else, and is the same data."""

import json
import shutil

import pytest
import torch

from kdtoolkit.benchmark.datasets import load_data
from kdtoolkit.benchmark.needs import moved, paths_of, place_of, places_of_data
from kdtoolkit.benchmark.parcels import unpack
from kdtoolkit.benchmark.plan import Plan
from kdtoolkit.benchmark.store import Store
from kdtoolkit.benchmark.suite import DataSection, change
from kdtoolkit.errors import KDError
from tests.benchmark._suite import tiny
from tests.data import _coco, _layouts, _voc, _yolo


def arrived(data, tmp_path):
    """The data section and its data sets on a different machine: the original folder is gone."""
    pictures = tmp_path / "pictures"
    sets = load_data(data, pictures)
    task = Plan(change(tiny(), data=data.model_dump()), Store(tmp_path / "run"), sets, device="cpu", threads=1).cell(
        "PKD", 0
    )
    here = {
        place.path: unpack(place.parcel.digest, place.parcel.pieces(), tmp_path / "cache") / place.inside
        for place in places_of_data(data, sets, task.pictures)
    }
    (tmp_path / "home").rename(tmp_path / "gone")
    there = moved(task, here, pictures=tmp_path / "cache" / "pictures", results=tmp_path / "results")
    assert there.original is task  # the record names the user's folder, whatever machine it was made on
    assert there.original.settings["data"]["root"] == (None if data.root is None else str(data.root))
    return sets, load_data(there.data, there.pictures), here


def yolo_beside(root, path):
    """A YOLO file outside of the folder of its data."""
    _yolo.write(root / "data")
    (root / "data" / "data.yaml").unlink()
    (root / "files").mkdir()
    (root / "files" / "birds.yaml").write_text(_yolo.YAML.replace("path: .", f"path: {path}"))
    return root / "files" / "birds.yaml"


def linked(root, *folders):
    """A data set that has folders as links to different places in it."""
    for folder in folders:
        place = root / f"real_{folder.replace('/', '_')}"
        (root / folder).rename(place)
        (root / folder).symlink_to(place)
    return root


def yolo_in_capitals(root):
    """A label file with its ending in upper case."""
    folder = _yolo.write(root) / "labels" / "train"
    (folder / "7.txt").rename(folder / "7.TXT")
    return root


def coco(root):
    _coco.write(root)
    return _coco.write(root, split="val")


FORMATS = {
    "COCO": coco,
    "COCO, by its folder of annotations": lambda root: coco(root) / "annotations",
    "COCO, linked folders": lambda root: linked(coco(root), "annotations", "images"),
    "VOC": _voc.write,
    "VOC, linked folders": lambda root: linked(_voc.write(root), "Annotations", "JPEGImages"),
    "YOLO, linked folders": lambda root: linked(_yolo.write(root), "images/train", "labels/train"),
    "YOLO": _yolo.write,
    "YOLO, ending in capitals": yolo_in_capitals,
    "YOLO, by its file": lambda root: _yolo.write(root) / "data.yaml",
    "YOLO, absolute path": lambda root: _yolo.write(root, _yolo.YAML.replace("path: .", f"path: {root}")),
    "YOLO, file beside the folder": lambda root: yolo_beside(root, "../data"),
    "YOLO, file elsewhere": lambda root: yolo_beside(root, root / "data"),
}


def export(name):
    def write(root):
        (_layouts.SPLIT | _layouts.ONE_PART)[name](root)
        return root

    return write


FORMATS |= {
    **{name: export(name) for name in ("roboflow_coco", "cvat_yolo", "cvat_voc", "label_studio_yolo")},
    "one JSON file": lambda root: export("label_studio_coco")(root) / "result.json",
}


@pytest.mark.parametrize("form", FORMATS)
def test_a_data_set_that_was_sent_is_the_same(form, tmp_path):
    root = FORMATS[form](tmp_path / "home")
    ours, theirs, _ = arrived(DataSection(root=root), tmp_path)
    for name in ("teacher", "student", "val"):
        mine, sent = getattr(ours, name), getattr(theirs, name)
        assert mine.has_ids == sent.has_ids
        assert mine.coco() == sent.coco()
        assert mine.fingerprint() == sent.fingerprint()


def test_images_that_are_held_out_are_told(tmp_path):
    sets = load_data(DataSection(root=export("cvat_voc")(tmp_path)))
    assert list(sets.notices) == [
        "evaluation takes a fifth of the images, held out by their names, as the data come in one part"
    ]


def test_images_that_no_split_has_and_other_files_are_not_sent(tmp_path):
    root = coco(tmp_path / "home")
    shutil.copy(root / "images" / "7.png", root / "images" / "unused.png")
    (root / "backup.zip").write_bytes(b"")
    data = DataSection(root=root)
    (place,) = places_of_data(data, load_data(data), tmp_path)
    assert {name for name, _ in place.parcel.files} == {
        "annotations/train.json",
        "annotations/val.json",
        "images/7.png",
        "images/9.png",
    }


def test_images_without_labels_are_sent_too(tmp_path):
    root = coco(tmp_path / "home" / "data")
    shutil.copytree(root / "images", tmp_path / "home" / "more" / "deeper")
    ours, theirs, _ = arrived(DataSection(root=root, unlabelled=tmp_path / "home" / "more"), tmp_path)
    assert theirs.unlabelled.fingerprint() == ours.unlabelled.fingerprint()


def test_drawn_pictures_are_sent_as_they_were_drawn(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    ours, theirs, here = arrived(tiny().data, tmp_path)
    monkeypatch.setattr("kdtoolkit.data.shapes._Scene", None)  # nothing is drawn again
    assert list(here) == [tmp_path / "pictures"]
    assert all(torch.equal(mine[0], sent[0]) for mine, sent in zip(ours.val, theirs.val, strict=True))


def test_files_and_folders_of_detectors_are_sent(tmp_path):
    folder = tmp_path / "birds"
    folder.mkdir()
    for name in ("model.safetensors", "detector.yaml", "README.md"):
        (folder / name).write_text(name)
    weights = tmp_path / "student.pth"
    weights.write_text("weights")
    suite = tiny()
    student = suite.student.model_copy(update={"weights": str(weights), "args": {"pretrained": str(weights)}})
    suite = suite.model_copy(update={"teacher": suite.teacher.model_copy(update={"model": str(folder)})})
    suite = suite.model_copy(update={"student": student})
    task = Plan(suite, Store(tmp_path / "run"), load_data(suite.data), device="cpu", threads=1).cell("PKD", 0)
    task.teacher_weights.parent.mkdir()
    task.teacher_weights.write_text("teacher")
    assert set(paths_of(task)) == {folder, weights, task.teacher_weights}
    places = [place_of(path) for path in paths_of(task)]
    here = {
        each.path: unpack(each.parcel.digest, each.parcel.pieces(), tmp_path / "cache") / each.inside for each in places
    }
    there = moved(task, here, pictures=tmp_path, results=tmp_path)
    assert there.detector.args["pretrained"] == there.detector.weights == str(here[weights])
    assert here[weights].read_text() == "weights"
    assert there.teacher_weights.read_text() == "teacher"
    names = {path.name for path in here[folder].iterdir()}
    assert there.teacher_detector.model == str(here[folder])
    assert names == {"model.safetensors", "detector.yaml"}
    assert there.parts == task.parts


def test_images_outside_of_the_data_set_are_an_error_that_names_one(tmp_path):
    root = coco(tmp_path / "home")
    data = DataSection(root=root)
    sets = load_data(data)
    for split in sets.splits:
        split.root = root / "annotations"
    with pytest.raises(KDError, match=r"7\.png lies outside of .*copy the data into one folder"):
        list(places_of_data(data, sets, tmp_path))
    assert json.loads((root / "annotations" / "val.json").read_text())["images"]
