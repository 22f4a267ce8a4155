import io

import numpy as np
import pytest
from PIL import Image

from kdtoolkit.benchmark import pictures
from kdtoolkit.benchmark.cell import build_detector
from kdtoolkit.benchmark.cells import read_cells
from kdtoolkit.benchmark.datasets import load_data
from kdtoolkit.benchmark.detections_file import detections_path, keep_ground_truth, write_detections
from kdtoolkit.benchmark.pictures import TRUTH, Gallery
from kdtoolkit.benchmark.report import View
from kdtoolkit.benchmark.runs import Run
from kdtoolkit.benchmark.store import Store, read_result, write_atomic, write_weights
from kdtoolkit.benchmark.suite import BASELINE, TEACHER, change
from kdtoolkit.engine.scoring import Found
from tests.benchmark._suite import made_up, store_result, tiny


def gallery(store, suite, **options):
    return pictures.gallery(Run(store.root, suite, read_cells(store, suite)), **options)


def objects_of(truth, but=()):
    """The objects themselves as detections, except those of the images at some places."""
    places = {image["id"]: place for place, image in enumerate(truth["images"])}
    labels = {category["id"]: label for label, category in enumerate(truth["categories"])}
    kept = [each for each in truth["annotations"] if places[each["image_id"]] not in but]
    return Found(
        np.array([places[each["image_id"]] for each in kept]),
        np.array([labels[each["category_id"]] for each in kept]),
        np.array([each["bbox"] for each in kept]),
        np.linspace(0.9, 0.5, len(kept)),
    )


def result_of(row, images, **changes):
    per_class = dict.fromkeys(images.class_names, 20.0)
    return made_up(row, 0, 20.0, per_class=per_class, fingerprints={"val_data": images.fingerprint()}, **changes)


@pytest.fixture
def run(tmp_path):
    """A run of a teacher that finds all, a baseline that misses all of two images, and PKD that misses one of them."""
    store, suite = Store(tmp_path / "tiny"), change(tiny(), seeds=1)
    images = load_data(suite.data).val
    truth = images.coco()
    write_atomic(store.suite_path, suite.to_yaml().encode())
    keep_ground_truth(store.ground_truth_path, images)
    for row, but in ((TEACHER, ()), (BASELINE, (1, 3)), ("PKD", (1,))):
        path = store.teacher_copy if row == TEACHER else store.result_path(row, 0)
        result = result_of(row, images)
        store_result(path, result)
        write_detections(detections_path(path), objects_of(truth, but), result)
        section = suite.teacher if row == TEACHER else suite.student
        weights = store.teacher_path("0123456789abcdef") if row == TEACHER else path
        write_weights(weights.with_suffix(".pt"), build_detector(section, images.class_names, 0).model)
    return store, suite


def detect(store, suite, but):
    """Store that PKD has found all objects, except on some images."""
    path = store.result_path("PKD", 0)
    write_detections(detections_path(path), objects_of(load_data(suite.data).val.coco(), but), read_result(path))


def test_the_image_on_which_rows_differ_is_shown_with_every_row(run):
    store, suite = run
    found = gallery(store, suite)
    (item,) = found.items  # on the remaining images the rows are equal
    truth = load_data(suite.data).val.coco()
    assert item.title == truth["images"][3]["file_name"]
    assert [panel.name for panel in item.panels] == [
        *(TRUTH, TEACHER, BASELINE, "PKD"),
        *(f"scores: {row}" for row in (TEACHER, BASELINE, "PKD")),
    ]
    count = sum(each["image_id"] == truth["images"][3]["id"] for each in truth["annotations"])
    assert item.alt == f"Mistakes, mean over seeds: baseline {count}, PKD 0"
    alts = {panel.name: panel.alt for panel in item.panels}
    assert alts[BASELINE] == f"baseline: 0 right, 0 wrong, {count} missed"
    assert next(panel.content for panel in item.panels if panel.name == BASELINE) == f"0 right, 0 wrong, {count} missed"
    assert [panel.is_map for panel in item.panels] == [False] * 4 + [True] * 3
    assert alts["PKD"] == f"PKD: {count} right, 0 wrong, 0 missed"
    assert "On 1 of them a method makes fewer mistakes than the baseline" in found.note
    pictures = {panel.name: Image.open(io.BytesIO(panel.image)) for panel in item.panels}
    assert {(picture.size, picture.format) for picture in pictures.values()} == {((560, 560), "WEBP")}
    names = (TRUTH, BASELINE, "PKD", "scores: PKD")
    assert len({pictures[name].tobytes() for name in names}) == len(names)


def test_a_gallery_is_kept_until_results_change(run, monkeypatch):
    store, suite = run
    first = gallery(store, suite)
    (path,) = (store.root / "gallery").iterdir()
    assert Gallery.model_validate_json(path.read_bytes()) == first
    with monkeypatch.context() as patched:
        patched.setattr("kdtoolkit.benchmark.pictures.load_data", None)  # nothing is opened
        assert gallery(store, suite) == first
    path.write_text("{")
    assert gallery(store, suite) == first
    images = load_data(suite.data).val
    store_result(store.result_path("PKD", 0), result_of("PKD", images, date="2021-01-01"))
    detect(store, suite, (2,))
    assert len(gallery(store, suite).items) == 3
    assert len(list((store.root / "gallery").iterdir())) == 1


def test_as_many_images_are_shown_as_are_asked_for(run):
    store, suite = run
    for weights in (*store.root.rglob("*.pt"), *store.teachers.glob("*.pt")):
        weights.unlink()
    detect(store, suite, (0, 2))
    assert [len(gallery(store, suite, count=count).items) for count in (0, 1, 3)] == [0, 1, 3]


def test_without_weights_there_are_pictures_and_a_sentence(run):
    store, suite = run
    store.result_path("PKD", 0).with_suffix(".pt").unlink()
    found = gallery(store, suite)
    assert "There is no score map of PKD: its weights (seed0.pt) are not beside the result." in found.note
    assert [panel.name for panel in found.items[0].panels][-2:] == ["scores: teacher", "scores: baseline"]
    assert not (store.root / "gallery").exists()  # the weights may come back


@pytest.mark.parametrize("content", [b"", b"PK", b"text that is no file of weights"])
def test_damaged_weights_end_no_gallery(run, content):
    store, suite = run
    store.result_path("PKD", 0).with_suffix(".pt").write_bytes(content)
    found = gallery(store, suite)
    assert "There is no score map of PKD: " in found.note
    assert "seed0.pt" in found.note
    assert [panel.name for panel in found.items[0].panels][-2:] == ["scores: teacher", "scores: baseline"]


def test_a_folder_that_cannot_be_written_has_a_gallery(run):
    store, suite = run
    (store.root / "gallery").write_text("a file, so that no folder can be made here")
    assert len(gallery(store, suite).items) == 1


def test_detections_are_judged_by_the_ground_truth_of_their_own_images_alone(run):
    store, suite = run
    images = load_data(suite.data).val
    for row in (TEACHER, BASELINE, "PKD"):
        path = store.teacher_copy if row == TEACHER else store.result_path(row, 0)
        store_result(path, result_of(row, images).model_copy(update={"fingerprints": {"val_data": "different"}}))
    found = gallery(store, suite)
    assert "baseline, seed 0 is not in the pictures: the run's ground truth is not known to be that" in found.note
    assert found.items == ()


def test_what_is_missing_is_said(run, tmp_path):
    store, suite = run
    fewer = change(suite, data={"val_images": 3})
    assert "the images have changed" in gallery(store, fewer).note
    gone = change(suite, data={"root": tmp_path / "gone"})
    assert "the images cannot be read" in gallery(store, gone).note
    detections_path(store.result_path("PKD", 0)).write_bytes(b"PK")
    assert "seed0.detections.npz is damaged" in gallery(store, suite).note
    detections_path(store.result_path("PKD", 0)).unlink()
    assert "they need detections of two rows" in gallery(store, suite).note
    store.ground_truth_path.unlink()
    assert "made by an earlier version" in gallery(store, suite).note


def test_code_of_a_suite_is_not_run(run):
    store, suite = run
    own = change(suite, student={**suite.student.model_dump(exclude_unset=True), "model": "no_such_module:detector"})
    found = gallery(store, own)
    assert "no_such_module:detector is code of its own, which a report does not run" in found.note
    assert [panel.name for panel in found.items[0].panels][-1] == "scores: teacher"


def test_no_fault_of_the_pictures_stops_a_board(run):
    store, _ = run
    store.ground_truth_path.write_bytes(b"damaged")
    view = View.of(store.root, pictures=True)
    assert {row.entry for row in view.board.rows} == {BASELINE, "PKD"}
    assert f"There are no pictures: {store.ground_truth_path} is damaged" in view.gallery.note
