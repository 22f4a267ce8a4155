"""Whether terms are the same in each run, layout, precision and number of processes."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import torch
from torch import Tensor

from kdtoolkit.contract import PriorKind
from kdtoolkit.errors import IncompatibleError, KDError
from kdtoolkit.teacher_cache import TeacherCache
from kdtoolkit.testing._batch import without_objects
from kdtoolkit.testing._doubles import transformed
from kdtoolkit.testing._expect import expect, expect_backward, expect_losses, expect_same, total, without_onednn
from kdtoolkit.testing.methods._case import ROUNDING, Case, method_of
from kdtoolkit.testing.ranks import side_by_side
from kdtoolkit.testing.report import SEED, LeftOut, by_name

LAYOUT = 1e-3  # relative to the terms: sums are taken in a different order


PROCESSES = 5e-3  # relative: sums are taken in a different order, and pass through heads with random weights


BFLOAT16 = 0.3  # relative: terms are differences between similar detectors, rounded to 8 bits


def _two_processes(case: Case) -> None:
    """Two processes with half of the batch each get the terms and gradients of one process with all of it, on average.

    What a term is divided by (positives, sums of weights, statistics) must be summed over processes for that. The
    student is in eval mode, since its batch norms see the images of one process and its dropout is random.
    """
    distiller = case.fresh()
    distiller.student.eval()
    image, target = case.images[0], case.targets[0]
    # Equal sizes, so that each half lies on the canvas of the whole; unequal objects, so that the halves count apart.
    images = [image, image.flip(-1) * 0.5]
    targets = [target, {"boxes": target["boxes"][:1], "labels": target["labels"][:1]}]

    def step(part: slice, seed: int = SEED) -> dict[str, Tensor]:
        """The terms, and the gradients of the student's levels and of what the method learns."""
        own, levels = copy.deepcopy(distiller), []

        def keep(level: Tensor) -> Tensor:
            level.retain_grad()
            levels.append(level)
            return level

        own.student_adapter = transformed(own.student_adapter, levels=keep)
        torch.manual_seed(seed)
        terms = {k: loss for k, loss in own(images[part], targets[part]).items() if not k.startswith("task/")}
        torch.autograd.backward(total(terms))
        learned = {f"the gradient of {name}": p.grad for name, p in method_of(own).named_parameters()}
        shown = {f"the gradient of level {i}": level.grad for i, level in enumerate(levels)}
        return {k: x.detach() for k, x in (terms | learned | shown).items() if x is not None}

    try:
        whole, again = step(slice(None)), step(slice(None), SEED + 1)
    except KDError as error:
        raise LeftOut(f"the student takes no step in eval mode: {error}") from error
    if not all(torch.equal(whole[name], again[name]) for name in whole):
        raise LeftOut("the method draws at random, so no two runs give the same numbers")
    try:
        halves = side_by_side([partial(step, slice(i, i + 1)) for i in range(2)])
    except IncompatibleError as error:
        raise LeftOut(f"the method refuses a single image: {error}") from error
    largest = max(value.norm() for value in whole.values())
    for name, value in whole.items():
        parts = [half.get(name, torch.zeros_like(value)) for half in halves]
        mean = (torch.cat(parts) if "level" in name else torch.stack(parts).sum(0)) / len(halves)
        problem = (
            f"{name} is {mean.norm():g} in size on average of two processes, and {value.norm():g} in one process with "
            "all images: divide by kdtoolkit.processes.share(...) of what is counted, and take statistics by total(...)"
        )
        expect(bool((mean - value).norm() <= PROCESSES * (value.norm() + 0.1 * largest)), problem)


def _channels_last(case: Case) -> None:
    """Terms are the same if the channels of maps lie last in memory (channels_last)."""
    turned = partial(transformed, levels=lambda x: x.contiguous(memory_format=torch.channels_last))
    terms = case.terms(case.fresh(change_student=turned, change_teacher=turned))
    for name, value in case.usual.items():
        near = abs(terms[name] - value) <= LAYOUT * (abs(value) + total(case.usual).abs()) + ROUNDING
        expect(bool(near), f"{name} is {terms[name].item():g} with channels_last, and {value.item():g} without")


@without_onednn()
def _mixed_precision(case: Case) -> None:
    """Under bfloat16 autocast, terms are finite, have the type float32, and are near the terms without autocast."""
    exact, distiller = case.usual, case.fresh()
    with torch.autocast(case.images[0].device.type, torch.bfloat16):
        terms = case.terms(distiller)
    expect_losses(terms, "terms")
    expect_backward(terms, distiller, "terms")
    for name, value in terms.items():
        near = abs(value - exact[name]) <= BFLOAT16 * abs(exact[name]) + 1e-3 * total(exact).abs() + 1e-6
        found = f"{name} is {value.item():g} in bfloat16, and {exact[name].item():g} in float32"
        expect(bool(near), f"{found} (if that is about 0, perturb the detectors' weights)")


@without_onednn()
def _own_precision(case: Case) -> None:
    """Where the detectors compute in float32, so does the method under bfloat16 autocast: terms hardly change."""
    exact = partial(transformed, exact=True)
    distiller = case.fresh(change_student=exact, change_teacher=exact)
    with torch.autocast(case.images[0].device.type, torch.bfloat16):
        terms = case.terms(distiller)
    for name, value in case.usual.items():
        near = abs(terms[name] - value) <= LAYOUT * abs(value) + ROUNDING
        expect(
            bool(near),
            f"{name} is {terms[name].item():g} under autocast, and {value.item():g} without, although the detectors "
            "compute alike: autocast rounds products of matrices (@, einsum) and layers. Switch it off around them",
        )


def _repeatable(case: Case) -> None:
    """A second run with the same seed is equal to the bit, also after a different batch: nothing is kept."""
    expect_same(case.terms(case.fresh()), case.usual, "the second run")
    distiller = case.fresh()
    if [*method_of(distiller).buffers()]:  # buffers may keep statistics of what the method has seen
        return
    case.terms(distiller, [image.flip(-1) for image in case.images], without_objects(case.targets, [0]))
    expect_same(case.terms(distiller), case.usual, "a run after another batch")


def _warm_cache(case: Case) -> None:
    """With a teacher cache that knows the images, terms are those with a live teacher, within rounding."""
    if case.teacher.spec.priors is PriorKind.DETECTIONS:
        raise LeftOut("a file of detections needs no cache")
    cache = TeacherCache.in_memory()
    try:
        _, terms = (case.terms(case.fresh(teacher_cache=cache)) for _ in range(2))
    except Exception as error:
        raise AssertionError(
            f"a step with a teacher cache fails with {type(error).__name__}: {error}. `features` and `states` are "
            "sequences: write tuple(...) where a tuple is needed"
        ) from error
    for name, value in case.usual.items():
        near = abs(terms[name] - value) <= LAYOUT * (abs(value) + total(case.usual).abs()) + ROUNDING
        expect(bool(near), f"{name} is {terms[name].item():g} with a teacher cache, and {value.item():g} without")


def _round_trip(case: Case) -> None:
    """The method's state dict, loaded into one set up afresh, gives equal terms."""
    distiller, other = case.fresh(), case.fresh(seed=SEED + 1)
    method_of(other).load_state_dict(method_of(distiller).state_dict())
    expect_same(case.terms(other), case.usual, "with the state dict of a different method")


def _copies(case: Case) -> None:
    """A deep copy of the method, through a pickle, gives equal terms."""
    distiller = case.fresh()
    distiller.methods[0] = pickle.loads(pickle.dumps(copy.deepcopy(method_of(distiller))))
    expect_same(case.terms(distiller), case.usual, "a pickled copy")


CHECKS = by_name(
    _two_processes, _channels_last, _mixed_precision, _own_precision, _repeatable, _warm_cache, _round_trip, _copies
)
