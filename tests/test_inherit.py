"""Inheriting: what a student takes from its teacher, in each family of each library."""

import pytest
import torch

from kdtoolkit import KDError, adapt
from kdtoolkit.classes import ClassMap
from kdtoolkit.inherit import inherit
from kdtoolkit.matrix import families
from tests.conftest import tiny_fcos, tiny_gfl, tiny_of, tiny_retinanet

SHARED = ClassMap(student=(0, 2), teacher=(3, 1))  # of 3 and 5 classes


@pytest.mark.parametrize("family", families())
def test_a_student_takes_the_teachers_head_and_its_rows_of_shared_classes(family, batch):
    teacher, student = (adapt(tiny_of(family, seed=seed, num_classes=count)) for seed, count in ((1, 5), (2, 3)))
    teacher.model.eval()
    student.model.eval()
    images, targets = batch
    with torch.no_grad():
        before = {name: value.clone() for name, value in student.model.state_dict().items()}
        found = inherit(student, teacher, SHARED)
        after = student.model.state_dict()
        assert set(found.taken) | set(found.left) == set(after)
        assert all(torch.equal(before[name], after[name]) for name in found.left)
        # Equal features, batches and priors now lead to equal predictions of the shared classes.
        seen = teacher.prepare(images, targets)
        features = teacher.features(seen)
        priors = teacher.head(features, seen).predictions.priors
        theirs, ours = (adapter.head(features, seen, priors) for adapter in (teacher, student))
    for own, its in zip(SHARED.student, SHARED.teacher, strict=True):
        torch.testing.assert_close(ours.predictions.logits[..., own], theirs.predictions.logits[..., its])
    if theirs.predictions.activation == "softmax":
        torch.testing.assert_close(ours.predictions.logits[..., -1], theirs.predictions.logits[..., -1])


@pytest.mark.parametrize("family", families())
def test_adapters_name_all_layers_that_have_rows_for_classes(family):
    few, many = (tiny_of(family, seed=0, num_classes=count) for count in (3, 5))
    layers, states = adapt(few).class_layers, (few.state_dict(), many.state_dict())
    depend = {name.rpartition(".")[0] for name in states[0] if states[0][name].shape != states[1][name].shape}
    assert layers is not None
    assert depend == set(layers)


def test_the_backbone_is_taken_only_if_all_of_it_fits():
    teacher = tiny_gfl(seed=1)
    same, wider = tiny_gfl(seed=2), tiny_gfl(seed=2, backbone="resnet18")
    assert not inherit(same, teacher).left
    assert all(
        torch.equal(a, b) for a, b in zip(same.state_dict().values(), teacher.state_dict().values(), strict=True)
    )
    found = inherit(wider, teacher)
    assert found.left
    assert all(name.startswith("backbone.") for name in found.left)
    assert not any(name.startswith("backbone.") for name in found.taken)
    assert "weights in scales, neck, towers, predictors; of its other tensors" in found.describe()
    assert "belong to the backbone" in found.describe()


def test_parts_of_different_shape_stay_and_are_told():
    teacher, student = tiny_gfl(seed=1), tiny_gfl(seed=2, backbone="resnet18", head_channels=8)
    found = inherit(student, teacher)
    assert "neck.inner_blocks.0.0.weight" in found.taken
    assert found.left["predictors.cls.weight"] == "the teacher's have different shapes"
    assert "neck, predictors.cls (1 of 2 tensors)" in found.describe()


def test_rows_of_classes_that_are_not_shared_stay_for_each_anchor():
    teacher, student = tiny_retinanet(seed=1, num_classes=5), tiny_retinanet(seed=2)
    before = student.predictors["cls"].weight.detach().clone().view(9, 3, -1)
    inherit(student, teacher, SHARED)
    after, theirs = (
        model.predictors["cls"].weight.detach().view(9, k, -1) for model, k in ((student, 3), (teacher, 5))
    )
    assert torch.equal(after[:, 1], before[:, 1])
    assert torch.equal(after[:, [0, 2]], theirs[:, [3, 1]])


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        (lambda: tiny_gfl(seed=1, num_classes=5), "ClassMap.by_name"),
        (lambda: tiny_of("torchvision FCOS", seed=1), "nothing of torchvision FCOS fits GFL"),
    ],
)
def test_what_cannot_be_taken_is_an_error(teacher, says):
    with pytest.raises(KDError, match=says):
        inherit(tiny_gfl(seed=2), teacher())


@pytest.mark.parametrize("class_map", [ClassMap((0, 3), (0, 1)), ClassMap((0, 1), (0, 3))])
def test_a_class_that_a_detector_does_not_have_is_an_error_before_anything_is_taken(class_map):
    family = "torchvision Faster R-CNN"  # its rows have one more, of background
    student, teacher = (tiny_of(family, seed=seed, num_classes=3) for seed in (2, 1))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(KDError, match="the class map names the class"):
        inherit(student, teacher, class_map)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_an_adapter_that_does_not_name_its_class_layers_takes_all_or_is_refused():
    class Silent(type(adapt(tiny_fcos(seed=0)))):
        class_layers = None

    teacher, student = tiny_fcos(seed=1), tiny_fcos(seed=2)
    assert not inherit(Silent(student), teacher).left
    with pytest.raises(KDError, match="Silent does not say which weights belong to classes"):
        inherit(Silent(student), teacher, ClassMap((0, 1), (1, 0)))
