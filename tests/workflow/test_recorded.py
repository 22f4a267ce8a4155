"""A file of detections as the teacher of `kd eval`, `kd pseudo-label`, `kd predict` and `kd distill`."""

import json

import pytest
from PIL import Image

import kdtoolkit
from kdtoolkit import KDError
from kdtoolkit.data import open_dataset
from kdtoolkit.workflow.options import ProbeOptions, check_options
from kdtoolkit.workflow.probe import run as run_probe
from tests.data._coco import pixels
from tests.data._results import entry, found_in, write
from tests.workflow._blobs import BOX, COLOURS, FAR, dataset, detector, picture, right
from tests.workflow._data import TINY

XYWH = (BOX[0], BOX[1], BOX[2] - BOX[0], BOX[3] - BOX[1])


@pytest.fixture
def data(tmp_path):
    return dataset(tmp_path / "data", [right("red", 0.9), right("green", 0.8), right("blue", 0.7)])


def entries(*scores, first=1):
    """The three objects of `data`, with these scores."""
    return [entry(number, number, XYWH, score) for number, score in enumerate(scores, first)]


def test_a_file_is_scored_as_the_detector_that_wrote_it(tmp_path):
    pictures = [right("red", 0.9), ([("red", 0.6, FAR)], [("red", BOX)]), right("blue", 0.5), right("green", 0.2)]
    data = dataset(tmp_path / "data", pictures)
    alone = kdtoolkit.evaluate(detector(), data)
    kdtoolkit.predict(detector(), data / "images", out=tmp_path / "out", score=0, pictures=False)
    found = kdtoolkit.evaluate(tmp_path / "out" / "predictions.json", data)
    assert 0 < found.scores.ap < 100
    assert found.scores == alone.scores
    assert found.milliseconds is None
    assert found.weights == "4 detections on 4 images"
    assert found.notes == ()


def test_ids_are_those_of_the_data_and_names_are_mapped(tmp_path, data):
    assert kdtoolkit.evaluate(write(tmp_path / "d.json", entries(0.9, 0.8, 0.7)), data).scores.ap == pytest.approx(100)
    document = {
        "categories": [{"id": 1, "name": "Red"}, {"id": 2, "name": "lime"}, {"id": 3, "name": "owl"}],
        "annotations": entries(0.9, 0.8, 0.7),
    }
    path = write(tmp_path / "d.json", document)
    found = kdtoolkit.evaluate(path, data, class_map={"green": "lime"})
    assert found.scores.per_class == pytest.approx({"red": 100, "green": 100})
    assert "1 of the detector's classes are left out (owl)" in found.notes[0]


def test_detections_of_further_splits_are_left_out(tmp_path, data):
    dataset(data, [right("red", 0.9)] * 5, split="train")
    more = [entry(file_name=f"train{i}.png", class_id=1, box=XYWH) for i in range(1, 6)]
    path = write(tmp_path / "d.json", entries(0.9, 0.8, 0.7) + more)
    assert kdtoolkit.evaluate(path, data).scores.detections == 3


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (
            [entry(1, 1, XYWH), entry(2, 2, XYWH), entry(4, 3, XYWH)],
            r"detection 2 \(counted from 0\) is on the image 4, and the data has no such",
        ),
        ([entry("x.png", 1)], r"has no detection on 3 of the 3 images of .*val.json, such as .*val1.png"),
        (entries(0.9)[:1], r"has no detection on 2 of the 3 images of .*val.json, such as .*val2.png"),
        (entries(0.9, 8, 0.7), r"detection 1 \(counted from 0\), image 2: score must be a number from 0 to 1, not 8"),
        ([entry(1, 9)], r"no class has the category_id 9, only 1, 2, 3"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, data, content, part):
    with pytest.raises(KDError, match=part) as error:
        kdtoolkit.evaluate(write(tmp_path / "d.json", content), data)
    assert "d.json" in str(error.value)


def test_labels_are_made_of_the_detections_on_images_without_labels(tmp_path, data):
    photos = tmp_path / "photos"
    picture(photos / "a.png")
    picture(photos / "sub" / "b.png")
    more = [
        entry("a.png", 1, XYWH, 0.95),
        entry("a.png", 2, XYWH, 0.1),
        entry("sub/b.png", 3, (60, 50, 48, 20), 0.75),
    ]
    path = write(tmp_path / "d.json", entries(0.9, 0.8, 0.7) + more)
    found = kdtoolkit.pseudo_label(path, photos, data, out=tmp_path / "out")
    assert found.boxes == {"red": 1, "green": 0, "blue": 1}
    scored = kdtoolkit.evaluate(path, data)
    assert scored.scores.ap == pytest.approx(100)
    assert "the data does not have 2 of the 5 images of" in scored.notes[0]
    labelled = open_dataset(tmp_path / "out", "train")
    assert [labelled[i][1]["boxes"].tolist() for i in range(2)] == [[[*BOX]], [[60, 50, 100, 70]]]
    with pytest.raises(KDError, match=r"has no detection on 2 of the 2 images of .*photos"):
        kdtoolkit.pseudo_label(write(path, entries(0.9, 0.8, 0.7)), photos, data, out=tmp_path / "new")


def test_boxes_that_lie_beyond_photos_are_refused(tmp_path, data):
    picture(tmp_path / "photos" / "a.png")
    path = write(tmp_path / "d.json", [*entries(0.9, 0.8, 0.7), entry("a.png", 1, (120, 100, 40, 40))])
    with pytest.raises(
        KDError, match=r"1 of 1 boxes reach far beyond their images of .*photos\. .*on an image of 100x80"
    ):
        kdtoolkit.pseudo_label(path, tmp_path / "photos", data, out=tmp_path / "out")


def test_a_photo_named_as_a_labelled_image_is_refused(tmp_path, data):
    """The file has detections of val's images alone, and they are no labels of photos that have the same names."""
    for number in (1, 2, 3):
        picture(tmp_path / "photos" / f"val{number}.png")
    found = [entry(f"val{number}.png", number, XYWH) for number in (1, 2, 3)]
    path = write(tmp_path / "d.json", found)
    with pytest.raises(KDError, match=r"detection 0 .* is on the image 'val1.png', and there is one in val and in the"):
        kdtoolkit.pseudo_label(path, tmp_path / "photos", data, out=tmp_path / "out")
    found += [entry(f"photos/val{number}.png", number, XYWH) for number in (1, 2, 3)]
    for each in found[:3]:
        each["image_id"] = f"images/{each['image_id']}"
    made = kdtoolkit.pseudo_label(write(path, found), tmp_path / "photos", data, out=tmp_path / "out")
    assert made.boxes == {"red": 1, "green": 1, "blue": 1}


def test_images_that_cannot_be_decoded_are_left_out_and_named(tmp_path, data):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels(1)).save(photos / name)
    whole = (photos / "b.png").read_bytes()
    (photos / "b.png").write_bytes(whole[:200] + bytes(50) + whole[250:])  # both ends are good
    more = [entry(name, 1, (1, 1, 9, 9), 0.95) for name in ("a.png", "b.png")]
    categories = [{"id": number, "name": name} for number, name in enumerate(COLOURS, 1)]
    content = {"categories": categories, "annotations": entries(0.9, 0.8, 0.7) + more}
    path = write(tmp_path / "d.json", content)
    found = kdtoolkit.predict(path, photos, out=tmp_path / "seen")
    labelled = kdtoolkit.pseudo_label(path, photos, data, out=tmp_path / "out")
    for skipped in (found.skipped, labelled.skipped):
        ((file, reason),) = skipped.items()
        assert (file, "cannot be decoded" in reason) == (photos / "b.png", True)
    assert len(found.images) == labelled.images == 1


def test_detections_can_be_drawn(tmp_path, data):
    path = write(tmp_path / "d.json", [entry(f"val{n}.png", n, XYWH, 0.5, category="x" * n) for n in (1, 2, 3)])
    found = kdtoolkit.predict(path, data / "images", out=tmp_path / "out")
    assert found.detections == 3
    assert found.images[0].boxes.tolist() == [[*BOX]]
    assert len(list((tmp_path / "out" / "pictures").glob("*.jpg"))) == 3
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())[2]["category"] == "xxx"


# kd distill ----------------------------------------------------------------------------------------------------------


OPTIONS = {"steps": 2, "batch_size": 2, "student_weights": "none", "device": "cpu", "quiet": True}


@pytest.mark.slow
def test_a_student_learns_from_a_file(tmp_path, shapes):
    file = write(tmp_path / "d.json", found_in(shapes, "train", "val"))
    report = kdtoolkit.distill(file, TINY, shapes, out=tmp_path / "out", **OPTIONS)
    assert report.teacher.ap == pytest.approx(100)
    assert report.plan["method"] == "ObjectKD (the teacher shows detections alone)"
    assert report.plan["teacher"].endswith("d.json, a file of detections (31 detections on 16 images)")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "at the size at which" not in text
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "A file: 31 detections on 16 images." in card
    assert "The teacher's detections: licence unknown" in card
    assert report.student.metrics["objectkd/missed"] == 0


@pytest.mark.slow
def test_images_without_labels_need_detections_and_validation_images_do_not(tmp_path, shapes, capsys):
    photos = tmp_path / "photos"
    picture(photos / "more1.png")
    picture(photos / "more2.png")
    found = found_in(shapes, "train")
    options = {**OPTIONS, "steps": 4, "train": {"unlabelled_share": 0.5}, "unlabelled": photos}
    file = write(tmp_path / "d.json", found)
    with pytest.raises(KDError, match=r"has no detection on 2 of the 2 images of .*photos"):
        kdtoolkit.distill(file, TINY, shapes, out=tmp_path / "none", **options)
    more = [entry(f"more{i}.png", 1, XYWH, 0.9) for i in (1, 2)]
    report = kdtoolkit.distill(
        write(file, found + more), TINY, shapes, out=tmp_path / "out", **{**options, "quiet": False}
    )
    assert report.teacher is None
    assert "the teacher is not measured: " in capsys.readouterr().out
    assert report.ap is not None


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"method": "PKD"}, r"PKD cannot distil d.json into GFL: .*Use ObjectKD.*`--method auto` would take ObjectKD"),
        ({"init": "teacher"}, r"d.json is no whole detector, so it has no neck and head to start from: leave init out"),
        ({"teacher_weights": "pretrained"}, r"d.json is a file of detections, which has no weights"),
        ({"teacher": "{none}"}, r"there is no file .*none.json; correct the path"),
        (
            {"student": "{file}", "student_weights": None},
            r"d.json is a file of detections, which can only teach, as it is: name",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_uses_of_a_file_are_one_sentence(tmp_path, shapes, changes, part):
    file = write(tmp_path / "d.json", found_in(shapes, "train", "val"))
    places = {"file": str(file), "none": str(tmp_path / "none.json")}
    given = {"teacher": file, "student": TINY, **OPTIONS, **changes}
    given = {
        name: value.format(**places) if "{" in str(value) and value != TINY else value for name, value in given.items()
    }
    with pytest.raises(KDError, match=part) as error:
        kdtoolkit.distill(given.pop("teacher"), given.pop("student"), shapes, out=tmp_path / "out", **given)
    assert "\n" not in str(error.value)


def test_it_cannot_be_exported(tmp_path, shapes):
    file = write(tmp_path / "d.json", found_in(shapes, "train"))
    with pytest.raises(KDError, match=r"d.json is a file of detections, so there is no network to export: name a"):
        kdtoolkit.export(file, out=tmp_path / "d.onnx")


def test_it_can_be_probed(tmp_path, shapes):
    file = write(tmp_path / "d.json", found_in(shapes, "train"))
    given = {"teacher": str(file), "student": TINY, "data": shapes, "student_weights": "none", "batch_size": 4}
    found = run_probe(check_options(ProbeOptions, {**given, "batches": 1, "after": 0}), quiet=True)
    assert "objectkd" in {row.name for row in found.probe.rows}


def test_ids_that_are_in_several_splits_are_refused(tmp_path, shapes):
    truth = open_dataset(shapes, "train").coco()
    found = [entry(a["image_id"], a["category_id"], a["bbox"]) for a in truth["annotations"]]
    with pytest.raises(KDError, match=r"on the image 1, and there is one in train and in val: give each entry a file"):
        kdtoolkit.distill(write(tmp_path / "d.json", found), TINY, shapes, out=tmp_path / "out", **OPTIONS)
