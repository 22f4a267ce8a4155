"""A step whose images have no labels: the student learns from the teacher alone."""

import pytest
import torch

from kdtoolkit import Distiller, KDError
from kdtoolkit.classes import ClassMap
from kdtoolkit.methods import FGD, PKD, CrossKD, FitNet, Mimic
from tests.conftest import tiny_fcos, tiny_gfl, tiny_of

LOW = 0.01  # about what random detectors give


def sure(**changes):
    """A teacher that has detections."""
    return tiny_gfl(seed=1, score_threshold=0.005, **changes)


def seen_by(distiller, images, targets=None):
    """The exchange that the first method gets."""
    seen = []
    distiller.methods[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    losses = distiller(images, targets)
    return seen[0], losses


def test_there_are_no_losses_of_the_students_own_and_the_student_learns(batch):
    distiller = Distiller(sure(), tiny_gfl(seed=2), [CrossKD(), PKD()], score=LOW).train()
    losses = distiller(batch[0], None)
    assert set(losses) == {"crosskd/cls", "crosskd/box", "pkd/feature"}
    losses.total.backward()
    assert distiller.student.towers["cls"][0][0].weight.grad.any()
    assert distiller.step == 1


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_teachers_detections_stand_for_objects_in_both_canvases(batch, scale):
    teacher, student = sure(), tiny_fcos(seed=2)
    distiller = Distiller(teacher, student, [FGD()], score=LOW, teacher_scale=scale)
    exchange, _ = seen_by(distiller, batch[0])
    view = exchange.teacher
    found = view.adapter.detections(view.head, view.batch)
    for i, image in enumerate(found):
        keep = image["scores"] >= LOW
        assert keep.any()
        kept = image["boxes"][keep]
        whole = ((kept[:, 2:] - kept[:, :2]) >= 1).all(1)
        torch.testing.assert_close(exchange.student.batch.boxes[i], kept[whole], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(view.batch.boxes[i], kept[whole] * scale, atol=1.0, rtol=0)
        assert torch.equal(exchange.student.batch.labels[i], image["labels"][keep][whole])


def test_boxes_reach_a_student_that_resizes_its_images(batch):
    teacher, student = sure(), tiny_of("torchvision FCOS", seed=2)
    student.transform.min_size, student.transform.max_size = (128,), 512
    exchange, _ = seen_by(Distiller(teacher, student, [FGD()], score=LOW), batch[0])
    view = exchange.student
    (height, width), original = view.batch.sizes[1], view.batch.original_sizes[1]
    assert (height, width) != original == (50, 60)
    found = exchange.teacher.adapter.detections(exchange.teacher.head, exchange.teacher.batch)[1]
    first = found["boxes"][found["scores"] >= LOW][0]
    torch.testing.assert_close(view.batch.boxes[1][0], first * torch.tensor([width / 60, height / 50] * 2))


def test_methods_see_detections_of_shared_classes_and_the_student_its_own_labels(batch):
    teacher, student = sure(num_classes=5), tiny_gfl(seed=2)
    class_map = ClassMap(student=(0, 2), teacher=(3, 1))
    exchange, _ = seen_by(Distiller(teacher, student, [CrossKD()], class_map=class_map, score=LOW), batch[0])
    shown, own = exchange.student.batch, exchange.student.batch.whole
    assert {*torch.cat(shown.labels).tolist()} == {0, 1}
    assert [(2 * labels).tolist() for labels in shown.labels] == [labels.tolist() for labels in own.labels]
    assert {*torch.cat(exchange.teacher.batch.whole.labels).tolist()} == {3, 1}


def test_the_teachers_head_rests_if_no_method_needs_objects(batch):
    teacher, calls = tiny_gfl(seed=1), []
    teacher.predictors["cls"].register_forward_hook(lambda *_: calls.append(1))
    Distiller(teacher, tiny_gfl(seed=2), [PKD(), FitNet()])(batch[0], None)
    assert not calls
    Distiller(teacher, tiny_gfl(seed=2), [Mimic(), FitNet(region="boxes")])(batch[0], None)
    assert len(calls) == 3  # once a level


def test_without_a_method_at_work_there_is_nothing_to_learn(batch):
    with pytest.raises(KDError, match="without a method nothing can be learnt"):
        Distiller(None, tiny_gfl(seed=2))(batch[0], None)
    late = Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [PKD().scheduled(start=5)])
    with pytest.raises(KDError, match=r"step 1 have no labels, and no method .* is at work in it"):
        late(batch[0], None)


@pytest.mark.parametrize("score", [0, 1.5])
def test_a_score_that_is_none_is_an_error(score):
    with pytest.raises(KDError, match=f"score is {score}"):
        Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [PKD()], score=score)


def test_images_are_checked_as_with_labels(batch):
    with pytest.raises(KDError, match="image 0 has values from"):
        Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [PKD()])([image * 255 for image in batch[0]], None)
