"""Which methods can distil a pair (kdtoolkit/verdicts.py)."""

from dataclasses import replace

from kdtoolkit.compatibility import why_refused
from kdtoolkit.libraries import adapt
from kdtoolkit.methods import all_methods
from kdtoolkit.verdicts import Verdict, judge_pair
from tests.conftest import tiny_fcos, tiny_gfl, tiny_of, tiny_retinanet


def judge(student, teacher):
    return judge_pair(adapt(student).spec, adapt(teacher).spec)


def test_verdicts_are_the_distillers():
    student, teacher = adapt(tiny_fcos(seed=0)).spec, adapt(tiny_gfl(seed=0)).spec
    verdicts = judge_pair(student, teacher)
    assert verdicts.keys() == all_methods().keys()
    for name, method in all_methods().items():
        assert verdicts[name].reason == why_refused(method, student, teacher)
    assert verdicts["CrossKD"] == Verdict(settings="CrossKD.for_fcos")
    assert verdicts["FGD"].settings == "FGD.for_fcos"
    assert verdicts["CWD"] == Verdict()


def test_it_is_said_what_would_mend_a_refusal():
    gfl = tiny_gfl(seed=0)
    assert judge(gfl, tiny_gfl(seed=0, num_classes=5))["CrossKD"].mends == ("equal class counts, or a class map",)
    assert judge(tiny_fcos(seed=0), gfl)["LD"].mends == ("box distributions over equal bins",)
    assert judge(gfl, tiny_gfl(seed=0, bins=9))["Mimic"].mends == ("box distributions over equal bins",)
    assert judge(tiny_gfl(seed=0, strides=(8, 16, 32, 64)), gfl)["Mimic"].mends == ("equal pyramid levels",)
    assert "equal numbers of priors a cell" in judge(gfl, tiny_retinanet(seed=0))["LogitKD"].mends
    coarse = replace(adapt(gfl).spec, strides=(64, 128, 256))
    both = judge_pair(coarse, adapt(tiny_gfl(seed=0, num_classes=5)).spec)
    assert both["CrossKD"].mends == ("equal class counts, or a class map", "equal pyramid levels")
    assert both["PKD"].mends == ("equal pyramid levels",)
    assert "sigmoid scores in both" in judge(tiny_of("torchvision SSD", seed=0), gfl)["BCKD"].mends


def test_what_no_setting_mends_takes_another_detector():
    verdict = judge(tiny_gfl(seed=0), tiny_of("torchvision Faster R-CNN", seed=0))["CrossKD"]
    assert verdict.reason
    assert verdict.mends == ()


def test_published_settings_for_the_students_kind_are_named():
    gfl = tiny_gfl(seed=0)
    for family, named in {
        "torchvision FCOS": {"CrossKD.for_fcos", "FGD.for_fcos", "PKD.for_fcos"},
        "torchvision Faster R-CNN": {"FGD.for_faster_rcnn", "MGD.for_faster_rcnn"},
    }.items():
        student = tiny_of(family, seed=0)
        assert {verdict.settings for verdict in judge(student, gfl).values()} - {""} == named
