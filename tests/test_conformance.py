"""Every adapter's examples and every method, found by themselves: what lands in the tree is covered."""

import os

import pytest
import torch

from kdtoolkit.contract import adapt
from kdtoolkit.distiller import refusal
from kdtoolkit.matrix import families
from kdtoolkit.methods import all_methods
from kdtoolkit.testing import check_adapter, check_method, example_batch

FAMILIES = families()
METHODS = all_methods()
NUM_CLASSES = 3


def build(family, seed=0):
    torch.manual_seed(seed)
    return FAMILIES[family](NUM_CLASSES)


def library(model):
    return type(model).__module__.split(".")[0]


def kind(family):
    """What a method can tell a family by: to it, families of one kind are one."""
    spec = adapt(build(family)).spec
    return spec.priors, spec.activation, bool(spec.bins), spec.first_stage is not None


# The library's own forward, where it takes images as they are. Others are compared in tests/adapters.


def torchvision_own(model, images):
    shift = int(adapt(model).spec.activation == "softmax")
    return [{**found, "labels": found["labels"] - shift} for found in model(list(images))]


def torchvision_own_losses(model, images, targets):
    shift = int(adapt(model).spec.activation == "softmax")
    return model(list(images), [{"boxes": t["boxes"], "labels": t["labels"] + shift} for t in targets])


OWN = {
    "kdtoolkit": (lambda model, images: model(images), lambda model, images, targets: model(images, targets)),
    "torchvision": (torchvision_own, torchvision_own_losses),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter(family):
    model = build(family)
    own, own_losses = OWN.get(library(model), (None, None))
    if type(model).__name__ in ("MaskRCNN", "KeypointRCNN"):
        own_losses = None  # it wants masks or keypoints, which are no part of distillation
    if library(model) == "kdtoolkit":
        model.score_threshold = 0.0
    report = check_adapter(model, own=own, own_losses=own_losses)
    assert report.results["resume"].outcome == "passed"
    if own is not None:
        assert report.results["own_detections"].outcome == "passed"


def first_of_each_kind():
    found = {}
    for family in FAMILIES:
        found.setdefault(kind(family), family)
    return list(found.values())


KINDS = first_of_each_kind()
# Every method on twins of each kind and on a few mixed pairs, CrossKD on twins of every family: it depends the most on
# what an adapter does. tests/test_matrix.py runs one step of everything. With ALL_TWINS=1 in the environment every
# method is checked on twins of every family, which takes a quarter of an hour.
TWINS = FAMILIES if os.environ.get("ALL_TWINS") else KINDS
PAIRS = [(family, family) for family in TWINS] + list(zip(KINDS[::3], KINDS[1::3], strict=False))
CASES = [(method, *pair) for method in METHODS for pair in PAIRS]
CASES += [("CrossKD", family, family) for family in FAMILIES if family not in TWINS]

# Checks that fail, by method and teacher.
EMPTY_BOXES = {"vanishing": "random weights give boxes without area, whose GIoU with themselves is 0"}
OTHER_QUERIES = {"mixed_precision": "in bfloat16 the random detector selects other queries than in float32"}
KNOWN = {
    ("CrossKD", "YOLO26"): EMPTY_BOXES,
    ("Mimic", "YOLO26"): EMPTY_BOXES,
    ("LogitKD", "RF-DETR"): OTHER_QUERIES,
}


@pytest.mark.parametrize(("method", "student", "teacher"), CASES, ids=lambda name: name.replace(" ", "-"))
def test_method(method, student, teacher):
    pair = build(student, 0), build(teacher, 1)
    # Of one size where detectors may pad otherwise, which is refused at the first step.
    images, targets = example_batch(NUM_CLASSES, sizes=((64, 64), (50, 60) if student == teacher else (64, 64)))
    report = check_method(METHODS[method], *pair, known=KNOWN.get((method, teacher)), images=images, targets=targets)
    reason = refusal(METHODS[method], *(adapt(model).spec for model in pair))
    if student == teacher or reason is not None:
        assert report.refused == reason


@pytest.mark.parametrize("method", METHODS)
def test_every_method_works_somewhere(method):
    specs = [adapt(build(family)).spec for family in FAMILIES]
    assert any(refusal(METHODS[method], spec, spec) is None for spec in specs)
