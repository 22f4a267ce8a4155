"""Detectors and pairs as `kd inspect` shows them."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from kdtoolkit.compatibility import why_refused
from kdtoolkit.inspect import Verdict, inspect_detector, judge_pair, print_families, print_inspection, print_pair
from kdtoolkit.libraries import adapt
from kdtoolkit.matrix import families
from kdtoolkit.methods import all_methods
from tests.conftest import tiny_fcos, tiny_gfl, tiny_of, tiny_retinanet


def printed(show, *arguments, width=80):
    out = io.StringIO()
    show(*arguments, Console(file=out, width=width))
    return out.getvalue()


def judge(student, teacher):
    return judge_pair(adapt(student).spec, adapt(teacher).spec)


def test_verdicts_are_the_distillers():
    student, teacher = adapt(tiny_fcos(seed=0)).spec, adapt(tiny_gfl(seed=0)).spec
    verdicts = judge_pair(student, teacher)
    assert verdicts.keys() == all_methods().keys()
    for name, method in all_methods().items():
        assert verdicts[name].reason == why_refused(method, student, teacher)
    assert verdicts["CrossKD"] == Verdict()


def test_it_is_said_what_would_mend_a_refusal():
    gfl = tiny_gfl(seed=0)
    assert judge(gfl, tiny_gfl(seed=0, num_classes=5))["CrossKD"].mends == ("equal class counts",)
    assert judge(tiny_fcos(seed=0), gfl)["LD"].mends == ("box distributions over equal bins",)
    assert judge(gfl, tiny_gfl(seed=0, bins=9))["Mimic"].mends == ("box distributions over equal bins",)
    assert judge(tiny_gfl(seed=0, strides=(8, 16, 32, 64)), gfl)["Mimic"].mends == ("equal pyramid levels",)
    assert "equal numbers of priors a cell" in judge(gfl, tiny_retinanet(seed=0))["LogitKD"].mends
    coarse = replace(adapt(gfl).spec, strides=(64, 128, 256))
    both = judge_pair(coarse, adapt(tiny_gfl(seed=0, num_classes=5)).spec)
    assert both["CrossKD"].mends == ("equal class counts", "equal pyramid levels")
    assert both["PKD"].mends == ("equal pyramid levels",)
    assert "sigmoid scores in both" in judge(tiny_of("torchvision SSD", seed=0), gfl)["BCKD"].mends


def test_what_no_setting_mends_takes_another_detector():
    verdict = judge(tiny_gfl(seed=0), tiny_of("torchvision Faster R-CNN", seed=0))["CrossKD"]
    assert verdict.reason
    assert verdict.mends == ()


@pytest.mark.parametrize("width", [80, 120])
def test_a_pair_is_shown_side_by_side(width):
    student, teacher = (inspect_detector(model, 64) for model in (tiny_fcos(seed=0), tiny_gfl(seed=0, num_classes=5)))
    text = printed(print_pair, student, teacher, width=width)
    for part in (
        "FCOS",
        "GFL",
        "3, sigmoid",
        "5, sigmoid",
        "3 and 5",
        "8, 16, 32",
        "would work with equal class counts",
    ):
        assert part in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", [80, 120])
def test_no_word_is_cut(width):
    known = {name: families()[name] for name in ("GFL", "torchvision Faster R-CNN v2")}
    found = inspect_detector(tiny_of("torchvision Faster R-CNN", seed=0), 64)
    for text in (printed(print_families, known, width=width), printed(print_inspection, found, width=width)):
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= width
        assert {"assignment,", "predictions,", "stages"} <= set(text.split())


def test_names_are_not_read_as_markup():
    names = {"mine [bold]x[/]": lambda classes: tiny_gfl(seed=0, num_classes=classes)}
    assert "mine [bold]x[/]" in printed(print_families, names)


def test_every_family_is_shown_and_left_as_it_was():
    for name, build in families().items():
        model = build(3)
        learned = [p.requires_grad for p in model.parameters()]
        assert inspect_detector(model, 64).multiply_adds > 0, name
        assert [p.requires_grad for p in model.parameters()] == learned
