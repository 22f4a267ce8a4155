"""Class lists that differ: methods compare what two detectors of the shared classes alone would show."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from kdtoolkit import Distiller, KDError, adapt
from kdtoolkit.classes import ClassMap, SharedClasses
from kdtoolkit.compatibility import why_refused
from kdtoolkit.inherit import inherit
from kdtoolkit.methods import CWD, FGD, LD, PKD, CrossKD, FitNet, LogitKD, all_methods
from kdtoolkit.testing import check_adapter
from tests.conftest import first_of_each_kind, tiny_atss, tiny_gfl, tiny_of

SHARED = ClassMap(student=(0, 2), teacher=(3, 1))  # of 3 and 5 classes
KINDS = first_of_each_kind()
QUICK = ("GFL", "ATSS", "FCOS", "torchvision SSD", "DETR", "Conditional DETR")
SOFTMAX = ("DETR", "torchvision SSD", "torchvision Faster R-CNN")


def marked(kinds):
    """The families, of which the others are slow."""
    return [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in kinds]


FURTHER = {  # settings that compare or need what the defaults do not
    "LD, all terms": lambda: LD(valuable_weight=0.25, cls_weight=1.0),
    "DKD": lambda: LogitKD(kind="dkd"),
    "DIST": lambda: LogitKD(kind="dist"),
    "CWD.for_logits": CWD.for_logits,
    "FitNet in boxes": lambda: FitNet(region="boxes"),
    "CrossKD, teacher's priors": lambda: CrossKD(priors="teacher"),
}
METHODS = {**all_methods(), **FURTHER}


def only_shared(family, whole, labels):
    """The detector with the rows of these classes alone.

    The classes that it lacks get no score in `whole` where their scores decide more than their own rows: in a softmax,
    and in the choice of queries.
    """
    adapter = adapt(whole)
    if adapter.spec.activation == "softmax" or not adapter.spec.priors.on_grid:
        modules = dict(whole.named_modules())
        for name, rows in adapter.class_layers.items():
            bias = getattr(modules[name], "bias", None)
            if bias is not None and rows.inner == 1:
                columns = bias.detach().view(-1, rows.before + adapter.spec.num_classes + rows.after)
                for label in set(range(adapter.spec.num_classes)) - set(labels):
                    columns[:, rows.before + label] = -1e4
    part = tiny_of(family, seed=0, num_classes=len(labels))
    assert not inherit(part, whole, ClassMap(tuple(range(len(labels))), labels)).left
    return part


def methods_for(specs, needs="features"):
    """Every method that can distil such a pair of detectors, by itself and with further settings."""
    built = [make() for make in METHODS.values()]
    return [
        method for method in built if needs in method.needs or needs == "features" if not why_refused(method, *specs)
    ]


def two_classes(family):
    """The specs of a pair of detectors of this family with two classes."""
    return [adapt(tiny_of(family, seed=0, num_classes=2)).spec] * 2


def terms(teacher, student, methods, images, targets, class_map=None):
    """The terms of all methods in one step."""
    torch.manual_seed(3)  # what the methods learn
    distiller = Distiller(teacher, student, methods, class_map=class_map).train()
    torch.manual_seed(4)  # what is drawn in the step
    return {name: loss for name, loss in distiller(images, targets).items() if not name.startswith("task/")}


@pytest.mark.parametrize("family", marked(KINDS))
def test_methods_see_what_detectors_of_the_shared_classes_alone_would_show(family, batch):
    images, targets = batch
    objects = [{"boxes": t["boxes"][t["labels"] != 1], "labels": t["labels"][t["labels"] != 1]} for t in targets]
    renamed = [{"boxes": t["boxes"], "labels": t["labels"] // 2} for t in objects]
    teacher, student = tiny_of(family, seed=1, num_classes=5), tiny_of(family, seed=2, num_classes=3)
    parts = only_shared(family, teacher, SHARED.teacher), only_shared(family, student, SHARED.student)
    found = terms(teacher, student, methods_for(two_classes(family)), images, objects, SHARED)
    expected = terms(*parts, methods_for(two_classes(family)), images, renamed)
    assert {"crosskd/cls", "pkd/feature", "fgd/foreground"} <= set(found)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", marked(KINDS))
def test_the_order_of_the_teachers_classes_does_not_matter(family, batch):
    teacher, student = tiny_of(family, seed=1), tiny_of(family, seed=2)
    turned = tiny_of(family, seed=0)
    inherit(turned, teacher, ClassMap((2, 0, 1), (0, 1, 2)))  # class 0 of the teacher is class 2 here
    specs = adapt(student).spec, adapt(teacher).spec
    same = copy.deepcopy(student)
    found = terms(turned, same, methods_for(specs), *batch, ClassMap((0, 1, 2), (2, 0, 1)))
    torch.testing.assert_close(found, terms(teacher, student, methods_for(specs), *batch))


@pytest.mark.parametrize("family", marked(each for each in KINDS if each not in SOFTMAX))
def test_no_method_pulls_at_a_class_that_the_teacher_lacks(family, batch):
    teacher, student = tiny_of(family, seed=1, num_classes=5), tiny_of(family, seed=2, num_classes=3)
    modules, pulled = dict(student.named_modules()), False
    methods = methods_for(two_classes(family), "predictions")
    torch.stack([*terms(teacher, student, methods, *batch, SHARED).values()]).sum().backward()
    for layer, rows in adapt(student).class_layers.items():
        if (gradient := modules[layer].weight.grad) is not None:
            found = gradient.view(-1, 3 + rows.after, *gradient.shape[1:])
            assert not found[:, 1].any(), layer
            pulled |= bool(found[:, 0].any())
    assert pulled


@pytest.mark.parametrize("family", SOFTMAX)
def test_no_method_cares_for_shares_of_background_and_absent_classes(family, batch):
    teacher, student = tiny_of(family, seed=1, num_classes=5), tiny_of(family, seed=2, num_classes=3)
    moved = adapt(copy.deepcopy(student))
    head = moved.head

    def with_mass_moved(*args, **kwargs):
        trace = head(*args, **kwargs)
        logits = trace.predictions.logits.clone()
        # A quarter of the probability of the absent class stays; the rest is background's.
        logits[..., 3] = torch.logaddexp(logits[..., 3], logits[..., 1] + math.log(0.75))
        logits[..., 1] += math.log(0.25)
        return replace(trace, predictions=replace(trace.predictions, logits=logits))

    moved.head = with_mass_moved
    found, expected = (
        terms(teacher, each, methods_for(two_classes(family), "predictions"), *batch, SHARED)
        for each in (moved, student)
    )
    torch.testing.assert_close(found, expected)


def test_objects_of_the_students_own_class_are_no_objects_to_methods_and_nothing_is_compared_there(batch):
    images, targets = batch
    student = adapt(tiny_gfl(seed=2))
    view = SharedClasses(student, SHARED.student)
    whole = student.prepare(images, targets)
    trace = student.head(student.features(whole), whole)
    seen = view.seen(whole)
    assert [labels.tolist() for labels in seen.labels] == [[0, 1], []]
    own, shown = student.assign(trace, whole), view.assign(view.seen_trace(trace), seen)
    hidden = own.labels == 1
    assert hidden.any()
    assert not shown.weights[hidden].any()
    assert torch.equal(shown.weights[~hidden], own.weights[~hidden])
    assert torch.equal(shown.positive, own.positive & ~hidden)
    assert shown.labels[own.labels == 2].unique().tolist() == [1]
    assert shown.labels[~shown.positive].unique().tolist() == [2]


def test_the_teacher_sees_the_objects_that_it_knows(batch):
    distiller = Distiller(tiny_gfl(seed=1, num_classes=5), tiny_gfl(seed=2), [FGD()], class_map=SHARED)
    like = distiller.student_adapter.prepare(*batch)
    seen = distiller.teacher_batch(*batch, like)
    assert [labels.tolist() for labels in seen.whole.labels] == [[3, 1], []]
    assert [labels.tolist() for labels in seen.labels] == [[0, 1], []]


def test_the_student_learns_all_its_classes_from_the_ground_truth(batch):
    plain = Distiller(None, tiny_gfl(seed=2))(*batch)
    found = Distiller(tiny_atss(seed=1, num_classes=5), tiny_gfl(seed=2), [CrossKD()], class_map=SHARED)(*batch)
    assert {name: loss for name, loss in found.items() if name.startswith("task/")} == dict(plain)


@pytest.mark.slow
@pytest.mark.parametrize("family", KINDS)
def test_a_detector_that_shows_some_classes_keeps_the_promises_of_an_adapter(family):
    whole = adapt(tiny_of(family, seed=1, num_classes=4))
    check_adapter(
        SharedClasses(whole, (3, 1)),
        own="the library has all classes",
        own_losses="the library has all classes",
        known={"matches": "it wraps an adapter, and is never found by the class of a model"},
    )


def test_classes_are_paired_by_name_and_by_hand():
    student, teacher = ["Traffic Light", "parrot", "dog"], ["person", "dog", "bird", "traffic_light"]
    found = ClassMap.by_name(student, teacher)
    assert found == ClassMap(student=(0, 2), teacher=(3, 1))
    assert ClassMap.by_name(student, teacher, {"parrot": "bird"}) == ClassMap((0, 1, 2), (3, 2, 1))
    said = found.describe(student, teacher)
    assert "Traffic Light (the teacher's traffic_light), dog" in said
    assert "the teacher says nothing about parrot" in said
    assert "2 of the teacher's classes are left out (person, bird)" in said


def test_classes_whose_names_differ_by_case_alone_are_paired_by_their_exact_names():
    letters = ["A", "a", "car-1", "car 1"]
    assert ClassMap.by_name(letters, letters) == ClassMap((0, 1, 2, 3), (0, 1, 2, 3))
    assert ClassMap.by_name(["a", "A"], letters) == ClassMap((0, 1), (1, 0))
    assert ClassMap.by_name(["cat", "Cat"], ["cat", "tiger"], {"Cat": "tiger"}) == ClassMap((0, 1), (0, 1))


@pytest.mark.parametrize(
    ("student", "teacher", "given", "says"),
    [
        (["kat", "fox"], ["cat", "dog"], {}, r"has kat, fox; the teacher has cat, dog.*'kat' \(did you mean 'cat'\?\)"),
        (["cat"], ["cat"], {"kat": "cat"}, r"the student has no class 'kat' \(did you mean 'cat'\?\): it has cat"),
        (["fox"], ["cat", "dog"], {"fox": "dgo"}, r"the teacher has no class 'dgo' \(did you mean 'dog'\?\)"),
        (["cat", "lion"], ["cat"], {"lion": "cat"}, "'cat' and 'lion' would both be the teacher's 'cat'"),
        (["cat", "Cat"], ["cat"], {}, "the student's classes 'cat' and 'Cat' cannot be told apart"),
        (["CAT"], ["cat", "Cat"], {}, "the teacher's classes 'cat' and 'Cat' cannot be told apart"),
        (["cat"], ["Dog", "dog"], {"cat": "DOG"}, "the teacher's classes 'Dog' and 'dog' cannot be told apart"),
        (["cat", "cat"], ["cat"], {}, "the student has two classes 'cat'"),
    ],
)
def test_class_lists_that_cannot_be_paired_are_errors(student, teacher, given, says):
    with pytest.raises(KDError, match=says):
        ClassMap.by_name(student, teacher, given)


@pytest.mark.parametrize(("ours", "theirs"), [((), ()), ((0,), (1, 2)), ((0, 0), (1, 2)), ((-1,), (0,))])
def test_labels_that_are_no_pairs_are_errors(ours, theirs):
    with pytest.raises(KDError, match="ClassMap"):
        ClassMap(ours, theirs)


def test_a_map_of_classes_that_a_detector_lacks_is_an_error():
    with pytest.raises(KDError, match="names the class 3 of GFL, which has 3 classes"):
        Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [PKD()], class_map=ClassMap((0,), (3,)))
