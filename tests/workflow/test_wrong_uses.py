"""What goes wrong in `kd train` and `kd distill`: each is one sentence that says what to do, and no traceback."""

import json
import shutil

import pytest
import torch

from kdtoolkit.engine import train as loop
from kdtoolkit.workflow import training
from tests.test_cli import kd
from tests.workflow._data import TINY, write_shapes

FAST = ("--steps", 2, "--batch-size", 2)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: kd(*arguments, monkeypatch=monkeypatch, capsys=capsys)


def check(outcome, *parts):
    code, _, err = outcome
    assert code == 2, err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1, err
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train", "--data", "d"], "--model is missing: kd train needs it"),
        (["train", "--model", TINY], "--data is missing: kd train needs it"),
        (["distill", "--teacher", "t", "--data", "d"], "--student is missing: kd distill needs it"),
        (["train", "--model", TINY, "--data", "none"], "there is no file or folder"),
        (["train", "--model", TINY, "--data", "{shapes}", "--epochs", 3, "--steps", 3], "leave one of them out"),
        (["train", "--model", TINY, "--data", "{shapes}", "--lr", 0], "--lr 0.0: input should be greater than 0"),
        (["train", "--model", TINY, "--data", "{shapes}", "--image-size", 16], "--image-size 16: input should be"),
        (["train", "--model", TINY, "--data", "{shapes}", "--batch-size", "many"], "--batch-size"),
        (
            ["train", "--model", TINY, "--data", "{shapes}", "--device", "gpu"],
            "write 'auto', 'cpu', 'cuda' or 'cuda:1'",
        ),
        (
            ["train", "--model", TINY, "--data", "{shapes}", "--device", "mps"],
            "'mps' is no device that kdtoolkit knows",
        ),
        (["train", "--model", "kdtoolkit/glf", "--data", "{shapes}"], "did you mean 'gfl'?"),
        (["train", "--model", "gfl", "--data", "{shapes}"], "gfl"),
        (["train", "--model", "os:getcwd", "--data", "{shapes}"], "--allow-code"),
        (["train", "--model", TINY, "--weights", "none.pth", "--data", "{shapes}"], "none.pth"),
        (["train", "--model", TINY, "--data", "{shapes}", "--modle", "x"], "--modle"),
        (["train", "none.yaml"], "cannot read the run file none.yaml: No such file"),
        (["distill", "--teacher", "none", "--student", TINY, "--data", "{shapes}"], "none"),
        (["distill", "--teacher", TINY, "--student", TINY, "--data", "{shapes}"], "has no weights"),
        (["distill", "--teacher", "{teacher}", "--student", TINY, "--data", "{shapes}", "--init", "me"], "--init 'me'"),
        (["distill", "--teacher", "{teacher}", "--student", TINY, "--data", "{shapes}", "--method", "PDK"], "'PKD'?"),
        (
            ["distill", "--teacher", "{teacher}", "--student", TINY, "--data", "{shapes}", "--method", "KDDETR"],
            "`--method auto` would take CrossKD + PKD",
        ),
        (
            ["distill", "--teacher", "{teacher}", "--student", TINY, "--data", "{shapes}", "--class-map", "disc"],
            "--class-map disc: write OURS=THEIRS",
        ),
        (
            ["distill", "--teacher", "{teacher}", "--student", TINY, "--data", "{shapes}", "--class-map", "dics=ring"],
            "class_map: the data has no class 'dics' (did you mean 'disc'?)",
        ),
        (
            ["distill", "--teacher", "{teacher}", "--student", TINY, "--data", "{shapes}", "--unlabelled", "none"],
            "none",
        ),
        (["distill", "{teacher}/run.yaml"], "run.yaml is of `kd train`, not of `kd distill`"),
        (
            ["train", "--model", TINY, "--data", "{shapes}", "--out", "{shapes}"],
            "holds files that are no run of kdtoolkit",
        ),
        (["train", "--model", TINY, "--data", "{shapes}", "--out", "{shapes}/annotations/val.json"], "cannot write"),
    ],
)
def test_a_wrong_call_is_one_sentence(run, shapes, teacher, arguments, part):
    filled = [str(each).replace("{shapes}", str(shapes)).replace("{teacher}", str(teacher)) for each in arguments]
    weights = [] if {"--weights", "--device"} & {*filled} or len(filled) < 5 else ["--weights", "none"]
    if filled[0] == "distill":
        weights = ["--student-weights", "none"] if "--student" in filled else []
    check(run(*filled, *weights), part)


def test_a_teacher_that_is_bad_on_this_data_stops_the_run(run, shapes, teacher):
    check(
        run("distill", "--teacher", teacher, "--student", TINY, "--student-weights", "none", "--data", shapes, *FAST),
        "AP on the validation images of shapes: a student cannot learn from it",
        "--allow-weak-teacher",
    )


def test_data_without_validation_images_are_told(run, tmp_path):
    root = write_shapes(tmp_path / "data", counts=(("train", 4),))
    check(run("train", "--model", TINY, "--data", root, "--weights", "none"), "annotations/val.json")


def test_data_without_images_or_boxes_are_told(run, tmp_path):
    root = write_shapes(tmp_path / "data")
    path = root / "annotations" / "train.json"
    truth = json.loads(path.read_text())
    path.write_text(json.dumps({**truth, "annotations": []}))
    check(run("train", "--model", TINY, "--data", root, "--weights", "none"), "has no usable annotation")
    path.write_text(json.dumps({**truth, "images": [], "annotations": []}))
    check(run("train", "--model", TINY, "--data", root, "--weights", "none"), "lists no usable image")


def test_splits_with_different_classes_are_told(run, tmp_path):
    root = write_shapes(tmp_path / "data")
    path = root / "annotations" / "val.json"
    truth = json.loads(path.read_text())
    truth["categories"][0]["name"] = "globe"
    path.write_text(json.dumps(truth))
    check(run("train", "--model", TINY, "--data", root, "--weights", "none"), "only the first has disc")


def test_a_missing_image_is_told(run, tmp_path):
    root = write_shapes(tmp_path / "data")
    (root / "images" / "train0.png").unlink()
    code, _, err = run("train", "--model", TINY, "--data", root, "--weights", "none")
    assert code == 2
    assert "train.json: 1 fault:\n  image 1 (train0.png): there is no file" in err
    assert "--skip-bad" in err


def test_a_teacher_of_quite_different_classes_is_told(run, teacher, tmp_path):
    root = write_shapes(tmp_path / "data")
    for split in ("train", "val"):
        path = root / "annotations" / f"{split}.json"
        truth = json.loads(path.read_text())
        for category in truth["categories"]:
            category["name"] = f"bird {category['id']}"
        path.write_text(json.dumps(truth))
    check(
        run("distill", "--teacher", teacher, "--student", TINY, "--student-weights", "none", "--data", root),
        "share no class",
    )


def test_options_that_contradict_each_other_are_told(run, shapes, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"model: {json.dumps(TINY)}\ndata: {shapes}\nweights: none\ntrain: {{accumulation: 2}}\n")
    check(run("train", path, "--batch-size", 3), "batch_size (3) must be a multiple of train.accumulation (2)")


def test_a_nan_loss_is_told(run, shapes, monkeypatch):
    monkeypatch.setattr(loop, "_non_finite", lambda values: "task/cls = nan")
    check(
        run("train", "--model", TINY, "--data", shapes, "--weights", "none", *FAST, "--device", "cpu"),
        "step 1: task/cls = nan",
        "Lower the learning rate (lr)",
    )


def test_a_gpu_without_memory_is_told(run, shapes, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(training, "train", full)
    check(
        run("train", "--model", TINY, "--data", shapes, "--weights", "none", *FAST),
        "the GPU is out of memory: use half the --batch-size or a smaller --image-size",
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(run, shapes):
    check(run("train", "--model", TINY, "--data", shapes, "--device", "cuda"), "there is no CUDA device")


def test_a_folder_in_use_or_broken_is_told(run, shapes, teacher, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(teacher, out)
    command = ["train", "--model", TINY, "--weights", "none", "--data", shapes, "--out", out, *FAST]
    (out / "report.json").write_text("{")
    check(run(*command[:-4], "--steps", 4, "--batch-size", 4), "report.json cannot be read: put a copy of it back")
    (out / "report.json").unlink()
    check(run(*command), "holds a trained detector, and no report.json that says how it was trained")
    assert (out / "training" / "student.safetensors").exists()
    (out / "run.yaml").write_text("model: [\n")
    check(run(*command), "run.yaml, line 2: not YAML")


def test_ctrl_c_before_the_first_checkpoint(run, shapes, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    code, _, err = run("train", "--model", TINY, "--data", shapes, "--weights", "none", *FAST)
    assert code == 130
    assert "interrupted: the same command starts again, because there was no checkpoint yet" in err
