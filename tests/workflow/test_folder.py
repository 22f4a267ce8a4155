"""Which run lies in a folder: a command is compared with what was given, in both directions."""

from contextlib import ExitStack

import pytest

from kdtoolkit.engine.evaluate import Evaluation
from kdtoolkit.errors import KDError
from kdtoolkit.workflow.folder import enter, given
from kdtoolkit.workflow.options import DistillOptions, check_options
from kdtoolkit.workflow.report import Report, Trained

NAMES = {"teacher": "t", "student": "s", "data": "d"}
CHOSEN = {"batch_size": 8, "student_weights": "none"}  # what a run file holds beside what was given


def options(tmp_path, **words):
    return check_options(DistillOptions, {**NAMES, "out": tmp_path / "run", **words})


def finished(tmp_path, **words):
    """The folder of a run that began with these words, and has chosen what they leave open."""
    told = options(tmp_path, **words)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.yaml").write_text(options(tmp_path, **CHOSEN | words).to_yaml())
    found = Evaluation(1.0, 1.0, 1.0, None, None, None, {}, 1, 1)
    trained = Trained(evaluation=found, best_step=1, steps=1, seconds=1.0)
    Report(command="distill", title="", folder=folder, plan={}, given=given(told), made_of={}, student=trained).write()


def entered(told):
    with ExitStack() as held:
        return enter(held, told)


@pytest.mark.parametrize(
    ("first", "now"),
    [
        ({}, {}),
        ({}, {"method": "auto", "seed": 0, "class_map": {}}),
        ({}, {"batch_size": 8, "student_weights": "none"}),
        ({"method": "auto"}, {}),
        ({"seed": 0}, {}),
        ({"method": "PKD?weight=6"}, {"method": {"PKD": {"weight": 6.0}}}),
        ({"train": {"ema": 0.5}}, {"train": {"ema": 0.5}}),
        ({"lr": 0.1}, {"lr": 0.1, "device": "cpu", "compare_baseline": True, "allow_weak_teacher": True}),
    ],
)
def test_the_same_run_goes_on(tmp_path, first, now):
    finished(tmp_path, **first)
    told, report, began = entered(options(tmp_path, **now))
    assert began
    assert report.student.steps == 1
    assert (told.batch_size, told.compare_baseline) == (8, now.get("compare_baseline", False))


@pytest.mark.parametrize("first", [{}, {"method": "PKD", "init": "teacher"}, {"steps": 4, "train": {"ema": 0.5}}])
def test_the_run_file_goes_on(tmp_path, first):
    finished(tmp_path, **first)
    told = check_options(DistillOptions, {"out": tmp_path / "run"}, file=tmp_path / "run" / "run.yaml")
    assert entered(told)[2]
    with pytest.raises(KDError, match=r"different options \(seed: 0 there, 1 now\)"):
        entered(told.model_copy(update={"seed": 1}))


@pytest.mark.parametrize(
    ("first", "now", "differences"),
    [
        ({"method": "PKD", "init": "teacher"}, {}, "method: ['PKD'] there, left out now, init: teacher there, left"),
        ({"method": "PKD"}, {"method": "auto"}, "method: ['PKD'] there, auto now"),
        ({"lr": 0.1}, {}, "lr: 0.1 there, left out now"),
        ({"unlabelled": "more"}, {}, "more there, left out now"),
        ({"class_map": {"a": "b"}}, {}, "class_map: {'a': 'b'} there, left out now"),
        ({"class_map": {"a": "b", "c": "d"}}, {"class_map": {"a": "b"}}, "class_map: "),
        ({"student_weights": "none"}, {}, "student_weights: none there, left out now"),
        ({"skip_bad": True}, {}, "skip_bad: True there, left out now"),
        ({"steps": 4}, {"epochs": 3}, "epochs: None there, 3.0 now, steps: 4 there, left out now"),
        ({"train": {"ema": 0.5, "workers": 2}}, {"train": {"ema": 0.5}}, "train: "),
        ({"train": {"augmentation": {"flip": 0}}}, {"train": {"augmentation": {"zoom": [1, 2]}}}, "train: "),
        ({"batch_size": 8}, {}, "batch_size: 8 there, left out now"),
        ({}, {"batch_size": 4}, "batch_size: 8 there, 4 now"),
        ({}, {"init": "teacher"}, "init: None there, teacher now"),
        ({}, {"teacher_cache": "disk"}, "teacher_cache: auto there, disk now"),
        ({}, {"lr": 0.1}, "lr: None there, 0.1 now"),
    ],
)
def test_a_different_run_is_refused(tmp_path, first, now, differences):
    finished(tmp_path, **first)
    with pytest.raises(KDError, match="holds a run with different options") as error:
        entered(options(tmp_path, **now))
    assert differences in str(error.value)
    assert "run.yaml` goes on with its own options" in str(error.value)
