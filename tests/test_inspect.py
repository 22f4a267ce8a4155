"""Detectors and pairs as `kd inspect` shows them."""

import io

import pytest
from rich.console import Console
from torchvision.models.detection import FCOS

from kdtoolkit.adapters.torchvision import on_timm
from kdtoolkit.inspect import inspect_detector, print_families, print_inspection, print_pair
from kdtoolkit.matrix import families
from tests.conftest import tiny_fcos, tiny_gfl, tiny_of


def printed(show, *arguments, width=80):
    out = io.StringIO()
    show(*arguments, Console(file=out, width=width))
    return out.getvalue()


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
        "works if the two have equal class counts",
    ):
        assert part in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_published_settings_are_printed():
    pair = [inspect_detector(model, 64) for model in (tiny_fcos(seed=0), tiny_gfl(seed=0))]
    assert "Use the published settings for this student's kind: CrossKD.for_fcos()" in printed(
        print_pair, *pair, width=200
    )
    assert "Use the published settings" not in printed(print_pair, *pair[::-1], width=200)


def test_it_is_said_what_a_detector_does_to_images():
    assert "50 x 50 px, padded to 64 x 64" in printed(print_inspection, inspect_detector(tiny_gfl(seed=0), 50))
    enlarged = inspect_detector(on_timm(FCOS, 3, backbone="test_resnet", out_channels=64, min_size=96), 64)
    assert enlarged.resized == (96, 96)
    assert "64 x 64 px, resized by the detector to 96 x 96" in printed(print_inspection, enlarged, width=120)


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
        next(iter(model.children())).eval()
        learned = [p.requires_grad for p in model.parameters()]
        modes = [module.training for module in model.modules()]
        assert inspect_detector(model, 64).multiply_adds > 0, name
        assert [p.requires_grad for p in model.parameters()] == learned
        assert [module.training for module in model.modules()] == modes
