"""Training by a teacher that is a file of detections."""

import pytest

from kdtoolkit import Distiller, KDError
from kdtoolkit.data import Augmentation, InputSize, ProceduralShapes
from kdtoolkit.engine.evaluate import evaluate, why_not_measured
from kdtoolkit.engine.train import RunFolder, TrainConfig, train
from kdtoolkit.methods import ObjectKD
from kdtoolkit.models import open_detector
from tests.conftest import tiny_fcos, tiny_gfl
from tests.data._results import entry, write

CHANGES = Augmentation(flip=0.5, zoom=(0.6, 1.6), mosaic=0.5, mixup=0.5)


@pytest.fixture(scope="module")
def data():
    return ProceduralShapes(8, image_size=64, seed=0)


def opened(path, data, objects=lambda annotations: annotations, score=0.75):
    """The teacher that finds the data's own objects, and its file."""
    truth = data.coco()
    names = {each["id"]: each["name"] for each in truth["categories"]}
    found = [entry(a["image_id"], a["category_id"], a["bbox"], score) for a in objects(truth["annotations"])]
    return open_detector(write(path, found), categories=names).model


def config(**changes):
    return TrainConfig(**{"steps": 4, "batch_size": 4, "warmup_steps": 0, "augmentation": CHANGES, **changes})


@pytest.mark.parametrize("input_size", [None, InputSize(short=(64, 96), long=160)])
def test_what_was_found_stays_on_the_objects_through_all_changes_of_the_image(tmp_path, data, input_size):
    teacher = opened(tmp_path / "d.json", data)
    distiller = Distiller(teacher, tiny_gfl(seed=2, num_classes=6), [ObjectKD()])
    result = train(distiller, data, config(input_size=input_size), seed=0)
    assert sum(row["objectkd/covered"] + row["objectkd/unassigned"] for row in result.history) > 10
    assert [row["objectkd/missed"] for row in result.history] == [0.0] * 4
    assert all(row["objectkd/cls"] > 0 for row in result.history)


def test_images_without_labels_bring_their_detections(tmp_path, data):
    teacher = opened(tmp_path / "d.json", data)
    distiller = Distiller(teacher, tiny_fcos(seed=2, num_classes=6), [ObjectKD()])
    result = train(distiller, data, config(unlabelled_share=0.5), seed=0, unlabelled=data)
    without = [row for row in result.history if not any(name.startswith("task/") for name in row)]
    assert len(without) == 2
    for row in without:
        assert row["objectkd/covered"] + row["objectkd/unassigned"] > 0
        assert row["objectkd/missed"] == 0


def test_a_stopped_run_goes_on_only_with_the_same_detections(tmp_path, data):
    folder = RunFolder(tmp_path / "run", save_seconds=0)

    def again(score):
        teacher = opened(tmp_path / "d.json", data, score=score)
        distiller = Distiller(teacher, tiny_gfl(seed=2, num_classes=6), [ObjectKD()])
        return train(distiller, data, config(steps=2), seed=0, folder=folder)

    again(0.75)
    again(0.75)
    with pytest.raises(KDError, match=r"different settings \(teacher, data\)"):
        again(0.5)


def test_it_is_scored_and_told_if_it_has_seen_different_images(tmp_path, data):
    assert evaluate(opened(tmp_path / "d.json", data), data).ap == pytest.approx(100)
    teacher = opened(tmp_path / "d.json", data, objects=lambda all_: [a | {"image_id": 99} for a in all_])
    assert "d.json has no detection on 8 of the 8 images of" in why_not_measured(teacher, data)
    with pytest.raises(KDError, match="has no detection on 8 of the 8 images"):
        train(Distiller(teacher, tiny_gfl(seed=2, num_classes=6), [ObjectKD()]), data, config(), seed=0)


def test_it_is_not_measured_on_images_most_of_which_it_lacks(tmp_path, data):
    few = opened(tmp_path / "few.json", data, objects=lambda all_: [a for a in all_ if a["image_id"] in (1, 2, 3)])
    assert "few.json has no detection on 5 of the 8 images of" in why_not_measured(few, data)
    most = opened(tmp_path / "most.json", data, objects=lambda all_: [a for a in all_ if a["image_id"] > 3])
    assert why_not_measured(most, data) is None
