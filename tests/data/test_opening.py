"""Which format a path holds, the cache, and the oracles: libraries that read the same files."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdtoolkit import KDError
from kdtoolkit.data import PhotoDataset, batches, check_same_classes, coco, open_dataset, opening, photos, voc, yolo
from kdtoolkit.data.augment import Augmentation
from kdtoolkit.data.opening import locate, name_of, open_all
from tests.data import _coco, _voc, _yolo

WRITERS = {"COCO": _coco.write, "YOLO": _yolo.write, "VOC": _voc.write}
forms = pytest.mark.parametrize("form", WRITERS)


@forms
def test_a_folder_is_told_by_what_lies_there(tmp_path, form):
    root = WRITERS[form](tmp_path / "birds")
    places = {"COCO": root / "annotations", "YOLO": root / "data.yaml", "VOC": root / "Annotations"}
    for path in (root, str(root), places[form]):
        assert locate(path)[0].name == form
        assert isinstance(open_dataset(path, "train"), PhotoDataset)
        assert name_of(Path(path)) == "birds"
    for split in ("val", "test"):
        if split in locate(root)[0].splits(locate(root)[1]):
            assert len(open_dataset(root, split)) == 2
        else:
            with pytest.raises(KDError, match=split):
                open_dataset(root, split)


def test_what_was_looked_for_is_said(tmp_path):
    with pytest.raises(KDError, match=r"there is no file or folder .*none"):
        open_dataset(tmp_path / "none", "train")
    with pytest.raises(KDError, match=r"is no data set that is known; it holds nothing\. Looked for .*\(COCO\), "):
        open_dataset(tmp_path, "train")
    for name in ("labels.json", *(f"{i}.jpg" for i in range(9))):
        (tmp_path / name).touch()
    expected = (
        r"it holds 0.jpg, .*7.jpg and 2 more\. If labels.json is in COCO.s format, name it: .*labels.json\. Looked "
        r"for annotations/train.json \(COCO\), annotations/instances_train.json .*, data.yaml \(Ultralytics YOLO\), .*"
        r"ImageSets/Main/train.txt \(Pascal VOC\), train/\*.xml \(Roboflow\)"
    )
    with pytest.raises(KDError, match=expected):
        open_dataset(tmp_path, "train")
    _coco.write(tmp_path / "inner")
    with pytest.raises(KDError, match=r"is no data set that is known, but .*inner is one: name that"):
        open_dataset(tmp_path, "train")
    (tmp_path / "export.zip").touch()
    with pytest.raises(KDError, match=r"export.zip is no data set that is known: unpack it, and name the folder"):
        open_dataset(tmp_path / "export.zip", "train")
    with pytest.raises(KDError, match=r"0.jpg is no data set that is known\. Looked for"):
        open_dataset(tmp_path / "0.jpg", "train")


def test_folders_that_cannot_be_read(tmp_path, monkeypatch):
    def locate_coco(path):
        if "locked" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return _coco_locate(path)

    _coco_locate = coco.FORM.locate
    monkeypatch.setattr(opening, "FORMS", (replace(coco.FORM, locate=locate_coco), yolo.FORM, voc.FORM))
    (tmp_path / "locked").mkdir()
    for name in ("a", "b"):
        (tmp_path / "several").mkdir(exist_ok=True)
        (tmp_path / "several" / f"{name}.yaml").write_text("train: x\nnames: [x]")
    with pytest.raises(KDError, match=r"is no data set that is known; it holds locked/, several/\. Looked for .*"):
        locate(tmp_path)
    _coco.write(tmp_path / "one")
    with pytest.raises(KDError, match=r"but .*one is one: name that"):
        locate(tmp_path)
    with pytest.raises(KDError, match="locked cannot be read: Permission denied"):
        locate(tmp_path / "locked")
    long = "x" * 300  # no system has such names; some versions of Python raise OSError
    with pytest.raises(KDError, match=r"cannot be read|there is no file or folder"):
        locate(tmp_path / long)
    _yolo.write(tmp_path / "yolo", f"train: {long}\nnames: [ball, cube]")
    with pytest.raises(KDError, match=r"cannot be read|there is no folder"):
        open_dataset(tmp_path / "yolo", "train")


def test_several_formats_in_one_folder_are_not_guessed_at(tmp_path):
    _coco.write(_yolo.write(tmp_path))
    with pytest.raises(KDError, match=r"data of several formats: COCO, YOLO\. Name the one"):
        open_dataset(tmp_path, "train")
    assert locate(tmp_path / "data.yaml")[0].name == "YOLO"
    assert locate(tmp_path / "annotations")[0].name == "COCO"


@forms
def test_the_arguments_hold_for_all_formats(tmp_path, form):
    root = WRITERS[form](tmp_path)
    image, sample = open_dataset(root, "train", max_size=20)[0]
    assert image.shape == (3, 15, 20)
    assert sample["boxes"].tolist() == [[1.25, 2, 6.25, 12.125]]
    cubes = open_dataset(root, "train", class_names=["cube"])
    assert [cubes[i][1]["labels"].tolist() for i in range(2)] == [[], [0]]
    check_same_classes(cubes, open_dataset(root, "train", class_names=["cube"]))
    seen = []
    open_dataset(root, "train", progress=lambda *counts: seen.append(counts))
    assert seen == [(1, 2), (2, 2)]


@forms
def test_a_file_name_cannot_lead_out_of_the_folder(tmp_path, form):
    root = WRITERS[form](tmp_path / "data")
    Image.fromarray(_coco.pixels(1)).save(tmp_path / "secret.png")
    if form == "COCO":
        for name in ("../../secret.png", str(tmp_path / "secret.png"), "..\\..\\secret.png"):
            doc = _coco.document()
            doc["images"][0]["file_name"] = name
            with pytest.raises(KDError, match=r"leads out of .*images; file_name is relative"):
                open_dataset(_coco.write(root, doc), "train")
    elif form == "YOLO":
        _yolo.write(root, _yolo.YAML.replace("train: images/train", "train: list.txt"))
        (root / "list.txt").write_text(f"{tmp_path}/secret.png")
        with pytest.raises(KDError, match="lies outside of the data set's folder"):
            open_dataset(root, "train")
    else:
        _voc.write(root, files={"8": _voc.xml(_voc.BALL, file_name="../../secret.png")}, listed="8")
        with pytest.raises(KDError, match="leads out of"):
            open_dataset(root, "train")


def decoded_files(monkeypatch):
    """The names of files that are decoded from now on, as they come."""
    names = []
    decode = photos.decode
    monkeypatch.setattr(photos, "decode", lambda path, size: names.append(path.name) or decode(path, size))
    return names


@forms
def test_the_cache_decodes_each_image_once_for_all(tmp_path, monkeypatch, form):
    root, cache = WRITERS[form](tmp_path / "data"), tmp_path / "cache"
    names = decoded_files(monkeypatch)
    plain = open_dataset(root, "train", max_size=25)
    expected = [plain[i] for i in range(2)]
    names.clear()
    for _ in range(2):  # a second time as another process would open it
        kept = open_dataset(root, "train", max_size=25, cache=cache).in_memory()
        for i in range(2):
            assert torch.equal(kept[i][0], expected[i][0])
            assert torch.equal(kept[i][1]["boxes"], expected[i][1]["boxes"])
    part = open_dataset(root, "train", max_size=25, cache=cache).subset(1, 0).in_memory()
    assert part[0][0].shape == (3, 19, 25)
    assert sorted(names) == ["7.png", "9.png"]
    assert kept.fingerprint() == plain.fingerprint()
    open_dataset(root, "train", max_size=24, cache=cache).in_memory()
    assert len(names) == 4


def test_what_is_changed_in_an_image_stays_out_of_the_cache(tmp_path):
    def first():
        return open_dataset(_coco.write(tmp_path), "train", cache=tmp_path / "cache").in_memory()[0][0]

    first().zero_()
    assert np.array_equal(first().permute(1, 2, 0).numpy(), _coco.pixels(7))


def test_a_replaced_file_of_the_same_size_and_time_is_noticed(tmp_path):
    path, shown = _coco.write(tmp_path) / "images" / "7.bmp", []
    doc = _coco.document()
    doc["images"][0]["file_name"] = "7.bmp"
    _coco.write(tmp_path, doc)
    for value in (10, 20):
        Image.fromarray(np.full((30, 40, 3), value, np.uint8)).save(path)
        os.utime(path, (0, 0))
        shown.append(open_dataset(tmp_path, "train", cache=tmp_path / "cache").in_memory()[0][0].max().item())
    assert shown == [10, 20]


def test_a_cut_file_of_the_cache_is_written_again(tmp_path):
    def read():
        return open_dataset(_coco.write(tmp_path), "train", cache=tmp_path / "cache").in_memory()[0][0]

    expected = read().clone()
    for file in (tmp_path / "cache").glob("*/*.rgb"):
        file.write_bytes(file.read_bytes()[:-1])
    assert torch.equal(read(), expected)


def test_faults_of_pixels_and_of_the_cache_are_told(tmp_path, monkeypatch):
    path = _coco.write(tmp_path) / "images" / "7.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + bytes(50) + whole[250:])
    with pytest.raises(KDError, match=r"1 fault:\n  image 7 \(7.png\): the file cannot be decoded"):
        open_dataset(tmp_path, "train", cache=tmp_path / "cache").in_memory()
    data = open_dataset(tmp_path, "train", on_bad="skip", cache=tmp_path / "cache").in_memory()
    assert len(data) == 1
    for file in (tmp_path / "cache").glob("*/*.rgb"):
        file.unlink()
    with pytest.raises(KDError, match="was deleted while it was in use"):
        data[0]
    (tmp_path / "file").write_text("")
    with pytest.raises(KDError, match=r"cannot write decoded images to .*file"):
        open_dataset(tmp_path, "train", on_bad="skip", cache=tmp_path / "file").in_memory()
    monkeypatch.setattr("kdtoolkit.data.cache.SPARE", 10**15)  # as on a disk that is nearly full
    full = open_dataset(tmp_path, "train", on_bad="skip", cache=tmp_path / "cache")
    assert full.in_memory() is full


def test_loader_workers_read_from_the_cache(tmp_path):
    data = open_dataset(_coco.write(tmp_path), "train", cache=tmp_path / "cache")
    options = {"batch_size": 2, "steps": 2, "seed": 0, "augment": Augmentation()}
    for batch, other in zip(batches(data, **options), batches(data, **options, workers=2), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch.images, other.images, strict=True))


def test_all_splits_that_training_needs_are_opened(tmp_path):
    _yolo.write(tmp_path, f"{_yolo.YAML}test: ../test/images\n")
    assert list(open_all(tmp_path)) == ["train", "val"]
    assert list(open_all(tmp_path, without=["train"])) == ["val"]
    _yolo.write(tmp_path, "train: none\nval: images/train\nnames: [ball, cube]")
    with pytest.raises(KDError, match="train: there is no folder"):
        open_all(tmp_path)
