"""AP and gradients measured in the middle of a training: at the right steps, and the training goes on unchanged."""

import hashlib
import json
import time

import pytest
import torch

from kdtoolkit import Distiller, KDError, adapt
from kdtoolkit.compatibility import why_refused
from kdtoolkit.data import Augmentation, ProceduralShapes, batches
from kdtoolkit.engine import measuring
from kdtoolkit.engine.evaluate import evaluate
from kdtoolkit.engine.measuring import equal_shares
from kdtoolkit.engine.memory import PeakMemory
from kdtoolkit.engine.train import RunFolder, TrainConfig, Validation, train
from kdtoolkit.errors import NonFiniteLossError
from kdtoolkit.methods import FBKD, MGD, PKD, all_methods
from kdtoolkit.probing import probe
from tests.conftest import first_of_each_kind, tiny_gfl, tiny_of

CLASSES = len(ProceduralShapes(1).class_names)
SHARE = 0.2


@pytest.fixture(scope="module")
def data():
    return ProceduralShapes(10, image_size=64, seed=0)


@pytest.fixture(autouse=True)
def two_batches(monkeypatch):
    monkeypatch.setattr(measuring, "PROBE_BATCHES", 2)


class Stopped(Exception):
    pass


def run(data, *, methods=(PKD,), steps=6, folder=None, measured=(None, ()), family=None, **changes):
    """Train. `measured`: the steps of evaluations and of probes. `family`: that of both detectors; None is GFL."""
    if family is None:
        teacher = tiny_gfl(seed=1, num_classes=CLASSES, neck_channels=8)
        student = tiny_gfl(seed=2, num_classes=CLASSES)
    else:
        teacher, student = (tiny_of(family, seed=seed, num_classes=CLASSES) for seed in (1, 2))
    config = TrainConfig(**{"steps": steps, "batch_size": 2, "warmup_steps": 2, **changes})
    distiller = Distiller(teacher, student, [method() for method in methods])
    evaluated, probed = measured
    result = train(
        distiller,
        data,
        config,
        seed=0,
        folder=folder,
        validation=None if evaluated is None else Validation(data, at=evaluated),
        probe_at=probed,
    )
    return distiller, result


def digest(module):
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in module.state_dict().values())).hexdigest()


@pytest.mark.parametrize(("steps", "count", "at"), [(10, 5, (2, 4, 6, 8, 10)), (7, 3, (3, 5, 7)), (2, 4, (1, 2))])
def test_equal_shares_end_at_the_last_step(steps, count, at):
    assert equal_shares(steps, count) == at


@pytest.mark.parametrize(
    "changes",
    [
        {"methods": (lambda: PKD().held_at(share=SHARE), FBKD, MGD), "accumulation": 2},  # they hold, learn and draw
        {"methods": (PKD,), "ema": 0.9, "frozen_statistics": ("backbone",), "precision": "float16"},
    ],
)
def test_what_is_measured_does_not_change_the_training(data, changes):
    plain, without = run(data, **changes)
    found, result = run(data, measured=((2,), (1, 4)), **changes)
    assert digest(found.student) == digest(plain.student)
    assert digest(found.methods) == digest(plain.methods)
    assert result.history == without.history
    assert result.warnings == without.warnings
    assert [row["step"] for row in result.evaluations] == [2]
    assert [row["step"] for row in result.probes] == [1, 4]


@pytest.fixture(scope="module")
def specs():
    return {family: adapt(tiny_of(family, seed=0)).spec for family in first_of_each_kind()}


@pytest.mark.slow
@pytest.mark.parametrize("name", all_methods())
def test_no_method_keeps_what_a_probe_has_shown_it(data, specs, name):
    method = all_methods()[name]
    family = next(family for family, spec in specs.items() if why_refused(method, spec, spec) is None)
    plain, without = run(data, methods=(method,), steps=3, family=family)
    found, result = run(data, methods=(method,), steps=3, family=family, measured=(None, (1,)))
    assert len(result.probes) == 1
    assert digest(found.student) == digest(plain.student)
    assert digest(found.methods) == digest(plain.methods)
    assert result.history == without.history


def test_a_probe_is_that_of_the_student_at_that_step(data):
    distiller, result = run(data, measured=((6,), (6,)))
    shown = batches(data, batch_size=2, steps=2, seed=0, augment=Augmentation())
    found = probe(distiller, [batch[:2] for batch in shown])
    (row,) = result.probes
    assert row["conflict/pkd"] == pytest.approx(found.methods["pkd"].parts["all"].cosine)
    assert row["share/pkd"] == pytest.approx(found.methods["pkd"].parts["all"].share)
    assert row["conflict/task"] == pytest.approx(found.agreement["all"])
    assert result.evaluations[0]["eval/ap"] == evaluate(distiller.student, data).ap


def test_a_share_is_that_of_the_weights_at_that_step(data):
    methods = (
        lambda: PKD().scheduled(stop=4, decay=3),
        lambda: FBKD().held_at(share=SHARE),
        lambda: PKD().scheduled(every=2),
    )
    _, result = run(data, methods=methods, measured=(None, (1, 2, 6)))
    first, second, last = result.probes
    assert first["share/pkd"] > second["share/pkd"] > last["share/pkd"] == 0
    assert last["conflict/pkd"]  # which way it would pull
    assert all(abs(row["share/fbkd"] - SHARE) < 0.15 for row in result.probes)
    assert all(row["share/pkd2"] > 0 for row in result.probes)  # also after a step in which it was not run


def test_a_stopped_run_measures_as_one_that_was_not_stopped(data, tmp_path, monkeypatch):
    measured = ((2, 4), (2, 4, 5))
    _, whole = run(data, measured=measured, folder=RunFolder(tmp_path / "whole", save_steps=3))
    probed, calls = measuring.probe_batches, []

    def stop(*args, **options):
        calls.append(args)
        if len(calls) == 2:  # in step 4, after the checkpoint of step 3
            raise Stopped
        return probed(*args, **options)

    monkeypatch.setattr(measuring, "probe_batches", stop)
    with pytest.raises(Stopped):
        run(data, measured=measured, folder=RunFolder(tmp_path / "stopped", save_steps=3))
    _, again = run(data, measured=measured, folder=RunFolder(tmp_path / "stopped", save_steps=3))
    assert again.probes == whole.probes
    assert again.evaluations == whole.evaluations
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "stopped")]
    assert logs[0] == logs[1]
    assert [row["step"] for row in map(json.loads, logs[0]) if "conflict/pkd" in row] == [2, 4, 5]


def test_its_time_and_memory_do_not_count(data, monkeypatch):
    clock = [0.0]
    probed = measuring.probe_batches

    def slow(*args, **options):
        clock[0] += 1000.0
        return probed(*args, **options)

    now = time.perf_counter
    monkeypatch.setattr("time.perf_counter", lambda: now() + clock[0])
    monkeypatch.setattr(measuring, "probe_batches", slow)
    _, result = run(data, measured=(None, (1, 3)))
    assert result.seconds < 1000
    assert result.step_ms < 1000


def test_a_loss_that_is_not_finite_in_a_probe_leaves_a_gap(data, monkeypatch):
    def broken(*_, **__):
        raise NonFiniteLossError("pkd/feature is nan")

    monkeypatch.setattr(measuring, "probe", broken)
    _, result = run(data, measured=(None, (2,)))
    assert result.probes == [{"step": 2, "conflict/pkd": None, "share/pkd": None}]
    assert result.steps == 6


def test_what_cannot_be_probed_is_told_before_the_first_step(data):
    with pytest.raises(KDError, match="name a teacher and a method"):
        run(data, methods=(), measured=(None, (2,)))


def test_peak_memory_is_that_of_the_training(data, monkeypatch):
    peaks = iter([100.0, 900.0, 900.0])
    monkeypatch.setattr("kdtoolkit.engine.memory.peak_memory_mb", lambda device: next(peaks))
    _, result = run(data, measured=((2, 4), ()))
    assert result.peak_memory_mb == 100.0


def test_on_a_gpu_the_peak_begins_anew_with_the_training_and_after_each_pause(monkeypatch):
    peak = [500.0]  # of what the process did before
    monkeypatch.setattr("kdtoolkit.engine.memory.peak_memory_mb", lambda device: peak[0])
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device: peak.__setitem__(0, 50.0))
    memory = PeakMemory(torch.device("cuda"))
    assert memory.read() == 50.0
    peak[0] = 100.0
    with memory.paused():
        peak[0] = 900.0
    assert memory.read() == 100.0
    peak[0] = 120.0  # a later step
    assert memory.read() == 120.0
