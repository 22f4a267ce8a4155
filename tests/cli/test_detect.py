import errno
import json
from pathlib import Path

import pytest
import torch

import kdtoolkit
from kdtoolkit import KDError
from kdtoolkit.models import Detector, build_model, save_detector
from tests.data._yolo import write
from tests.test_cli import kd
from tests.workflow._blobs import BOX, COLOURS, dataset, picture, right

TINY = "kdtoolkit/gfl?backbone=resnet10t&neck_channels=16&head_channels=24&head_groups=4&bins=9&strides=[8, 16, 32]"


@pytest.fixture
def run(monkeypatch, capsys):
    return lambda *arguments: kd(*arguments, monkeypatch=monkeypatch, capsys=capsys)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A saved detector with random weights that passes for a trained one, images and data sets for it."""
    root = tmp_path_factory.mktemp("places")
    torch.manual_seed(0)
    model = build_model(TINY, 3)
    model.predictors["cls"].bias.data += 4  # so that it finds something
    save_detector(Detector(model, TINY, COLOURS, "nowhere", True, image_size=96), root / "model")
    save_detector(Detector(model, TINY, COLOURS, "", False), root / "untrained")
    save_detector(Detector(model, TINY, None, "nowhere", True), root / "nameless")
    torch.save(model.state_dict(), root / "weights.pth")
    dataset(root / "data", [right("red", 0.9), right("blue", 0.5)])
    write(root / "others")
    picture(root / "photos" / "a.png", ("red", 0.9, BOX))
    picture(root / "photos" / "b.png")
    (root / "broken").mkdir()
    (root / "broken" / "x.png").write_text("no image")
    (root / "texts").mkdir()
    return root


def test_eval_prints_a_table_and_the_speed(run, places):
    code, out, err = run("eval", places / "model", "--data", places / "data")
    assert (code, err) == (0, "")
    assert "2 images" in out
    assert out.split("medium")[1].split()[1] == "all"
    for part in ("red", "green", "blue", " ms an image, one at a time, on ", "longest side at most 96 px"):
        assert part in out


def test_eval_prints_json_and_takes_weights_and_classes(run, places):
    command = ["eval", TINY, "--weights", places / "weights.pth", "--classes-as-in", places / "data"]
    code, out, err = run(*command, "--data", places / "data", "--json", "--image-size", 64)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["image_size"] == 64
    assert set(found["scores"]["per_class"]) == set(COLOURS)


def test_classes_without_names_are_taken_for_those_of_the_data(run, places):
    code, out, _ = run("eval", places / "nameless", "--data", places / "data")
    assert code == 0
    assert "note: Nobody knows the names of the detector's classes: they are taken for those of the data (red to" in out
    code, _, err = run("eval", places / "nameless", "--data", places / "others", "--split", "train")
    assert (code, "--classes-as-in PATH" in err) == (2, True), err


def test_a_class_map_needs_names(places):
    with pytest.raises(KDError, match="class_map needs the names of the detector's classes, which nobody knows"):
        kdtoolkit.evaluate(places / "nameless", places / "data", class_map={"red": "crimson"})


def test_classes_as_in_a_data_set_that_the_detector_does_not_have(run, places):
    for model, theirs in (("model", "the classes red, green, blue"), ("nameless", "3 classes")):
        code, _, err = run("eval", places / model, "--classes-as-in", places / "others", "--data", places / "data")
        assert (code, f"{model} has {theirs}, and {places / 'others'} has " in err) == (2, True), err
        assert "leave out --classes-as-in" in err


def test_predict_writes_and_tells_where(run, places, tmp_path):
    out = tmp_path / "out"
    code, printed, err = run("predict", places / "model", places / "photos", "--out", out, "--score", 0)
    assert (code, err) == (0, "")
    assert f"written: {out}/predictions.json\nwritten: {out}/pictures\n" in printed
    count = len(json.loads((out / "predictions.json").read_text()))
    assert f"{count} detections with a score of 0 or more on 2 images" in printed
    assert count > 0
    command = ["predict", places / "model", places / "photos" / "a.png", "--format", "yolo", "--no-pictures", "--quiet"]
    assert run(*command, "--out", tmp_path / "labels") == (0, "", "")
    assert (tmp_path / "labels" / "labels" / "a.txt").is_file()
    code, _, err = run(*command, "--out", tmp_path / "labels")
    assert (code, "labels and classes.txt already, perhaps of an earlier call" in err) == (2, True)


def test_images_that_cannot_be_read_are_named_and_counted(run, places, tmp_path):
    photos = tmp_path / "photos"
    picture(photos / "a.png")
    for number in range(25):
        (photos / f"b{number:02}.png").write_text("no image")
    code, out, err = run("predict", places / "model", photos, "--out", tmp_path / "out")
    assert code == 1
    assert "on 1 image\n" in out
    assert f"left out: {photos}/b00.png: the file cannot be decoded" in err
    assert "b19.png" in err
    assert "b20.png" not in err
    assert err.endswith("and 5 more\n25 images could not be read\n")


def test_pseudo_labels_pass_the_check(run, places, tmp_path):
    out = tmp_path / "out"
    command = ["pseudo-label", places / "model", places / "photos", "--data", places / "data", "--out", out]
    code, printed, err = run(*command, "--score", 0.001, "--format", "yolo")
    assert (code, err) == (0, "")
    assert "| class | score | precision" in printed
    assert f"{out}: 2 images, " in printed
    code, printed, _ = run("data", "check", out)
    assert (code, "No faults." in printed) == (0, True)


def test_a_class_map_is_read(run, places, tmp_path):
    data = dataset(tmp_path / "data", [([("red", 0.5, BOX)], [("owl", BOX)])], ("owl",))
    code, out, err = run("eval", places / "model", "--data", data, "--class-map", "owl=red")
    assert (code, err) == (0, "")
    assert "owl (the detector's red)" in out


PREDICT, EVAL, LABEL = (
    ["predict", "model", "photos", "--out", "out"],
    ["eval", "model", "--data", "data"],
    ["pseudo-label", "model", "photos", "--data", "data", "--out", "out"],
)
WRONG = [
    (["predict", "none", "photos"], "unknown model"),
    (["predict", "none.pt", "photos"], "none.pt"),
    (["predict", "texts", "photos"], "texts holds no detector"),
    (["predict", "weights.pth", "photos"], "does not say of which detector: name the detector"),
    (["predict", "untrained", "photos"], "has no weights for detection"),
    (["predict", "kdtoolkit/gfl", "photos"], "has random weights"),
    (["predict", "kdtoolkit/glf", "photos"], "(did you mean 'gfl'?)"),
    (["predict", "model", "none"], "there is no file or folder"),
    (["predict", "model", "texts"], "has no images: it is empty"),
    (["predict", "model", "weights.pth"], "weights.pth is no image by its name"),
    (["predict", "model", "broken"], "none of the 1 images in"),
    ([*PREDICT, "--score", "2"], "score is 2.0; scores lie between 0 and 1"),
    ([*PREDICT, "--score", "high"], "Invalid value for '--score'"),
    ([*PREDICT, "--format", "voc"], "'voc' is not one of 'coco', 'yolo'"),
    ([*PREDICT, "--batch-size", "0"], "Invalid value for '--batch-size'"),
    (["predict", "model", "x" * 300], "File name too long; correct the path, or its permissions"),
    ([*PREDICT, "--image-size", "8"], "image_size is 8 px; it must be at least 32"),
    ([*PREDICT, "--device", "gpu"], "device='gpu' is no device"),
    ([*PREDICT, "--weights", "weights.pth"], "has its own weights and arguments: leave out"),
    (["predict", "model", "photos", "--out", "weights.pth"], "weights.pth"),
    (["predict", "model", "photos", "--out", "weights.pth/x"], "cannot write to"),
    (["predict", "model"], "Missing argument"),
    (["eval", "model"], "Missing option '--data'"),
    (["eval", "model", "--data", "none"], "there is no file or folder"),
    (["eval", "model", "--data", "texts"], "is no data set that is known"),
    ([*EVAL, "--split", "dev"], "there is no file"),
    (["eval", "model", "--data", "others", "--split", "train"], "share no class"),
    ([*EVAL, "--class-map", "red"], "--class-map red: write OURS=THEIRS"),
    ([*EVAL, "--class-map", "red=red", "--class-map", "red=blue"], "--class-map names red twice"),
    ([*EVAL, "--class-map", "owl=red"], "has no class 'owl'"),
    ([*EVAL, "--classes-as-in", "none"], "there is no file or folder"),
    ([*EVAL, "--batch-size", "0"], "Invalid value for '--batch-size'"),
    (["pseudo-label", "model", "none", "--data", "data"], "there is no file or folder"),
    (["pseudo-label", "model", "photos", "--data", "none"], "there is no file or folder"),
    (["pseudo-label", "model", "photos", "--data", "data", "--out", "photos"], "is there already; name a new folder"),
    ([*LABEL, "--batch-size", "0"], "Invalid value for '--batch-size'"),
    ([*LABEL, "--score", "1"], "finds nothing in"),
    ([*LABEL, "--score", "-1"], "score is -1.0"),
    ([*LABEL, "--split", "test"], "test.json"),
]


@pytest.mark.parametrize(("words", "part"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_wrong_uses_are_one_error_without_a_traceback(run, places, monkeypatch, words, part):
    monkeypatch.chdir(places)
    code, out, err = run(*words)
    assert (code, out, part in err) == (2, "", True), err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err
    assert not (places / "out").exists()


def test_a_path_in_a_folder_that_may_not_be_entered_is_one_error(run, places, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    code, out, err = run("predict", "model", "private/photos")
    assert (code, out) == (2, "")
    assert err == "error: private/photos: Permission denied; correct the path, or its permissions\n"
