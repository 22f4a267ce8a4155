import numpy as np
import pytest

from kdtoolkit import KDError
from kdtoolkit.data.detections import is_detection_file, read_detections
from tests.data._results import entry, write

IDS = {8: "cube", 3: "ball"}
CATEGORIES = [{"id": 3, "name": "ball"}, {"id": 8, "name": "cube"}]


def read(tmp_path, content, categories=IDS):
    return read_detections(write(tmp_path / "d.json", content), categories)


def test_a_list_has_the_ids_of_the_data(tmp_path):
    found = read(tmp_path, [entry(), entry(9, 8, (0, 0, 40, 30), 0.25), entry(7, 8, (1, 1, 2, 2), 1)])
    assert found.class_names == ("ball", "cube")
    assert found.keys == (7, 9)
    assert found.images.tolist() == [0, 1, 0]
    assert found.labels.tolist() == [0, 1, 1]
    assert found.boxes[0].tolist() == [2.5, 4, 10, 20.25]
    assert found.scores.tolist() == [0.9, 0.25, 1.0]
    assert found.probabilities is None
    assert found.listed is None


def test_an_object_names_its_own_images_and_classes(tmp_path):
    document = {
        "images": [{"id": 1, "file_name": "a/7.png"}, {"id": 2, "file_name": "9.png"}],
        "categories": [{"id": 2, "name": "owl"}, {"id": 1, "name": "cube"}],
        "annotations": [entry(1, 2), entry(1, 1)],
    }
    found = read(tmp_path, document)
    assert found.class_names == ("cube", "owl")
    assert found.keys == ("a/7.png",)
    assert found.labels.tolist() == [1, 0]
    assert found.listed == {"a/7.png", "9.png"}


def test_entries_may_name_files_and_classes_as_kd_predict_writes_them(tmp_path):
    entries = [
        entry(1, 2, file_name=".\\a\\7.png", category="ball"),
        entry(1, 5, file_name="a/7.png", category="owl"),
        entry(2, 2, file_name="9.png", category="ball"),
    ]
    found = read(tmp_path, entries, None)
    assert found.class_names == ("ball", "owl")
    assert found.keys == ("a/7.png", "9.png")
    assert found.labels.tolist() == [0, 1, 0]


def test_file_names_may_stand_in_image_id(tmp_path):
    assert read(tmp_path, [entry("7.png"), entry("000009")]).keys == ("7.png", "000009")


def test_all_class_scores_are_kept_and_the_rest_have_one(tmp_path):
    found = read(tmp_path, [entry(scores=[0.9, 0.3]), entry(class_id=8, score=0.5)])
    np.testing.assert_allclose(found.probabilities, [[0.9, 0.3], [0.0, 0.5]])
    assert found.probabilities.dtype == np.float32


def test_the_digest_is_of_the_content(tmp_path):
    one, same, other = (read(tmp_path, [entry(score=score)]).digest for score in (0.5, 0.5, 0.6))
    assert one == same != other


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("[{", ["line 1, column 3: not valid JSON", "Export the file again"]),
        ('{"a": 1}', ["holds no list of detections", '"bbox": [x, y, width, height]']),
        ("3", ["holds no list of detections"]),
        ([], ["has no detections: run the detector"]),
        ([entry(), 5], ["d.json: detection 1 (counted from 0): must be an object such as", "not 5"]),
        (
            [entry(None)],
            ["detection 0 (counted from 0): image_id must be the id of an image, or its file name, not None"],
        ),
        ([entry(file_name=3)], ["detection 0 (counted from 0), image 3: file_name must be text, not 3"]),
        ([entry(7.5)], ["detection 0 (counted from 0), image 7.5: image_id must be"]),
        (
            [entry(class_id=4)],
            ["detection 0 (counted from 0), image 7: no class has the category_id 4, only 3, 8", "`categories`"],
        ),
        ([entry(class_id="ball")], ["no class has the category_id 'ball', only 3, 8"]),
        (
            [entry(box=(1, 2, 3))],
            ["detection 0 (counted from 0), image 7: bbox must be four finite numbers", "not [1, 2, 3]"],
        ),
        ([entry(box=(1, 2, float("nan"), 3))], ["bbox must be four finite numbers"]),
        ([entry(box=(30, 20, -10, 5))], ["its width and height must not be negative", "[x, y, width, height]"]),
        (
            [entry(), entry(score=1.5)],
            ["detection 1 (counted from 0), image 7: score must be a number from 0 to 1, not 1.5"],
        ),
        ([entry(score=None)], ["score must be a number from 0 to 1, not None"]),
        ([entry(score=True)], ["score must be a number from 0 to 1, not True"]),
        ([entry(score=float("nan"))], ["score must be a number from 0 to 1, not nan"]),
        ([entry(scores=[0.5])], ["scores must be a list of 2 numbers, one for each class", "not 1 numbers"]),
        ([entry(scores=[0.5, -1])], ["scores[1] must be a number from 0 to 1, not -1"]),
        ([entry(scores="high")], ["scores must be a list of 2 numbers", "not 'high'"]),
        ([entry(box=(0.1, 0.2, 0.3, 0.4))], ["all boxes lie within 0..1", "multiply them by the image's width"]),
        (
            [entry(class_id=1, category="a"), entry(class_id=1, category="b")],
            ["detection 1 (counted from 0): the category_id 1 is 'b' here and 'a' in an earlier entry"],
        ),
        ({"annotations": [entry()], "images": 3}, ["`images` must be a list, not 3"]),
        ({"annotations": [entry()], "images": [{"id": 7}]}, ["images[0] must be an object with an integer id and a"]),
        ({"annotations": [entry()], "images": [{"id": 7, "file_name": "a"}] * 2}, ["images[1]: the id 7 is there"]),
        ({"annotations": [entry()], "images": [{"id": 1, "file_name": "a"}]}, ["no image under `images` has the id 7"]),
        ({"annotations": [entry()], "categories": [{"id": 3}]}, ["categories[0] must be an object with"]),
        (
            {"annotations": [entry()], "categories": [{"id": 8, "name": "cube"}]},
            ["detection 0 (counted from 0), image 7: no class"],
        ),
    ],
)
def test_a_bad_file_is_one_sentence_that_names_the_entry(tmp_path, content, parts):
    with pytest.raises(KDError) as error:
        read(tmp_path, content)
    message = str(error.value)
    assert "d.json" in message
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_classes_that_nobody_names_are_asked_for(tmp_path):
    with pytest.raises(KDError, match=r'its category ids are. Name data in COCO.*--classes-as-in.*"categories"'):
        read(tmp_path, [entry()], None)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(KDError, match=r"there is no file .*none\.json"):
        read_detections(tmp_path / "none.json")


def test_a_file_of_detections_is_known_by_its_ending(tmp_path):
    assert is_detection_file("runs/detections.json")
    assert is_detection_file(tmp_path / "D.JSON")
    (tmp_path / "folder.json").mkdir()
    assert not is_detection_file(tmp_path / "folder.json")
    assert not is_detection_file("kdtoolkit/gfl")
