import json

import numpy as np
import pytest
from PIL import Image

import kdtoolkit
from kdtoolkit import KDError
from kdtoolkit.data.drawing import colour
from tests.workflow._blobs import BOX, FAR, detector, picture


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    picture(root / "a.png", ("red", 0.9, BOX), ("blue", 0.2, FAR))
    picture(root / "sub" / "b.jpg.png", ("green", 0.6, FAR), size=(200, 160))
    picture(root / "c.png")
    return root


def test_detections_are_in_pixels_of_the_image_best_first(photos):
    found = kdtoolkit.predict(detector(), photos, score=0.1)
    a, c, b = found.images
    assert [image.path.name for image in found.images] == ["a.png", "c.png", "b.jpg.png"]
    assert a.boxes.tolist() == [[*BOX], [*FAR]]
    assert a.labels.tolist() == [0, 2]
    assert a.scores == pytest.approx([0.9, 0.2], abs=0.01)
    assert (a.size, c.size, b.size) == ((100, 80), (100, 80), (200, 160))
    assert len(c.scores) == 0
    assert (found.detections, found.class_names, found.written) == (3, ("red", "green", "blue"), ())
    small = kdtoolkit.predict(detector(image_size=50), photos / "a.png").images[0]
    assert small.boxes[0] == pytest.approx(BOX, abs=3)
    assert small.labels.tolist() == [0]


def test_results_of_coco_and_pictures_are_written(photos, tmp_path):
    out = tmp_path / "out"
    found = kdtoolkit.predict(detector(), photos, out=out)
    assert found.written == (out / "predictions.json", out / "pictures")
    results = json.loads((out / "predictions.json").read_text())
    assert results[0] == {
        "image_id": 1,
        "category_id": 1,
        "bbox": [10, 10, 40, 30],
        "score": pytest.approx(0.9, abs=0.01),
        "file_name": "a.png",
        "category": "red",
    }
    assert [(each["image_id"], each["file_name"]) for each in results[1:]] == [(3, "sub/b.jpg.png")]
    drawn = Image.open(out / "pictures" / "a.jpg")
    assert drawn.size == (600, 480)
    edge = np.asarray(drawn)[61:239, 61].astype(int)  # the left side of the red box
    assert np.abs(edge - colour(0)).max() < 60
    assert {path.relative_to(out / "pictures").as_posix() for path in (out / "pictures").rglob("*.jpg")} == {
        "a.jpg",
        "c.jpg",
        "sub/b.jpg.jpg",
    }


def test_the_results_are_what_pycocotools_reads(photos, tmp_path):
    from pycocotools.coco import COCO

    kdtoolkit.predict(detector(), photos, out=tmp_path / "out", pictures=False)
    truth = COCO()
    truth.dataset = {"info": {}, "images": [{"id": i} for i in (1, 2, 3)], "annotations": [], "categories": [{"id": 1}]}
    truth.createIndex()
    assert len(truth.loadRes(str(tmp_path / "out" / "predictions.json")).anns) == 2


def test_text_files_of_yolo_are_written(photos, tmp_path):
    out = tmp_path / "out"
    found = kdtoolkit.predict(detector(), photos, out=out, format="yolo", pictures=False, score=0.1)
    assert found.written == (out / "labels", out / "classes.txt")
    lines = (out / "labels" / "a.txt").read_text().splitlines()
    assert [float(value) for value in lines[0].split()] == pytest.approx([0, 0.3, 0.3125, 0.4, 0.375, 0.9], abs=0.01)
    assert lines[1].startswith("2 0.75")
    assert (out / "labels" / "c.txt").read_text() == ""
    assert (out / "labels" / "sub" / "b.jpg.txt").exists()
    assert (out / "classes.txt").read_text() == "red\ngreen\nblue\n"


def test_broken_images_are_left_out_and_named(photos):
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:60])
    (photos / "text.jpg").write_text("no image")
    found = kdtoolkit.predict(detector(), photos, batch_size=2)
    assert {path.name for path in found.skipped} == {"broken.png", "text.jpg"}
    assert all("cannot be decoded" in reason for reason in found.skipped.values())
    assert len(found.images) == 3


def test_files_that_differ_in_their_ending_alone_keep_apart(photos, tmp_path):
    picture(photos / "a.bmp", ("blue", 0.9, FAR))
    picture(photos / "a.bmp.png", ("blue", 0.9, FAR))
    kdtoolkit.predict(detector(), photos, out=tmp_path / "out", format="yolo")
    labels = tmp_path / "out" / "labels"
    assert (labels / "a.bmp.txt").read_text().startswith("2 ")
    assert (labels / "a.bmp.png.txt").read_text().startswith("2 ")
    assert (labels / "a.png.txt").read_text().startswith("0 ")
    assert not (labels / "a.txt").exists()


def test_boxes_are_cut_at_the_edge(photos):
    model = detector()
    model.model.scale.data *= 3
    boxes = kdtoolkit.predict(model, photos / "a.png", score=0.1).images[0].boxes
    assert boxes.tolist() == [[30, 30, 100, 80]]  # the other one lies outside


def test_the_output_is_no_image(photos):
    out = photos / "sub" / ".." / "predicted"
    picture(photos / "predicted" / "earlier.png")
    assert len(kdtoolkit.predict(detector(), photos, out=out).images) == 3


def test_detections_of_an_earlier_call_are_not_mixed_with_new_ones(photos, tmp_path):
    kdtoolkit.predict(detector(), photos, out=tmp_path / "out")
    with pytest.raises(KDError, match=r"has pictures and predictions.json already, .*: choose a new folder by --out"):
        kdtoolkit.predict(detector(), photos, out=tmp_path / "out")


def test_names_of_classes_of_an_earlier_call_are_kept(photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "classes.txt").write_text("owl\n")
    with pytest.raises(KDError, match=r"has classes.txt already"):
        kdtoolkit.predict(detector(), photos, out=tmp_path / "out", format="yolo")
    assert (tmp_path / "out" / "classes.txt").read_text() == "owl\n"


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"score": 1.5}, "score is 1.5; scores lie between 0 and 1"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"format": "voc"}, "format is 'voc'; write 'coco' or 'yolo'"),
        ({"images": "none"}, "there is no file or folder .*none; name an image"),
        ({"images": "broken"}, "none of the 1 images in .*broken can be read .*cannot be decoded"),
        ({"out": "broken/x.png"}, "cannot write to .*x.png: "),
        ({"out": "x" * 300}, "cannot write to .*name too long"),
        ({"images": "x" * 300}, "name too long"),
        ({"model": detector(trained=False)}, "Name a file or the library's own weights: --weights FILE"),
    ],
)
def test_wrong_uses_are_told(photos, tmp_path, options, part):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_text("no image")
    given = {"model": detector(), "images": "photos", "out": "out", **options}
    model, images, out = given.pop("model"), tmp_path / given.pop("images"), tmp_path / given.pop("out")
    with pytest.raises(KDError, match=part):
        kdtoolkit.predict(model, images, out=out, **given)
