"""Every adapter's examples and every method, found by themselves: what lands in the tree is covered."""

import pytest
import torch

from kdtoolkit.compatibility import why_refused
from kdtoolkit.libraries import adapt
from kdtoolkit.matrix import families
from kdtoolkit.methods import all_methods
from kdtoolkit.testing import check_adapter, check_method
from tests.conftest import cases_of, first_of_each_kind

FAMILIES = families()
METHODS = all_methods()
NUM_CLASSES = 3


def build(family, seed=0):
    torch.manual_seed(seed)
    return FAMILIES[family](NUM_CLASSES)


def library(model):
    return type(model).__module__.split(".")[0]


# The library's own forward.


def torchvision_own(model, images):
    shift = int(adapt(model).spec.activation == "softmax")
    return [{**found, "labels": found["labels"] - shift} for found in model(list(images))]


def torchvision_own_losses(model, images, targets):
    shift = int(adapt(model).spec.activation == "softmax")
    masks = [
        torch.ones(len(t["boxes"]), *image.shape[1:], dtype=torch.uint8)
        for t, image in zip(targets, images, strict=True)
    ]
    truth = [
        {"boxes": t["boxes"], "labels": t["labels"] + shift, "masks": m} for t, m in zip(targets, masks, strict=True)
    ]
    losses = model(list(images), truth)
    losses.pop("loss_mask", None)  # which is no part of distillation
    return losses


def own_of(library):
    if library == "ultralytics":
        from tests.adapters.test_ultralytics import own_detections, own_losses

        return own_detections, own_losses
    return {
        "kdtoolkit": (lambda model, images: model(images), lambda model, images, targets: model(images, targets)),
        "torchvision": (torchvision_own, torchvision_own_losses),
        "transformers": ("its processors want pixels in bytes: tests/adapters/transformers compares them",) * 2,
    }[library]


KNOWN_OF_ADAPTERS = {"YOLO26": {"sources": "it detects with its second head, and learns with both"}}
KINDS = first_of_each_kind()


@cases_of("family", FAMILIES.keys(), set(KINDS))
def test_adapter(family):
    model = build(family)
    own, own_losses = own_of(library(model))
    if library(model) == "kdtoolkit":
        model.score_threshold = 0.0
    report = check_adapter(model, own=own, own_losses=own_losses, known=KNOWN_OF_ADAPTERS.get(family))
    for check in ("resume", "shown", "assignment", "teacher"):
        assert report.results[check].outcome == "passed"
    for check, function in (("own_detections", own), ("own_task_losses", own_losses)):
        assert report.results[check].outcome == ("passed" if callable(function) else "left out")


TWINS = [(family, family) for family in KINDS]
MIXED = list(zip(KINDS[::3], KINDS[1::3], strict=False))


def cases():
    """Of each method a pair; the slow ones are every method on twins of each kind and on mixed pairs.

    CrossKD, which depends the most on what an adapter does, comes on twins of every kind of priors, slowly of every
    family. tests/test_matrix.py runs one step of everything.
    """
    specs = {family: adapt(build(family)).spec for family in KINDS}
    of_priors = {}
    for family, spec in specs.items():
        of_priors.setdefault(spec.priors, family)
    often = {("PKD", *MIXED[0]), ("CrossKD", *MIXED[0]), *(("CrossKD", f, f) for f in of_priors.values())}
    for name, method in METHODS.items():
        often.add(next((name, f, f) for f, spec in specs.items() if why_refused(method, spec, spec) is None))
    every = [(name, *pair) for name in METHODS for pair in TWINS + MIXED]
    every += [("CrossKD", family, family) for family in FAMILIES if family not in KINDS]
    return [case if case in often else pytest.param(*case, marks=pytest.mark.slow) for case in every]


# Checks that fail, by method, student and teacher.
EMPTY_BOXES = {"vanishing": "random weights give boxes without area, whose GIoU with themselves is 0"}
OTHER_QUERIES = {"mixed_precision": "in bfloat16 the random detector selects other queries than in float32"}
KNOWN = {
    ("CrossKD", "YOLO26", "YOLO26"): EMPTY_BOXES,
    ("Mimic", "YOLO26", "YOLO26"): EMPTY_BOXES,
    ("LogitKD", "RF-DETR", "RF-DETR"): OTHER_QUERIES,
    ("ObjectKD", "D-FINE", "D-FINE"): OTHER_QUERIES,
}


@pytest.mark.parametrize(("method", "student", "teacher"), cases(), ids=lambda name: name.replace(" ", "-"))
def test_method(method, student, teacher):
    pair = build(student, 0), build(teacher, 1)
    report = check_method(METHODS[method], *pair, known=KNOWN.get((method, student, teacher)))
    assert report.refused == why_refused(METHODS[method], *(adapt(model).spec for model in pair))


@pytest.fixture(scope="module")
def specs():
    return [adapt(build(family)).spec for family in FAMILIES]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_works_somewhere(method, specs):
    assert any(why_refused(METHODS[method], spec, spec) is None for spec in specs)
