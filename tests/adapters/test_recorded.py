"""A teacher that is a file of detections."""

import pytest
import torch

from kdtoolkit import Distiller, IncompatibleError, KDError
from kdtoolkit.classes import ClassMap
from kdtoolkit.contract import Capability, Method, PriorKind
from kdtoolkit.libraries import adapt
from kdtoolkit.methods import KDDETR, PKD, CrossKD, Mimic, ObjectKD
from kdtoolkit.models import open_detector
from tests.conftest import tiny_fcos, tiny_gfl, tiny_of
from tests.data._results import entry, write

NAMES = {1: "red", 2: "green", 3: "blue"}


class Told(Method):
    """Takes what the teacher predicts as it is, and pulls all scores of the student to the largest score of it."""

    needs = frozenset({Capability.PREDICTIONS})
    terms = ("score",)
    paper = "none"

    def forward(self, exchange):
        self.seen = exchange
        target = exchange.teacher.head.predictions.scores.amax()
        return {"score": (exchange.student.head.predictions.probabilities - target).square().mean()}


@pytest.fixture
def file(tmp_path):
    return open_detector(write(tmp_path / "d.json", [entry("a.png", 2), entry("b.png", 3)]), categories=NAMES).model


def found_on(*images):
    """What a file has on each image: a list of boxes with the probabilities of all classes."""
    return [
        {
            "boxes": torch.tensor([box for box, _ in each], dtype=torch.float32).reshape(-1, 4),
            "probabilities": torch.tensor([scores for _, scores in each], dtype=torch.float32).reshape(-1, 3),
        }
        for each in images
    ]


FOUND = found_on(
    [([4, 8, 20, 24], [0.0, 0.75, 0.125]), ([0, 0, 10, 10], [0.25, 0.0, 1.0])], [([6, 5, 30, 25], [0.5, 0, 0])]
)


def with_found(targets, found=FOUND):
    return [{**target, "recorded": each} for target, each in zip(targets, found, strict=True)]


def without_labels(found=FOUND):
    return [{"recorded": each} for each in found]


def test_it_shows_predictions_alone(file):
    spec = adapt(file).spec
    assert spec.capabilities == {Capability.PREDICTIONS}
    assert (spec.name, spec.num_classes, spec.priors) == ("d.json", 3, PriorKind.DETECTIONS)


def test_predictions_are_the_boxes_and_scores_of_the_file_and_gaps_are_empty(file, batch):
    method = Told()
    Distiller(file, tiny_gfl(seed=2), [method])(batch[0], with_found(batch[1]))
    predictions = method.seen.teacher.head.predictions
    for i, each in enumerate(FOUND):
        count = len(each["boxes"])
        assert torch.equal(predictions.boxes[i, :count], each["boxes"])
        torch.testing.assert_close(predictions.probabilities[i, :count], each["probabilities"], atol=1e-6, rtol=1e-6)
    assert torch.equal(predictions.boxes[1, 1], torch.zeros(4))
    assert predictions.probabilities[1, 1].max() < 1e-6
    found = method.seen.teacher.adapter.detections(method.seen.teacher.head, method.seen.teacher.batch)
    assert found[0]["labels"].tolist() == [2, 1]
    assert found[0]["boxes"].tolist() == [[0, 0, 10, 10], [4, 8, 20, 24]]
    torch.testing.assert_close(found[0]["scores"], torch.tensor([1.0, 0.75]))
    assert [len(each["scores"]) for each in found] == [2, 1]


def test_a_batch_in_which_nothing_was_found_has_empty_predictions(file, batch):
    method = Told()
    losses = Distiller(file, tiny_gfl(seed=2), [method])(batch[0], with_found(batch[1], found_on([], [])))
    assert losses["told/score"].isfinite()
    assert method.seen.teacher.head.predictions.boxes.shape == (2, 1, 4)


def test_boxes_are_on_the_canvas_that_the_student_makes(file, batch):
    student = tiny_of("torchvision FCOS", seed=2)
    student.transform.min_size, student.transform.max_size = (128,), 512
    method = Told()
    Distiller(file, student, [method])(batch[0], with_found(batch[1]))
    view = method.seen.teacher
    for i, each in enumerate(FOUND):
        (height, width), (old_height, old_width) = view.batch.sizes[i], batch[0][i].shape[-2:]
        factors = torch.tensor([width / old_width, height / old_height] * 2)
        torch.testing.assert_close(view.head.predictions.boxes[i, : len(each["boxes"])], each["boxes"] * factors)
    back = view.adapter.detections(view.head, view.batch)[1]["boxes"]
    torch.testing.assert_close(back, FOUND[1]["boxes"])


def test_classes_are_mapped_as_those_of_any_teacher(file, batch):
    method = Told()
    student = tiny_gfl(seed=2, num_classes=4)
    Distiller(file, student, [method], class_map=ClassMap(student=(3, 0), teacher=(1, 2)))(
        batch[0], with_found(batch[1])
    )
    seen = method.seen.teacher.head.predictions.probabilities
    torch.testing.assert_close(seen[0], torch.tensor([[0.75, 0.125], [0.0, 1.0]]), atol=1e-6, rtol=1e-6)


def test_without_labels_its_detections_stand_for_objects(file, batch):
    method = Told()
    distiller = Distiller(file, tiny_fcos(seed=2), [method], score=0.6)
    losses = distiller(batch[0], without_labels())
    assert set(losses) == {"told/score"}
    objects = method.seen.student.batch
    assert [labels.tolist() for labels in objects.labels] == [[2, 1], []]
    assert objects.boxes[0].tolist() == [[0, 0, 10, 10], [4, 8, 20, 24]]
    losses.total.backward()


def test_the_students_own_losses_are_those_without_a_teacher(file, batch):
    alone = Distiller(None, tiny_gfl(seed=2)).train()(*batch)
    taught = Distiller(file, tiny_gfl(seed=2), [Told()]).train()(batch[0], with_found(batch[1]))
    for name, loss in alone.items():
        assert torch.equal(loss, taught[name])


def test_a_network_takes_no_notice_of_recorded_detections(batch):
    teacher, student = tiny_gfl(seed=1), tiny_gfl(seed=2)
    distiller = Distiller(teacher, student, [PKD()])
    assert torch.equal(distiller(*batch).total, distiller(batch[0], with_found(batch[1])).total)


def test_batches_without_detections_are_told(file, batch):
    distiller = Distiller(file, tiny_gfl(seed=2), [Told()])
    for targets in (batch[1], None):
        with pytest.raises(KDError, match=r"d.json is a file of detections.* attach\(dataset, file\)"):
            distiller(batch[0], targets)


def test_detections_of_a_wrong_shape_are_told(file, batch):
    distiller = Distiller(file, tiny_gfl(seed=2), [Told()])
    wrong = [{"boxes": torch.zeros(1, 4), "probabilities": torch.zeros(1, 2)}, FOUND[1]]
    with pytest.raises(KDError, match=r"target 0: .*\(D, 3\), one for each class of d.json, but they are \(1, 4\) and"):
        distiller(batch[0], with_found(batch[1], wrong))
    with pytest.raises(KDError, match="there are 2 images, and recorded detections of 1"):
        distiller(batch[0], without_labels(FOUND[:1]))


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        ([1, 2], "must be a dict with the tensors 'boxes' and 'probabilities'"),
        ({"boxes": torch.zeros(1, 4)}, "must be a dict with the tensors"),
        ({"boxes": [[0, 0, 1, 1]], "probabilities": torch.zeros(1, 3)}, "must be a dict with the tensors"),
        ({"boxes": torch.tensor([[0, torch.nan, 1, 1]]), "probabilities": torch.zeros(1, 3)}, r"box 0 is \[0.0, nan,"),
        ({"boxes": torch.tensor([[5.0, 0, 1, 1]]), "probabilities": torch.zeros(1, 3)}, r"box 0 is \[5.0, 0.0, 1.0"),
        ({"boxes": torch.zeros(1, 4), "probabilities": torch.tensor([[0, 50.0, 0]])}, "of box 0 have 50.0; they must"),
        ({"boxes": torch.zeros(1, 4), "probabilities": torch.full((1, 3), torch.nan)}, "of box 0 have nan"),
    ],
)
def test_detections_that_are_none_are_told(file, batch, wrong, part):
    distiller = Distiller(file, tiny_gfl(seed=2), [Told()])
    with pytest.raises(KDError, match=f"target 1: recorded .*{part}"):
        distiller(batch[0], with_found(batch[1], [FOUND[0], wrong]))


def test_a_target_without_detections_is_named(file, batch):
    with pytest.raises(KDError, match="target 1 has no 'recorded', and further targets of the batch do"):
        Distiller(file, tiny_gfl(seed=2), [Told()])(batch[0], [*with_found(batch[1])[:1], batch[1][1]])


@pytest.mark.parametrize("method", [PKD, CrossKD, Mimic])
def test_methods_that_compare_networks_are_refused_and_what_works_is_said(file, method):
    with pytest.raises(IncompatibleError, match=r"which the teacher \(d.json\) does not show. Use ObjectKD.*pseudo"):
        Distiller(file, tiny_gfl(seed=2), [method()])


def test_only_advice_that_helps_is_given_where_classes_differ(file):
    student = tiny_gfl(seed=2, num_classes=5)
    with pytest.raises(IncompatibleError, match=r"has 5 classes, the teacher 3. Say which .* NAMES\)\)\. Methods that"):
        Distiller(file, student, [ObjectKD()])
    with pytest.raises(IncompatibleError, match="quer") as error:  # no class map would help it
        Distiller(file, student, [KDDETR()])
    assert "class_map" not in str(error.value)


def test_it_sees_no_images_so_their_size_cannot_be_chosen(file):
    with pytest.raises(KDError, match=r"d.json is a file of detections and sees no images: leave teacher_scale out"):
        Distiller(file, tiny_gfl(seed=2), [Told()], teacher_scale=0.5)


@pytest.mark.parametrize("weights", [{}, {"distribution_weight": 0}])  # a file has no distributions
def test_images_without_labels_from_which_nothing_can_be_learnt_are_told(file, batch, weights):
    distiller = Distiller(file, tiny_gfl(seed=2), [ObjectKD(cls_weight=0, box_weight=0, **weights)])
    with pytest.raises(KDError, match=r"images without labels: the terms of ObjectKD have the weight 0, or do not"):
        distiller(batch[0], without_labels())
    assert all(name.startswith("task/") for name in distiller(batch[0], with_found(batch[1])))


def test_it_cannot_be_a_student(file):
    with pytest.raises(
        KDError, match=r"d.json can only teach, because it shows nothing but predictions: name a detector"
    ):
        Distiller(None, file)


def test_its_state_is_the_digest_of_the_file(tmp_path, file):
    same, other = (
        open_detector(write(tmp_path / "e.json", [entry("a.png", 2), entry("b.png", label)]), categories=NAMES).model
        for label in (3, 1)
    )
    states = [model.state_dict()["digest"].tolist() for model in (file, same, other)]
    assert states[0] == states[1] != states[2]


def test_it_is_opened_as_it_is(tmp_path, file):
    opened = open_detector(file.path, categories=NAMES)
    assert (opened.class_names, opened.trained) == (("red", "green", "blue"), True)
    assert opened.weights == "2 detections on 2 images"
    with pytest.raises(KDError, match=r"detections of 3 classes \(red, green, blue\), not of 4: leave the number out"):
        open_detector(file.path, categories=NAMES, num_classes=4)
    with pytest.raises(KDError, match="which can only teach, as it is: name a detector to train"):
        open_detector(file.path, class_names=["red", "green", "blue"])
    with pytest.raises(
        KDError, match=r"d.json is a file of detections .*, which holds no weights: name it in the place"
    ):
        open_detector("kdtoolkit/GFL", num_classes=3, weights=file.path)
    with pytest.raises(KDError, match="which has no weights and no arguments: leave them out"):
        open_detector(file.path, categories=NAMES, weights="pretrained")
