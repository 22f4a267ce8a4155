"""The parts of a step that benchmarks/speed/step.py measures, on a tiny pair."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed import step
from benchmarks.speed.parts import CONTINUATION, FEATURES, PAIRS, PLAIN, SETTINGS, TEACHER, Parts, Scene

SCENE = Scene((64, 64), classes=3, boxes=2)
PAIR = PAIRS["gfl-tiny"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run():
    methods = ["CrossKD", "PKD", "KDDETR"]
    return step.measure("tiny", PAIR, SCENE, ["reference", "default", "cache"], methods, rounds=2, device=CPU)


def test_a_step_computes_what_its_parts_compute():
    parts = Parts(PAIR, SCENE, SETTINGS["reference"], ["CrossKD", "PKD"], CPU)
    flops = {}
    for name, work in parts.works.items():
        with FlopCounterMode(display=False) as counter:
            work()
        flops[name] = counter.get_total_flops()
    assert flops["CrossKD"] == flops[PLAIN] + flops[TEACHER] + flops[CONTINUATION]
    assert flops["PKD"] == flops[PLAIN] + flops[FEATURES]
    assert 0 < flops[FEATURES] < flops[TEACHER]


def test_settings_compute_the_same_losses(run):
    for name, found in run.steps():
        assert {key.partition("/")[0] for key in found.observed.losses} == {"task", found.part.lower()}
        assert step.largest_difference(found.observed, run.measured["reference", found.part].observed) < 1e-4
        plain = run.measured[run.arithmetic(name), PLAIN].observed.losses
        assert {key: found.observed.losses[key] for key in plain} == plain


def test_a_warm_cache_asks_the_teacher_nothing(run):
    assert run.arithmetic("cache") == "default"
    assert ("cache", PLAIN) not in run.measured
    parts = Parts(PAIR, SCENE, SETTINGS["cache"], ["CrossKD"], CPU)
    parts.warm_up(parts.works["CrossKD"])
    assert parts.cache.misses == SCENE.images
    with FlopCounterMode(display=False) as counter:
        parts.works["CrossKD"]()
    cached = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        parts.works[PLAIN]()
        parts.works[CONTINUATION]()
    assert cached == counter.get_total_flops()


def test_a_step_needs_the_memory_of_its_parts(run):
    peaks = {part: found.observed.peak_mb for (name, part), found in run.measured.items() if name == "reference"}
    assert peaks["CrossKD"] > peaks[PLAIN] > peaks[CONTINUATION] > 0


def test_ratios_are_of_the_rounds(run):
    (_, crosskd), *_ = run.steps()
    parts = [run.measured["reference", name].ms for name in (PLAIN, TEACHER, CONTINUATION)]
    assert run.beyond("reference", crosskd) == [d / (a + b + c) for d, a, b, c in zip(crosskd.ms, *parts, strict=True)]
    pkd = run.measured["reference", "PKD"]
    features = run.measured["reference", FEATURES].ms
    assert run.beyond("reference", pkd) == [d / (a + b) for d, a, b in zip(pkd.ms, parts[0], features, strict=True)]
    assert len(crosskd.ms) == 2


def test_a_table_has_a_row_for_each_combination_and_setting(run):
    head, *rows = step.steps_table(run)
    assert [row[:2] for row in rows] == [[m, s] for m in ("CrossKD", "PKD") for s in ("reference", "default", "cache")]
    assert {len(row) for row in [head, *rows]} == {len(head)}
    assert "queries" in run.refused["KDDETR"]


def test_what_is_written_has_all_samples(run, tmp_path):
    step.write(tmp_path, "here", {("tiny", SCENE.size): run})
    stored = json.loads((tmp_path / "step.json").read_text("utf-8"))
    assert stored["facts"] == "here"
    assert [each["ms"] for each in stored["measured"]] == [each.ms for each in run.measured.values()]
    text = (tmp_path / "step.md").read_text("utf-8")
    assert "KDDETR: " in text
    assert "| CrossKD | reference | " in text


@pytest.mark.slow
def test_a_profile_says_which_operations_a_step_has_beyond_its_parts(run):
    parts = Parts(PAIR, SCENE, SETTINGS["reference"], ["PKD"], CPU)
    (_, *total), *rows = step.excess(parts, run.measured["reference", "PKD"])
    more, whole, alone = map(float, total)
    assert more == pytest.approx(whole - alone, abs=0.1)
    assert all(float(row[1]) >= float(after[1]) for row, after in pairwise(rows))


def test_boxes_lie_in_the_image():
    scene = replace(SCENE, size=(40, 60), boxes=30)
    images, targets = scene.batch(CPU)
    assert images[0].shape == (3, 40, 60)
    for target in targets:
        assert (target["boxes"] >= 0).all()
        assert (target["boxes"] <= torch.tensor([60, 40, 60, 40])).all()
