"""What a run is made of, before its first step."""

import pytest
import timm
import torch

from kdtoolkit import processes
from kdtoolkit.engine import group
from kdtoolkit.errors import KDError
from kdtoolkit.methods import PKD
from kdtoolkit.models import open_detector
from kdtoolkit.workflow import prepare as prepare_module
from kdtoolkit.workflow.options import DistillOptions, TrainOptions, check_options
from kdtoolkit.workflow.prepare import prepare
from tests.data import _layouts
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


def test_the_image_size_of_a_detector_of_torchvision_does_not_depend_on_where_its_weights_lie(shapes, tmp_path):
    file = tmp_path / "ssd" / "weights.pth"
    file.parent.mkdir()
    torch.save(timm.create_model("resnet10t").state_dict(), file)
    name = f"torchvision/fcos?backbone=resnet10t&out_channels=32&pretrained={file}"
    found = prepared(TrainOptions, model=name, data=shapes, image_size=96)
    assert found.student.model.transform.max_size == 96
    assert "the detector's own preprocessing enlarges small images: one of 64 x 64 px to 96 x 96 px" in found.notes
    kept = prepared(TrainOptions, model=name, data=shapes, image_size=64)
    assert not any("enlarges" in note for note in kept.notes)


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
    monkeypatch.setattr(group, "from_first", lambda make: make())
    with pytest.raises(KDError, match=r"batch_size \(4\) must be a multiple of 6: the number of processes \(3\) times"):
        prepared(DistillOptions, **pair, batch_size=4, train={"accumulation": 2})


def test_a_method_that_begins_after_the_end_is_told_before_the_teacher_is_measured(pair):
    with pytest.raises(KDError, match=r"PKD: start \(9000\) and warmup \(0\) leave no step of the run \(100 steps\)"):
        prepared(DistillOptions, **pair, steps=100, batch_size=4, method="PKD?start=9000")


def test_images_without_labels_that_teach_nothing_are_told_before_the_teacher_is_measured(pair, shapes, monkeypatch):
    words = pair | {"unlabelled": shapes / "images", "steps": 100, "batch_size": 4}
    with pytest.raises(KDError, match="none of the 100 steps would have images without labels"):
        prepared(DistillOptions, **words, method="PKD", train={"unlabelled_share": 0.001})
    monkeypatch.setattr(PKD, "unlabelled", "skips")
    with pytest.raises(KDError, match="there are images without labels"):
        prepared(DistillOptions, **words, method="PKD")


@pytest.mark.parametrize("found", [True, False])
def test_the_first_process_decides_for_all_whether_there_are_published_weights(shapes, monkeypatch, found):
    def decided(make):
        if not found:
            raise KDError("there is no network")
        return True

    asked = []

    def opened(name, *, args, weights, **rest):
        asked.append((args, weights))
        return open_detector(name, args={}, weights=None, **rest)

    monkeypatch.setattr(group, "from_first", decided)
    monkeypatch.setattr(prepare_module, "open_detector", opened)
    first = prepared(TrainOptions, model=TINY, data=shapes, steps=1)
    assert asked == [({"pretrained": True}, None) if found else ({}, "none")]
    assert first.run_file.weights == ("pretrained" if found else "none")
    assert first.notes == (
        ()
        if found
        else ("the model begins with random weights: published ones cannot be had here (there is no network)",)
    )


def test_a_detector_that_cannot_be_trained_by_single_images_is_told(shapes):
    words = {"model": "torchvision/ssdlite320_mobilenet_v3_large", "weights": "none", "data": shapes, "steps": 1}
    with pytest.raises(KDError, match=r"batch norm sees a single number per channel, .* Use a larger batch_size"):
        prepared(TrainOptions, **words, batch_size=1)


def test_the_plan_says_in_words_what_is_inherited_and_where_weights_come_from(pair, shapes, tmp_path):
    backbone = timm.create_model("resnet10t", channels=(8, 8, 16, 16), stem_width=4)
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    student = f"{TINY}&pretrained={tmp_path}/backbone.pth"
    words = {"teacher": pair["teacher"], "student": student, "data": shapes, "init": "teacher", "steps": 2}
    plan = prepared(DistillOptions, **words, unlabelled=shapes / "images").plan
    assert plan["student"].why == f"weights: {tmp_path}/backbone.pth in the backbone, the rest random"
    assert plan["inherits"].value.startswith("the student starts from the teacher's weights in ")
    assert plan["unlabelled"].why == "only the methods' losses, no labels"
    assert plan["evaluation"].value == "once, at the end, on 4 images"


def test_the_plan_says_that_images_are_held_out(tmp_path):
    _layouts.label_studio_yolo(tmp_path / "birds")
    plan = prepared(TrainOptions, model=TINY, weights="none", data=tmp_path / "birds", steps=2).plan
    assert plan["data"].value.startswith(
        "birds: 8 images to train on, 2 to evaluate on (a fifth of the images, held out"
    )
