"""Runs in which some steps show images without labels."""

from typing import ClassVar

import pytest
import torch

from kdtoolkit import Distiller, KDError
from kdtoolkit.contract import Capability, Method
from kdtoolkit.data import ProceduralShapes
from kdtoolkit.data.views import sizes_of
from kdtoolkit.engine.mixture import unlabelled_steps, views_of_run
from kdtoolkit.engine.train import RunFolder, TrainConfig, train
from kdtoolkit.methods import PKD, CrossKD
from tests.conftest import tiny_gfl

CLASSES = len(ProceduralShapes(1).class_names)


class NeedsLabels(Method):
    needs = frozenset({Capability.FEATURES})
    terms: ClassVar = ("none",)
    paper = "none"
    unlabelled = "skips"

    def forward(self, exchange):
        return {"none": exchange.student.features[0].mean()}


@pytest.fixture(scope="module")
def labelled():
    return ProceduralShapes(6, image_size=64, seed=0)


@pytest.fixture(scope="module")
def unlabelled():
    return ProceduralShapes(3, image_size=64, seed=1)


def distiller_with(*methods, **options):
    teacher, student = tiny_gfl(seed=1, num_classes=CLASSES), tiny_gfl(seed=2, num_classes=CLASSES)
    return Distiller(teacher, student, list(methods), **options)


def config(**changes):
    return TrainConfig(**{"steps": 9, "batch_size": 4, "warmup_steps": 2, **changes})


def weights(distiller):
    return torch.cat([p.detach().flatten() for p in distiller.student.parameters()])


class Stopped(Exception):
    pass


def stop_at(distiller, step):
    def interrupt(module, args):
        if distiller.training and distiller.step > step:
            raise Stopped

    distiller.student.neck.register_forward_pre_hook(interrupt)


def test_steps_without_labels_are_as_many_as_their_images_and_spread_evenly(labelled, unlabelled):
    found = unlabelled_steps(distiller_with(PKD()), config(), labelled, unlabelled)
    assert found == [False, False, True] * 3
    found = unlabelled_steps(distiller_with(PKD()), config(unlabelled_share=0.25), labelled, unlabelled)
    assert [step for step, without in enumerate(found) if without] == [3, 7]


def test_at_most_half_of_the_steps_are_without_labels_unless_more_is_asked_for(labelled, unlabelled):
    many = ProceduralShapes(100, image_size=64, seed=1)
    assert sum(unlabelled_steps(distiller_with(PKD()), config(steps=10), labelled, many)) == 5
    assert sum(unlabelled_steps(distiller_with(PKD()), config(steps=10, unlabelled_share=0.8), labelled, many)) == 8


def test_a_step_in_which_no_method_works_has_labels(labelled, unlabelled):
    late = distiller_with(PKD().scheduled(start=4, every=2), NeedsLabels())
    found = unlabelled_steps(late, config(unlabelled_share=0.5), labelled, unlabelled)
    assert [step for step, without in enumerate(found) if without] == [4, 6, 8]


def test_the_log_tells_which_steps_had_no_labels(labelled, unlabelled, tmp_path):
    seen = []
    distiller = distiller_with(CrossKD(), PKD())
    distiller.register_forward_hook(lambda module, args, losses: seen.append((args[1] is None, sorted(losses))))
    train(distiller, labelled, config(), unlabelled=unlabelled, seed=0)
    assert [without for without, _ in seen] == [False, False, True] * 3
    assert all(any(name.startswith("task/") for name in terms) != without for without, terms in seen)


def test_views_are_counted_as_a_teacher_cache_meets_them(labelled, unlabelled):
    # No batch has an image twice: a cache is asked about both before it keeps one.
    options = config(teacher_cache="memory", unlabelled_share=0.5, batch_size=3)
    distiller = distiller_with(PKD())
    counted = views_of_run(distiller, options, sizes_of(labelled), sizes_of(unlabelled), seed=0)
    met = train(distiller, labelled, options, unlabelled=unlabelled, seed=0).cache
    assert (counted.shown, counted.different) == (met.hits + met.misses, met.misses)
    first = views_of_run(distiller, options, sizes_of(labelled), sizes_of(unlabelled), seed=0, most=8)
    assert first.shown == 6


def test_each_part_of_a_batch_has_a_canvas_of_its_own():
    distiller, sizes = distiller_with(PKD()), [(64, 96), (96, 64), (64, 64)]
    found = [
        views_of_run(
            distiller, config(steps=30, batch_size=2, accumulation=n, augmentation={"flip": 0}), sizes, None, seed=0
        )
        for n in (1, 2)
    ]
    assert found[0].different > found[1].different == 3


@pytest.mark.parametrize("changes", [{}, {"accumulation": 2, "workers": 1, "unlabelled_share": 0.4}])
def test_a_stopped_run_ends_like_one_that_was_not(labelled, unlabelled, tmp_path, changes):
    whole = distiller_with(CrossKD(), PKD())
    train(whole, labelled, config(**changes), unlabelled=unlabelled, seed=0)
    cut = distiller_with(CrossKD(), PKD())
    stop_at(cut, 4)
    folder = RunFolder(tmp_path, save_steps=2)
    with pytest.raises(Stopped):
        train(cut, labelled, config(**changes), unlabelled=unlabelled, seed=0, folder=folder)
    again = distiller_with(CrossKD(), PKD())
    train(again, labelled, config(**changes), unlabelled=unlabelled, seed=0, folder=folder)
    assert torch.equal(weights(whole), weights(again))
    assert not torch.equal(weights(whole), weights(cut))


@pytest.mark.parametrize("change", ["images", "score"])
def test_a_folder_belongs_to_the_images_and_the_score(labelled, unlabelled, tmp_path, change):
    train(distiller_with(PKD()), labelled, config(steps=3), unlabelled=unlabelled, seed=0, folder=RunFolder(tmp_path))
    images = ProceduralShapes(3, image_size=64, seed=2) if change == "images" else unlabelled
    other = distiller_with(PKD(), score=0.4 if change == "score" else 0.5)
    named = "unlabelled" if change == "images" else "score"
    with pytest.raises(KDError, match=rf"different settings \({named}\)"):
        train(other, labelled, config(steps=3), unlabelled=images, seed=0, folder=RunFolder(tmp_path))


@pytest.mark.parametrize(
    ("make", "changes", "says"),
    [
        (lambda: distiller_with(), {}, "without a method nothing can be learnt from them"),
        (lambda: distiller_with(NeedsLabels()), {}, r"none of the methods \(NeedsLabels\) can work without labels"),
        (lambda: distiller_with(PKD()), {"unlabelled_share": 0.01}, "none of the 9 steps would have images without"),
        (lambda: distiller_with(PKD().scheduled(start=9)), {}, r"start \(9\) and warmup \(0\) leave no step"),
    ],
)
def test_runs_that_could_not_use_the_images_are_refused(labelled, unlabelled, make, changes, says):
    with pytest.raises(KDError, match=says):
        train(make(), labelled, config(**changes), unlabelled=unlabelled, seed=0)
