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


SIZES = (8, 16, 32, 64, 128)  # images tried for the smallest that a pair takes


def _finite_step(
    case: Case, what: str, images: Sequence[Tensor] | None = None, targets: Sequence[Target] | None = None
) -> None:
    distiller = case.fresh()
    terms = case.terms(distiller, images, targets)
    expect_losses(terms, what)
    expect_backward(terms, distiller, what)


def _no_objects(case: Case) -> None:
    """Images without any object give finite terms and gradients."""
    _finite_step(case, "no object at all", targets=without_objects(case.targets, range(len(case.targets))))


def _one_image_without(case: Case) -> None:
    """One image without objects among others gives finite terms and gradients."""
    for i in (0, len(case.targets) - 1):
        _finite_step(case, f"no object in image {i}", targets=without_objects(case.targets, [i]))


def _constant_images(case: Case) -> None:
    """Images of one colour, whose features hardly vary, give finite terms and gradients."""
    _finite_step(case, "black images", [torch.zeros_like(image) for image in case.images])


def _no_signal(case: Case) -> None:
    """Features that are 0 everywhere, in the student or the teacher, give finite terms and gradients."""
    dead = partial(transformed, levels=lambda level: level * 0)
    for role, distiller in (("student", case.fresh(student=dead)), ("teacher", case.fresh(teacher=dead))):
        terms = case.terms(distiller)
        what = f"features of the {role} that are all 0"
        expect_losses(terms, what)
        expect_backward(terms, distiller, what)


def _unequal_padding(case: Case) -> None:
    """A teacher that pads further than the student gives finite terms and gradients."""
    distiller = case.fresh(teacher=partial(transformed, padding=PADDING))
    try:
        terms = case.terms(distiller)
    except IncompatibleError as error:  # a teacher of one size has other cells then
        raise LeftOut(f"refuses it: {error}") from error
    what = f"{PADDING} pixels more padding in the teacher"
    expect_losses(terms, what)
    expect_backward(terms, distiller, what)


def _small_images(case: Case) -> None:
    """The smallest images that the pair takes, whose levels have few cells, give finite terms and gradients."""
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
        except Exception:  # too small for the detectors themselves, who say so in their own ways
            continue
        try:
            _finite_step(case, f"images of {size} px", images, targets)
        except IncompatibleError:  # the pair pads them otherwise
            continue
        return
    raise LeftOut(f"the detectors take no square images of {', '.join(map(str, SIZES))} px")


def _one_image(case: Case) -> None:
    """A batch of a single image gives finite terms and gradients."""
    for i in range(len(case.images)):
        images, targets = case.images[i : i + 1], case.targets[i : i + 1]
        try:
            Distiller(None, copy.deepcopy(case.student)).train()(images, targets)
        except Exception:  # too little for the detector's own batch norms
            continue
        try:
            _finite_step(case, "a single image", images, targets)
        except IncompatibleError as error:  # which is said in a sentence
            raise LeftOut(f"refuses it: {error}") from error
        return
    raise LeftOut("the student takes no batch of a single image")


CHECKS = by_name(
    _no_objects, _one_image_without, _constant_images, _no_signal, _unequal_padding, _small_images, _one_image
)
