"""A cell on a machine that has none of the run's files: here a folder that stands for its disk."""

import re
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from kdtoolkit.benchmark import cell
from kdtoolkit.benchmark.datasets import load_data
from kdtoolkit.benchmark.needs import places_of_data
from kdtoolkit.benchmark.parcels import cache_folder
from kdtoolkit.benchmark.plan import Plan
from kdtoolkit.benchmark.remote import Begun, Done, Sent, run_shipped
from kdtoolkit.benchmark.store import CellResult, Store, read_result
from kdtoolkit.benchmark.suite import BASELINE, change
from tests.benchmark._suite import tiny


@pytest.fixture
def node(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    (tmp_path / "node").mkdir()


def shipped(suite, root):
    """The task of a baseline, and what is sent with it."""
    sets = load_data(suite.data, Store(root).pictures)
    task = Plan(suite, Store(root), sets, device="cpu", threads=1).cell(BASELINE, 0)
    places = places_of_data(task.data, sets, task.pictures)
    return task, [Sent(each.path, each.inside, each.parcel.digest, partial(each.parcel.pieces)) for each in places]


def test_a_cell_elsewhere_gives_the_result_that_it_gives_here(tmp_path, node):
    task, sent = shipped(tiny(), tmp_path / "runs" / "tiny")
    first, *reports, done = run_shipped(task, sent, "cell")
    assert isinstance(first, Begun)
    assert all(isinstance(each, cell.Report) for each in reports)
    assert done.failure is None
    assert set(done.files) >= {"seed0.json", "seed0.pt"}
    there = CellResult.model_validate_json(done.files["seed0.json"])
    assert not list((cache_folder() / "cells").rglob("seed0*"))
    assert not task.result.exists()
    cell.run(task, lambda report: None)
    here = read_result(task.result)
    assert (there.key, there.history, there.evaluation) == (here.key, here.history, here.evaluation)
    (tmp_path / "their.pt").write_bytes(done.files["seed0.pt"])
    mine, theirs = (torch.load(path, weights_only=True) for path in (task.weights, tmp_path / "their.pt"))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_killed_cell_is_lost_and_an_error_is_not(tmp_path, node):
    flag = tmp_path / "flag"
    flag.write_text("")
    suite = tiny(("model: kdtoolkit/gfl\n  args: *detector", "model: tests.benchmark._models:fragile\n  args: {}"))
    args = {**tiny().student.args, "flag": str(flag)}
    suite = suite.model_copy(update={"student": suite.student.model_copy(update={"args": args})})
    task, sent = shipped(suite, tmp_path / "runs" / "tiny")
    *_, done = run_shipped(task, sent, "cell")
    assert done.lost
    assert "SIGKILL" in done.failure.message
    (cache_folder() / "cells" / "cell" / "seed0.json").write_text("of an earlier version of the suite")
    bad = replace(task, detector=task.detector.model_copy(update={"args": {"backbone": "resnet10t", "x": 1}}))
    *_, done = run_shipped(bad, sent, "cell")
    assert (done.lost, set(done.files)) == (False, {"seed0.log"} & set(done.files))
    assert "x" in done.failure.message


def test_a_node_with_different_source_code_or_versions_is_refused(tmp_path, node):
    task, sent = shipped(tiny(), tmp_path / "runs" / "tiny")
    for changed, what in (
        (replace(task, source="12345678"), "kdtoolkit's source code than the run: .* not 12345678"),
        (replace(task, parts={**task.parts, "torch": "1.0"}), "torch than the run: .* not 1.0"),
        (replace(task, parts={**task.parts, "device": "NVIDIA A100"}), "device than the run: cpu, not NVIDIA A100"),
    ):
        _, done = run_shipped(changed, sent, "cell")
        assert isinstance(done, Done)
        assert not done.lost
        assert re.search(what, done.failure.message)


def test_a_disk_that_is_full_is_the_nodes_fault_and_no_reason_to_end_the_run(tmp_path, node):
    task, sent = shipped(tiny(), tmp_path / "runs" / "tiny")
    (cache_folder() / "cells").write_text("not a folder")
    _, done = run_shipped(task, sent, "cell")
    assert done.lost
    assert not done.failure.fatal
    assert str(Path("cells", "cell")) in done.failure.message


def test_a_cell_that_was_cut_off_goes_on_in_its_folder_and_ends_with_the_same_result(tmp_path, node):
    train = {"steps": 60, "batch_size": 2, "warmup_steps": 0}
    suite = change(tiny(), student={**tiny().student.model_dump(), "train": train})
    task, sent = shipped(suite, tmp_path / "runs" / "tiny")
    messages = run_shipped(task, sent, "cell")
    assert any(isinstance(each, cell.Report) and each.step for each in messages)  # it trains
    messages.close()
    (left,) = (cache_folder() / "cells").glob("*/*.run")
    assert left.name == task.run_folder.name
    *_, done = run_shipped(task, sent, "cell")
    assert CellResult.model_validate_json(done.files["seed0.json"]).history[-1]["step"] == 60
    assert not left.exists()


def test_curves_for_tensorboard_and_settings_are_those_of_the_run(tmp_path, node):
    pytest.importorskip("tensorboard")
    task, sent = shipped(tiny(), tmp_path / "runs" / "tiny")
    task = replace(task, tracked_in=tmp_path / "runs" / "tiny" / "tensorboard" / "baseline" / "seed0")
    *_, done = run_shipped(task, sent, "cell")
    assert done.failure is None
    assert any("tfevents" in name for name in done.tracked)
    assert set(done.files) >= {"seed0.json", "seed0.pt", "seed0.detections.npz"}
    assert CellResult.model_validate_json(done.files["seed0.json"]).settings == task.settings
    assert not task.tracked_in.exists()
