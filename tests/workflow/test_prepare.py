"""What a run is made of, before its first step."""

import pytest
import torch

from kdtoolkit import processes
from kdtoolkit.errors import KDError
from kdtoolkit.workflow.options import DistillOptions, check_options
from kdtoolkit.workflow.prepare import prepare
from tests.workflow._data import TINY

CPU = torch.device("cpu")


def prepared(kind, file=None, **words):
    return prepare(check_options(kind, words, file=file), CPU, lambda _: lambda done, total: None)


@pytest.fixture(scope="module")
def pair(teacher, shapes):
    return {"teacher": str(teacher), "student": TINY, "student_weights": "none", "data": shapes}


def args_of(found):
    return {use.name: use.args for use in found.methods}


def test_a_run_file_does_the_same_again_and_what_is_changed_in_it_changes_what_depends_on_it(pair, tmp_path):
    first = prepared(DistillOptions, **pair | {"student": "ultralytics/yolo11n", "batch_size": 8, "epochs": 3})
    path = tmp_path / "run.yaml"
    path.write_text(first.run_file.to_yaml())
    again = prepared(DistillOptions, path)
    assert (again.options, again.config, again.plan) == (first.options, first.config, first.plan)
    smaller = prepared(DistillOptions, path, batch_size=2)
    assert args_of(first)["CrossKD"]["cls_weight"] == 8
    assert args_of(smaller)["CrossKD"]["cls_weight"] == 2
    assert smaller.config.lr == pytest.approx(first.config.lr / 2)
    longer = prepared(DistillOptions, path, steps=1000)
    assert longer.config.warmup_steps == 50
    assert longer.config.augmentation != first.config.augmentation


@pytest.mark.parametrize(
    ("train", "steps"), [({}, 120), ({"unlabelled_share": 0.25}, 80), ({"unlabelled_share": 0.75}, 240)]
)
def test_images_without_labels_leave_the_epochs_of_the_others_as_they_are(pair, shapes, train, steps):
    found = prepared(
        DistillOptions, **pair, unlabelled=shapes / "images", epochs=20, batch_size=4, train=train, method="PKD"
    )
    share = train.get("unlabelled_share", 0.5)
    assert found.config.steps == steps  # 12 images with labels: 60 steps
    assert found.plan["schedule"].value == f"20 epochs, {steps} steps, {100 * share:.3g} % of them without labels"
    assert found.config.augmentation.colour == 0  # as in 20 epochs, not in 40
    given = prepared(DistillOptions, **pair, unlabelled=shapes / "images", steps=steps, batch_size=4, train=train)
    assert given.plan["schedule"].value.startswith("20 epochs")


def test_a_batch_that_the_processes_cannot_share_is_told_at_once(pair, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 3)
    with pytest.raises(KDError, match=r"batch_size \(4\) must be a multiple of 6: the number of processes \(3\) times"):
        prepared(DistillOptions, **pair, batch_size=4, train={"accumulation": 2})
