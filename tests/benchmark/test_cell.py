"""A cell that was interrupted goes on within its training, and leaves nothing but its result."""

import errno
import os

import pytest
import torch

from kdtoolkit.benchmark import cell
from kdtoolkit.benchmark.cell import build_detector
from kdtoolkit.benchmark.datasets import load_data
from kdtoolkit.benchmark.detections_file import detections_path, read_detections
from kdtoolkit.benchmark.plan import Plan
from kdtoolkit.benchmark.store import Computed, Store, StoreError, discard_runs, read_result, write_weights
from kdtoolkit.benchmark.suite import BASELINE, change
from kdtoolkit.engine import measuring
from kdtoolkit.engine.breakdown import breakdown
from kdtoolkit.engine.evaluate import evaluate
from tests.benchmark._suite import tiny


class Stopped(Exception):
    pass


def task_in(root, *changes):
    suite = tiny(*changes)
    store = Store(root / "run")
    plan = Plan(suite, store, load_data(suite.data), device="cpu", threads=torch.get_num_threads())
    return plan.cell(BASELINE, 0)


SOME = ("bins: 5", "bins: 5\n    score_threshold: 0.0")  # a detector that was hardly trained detects something


def test_detections_count_as_the_suite_says_also_before_the_end(tmp_path, monkeypatch):
    limits = []

    def counting(*args, max_detections, **options):
        limits.append(max_detections)
        return evaluate(*args, max_detections=max_detections, **options)

    for module in (cell, measuring):
        monkeypatch.setattr(module, "evaluate", counting)
    changed = ("val_images: 4", "val_images: 4\n  max_detections: 7"), ("entries:", "plateau: true\nentries:")
    task = task_in(tmp_path, SOME, *changed)
    cell.run(task, lambda report: None)
    assert len(limits) > 1
    assert set(limits) == {7}
    assert task.parts == {
        **task_in(tmp_path, SOME).parts,
        "max_detections": "7",
    }  # cells of COCO's number keep their key
    parts = read_result(task.result).breakdown
    assert parts.max_detections == 7
    assert sum(each.count for each in parts.calibration) <= 4 * 6 * 7  # images, classes


def test_a_cell_stores_where_its_ap_comes_from_and_what_an_image_costs(tmp_path):
    task = task_in(tmp_path, SOME)
    cell.run(task, lambda report: None)
    result = read_result(task.result)
    found = read_detections(detections_path(task.result), result)
    truth = load_data(task.data).val.coco()
    assert result.breakdown.by_class == pytest.approx(result.per_class)
    assert result.breakdown.errors == pytest.approx(breakdown(truth, found).errors, abs=0.01)
    assert sum(each.count for each in result.breakdown.calibration) == len(found.scores) > 0
    assert result.inference.size == (64, 64)
    assert result.inference.parameters == result.parameters
    assert result.computed == Computed(precision=result.key_parts["precision"], channels_last=True)  # as on any CPU


def test_an_interrupted_cell_goes_on_within_its_training(tmp_path, monkeypatch):
    monkeypatch.setattr(cell, "SAVE_SECONDS", 0.0)  # a checkpoint a step
    told = []

    def stop(report):
        if report.phase.startswith("evaluating"):
            raise Stopped

    whole, task = task_in(tmp_path / "whole"), task_in(tmp_path / "stopped")
    cell.run(whole, lambda report: None)
    with pytest.raises(Stopped):
        cell.run(task, stop)
    old = task.result.with_suffix(".0123.run")
    old.mkdir()  # of a training whose key was another
    assert task.run_folder.is_dir()
    cell.run(task, told.append)
    assert not any(report.phase == "training" for report in told)  # all of it was done
    files = [{path.name: path for path in result.parent.iterdir()} for result in (whole.result, task.result)]
    assert files[0].keys() == files[1].keys() == {"seed0.json", "seed0.pt", "seed0.detections.npz"}
    one, two = (torch.load(found["seed0.pt"], weights_only=True) for found in files)
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_training_that_cannot_be_stored_is_the_fault_of_the_disk(tmp_path, monkeypatch):
    task = task_in(tmp_path)
    sync = os.fsync

    def full(handle):
        if any(task.run_folder.glob("checkpoints/.step-*")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"No space left on device; there is none yet\. Free space"):
        cell.run(task, lambda report: None)


def test_a_curve_and_a_probe_change_nothing_but_what_is_stored_of_them(tmp_path):
    found = {}
    for name, options in {"plain": {}, "both": {"curve": 3, "probe": 1}}.items():
        suite = change(
            tiny(), student={**tiny().student.model_dump(), "train": {"steps": 3, "batch_size": 2}}, **options
        )
        store = Store(tmp_path / name)
        plan = Plan(suite, store, load_data(suite.data), device="cpu", threads=torch.get_num_threads())
        task = plan.cell("PKD", 0)
        teacher = build_detector(task.teacher_detector, load_data(suite.data).student.class_names, 0)
        write_weights(task.teacher_weights, teacher.model)
        cell.run(task, lambda report: None)
        found[name] = (
            read_result(task.result),
            torch.load(task.weights, weights_only=True),
            task,
            plan.cell(BASELINE, 0),
        )
    (plain, weights, task, _), (both, same, measured, baseline) = found.values()
    assert all(torch.equal(value, same[name]) for name, value in weights.items())
    assert (plain.key, plain.history, plain.evaluation) == (both.key, both.history, both.evaluation)
    assert plain.evaluations == [{"step": 3, "ap": plain.evaluation["ap"], "ap50": plain.evaluation["ap50"]}]
    assert [set(row) - {"step", "ap", "ap50"} for row in both.evaluations] == [
        set(),
        set(),
        {"conflict/task", "conflict/pkd", "share/pkd"},
    ]
    assert [row["step"] for row in both.evaluations] == [1, 2, 3]
    assert both.evaluations[-1].items() > plain.evaluations[-1].items()
    assert task.run_folder.name != measured.run_folder.name  # an unfinished training begins again
    assert (baseline.evaluated_at, baseline.probed_at) == ((1, 2), ())


def test_a_training_goes_on_with_curves_for_tensorboard_or_without(tmp_path):
    suite, store = tiny(), Store(tmp_path / "run")
    sets = load_data(suite.data)
    without, tracked = (
        Plan(suite, store, sets, device="cpu", threads=1, tensorboard=asked).cell(BASELINE, 0)
        for asked in (False, True)
    )
    assert tracked.evaluated_at == (tracked.steps,)
    assert tracked.run_folder == without.run_folder


def test_tensorboard_gets_losses_and_ap_of_each_cell(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    suite, store = tiny(), Store(tmp_path / "run")
    task = Plan(suite, store, load_data(suite.data), device="cpu", threads=1, tensorboard=True).cell(BASELINE, 1)
    cell.run(task, lambda report: None)
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard" / BASELINE / "seed1")).Reload()
    assert [event.step for event in found.Scalars("task/cls")] == [1, 2]
    (last,) = found.Scalars("eval/ap")
    result = read_result(task.result)
    assert (last.step, last.value) == (2, pytest.approx(result.evaluation["ap"]))
    assert [row["step"] for row in result.evaluations] == [2]
    assert not task.run_folder.exists()


def test_only_a_cells_own_folders_are_discarded(tmp_path):
    for name in ("seed1.a.run", "seed1.b.run", "seed10.a.run"):
        (tmp_path / name).mkdir()
    discard_runs(tmp_path / "seed1.json", but=tmp_path / "seed1.b.run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed1.b.run", "seed10.a.run"]
