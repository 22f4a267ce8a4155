"""The model of cost in benchmarks/speed/scale.py, where the answer is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.speed.parts import PAIRS, PLAIN, Scene
from benchmarks.speed.scale import (
    FIELDS,
    Counts,
    Device,
    Form,
    Training,
    count,
    forms,
    scenes_to_count,
    simulate,
    terms,
)

RUN = Training(images=64, epochs=10, gpus=2, batch=4, live=2.0, warm=1.0, miss=0.25, views=1, kept=10.0)


def test_arithmetic_and_traffic_are_counted_apart():
    layer, x = nn.Linear(4, 8, bias=False), torch.rand(3, 4)
    with torch.no_grad():
        found = count(lambda: layer(x).view(24).add(1.0))
    assert found.flops == 2 * 3 * 4 * 8
    assert found.bytes == 2 * 24 * 4  # the sum reads and writes 24 numbers; the view does nothing
    assert found.calls == 2


def test_a_form_goes_through_its_counts():
    wanted = Form(dict.fromkeys(FIELDS, (1000000.0, 2000000000.0, 3000000.0, 400000.0)))
    found = Form.through([(scene, wanted(scene)) for scene in scenes_to_count()])
    scene = Scene((800, 1216), images=8, classes=365, boxes=100)
    for name in FIELDS:
        assert getattr(found(scene), name) == pytest.approx(getattr(wanted(scene), name))


@pytest.mark.slow
def test_small_scenes_say_what_a_large_one_costs():
    pair, scene = PAIRS["gfl-tiny"], Scene((256, 384), images=2, classes=120, boxes=9)
    counted = forms(pair, "default", ["CrossKD+PKD"], [scene])
    found = forms(pair, "default", ["CrossKD+PKD"], scenes_to_count())
    for name in (PLAIN, "CrossKD+PKD"):
        ours, theirs = found[name](scene), counted[name](scene)
        assert ours.flops == pytest.approx(theirs.flops, rel=0.02)
        assert ours.bytes == pytest.approx(theirs.bytes, rel=0.1)
        assert ours.memory == pytest.approx(theirs.memory, rel=0.1)
    assert found["CrossKD+PKD"](scene).flops > found[PLAIN](scene).flops


def test_rates_are_found_again():
    device = Device("known", 5e10, 8e9, 2e5)
    scenes = [Scene((side, side), images, 10 * images) for side in (64, 128, 320) for images in (1, 4)]
    counts = [Counts(*(x * 10**power for x, power in zip(terms(each), (9, 8, 4), strict=False))) for each in scenes]
    found = Device.fitted("found", [(each, device.seconds(each)) for each in counts])
    assert (found.flops, found.bytes, found.calls) == pytest.approx((5e10, 8e9, 2e5))


def test_a_device_that_overlaps_waits_for_the_slower_side():
    counts = Counts(flops=1e9, bytes=1e6, calls=10)
    assert Device("busy", 1e9, 1e6, 1e9, overlaps=True).seconds(counts) == pytest.approx(2)
    assert Device("late", 1e12, 1e9, 2.0, overlaps=True).seconds(counts) == pytest.approx(5)


def test_with_one_view_the_first_epoch_fills_the_cache():
    found = simulate(RUN)
    assert found.known == pytest.approx(0.9)
    assert found.hours == pytest.approx(8 * (2 + 9 * 1) / 3600)
    assert found.stored == 640
    without = simulate(replace(RUN, cached=False))
    assert (without.known, without.stored) == (0, 0)
    assert without.hours == pytest.approx(80 * 2 / 3600)


def test_more_views_are_known_later_and_a_full_disk_knows_no_more():
    one, two = simulate(RUN), simulate(replace(RUN, views=2))
    assert 0.7 < two.known < one.known
    half = simulate(replace(RUN, room=320.0))
    assert half.stored == 320
    assert half.known == pytest.approx(0.45, abs=0.05)


def test_a_slow_disk_makes_the_gpus_wait():
    slow = simulate(replace(RUN, disk=40.0))  # a step moves 80 bytes: 2 seconds
    assert slow.waiting == pytest.approx(9 / 20)
    assert slow.hours == pytest.approx(80 * 2 / 3600)


def test_the_slowest_gpu_decides():
    alone, many = (simulate(replace(RUN, views=4, gpus=gpus, batch=4, images=256)) for gpus in (1, 16))
    steps = 10 * np.array([256 / 4, 256 / 64])
    assert many.hours / steps[1] > alone.hours / steps[0]
