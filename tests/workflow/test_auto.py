from dataclasses import replace

import pytest

from kdtoolkit.errors import IncompatibleError, KDError
from kdtoolkit.libraries import adapt, library_of_model
from kdtoolkit.method_use import MethodUse
from kdtoolkit.workflow.auto import choose, scaled
from tests.conftest import tiny_of


def chosen(student, teacher):
    model = tiny_of(student, seed=0)
    found = choose(adapt(model).spec, adapt(tiny_of(teacher, seed=1)).spec, library_of_model(model).prefix)
    assert found.why
    return [str(use) for use in found.methods]


@pytest.mark.parametrize(
    ("student", "teacher", "methods"),
    [
        ("GFL", "GFL", ["CrossKD", "PKD"]),
        ("FCOS", "GFL", ["CrossKD.for_fcos", "PKD.for_fcos"]),
        ("YOLO11", "YOLO11", ["CrossKD"]),
        ("torchvision Faster R-CNN", "torchvision Faster R-CNN", ["CrossKD"]),
        ("Deformable DETR", "Deformable DETR", ["KDDETR"]),
        ("GFL", "Deformable DETR", ["PKD"]),
        ("torchvision Faster R-CNN", "GFL", ["PKD"]),
    ],
)
def test_the_pair_decides(student, teacher, methods):
    assert chosen(student, teacher) == methods


def test_a_pair_without_methods_is_refused_with_reasons():
    spec = adapt(tiny_of("GFL", seed=0)).spec
    coarse, odd = (64, 128, 256, 512, 1024), (7, 14, 28, 56, 112)
    with pytest.raises(IncompatibleError, match=r"no method can distil GFL into GFL \(PKD: .*Cosine: "):
        choose(replace(spec, strides=coarse), replace(spec, strides=odd), "kdtoolkit")
    assert [str(use) for use in choose(spec, replace(spec, strides=odd), "kdtoolkit").methods] == ["Cosine"]


def test_all_weights_are_scaled():
    assert str(scaled(MethodUse.model_validate("PKD"), 8)) == "PKD?weight=48"
    crosskd = scaled(MethodUse.model_validate("CrossKD"), 8).args
    assert crosskd == {"cls_weight": 8, "distribution_weight": 32, "box_weight": 8, "quality_weight": 8}
    assert scaled(MethodUse.model_validate("CrossKD?quality_weight=0"), 2).args == {
        "cls_weight": 2,
        "distribution_weight": 8,
        "box_weight": 2,
        "quality_weight": 0,
    }
    assert scaled(MethodUse.model_validate("LD?cls_weight=1"), 8).args == {"weight": 2, "cls_weight": 8}


def test_published_settings_are_not_left_unscaled():
    with pytest.raises(KDError, match=r"the weights of CrossKD.for_fcos are fixed, .* x 8: name the method"):
        scaled(MethodUse.model_validate("CrossKD.for_fcos"), 8)
