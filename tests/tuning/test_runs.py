"""Whole searches, with a detector whose step takes milliseconds."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

import kdtoolkit
from kdtoolkit.data import open_dataset
from kdtoolkit.engine import train as loop
from kdtoolkit.errors import KDError, NonFiniteLossError
from kdtoolkit.tuning import runs
from kdtoolkit.tuning.report import TuneReport
from kdtoolkit.workflow import training
from kdtoolkit.workflow.options import DistillOptions, check_options
from tests.workflow._data import TINY


def tune(teacher, shapes, out, **changes):
    words = {"batch_size": 4, "student_weights": "none", "allow_weak_teacher": True, "quiet": True, "method": "PKD"}
    return kdtoolkit.tune(teacher, TINY, shapes, out=out, **words | {"steps": 9, "trials": 1, "seeds": 0} | changes)


@pytest.fixture
def trainings(monkeypatch):
    """Every training that begins: its folder, the step it goes to, whether it has a checkpoint, and its images."""
    begun = []

    def spied(distiller, images, config, *, folder, until, validation, **rest):
        begun.append(
            {
                "folder": folder.path.parent.name,
                "until": until,
                "goes on": any((folder.path / "checkpoints").glob("*.json")),
                "seed": rest["seed"],
                "methods": [type(method).__name__ for method in distiller.methods],
                "train": set(images.files()),
                "val": set(validation.dataset.files()),
            }
        )
        return loop.train(distiller, images, config, folder=folder, until=until, validation=validation, **rest)

    monkeypatch.setattr(training, "train", spied)
    return begun


FULL = {"method": ["PKD", "CWD"], "trials": 4, "seeds": 2, "share": [0.5], "stop": [0.5]}


def full(teacher, shapes, out):
    return tune(teacher, shapes, out, **FULL, confirm_data=[shapes])


@pytest.mark.slow
def test_a_search_from_its_trials_to_its_confirmation(teacher, shapes, tmp_path, trainings):
    found = full(teacher, shapes, tmp_path / "whole")
    files = {split: set(open_dataset(shapes, split).files()) for split in ("train", "val", "test")}
    trials = [each for each in trainings if each["folder"].isdigit()]
    confirming = [each for each in trainings if not each["folder"].isdigit()]

    # The search sees training images alone, and those that it evaluates on are not trained on.
    assert all(each["train"] | each["val"] == files["train"] and not each["train"] & each["val"] for each in trials)
    assert {len(each["val"]) for each in trials} == {3}
    assert len({frozenset(each["val"]) for each in trials}) == 1
    # Four trials begin, one of them goes on from its checkpoint, twice.
    assert [(each["until"], each["goes on"]) for each in trials] == [(1, False)] * 4 + [(3, True), (9, True)]
    assert len({each["folder"] for each in trials[3:]}) <= 2
    # The confirmation has fresh seeds, all training images and the validation images.
    assert {each["seed"] for each in trials} == {0}
    assert sorted(each["seed"] for each in confirming) == [1, 1, 1, 2, 2, 2]
    assert all(each["train"] == files["train"] and each["val"] == files["val"] for each in confirming)
    assert [each["methods"] for each in confirming if each["folder"].startswith("without")] == [[], []]
    assert set(found.confirmation.ap) == {"shapes, val", "shapes, test"}
    assert found.confirmation.complete

    # A search that is stopped again and again ends as one that was not.
    def stopping(after):
        left = [after]

        def stopped(*args, **rest):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return loop.train(*args, **rest)

        return stopped

    for after in (2, 3, 2):
        training.train = stopping(after)
        with pytest.raises(KeyboardInterrupt):
            full(teacher, shapes, tmp_path / "stopped")
    training.train = loop.train
    again = full(teacher, shapes, tmp_path / "stopped")
    for one, two in zip(found.trials, again.trials, strict=True):
        assert (one.name, one.scores, one.state) == (two.name, two.scores, two.state)
    assert again.confirmation.ap == found.confirmation.ap


@pytest.fixture(scope="module")
def finished(teacher, shapes, tmp_path_factory):
    return tune(teacher, shapes, tmp_path_factory.mktemp("runs") / "tuned")


def test_a_search_leaves_its_trials_a_report_and_a_run_file_of_kd_distill(finished, teacher, shapes):
    folder = finished.folder
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {
        "run.yaml",
        "study.jsonl",
        "tune.json",
        "tune.md",
        "best.yaml",
        "trials",
    }
    assert not list(folder.rglob("*.safetensors"))
    assert TuneReport.read(folder) == finished
    stored = json.loads((folder / "tune.json").read_text())
    assert (stored["finished"], stored["winner"], stored["steps"], len(stored["trials"])) == (True, None, 9, 1)
    best = check_options(DistillOptions, {}, file=folder / "best.yaml")
    assert best.method == finished.best.methods
    assert (best.teacher, best.data, best.steps, best.batch_size) == (str(teacher), shapes, 9, 4)
    assert best.out is None
    assert not best.compare_baseline


def test_a_finished_search_is_shown_again(finished, teacher, shapes, monkeypatch, capsys):
    monkeypatch.setattr(training, "train", None)  # nothing is trained
    assert tune(teacher, shapes, finished.folder) == finished
    out = capsys.readouterr().out
    assert "finished" in out
    assert "PKD is the best of 1 trial. It is not confirmed" in " ".join(out.split())


def test_a_folder_of_a_different_search_is_refused(finished, teacher, shapes):
    with pytest.raises(KDError, match=r"holds a run with different options \(trials: 1 there, 2 now\)"):
        tune(teacher, shapes, finished.folder, trials=2)


def test_images_that_changed_meanwhile_are_told(finished, teacher, shapes, tmp_path):
    data = shutil.copytree(shapes, tmp_path / "shapes")
    out = shutil.copytree(finished.folder, tmp_path / "copy")
    report = json.loads((out / "tune.json").read_text())
    report["given"]["data"] = str(data)
    (out / "tune.json").write_text(json.dumps(report | {"finished": False}))
    options = yaml.safe_load((out / "run.yaml").read_text())
    (out / "run.yaml").write_text(yaml.safe_dump(options | {"data": str(data)}))
    path = data / "annotations" / "train.json"
    truth = json.loads(path.read_text())
    path.write_text(json.dumps(truth | {"annotations": truth["annotations"][1:]}))
    with pytest.raises(KDError, match=r"the training images changed since the search in .*copy began"):
        tune(teacher, data, out)


@pytest.mark.slow
def test_a_trial_that_cannot_be_trained_does_not_end_the_search(teacher, shapes, tmp_path, monkeypatch, capsys):
    def trained(distiller, *args, **rest):
        if any(type(method).__name__ == "PKD" for method in distiller.methods):
            raise NonFiniteLossError("step 1: pkd/feature = nan")
        return loop.train(distiller, *args, **rest)

    monkeypatch.setattr(training, "train", trained)
    found = tune(teacher, shapes, tmp_path / "tuned", method=["PKD", "CWD"], trials=3, steps=3, quiet=False)
    assert [(trial.name, trial.state) for trial in found.trials] == [
        ("PKD", "failed"),
        ("CWD", "finished"),
        ("PKD + CWD", "failed"),
    ]
    assert found.best.name == "CWD"
    out = capsys.readouterr().out
    assert "note: trials are compared first after 1 step, and the warm-up takes 1, so that says little" in out
    assert "trial 1 of 3, to step 1 of 3: PKD: not trained: step 1: pkd/feature = nan" in out
    assert "- PKD: step 1: pkd/feature = nan" in (found.folder / "tune.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"budget": "soon"}, "budget: 'soon' is no time: write it as 4h, 90m, 1h30m or 45s"),
        ({"budget": "1h"}, "budget decides how long to train: leave epochs and steps out"),
        ({"share": [1.5]}, "share 1.5: input should be less than 1"),
        ({"method": ["KDDETR"]}, "KDDETR cannot distil"),
        ({"holdout": 0.01}, "of which a share of 0.01 cannot be held out"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(teacher, shapes, tmp_path, monkeypatch, words, message):
    monkeypatch.setattr(training, "train", None)
    with pytest.raises(KDError) as caught:
        tune(teacher, shapes, tmp_path / "tuned", **words)
    assert message in str(caught.value)


def test_several_processes_are_refused(teacher, shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(runs.group, "started", lambda: 2)
    with pytest.raises(KDError, match="a search runs in one process: start it without torchrun"):
        tune(teacher, shapes, tmp_path / "tuned")


@pytest.mark.slow
def test_a_confirmation_goes_on_after_a_training_that_fails(teacher, shapes, tmp_path, monkeypatch, capsys):
    out = tmp_path / "tuned"
    seen = []

    def trained(distiller, *args, seed, **rest):
        if seed == 1 and distiller.methods:
            seen.append((out / "best.yaml").exists() and (out / "tune.md").exists())
            raise NonFiniteLossError("step 1: pkd/feature = nan")
        return loop.train(distiller, *args, seed=seed, **rest)

    monkeypatch.setattr(training, "train", trained)
    found = tune(teacher, shapes, out, steps=3, seeds=2, quiet=False)
    assert seen == [True]  # the search's results are there before the confirmation begins
    assert (found.finished, found.winner) == (True, None)
    assert found.confirmation.failed == {"best": {1: "step 1: pkd/feature = nan"}}
    assert set(found.confirmation.ap["shapes, val"]["best"]) == {2}
    assert set(found.confirmation.ap["shapes, val"]["without teacher"]) == {1, 2}
    printed = " ".join(capsys.readouterr().out.split())
    assert "confirmation, best, seed 1: not trained: step 1: pkd/feature = nan" in printed
    assert "PKD could not be trained with seed 1: step 1: pkd/feature = nan" in printed


def test_further_data_never_takes_the_place_of_the_validation_images(teacher, shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "train", None)
    no_test = shutil.copytree(shapes, tmp_path / "shapes")
    Path(no_test, "annotations", "test.json").unlink()
    link = tmp_path / "link"
    link.symlink_to(no_test)
    with pytest.raises(KDError, match=r"and a different data set are both called shapes, val"):
        tune(teacher, shapes, tmp_path / "tuned", confirm_data=[no_test])
    for data in (link, no_test / "annotations"):
        with pytest.raises(KDError, match=r"the val images of .* are evaluated on already: leave it out"):
            tune(teacher, no_test, tmp_path / "tuned", confirm_data=[data])
    with pytest.raises(KDError, match=r"the test images of .* are evaluated on already: leave it out"):
        tune(teacher, shapes, tmp_path / "tuned", confirm_data=[shapes, shapes])


def test_a_teacher_that_knows_the_held_out_images_is_told(teacher, shapes, tmp_path, monkeypatch, capsys):
    tune(teacher, shapes, tmp_path / "tuned", steps=1, quiet=False)
    assert "note: the teacher was trained on this data set" in " ".join(capsys.readouterr().out.split())
    data = shutil.copytree(shapes, tmp_path / "different")
    tune(teacher, data, tmp_path / "again", steps=1, quiet=False)
    assert "the teacher was trained on this data set" not in " ".join(capsys.readouterr().out.split())


def test_further_data_is_checked_before_the_search(teacher, shapes, tmp_path):
    only_train = shutil.copytree(shapes, tmp_path / "only")
    for split in ("val", "test"):
        Path(only_train, "annotations", f"{split}.json").unlink()
    with pytest.raises(KDError, match="neither a test nor a val split"):
        tune(teacher, shapes, tmp_path / "tuned", confirm_data=[only_train])
