import io
import re

import pytest
from rich.console import Console

import kdtoolkit
from kdtoolkit import KDError
from kdtoolkit.workflow.evaluate import print_evaluated
from tests.workflow._blobs import BOX, FAR, dataset, detector, right


def test_a_perfect_detector_scores_100_and_is_timed(tmp_path):
    data = dataset(tmp_path, [right("red", 0.9), right("green", 0.8), right("blue", 0.7)])
    seen = []
    found = kdtoolkit.evaluate(
        detector(image_size=320), data, progress=lambda *counts: seen.append(counts), device="cpu"
    )
    assert (found.scores.images, found.image_size, found.device) == (3, 320, "cpu")
    assert found.scores.ap == pytest.approx(100)
    assert found.scores.per_class == pytest.approx({"red": 100, "green": 100, "blue": 100})
    assert 0 < found.milliseconds < 1000
    assert seen == [(3, 3)]
    assert found.notes == ()
    assert found.to_json()["scores"]["ap"] == found.scores.ap


def test_images_are_scaled_down_to_the_size(tmp_path):
    data = dataset(tmp_path, [right("red", 0.9)])
    assert kdtoolkit.evaluate(detector(), data, image_size=50).scores.ap50 == pytest.approx(100)


def test_shared_classes_are_compared_by_name_and_the_rest_is_said(tmp_path):
    pictures = [right("blue", 0.9), ([("red", 0.5, BOX)], [("owl", BOX)])]
    data = dataset(tmp_path, pictures, class_names=("owl", "blue"))
    found = kdtoolkit.evaluate(detector(), data)
    assert found.scores.per_class == pytest.approx({"blue": 100})
    assert found.scores.ap == pytest.approx(100)
    (note,) = found.notes
    assert "the detector says nothing about owl" in note
    assert "2 of the detector's classes are left out (red, green)" in note
    found = kdtoolkit.evaluate(detector(), data, class_map={"owl": "red"})
    assert found.scores.per_class == pytest.approx({"owl": 100, "blue": 100})


def test_classes_in_a_different_order_are_compared_by_name(tmp_path):
    data = dataset(tmp_path, [right("red", 0.9), right("blue", 0.9)], class_names=("blue", "red", "green"))
    found = kdtoolkit.evaluate(detector(), data)
    assert found.scores.per_class == pytest.approx({"blue": 100, "red": 100, "green": None})


def test_a_long_name_of_a_class_is_printed_whole(tmp_path):
    names = ("red", "green" * 30, "blue")
    data = dataset(tmp_path, [([("green", 0.9, BOX)], [(names[1], BOX)])], class_names=names)
    console = Console(width=80, file=io.StringIO())
    print_evaluated(kdtoolkit.evaluate(detector(names), data), console)
    assert "green" * 30 in re.sub(r"[\s\d.-]", "", console.file.getvalue())


def test_missed_and_false_detections_cost(tmp_path):
    pictures = [right("red", 0.5), ([("red", 0.9, BOX)], [("red", FAR)])]
    assert kdtoolkit.evaluate(detector(), dataset(tmp_path, pictures)).scores.ap < 60


@pytest.mark.parametrize(
    ("model", "options", "part"),
    [
        (detector(trained=False), {}, "has no weights for detection, so that its detections would be random"),
        (detector(("cat", "dog", "cow")), {}, "share no class"),
        (detector(None), {}, "does not say its classes"),
        (detector(), {"class_map": {"owl": "red"}}, "has no class 'owl'"),
        (detector(), {"weights": "x.pth"}, "give them to open_detector"),
        (detector(), {"image_size": 8}, "image_size is 8 px; it must be at least 32"),
        (detector(), {"batch_size": 0}, "batch_size must be at least 1"),
        (detector(), {"max_detections": 0}, "max_detections must be at least 1"),
        (detector(), {"device": "gpu"}, "device='gpu' is no device that kdtoolkit knows: write 'auto'"),
        (detector(), {"split": "dev"}, "there is no file .*dev.json"),
        (3, {}, "the model is a int; it must be a name, a file or a folder"),
    ],
)
def test_wrong_uses_are_told(tmp_path, model, options, part):
    data = dataset(tmp_path, [right("red", 0.9)])
    with pytest.raises(KDError, match=part):
        kdtoolkit.evaluate(model, data, **options)
