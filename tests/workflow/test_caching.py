"""The teacher cache of `kd distill`: what the plan says of it, when it is chosen, and what a run leaves of it."""

import re

import pytest
import torch

from kdtoolkit.errors import KDError
from kdtoolkit.workflow import caching
from kdtoolkit.workflow.options import DistillOptions, ProbeOptions, TrainOptions, check_options
from kdtoolkit.workflow.prepare import prepare
from tests.workflow._data import TINY

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair(teacher, shapes):
    return {
        "teacher": str(teacher),
        "student": TINY,
        "student_weights": "none",
        "data": shapes,
        "method": "PKD",
        "batch_size": 4,
    }


def prepared(pair, kind=DistillOptions, **words):
    return prepare(check_options(kind, pair | words), CPU, lambda _: lambda done, total: None)


def test_a_cache_on_disk_is_chosen_where_views_come_again(pair):
    found = prepared(pair, epochs=20)
    line = found.plan["teacher cache"]
    assert (found.config.teacher_cache, found.options.teacher_cache) == ("disk", "disk")
    assert "teacher_cache" not in found.run_file.to_yaml()
    size = 8 * sum((64 // stride) ** 2 for stride in (8, 16, 32)) * 4  # channels, cells, bytes
    # 12 images, and their mirror images
    assert line.value == f"on disk, 24 views of {size / 1e3:.0f} kB: {24 * size / 1e3:.0f} kB"
    assert line.why == "each is shown 10.0 times on average"


@pytest.mark.parametrize(
    ("words", "value", "why"),
    [
        ({"epochs": 40}, "off", "colour and zoom: images never come again with the same pixels"),
        ({"epochs": 2}, "off", "views of 3 kB: .* a view is shown 1.[0-9] times on average: too seldom to pay"),
        ({"epochs": 20, "teacher_cache_gb": 1e-5}, "off", "24 views of 3 kB: 65 kB; more than 10 kB"),
        ({"epochs": 20, "teacher_cache": "off"}, "off", "you chose it"),
        (
            {"epochs": 2, "teacher_cache": "memory"},
            "in memory, .* views",
            "you chose it; each is shown .* times on average",
        ),
        (
            {"epochs": 20, "teacher_cache": "disk", "teacher_cache_gb": 1e-5},
            "on disk, 24 views of 3 kB: 65 kB; the first 10 kB are kept",
            "you chose it",
        ),
    ],
)
def test_the_plan_says_why(pair, words, value, why):
    line = prepared(pair, **words).plan["teacher cache"]
    assert re.search(value, line.value), line
    assert re.search(why, line.why), line


def test_a_cache_that_is_asked_for_leaves_colours_and_sizes_as_they_are(pair):
    found = prepared(pair, epochs=40, teacher_cache="memory")
    assert not found.config.never_repeat
    assert found.plan["augmentation"].why == "a teacher cache finds nothing if colour or size change"
    with pytest.raises(
        KDError, match=r"teacher_cache is memory, and augmentation\.colour gives an image different pixels"
    ):
        prepared(pair, teacher_cache="memory", train={"augmentation": {"colour": 0.1}})
    with pytest.raises(KDError, match="train: teacher_cache is an option of its own"):
        prepared(pair, train={"teacher_cache": "memory"})


def test_photos_are_counted_at_the_size_at_which_they_are_shown(pair, monkeypatch):
    counted = []
    whole = caching.forecast

    def counting(distiller, dataset, config, sizes, unlabelled, **rest):
        counted.extend(sizes)
        return whole(distiller, dataset, config, sizes, unlabelled, **rest)

    monkeypatch.setattr(caching, "forecast", counting)
    prepared(pair, epochs=20, image_size=48)
    assert counted == [(48, 48)] * 12


def test_a_probe_has_no_cache(pair):
    found = prepared(pair, ProbeOptions, epochs=20)
    assert "teacher cache" not in found.plan
    assert found.config.teacher_cache == "off"


def test_a_detector_without_a_teacher_has_no_cache(shapes):
    with pytest.raises(KDError, match="teacher_cache: only a student with a teacher has one: leave teacher_cache out"):
        check_options(TrainOptions, {"model": TINY, "data": shapes, "train": {"teacher_cache": "disk"}})
