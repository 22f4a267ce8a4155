"""Whether a method takes every batch: without objects, dark, small, of one image, padded unequally."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from kdtoolkit.contract import Target
from kdtoolkit.distiller import Distiller
from kdtoolkit.errors import IncompatibleError
from kdtoolkit.testing._batch import without_objects
from kdtoolkit.testing._doubles import Probe, transformed
from kdtoolkit.testing._expect import expect_backward, expect_losses
from kdtoolkit.testing.methods._case import Case
from kdtoolkit.testing.report import LeftOut, by_name

PADDING = 64  # pixels


SIZES = (8, 16, 32, 64, 128)  # sides in pixels, tried in turn to find the smallest that a pair takes


def _finite_step(
    case: Case, what: str, images: Sequence[Tensor] | None = None, targets: Sequence[Target] | None = None
) -> None:
    distiller = case.fresh()
    terms = case.terms(distiller, images, targets)
    expect_losses(terms, what)
    expect_backward(terms, distiller, what)


def _no_objects(case: Case) -> None:
    """If no image has an object, terms and gradients are finite."""
    _finite_step(case, "no object at all", targets=without_objects(case.targets, range(len(case.targets))))


def _one_image_without(case: Case) -> None:
    """If one image has no object, terms and gradients are finite."""
    for i in (0, len(case.targets) - 1):
        _finite_step(case, f"no object in image {i}", targets=without_objects(case.targets, [i]))


def _constant_images(case: Case) -> None:
    """For images of one colour, whose features hardly vary, terms and gradients are finite."""
    _finite_step(case, "black images", [torch.zeros_like(image) for image in case.images])


def _no_signal(case: Case) -> None:
    """If the features of student or teacher are all 0, terms and gradients are finite."""
    dead = partial(transformed, levels=lambda level: level * 0)
    for role, distiller in (("student", case.fresh(change_student=dead)), ("teacher", case.fresh(change_teacher=dead))):
        terms = case.terms(distiller)
        what = f"features of the {role} that are all 0"
        expect_losses(terms, what)
        expect_backward(terms, distiller, what)


def _unequal_padding(case: Case) -> None:
    """If the teacher pads further than the student, terms and gradients are finite."""
    distiller = case.fresh(change_teacher=partial(transformed, padding=PADDING))
    try:
        terms = case.terms(distiller)
    except IncompatibleError as error:  # a teacher of one image size then has cells of a different stride
        raise LeftOut(f"the method refuses it: {error}") from error
    what = f"{PADDING} pixels more padding in the teacher"
    expect_losses(terms, what)
    expect_backward(terms, distiller, what)


def _no_labels(case: Case) -> None:
    """On images without labels a method runs as its `unlabelled` says; terms and gradients are finite."""
    if case.factory().unlabelled == "skips":
        raise LeftOut("it is not run on images without labels")
    distiller = case.fresh()
    terms = case.unlabelled_terms(distiller)
    expect_losses(terms, "no labels")
    expect_backward(terms, distiller, "no labels")


def _small_images(case: Case) -> None:
    """For the smallest images that the pair takes, whose levels have few cells, terms and gradients are finite."""
    for size in SIZES:
        images = [image.new_full((3, size, size), 0.5) for image in case.images]
        for image in images:
            image[:, : size // 2] = 0.0
        targets: list[Target] = [
            {"boxes": target["boxes"].new_tensor([[1.0, 1.0, size - 1.0, size - 1.0]]), "labels": target["labels"][:1]}
            for target in case.targets
        ]
        try:
            plain = Distiller(copy.deepcopy(case.teacher), copy.deepcopy(case.student), [Probe(frozenset())])
            plain.train()(images, targets)
        except Exception:  # too small for the detectors themselves
            continue
        try:
            _finite_step(case, f"images of {size} px", images, targets)
        except IncompatibleError:  # at this size the detectors' cells do not correspond
            continue
        return
    raise LeftOut(f"the detectors take no square images of {', '.join(map(str, SIZES))} px")


def _one_image(case: Case) -> None:
    """For a batch of a single image, terms and gradients are finite."""
    for i in range(len(case.images)):
        images, targets = case.images[i : i + 1], case.targets[i : i + 1]
        try:
            Distiller(None, copy.deepcopy(case.student)).train()(images, targets)
        except Exception:  # the detector's own batch norms may need more
            continue
        try:
            _finite_step(case, "a single image", images, targets)
        except IncompatibleError as error:  # a clear refusal is fine
            raise LeftOut(f"the method refuses it: {error}") from error
        return
    raise LeftOut("the student takes no batch of a single image")


CHECKS = by_name(
    _no_objects,
    _one_image_without,
    _no_labels,
    _constant_images,
    _no_signal,
    _unequal_padding,
    _small_images,
    _one_image,
)
