import pytest
from pydantic import ValidationError

from kdtoolkit.contract import Schedule
from kdtoolkit.method_use import MethodUse
from kdtoolkit.methods import CrossKD


def test_published_settings_for_other_detectors_have_names():
    use = MethodUse.model_validate("CrossKD.for_fcos")
    assert use.method is CrossKD
    built = use.build()
    assert (built.stage, built.distances.box_loss) == (-2, "iou")
    assert MethodUse.model_validate({"PKD.for_fcos": {"stop": 9}}).build().schedule == Schedule(stop=9)
    with pytest.raises(ValidationError, match="unknown key 'weight'"):
        MethodUse.model_validate({"PKD.for_fcos": {"weight": 3.0}})
    with pytest.raises(ValidationError, match=r"did you mean 'PKD.for_fcos'"):
        MethodUse.model_validate("PKD.for_fcs")


def test_methods_take_a_schedule_and_levels():
    use = MethodUse.model_validate({"PKD": {"weight": 2, "stop": 50, "decay": 5, "strides": [8, 16]}})
    method = use.build()
    assert (method.schedule, method.strides) == (Schedule(decay=5, stop=50), (8, 16))
    for wrong, part in (
        ({"CrossKD": {"strides": [8]}}, "uses the detectors' heads"),
        ({"PKD": {"decay": 5}}, "needs stop"),
    ):
        with pytest.raises(ValidationError, match=part):
            MethodUse.model_validate(wrong)


def test_arguments_may_follow_a_question_mark():
    use = MethodUse.model_validate("PKD?weight=2&strides=[8, 16]")
    assert use == MethodUse.model_validate({"PKD": {"weight": 2, "strides": [8, 16]}})
    assert MethodUse.model_validate(str(use)) == use
    for wrong, part in (
        ("PKD?weight", "write arguments as PKD?name=value"),
        ("PKD?wieght=2", "did you mean 'weight'?"),
        ("PDK?weight=2", "did you mean 'PKD'?"),
    ):
        with pytest.raises(ValidationError, match=part.replace("?", r"\?")):
            MethodUse.model_validate(wrong)
