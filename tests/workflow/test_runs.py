import errno
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from rich.console import Console
from safetensors.torch import load_file

import kdtoolkit
from kdtoolkit.data import open_dataset
from kdtoolkit.engine import train as loop
from kdtoolkit.engine.evaluate import Evaluation, evaluate
from kdtoolkit.errors import KDError
from kdtoolkit.files import write_atomic
from kdtoolkit.models import open_detector
from kdtoolkit.workflow import measuring, runs, training
from kdtoolkit.workflow.defaults import Choice
from kdtoolkit.workflow.options import DistillOptions, check_options
from kdtoolkit.workflow.report import Report
from tests.workflow._data import TINY, write_shapes


def distil(teacher, shapes, out, **changes):
    words = {"steps": 4, "batch_size": 4, "student_weights": "none", "allow_weak_teacher": True, "quiet": True}
    return kdtoolkit.distill(teacher, TINY, shapes, out=out, **words | changes)


@pytest.fixture(scope="module")
def distilled(teacher, shapes, tmp_path_factory):
    return distil(teacher, shapes, tmp_path_factory.mktemp("runs") / "student", compare_baseline=True)


def test_a_run_leaves_the_detector_with_its_card_a_report_and_its_settings(distilled, teacher):
    folder = distilled.folder
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {
        "model",
        "training",
        "baseline",
        "run.yaml",
        "report.json",
        "report.md",
    }
    assert not (folder / "training" / "checkpoints").exists()
    text = (folder / "model" / "README.md").read_text()
    assert all(part in text for part in ("disc", "CrossKD", "kd distill", "open_detector"))
    stored = json.loads((folder / "report.json").read_text())
    assert stored["finished"]
    assert stored["student"]["evaluation"]["ap"] == distilled.ap
    assert stored["added"] == distilled.added
    assert Report.read(folder) == distilled
    text = (folder / "report.md").read_text()
    assert "| teacher |" in text
    assert "The teacher was measured at the size" in text
    settings = check_options(DistillOptions, {}, file=folder / "run.yaml")
    assert settings.teacher == str(teacher)
    assert (settings.steps, settings.batch_size, settings.student_weights) == (4, 4, "none")
    assert (settings.method, settings.image_size, settings.lr, settings.train) == ("auto", None, None, {})


def test_the_saved_detector_has_the_reported_ap(distilled, shapes):
    detector = open_detector(distilled.folder)
    assert detector.trained
    assert detector.class_names == open_dataset(shapes, "val").class_names
    found = evaluate(detector.model, open_dataset(shapes, "val"), batch_size=4)
    assert found == distilled.student.evaluation


def test_the_baseline_is_the_same_training_without_teacher(distilled):
    rows = {
        name: [json.loads(line) for line in (distilled.folder / name / "log.jsonl").read_text().splitlines()]
        for name in ("training", "baseline")
    }
    first = {name: lines[0] for name, lines in rows.items()}
    assert {key: value for key, value in first["training"].items() if key.startswith("task/")} == {
        key: value for key, value in first["baseline"].items() if key.startswith("task/")
    }
    assert any(key.startswith("crosskd/") for key in first["training"])
    assert not any(key.startswith("crosskd/") for key in first["baseline"])
    assert distilled.added == distilled.ap - distilled.baseline.evaluation.ap


def test_what_could_not_be_written_for_a_while_is_in_the_report(shapes, tmp_path, monkeypatch):
    attempts = []

    def write(path, content):
        if path.name == "best.safetensors":
            attempts.append(path)
            if len(attempts) == 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_atomic(path, content)

    monkeypatch.setattr("kdtoolkit.engine.folder.write_atomic", write)
    report = kdtoolkit.train(TINY, shapes, out=tmp_path / "run", steps=1, batch_size=4, weights="none", quiet=True)
    assert len(attempts) == 2
    assert "best.safetensors: No space left on device" in report.student.warnings[-1]
    assert "No space left on device" in (tmp_path / "run" / "report.md").read_text()


def test_a_finished_run_is_shown_again(distilled, teacher, shapes, monkeypatch, capsys):
    monkeypatch.setattr(training, "train", None)  # nothing is trained
    assert distil(teacher, shapes, distilled.folder, compare_baseline=True) == distilled
    out = capsys.readouterr().out
    assert "finished" in out
    assert "warning" not in out
    assert distil(teacher, shapes, distilled.folder, method="auto") == distilled
    options = check_options(DistillOptions, {"quiet": True}, file=distilled.folder / "run.yaml")
    assert runs.run(options) == distilled


def test_the_comparison_may_be_asked_for_later(distilled, teacher, shapes, tmp_path, monkeypatch):
    out = tmp_path / "later"
    report = distil(teacher, shapes, out)
    assert report.baseline is None
    shutil.rmtree(out / "training")  # the detector itself is in model/
    trained = []
    monkeypatch.setattr(
        training, "train", lambda *args, **rest: trained.append(rest["folder"].path) or loop.train(*args, **rest)
    )
    later = distil(teacher, shapes, out, compare_baseline=True)
    assert trained == [out / "baseline"]
    assert later.student == report.student
    assert later.baseline.evaluation == distilled.baseline.evaluation
    assert distil(teacher, shapes, out) == later  # it stays
    shutil.move(out / "model", tmp_path / "shipped")
    assert distil(teacher, shapes, out) == later
    assert trained == [out / "baseline"]
    assert not (out / "model").exists()


@pytest.fixture
def copied(distilled, tmp_path):
    """A copy of the finished run, with changes of its report."""

    def copy_(**changes):
        out = shutil.copytree(distilled.folder, tmp_path / "copy")
        path = out / "report.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return out

    return copy_


def test_ctrl_c_in_a_comparison_that_was_asked_for_later(copied, teacher, shapes, monkeypatch, capsys):
    def interrupted(*_, folder, **__):
        (folder.path / "checkpoints").mkdir()
        (folder.path / "checkpoints" / "step-00000001.json").touch()
        raise KeyboardInterrupt

    out = copied(baseline=None)
    monkeypatch.setattr(training, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distil(teacher, shapes, out, compare_baseline=True)
    assert "interrupted: the same command goes on from the last checkpoint" in capsys.readouterr().err


def test_trained_weights_that_are_gone_are_told(copied, teacher, shapes):
    out = copied(model=None, finished=False)
    shutil.rmtree(out / "training")
    with pytest.raises(KDError, match=r"the trained weights in .* cannot be read .*put them back"):
        distil(teacher, shapes, out, compare_baseline=True)


def test_images_and_weights_that_changed_since_a_run_are_told(distilled, copied, teacher, shapes, tmp_path, capsys):
    data = shutil.copytree(shapes, tmp_path / "shapes")
    path = data / "annotations" / "val.json"
    truth = json.loads(path.read_text())
    path.write_text(json.dumps(truth | {"annotations": truth["annotations"][:-1]}))
    stored = json.loads((distilled.folder / "report.json").read_text())
    out = copied(given=stored["given"] | {"data": str(data)})
    (out / "run.yaml").write_text((out / "run.yaml").read_text().replace(str(shapes), str(data)))
    assert distil(teacher, data, out).ap == distilled.ap
    assert "the validation images changed since this run: the results are of" in " ".join(
        capsys.readouterr().out.split()
    )
    path.write_text(json.dumps(truth))
    distil(teacher, data, out)
    assert "changed" not in capsys.readouterr().out
    made_of = stored["made_of"] | {"the teacher's weights": "different", "the student's first weights": "different"}
    (out / "report.json").write_text(json.dumps(stored | {"baseline": None, "made_of": made_of, "given": {}}))
    with pytest.raises(
        KDError, match=r"first weights and the teacher's weights changed since the run in .* began: put"
    ):
        distil(teacher, data, out)
    (out / "report.json").write_text(json.dumps(stored | {"given": {}}))
    shutil.rmtree(data)
    assert distil(teacher, data, out).ap == distilled.ap
    assert "still those of this run cannot be checked: " in " ".join(capsys.readouterr().out.split())


def test_a_run_of_different_options_is_refused(distilled, teacher, shapes):
    for changes, part in (
        ({"lr": 1e-4}, "lr: None there, 0.0001 now"),
        ({"method": "PKD"}, "method: auto there, ['PKD'] now"),
        ({"steps": None, "epochs": 3}, "epochs: None there, 3.0 now"),
        ({"train": {"ema": 0.5}}, "train: "),
        ({"batch_size": None}, "batch_size: 4 there, left out now"),
    ):
        with pytest.raises(
            KDError, match=r"holds a run with different options .*choose a new folder \(--out "
        ) as error:
            distil(teacher, shapes, distilled.folder, **changes)
        assert part in str(error.value)
    with pytest.raises(KDError, match="is of `kd distill`, not of `kd train`"):
        kdtoolkit.train(TINY, shapes, out=distilled.folder)


def test_a_run_that_is_stopped_goes_on_and_ends_alike(distilled, teacher, shapes, tmp_path, monkeypatch, capsys):
    out = tmp_path / "stopped"
    seed_step = loop.seed_step

    def interrupted(seed, step, rank):
        if step == 3:
            raise KeyboardInterrupt
        seed_step(seed, step, rank)

    monkeypatch.setattr(training, "SAVE_SECONDS", 0)
    monkeypatch.setattr(loop, "seed_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distil(teacher, shapes, out)
    assert "interrupted: the same command goes on from the last checkpoint" in capsys.readouterr().err
    with pytest.raises(KDError, match="holds a run with different options"):
        distil(teacher, shapes, out, lr=1e-4)
    monkeypatch.setattr(loop, "seed_step", seed_step)
    report = distil(teacher, shapes, out)
    assert report.student.evaluation == distilled.student.evaluation
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (out, distilled.folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_run_file_does_the_same_again(distilled, tmp_path):
    options = check_options(
        DistillOptions, {"out": tmp_path / "again", "quiet": True}, file=distilled.folder / "run.yaml"
    )
    options = options.model_copy(update={"compare_baseline": False})
    assert runs.run(options).student.evaluation == distilled.student.evaluation


def test_a_teacher_of_other_classes_is_compared_in_those_that_are_shared(teacher, tmp_path, capsys):
    root = write_shapes(tmp_path / "data")
    for split in ("train", "val"):
        path = root / "annotations" / f"{split}.json"
        truth = json.loads(path.read_text())
        truth["categories"][0]["name"] = "wheel"
        truth["categories"][1]["name"] = "box"
        path.write_text(json.dumps(truth))
    report = kdtoolkit.distill(
        teacher,
        TINY,
        root,
        student_weights="none",
        out=tmp_path / "out",
        class_map={"wheel": "disc"},
        steps=2,
        batch_size=4,
        allow_weak_teacher=True,
    )
    assert "wheel (the teacher's disc)" in report.plan["classes"]
    assert "the teacher says nothing about box" in report.plan["classes"]
    assert set(report.teacher.per_class) == {"wheel", "triangle", "star", "ring", "gapped ring"}
    assert set(report.student.evaluation.per_class) == {"wheel", "box", "triangle", "star", "ring", "gapped ring"}
    assert "crosskd/cls" in (tmp_path / "out" / "training" / "log.jsonl").read_text()


def test_images_without_labels_are_shown_in_steps_of_their_own(teacher, shapes, tmp_path):
    more = tmp_path / "more"
    shutil.copytree(shapes / "images", more)
    report = distil(teacher, shapes, tmp_path / "out", unlabelled=more, steps=None, epochs=1, compare_baseline=True)
    assert report.student.steps == 6  # 12 images with labels and 12 of the 16 without, 4 a step
    rows = [json.loads(line) for line in (tmp_path / "out" / "training" / "log.jsonl").read_text().splitlines()]
    losses = [row for row in rows if "lr" in row]
    assert sum(not any(name.startswith("task/") for name in row) for row in losses) == 3
    assert "16 images" in report.plan["unlabelled"]
    alone = (tmp_path / "out" / "baseline" / "log.jsonl").read_text()
    assert alone.count("task/cls") == 6


def test_a_weak_teacher_is_told_before_training(teacher, shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "train", None)
    monkeypatch.setattr(measuring, "WEAK_AP", 101.0)
    with pytest.raises(
        KDError, match=r"the teacher has .* AP on the validation images of shapes.*--allow-weak-teacher"
    ):
        distil(teacher, shapes, tmp_path / "weak", allow_weak_teacher=False)


@pytest.mark.parametrize(
    ("teaching", "alone", "message"),
    [
        (
            0.5,
            40.0,
            r"has 0.5 AP .* shapes at the size that the student sees, and 40.0 AP alone.* than 64 px \(--image",
        ),
        (0.5, 1.5, r"has 0.5 AP .* shapes: a student cannot learn from it \(alone, .* 1.5 AP\). Usual reasons"),
        (0.5, 0.5, r"has 0.5 AP .* shapes: a student cannot learn from it. Usual reasons"),
        (None, None, r"the validation images of shapes have no object of a class that it knows"),
    ],
)
def test_the_teacher_is_judged_at_the_size_at_which_it_teaches(
    teacher, shapes, tmp_path, monkeypatch, teaching, alone, message
):
    def scored(model, dataset, *, like=None, **_):
        return Evaluation(alone if like is None else teaching, None, None, None, None, None, {}, 4, 0)

    monkeypatch.setattr(measuring, "evaluate", scored)
    with pytest.raises(KDError, match=f"{message}.*--allow-weak-teacher"):
        distil(teacher, shapes, tmp_path / "weak", allow_weak_teacher=False)


def test_a_student_may_begin_with_the_teachers_weights_and_trained_students_are_measured(
    teacher, shapes, tmp_path, capsys
):
    report = kdtoolkit.distill(
        teacher, teacher, shapes, out=tmp_path / "on", init="teacher", steps=2, method="PKD", allow_weak_teacher=True
    )
    assert report.before == report.teacher
    out = capsys.readouterr().out
    assert "inherits" in out
    assert "you chose it" in out
    assert max(map(len, out.split("holds")[0].splitlines()[3:-8])) <= 80 or "note" in out


def test_the_plan_fits_80_columns(shapes, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    kdtoolkit.train(TINY, shapes, out=tmp_path / "out", steps=1, weights="none")
    plan = capsys.readouterr().out.split("\n\n")[1]
    for name in ("data", "model", "image size", "schedule", "batch", "learning rate", "augmentation", "evaluation"):
        assert f" {name} " in plan
    assert max(map(len, plan.splitlines())) <= 80


def test_nothing_of_a_long_name_is_lost_in_80_columns():
    folder, classes = "runs/" + "birds-" * 20 + "[red]", "[bold]owl[/bold], " + "parrot" * 20
    console = Console(width=80, file=io.StringIO())
    runs.print_plan({"data": Choice(folder, classes), "teacher's images": Choice(folder, classes)}, console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) == 80
    values, reasons = lines[1].index("runs/"), lines[1].index("[bold]")
    for what, column in ((folder, slice(values, reasons)), (classes, slice(reasons, None))):
        assert "".join(line[column] for line in lines).replace(" ", "") == 2 * what.replace(" ", "")


@pytest.mark.slow
def test_two_processes_train_as_one(teacher, shapes, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "kdtoolkit", "distill", "--teacher", teacher, "--student", TINY, "--student-weights", "none"]
    command += [
        "--data",
        shapes,
        "--steps",
        "3",
        "--batch-size",
        "4",
        "--allow-weak-teacher",
        "--out",
        tmp_path / "out",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("on the validation images") == 1
    report = Report.read(tmp_path / "out")
    assert report.finished
    found = evaluate(open_detector(tmp_path / "out").model, open_dataset(shapes, "val"), batch_size=4)
    assert found == report.student.evaluation
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished. Its results:") == 1
    done = subprocess.run([*map(str, command), "--lr", "1"], capture_output=True, text=True)
    assert done.stderr.count("holds a run with different options") == 1


def test_a_file_of_backbone_weights_in_the_name_is_what_training_begins_with(shapes, tmp_path, capsys):
    backbone = timm.create_model("resnet10t", channels=(8, 8, 16, 16), stem_width=4)
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    report = kdtoolkit.train(f"{TINY}&pretrained={tmp_path}/backbone.pth", shapes, out=tmp_path / "run", steps=1)
    assert "backbone.pth" in report.plan["model"]
    assert "cannot be had here" not in capsys.readouterr().out
