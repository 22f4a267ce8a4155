import json
import os

import pytest

import kdtoolkit
from kdtoolkit import KDError
from kdtoolkit.data import open_dataset
from kdtoolkit.data.tools.check import check
from tests.workflow._blobs import BOX, FAR, dataset, detector, picture, right


@pytest.fixture
def data(tmp_path):
    """Red is right down to 0.5 and wrong at 0.4; green is right at 0.3; blue does not occur."""
    false = ([("red", 0.4, BOX)], [("red", FAR)])
    pictures = [right("red", 0.9), right("red", 0.5), false, false, right("green", 0.3)]
    return dataset(tmp_path / "data", pictures)


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    picture(root / "a.png", ("red", 0.6, BOX), ("green", 0.35, FAR))
    picture(root / "b.png", ("red", 0.42, BOX), ("blue", 0.9, FAR))
    picture(root / "c.png", ("green", 0.12, BOX))
    (root / "d.png").write_text("no image")
    return root


@pytest.mark.parametrize("format", ["coco", "yolo"])
def test_scores_are_chosen_for_each_class_and_the_labels_are_a_data_set(data, photos, tmp_path, format):
    out = tmp_path / "out"
    found = kdtoolkit.pseudo_label(detector(), photos, data, out=out, format=format)
    red, green, blue = found.thresholds.values()
    assert red.score == pytest.approx(0.45, abs=0.01)  # between the last right one and the first wrong one
    assert (red.precision, red.recall, red.objects) == (1.0, 0.5, 4)
    assert green.score < 0.3
    assert (green.precision, green.recall, green.objects) == (1.0, 1.0, 1)
    assert (blue.precision, blue.recall, blue.objects) == (None, None, 0)
    assert found.boxes == {"red": 1, "green": 1, "blue": 1}
    assert (found.images, found.empty) == (3, 1)
    assert [path.name for path in found.skipped] == ["d.png"]
    labelled = open_dataset(out, "train")
    assert labelled.class_names == ("red", "green", "blue")
    assert [sample["labels"].tolist() for _, sample in (labelled[i] for i in range(3))] == [[0, 1], [2], []]
    assert labelled[0][1]["boxes"].tolist() == [[*BOX], [*FAR]]
    report = check(out, image_size=640, stride=8, queries=300, progress=lambda *_: None)
    assert report.is_good
    assert "| red | 0.4" in (out / "report.md").read_text()
    assert json.loads((out / "report.json").read_text())["thresholds"]["green"]["recall"] == 1.0


def test_the_report_is_written_if_a_folder_is_named_in_no_utf_8(data, photos, tmp_path):
    photos = photos.rename(tmp_path / os.fsdecode(b"caf\xe9"))
    found = kdtoolkit.pseudo_label(detector(), photos, data, out=tmp_path / "out")
    assert [path.name for path in found.skipped] == ["d.png"]
    assert r"caf\udce9/d.png" in (tmp_path / "out" / "report.md").read_text()


def test_a_score_of_ones_own_is_used_and_measured(data, photos, tmp_path):
    found = kdtoolkit.pseudo_label(detector(), photos, data, out=tmp_path / "out", score=0.34)
    assert found.boxes == {"red": 2, "green": 1, "blue": 1}
    red, green, blue = found.thresholds.values()
    assert (red.score, red.precision, red.recall) == (0.34, 0.5, 0.5)
    assert (green.precision, green.recall) == (None, 0.0)
    assert (blue.precision, blue.recall) == (None, None)


def test_labels_have_the_classes_of_the_data(photos, tmp_path):
    data = dataset(tmp_path / "data", [right("green", 0.2), ([("red", 0.5, BOX)], [("owl", BOX)])], ("green", "owl"))
    found = kdtoolkit.pseudo_label(detector(), photos, data, out=tmp_path / "out", class_map={"owl": "red"})
    labelled = open_dataset(tmp_path / "out", "train")
    assert labelled.class_names == ("green", "owl")
    assert [labelled[i][1]["labels"].tolist() for i in range(3)] == [[1, 0], [1], [0]]
    assert "1 of the detector's classes are left out (blue)" in found.notes[0]


def test_a_class_without_a_right_detection_gets_no_label(photos, tmp_path):
    data = dataset(tmp_path / "data", [right("red", 0.3), ([("green", 0.9, FAR)], [("green", BOX)])])
    found = kdtoolkit.pseudo_label(detector(), photos, data, out=tmp_path / "out")
    assert found.thresholds["green"].score is None
    assert found.boxes["green"] == 0
    assert found.notes[0].startswith("green: no labels, because most detections were wrong")
    assert "| green | none | - | 0.00 | 1 | 0 |" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("a.jpg", "image a.jpg and image a.png would both be a in the new data set"),
        ("new\nline.png", r"the name of the file 'new\\nline.png' cannot be written: .*; rename it"),
        (os.fsdecode(b"caf\xe9.png"), r"the name of the file 'caf\\udce9.png' cannot be written: .*; rename it"),
        (" e.png", "image  e.png: readers of YOLO look for images by their endings"),
    ],
)
def test_names_are_checked_before_the_teacher_runs(data, photos, tmp_path, name, part):
    (photos / name).write_bytes((photos / "a.png").read_bytes())
    teacher = detector()
    teacher.model.forward = None
    with pytest.raises(KDError, match=part):
        kdtoolkit.pseudo_label(teacher, photos, data, out=tmp_path / "out", format="yolo")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"batch_size": -1}, "batch_size is -1; it must be at least 1"),
        ({"score": -1}, "score is -1; scores lie between 0 and 1"),
        ({"score": 1.0}, "finds nothing in .* that scores enough"),
        ({"format": "voc"}, "format is 'voc'"),
        ({"split": "test"}, r"there is no file .*test.json \(but val.json\)"),
        ({"out": "photos"}, "photos is there already; name a new folder"),
        ({"images": "none"}, "there is no file or folder"),
        ({"model": detector(trained=False)}, "no weights for detection"),
    ],
)
def test_wrong_uses_are_told_and_nothing_is_written(data, photos, tmp_path, options, part):
    given = {"model": detector(), "images": "photos", "out": "out", **options}
    model, images, out = given.pop("model"), tmp_path / given.pop("images"), tmp_path / given.pop("out")
    with pytest.raises(KDError, match=part):
        kdtoolkit.pseudo_label(model, images, data, out=out, **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("out", "name", "part"),
    [
        ("photos/a.png/out", "e.png", r"cannot write .*a.png is no folder"),
        ("out", "sub\\e.png", r"image sub/e.png and image sub/e.png would both be sub/e.png"),
    ],
)
@pytest.mark.skipif(os.sep == "\\", reason="no file of Windows has a backslash in its name")
def test_what_cannot_be_written_is_told_before_anything_is_detected(
    data, photos, tmp_path, monkeypatch, out, name, part
):
    picture(photos / "sub" / "e.png", ("red", 0.6, BOX))
    picture(photos / name, ("red", 0.6, BOX))
    monkeypatch.setattr("kdtoolkit.workflow.pseudo_label.make_ready", lambda *_, **__: pytest.fail("it detects"))
    with pytest.raises(KDError, match=part):
        kdtoolkit.pseudo_label(detector(), photos, data, out=tmp_path / out)
