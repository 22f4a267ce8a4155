"""Lines of JSON that go on where a run goes on, and Accelerate's trackers."""

import json
import os
from pathlib import Path

import pytest

from kdtoolkit import Distiller, KDError
from kdtoolkit.data import ProceduralShapes
from kdtoolkit.engine import folder as folders
from kdtoolkit.engine.log import Log
from kdtoolkit.engine.train import RunFolder, TrainConfig, train
from tests.conftest import tiny_gfl


def rows(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_log_goes_on_after_the_position_of_its_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    log = Log(path)
    for step in range(4):
        log.add({"step": step})
        if step == 1:
            log.flush()
            position = log.position
    assert rows(path) == [0, 1]
    log.flush()
    with path.open("a") as file:
        file.write('{"step": 4')  # half a line of a killed run
    again = Log(path, position)
    again.add({"step": 9})
    again.flush()
    assert rows(path) == [0, 1, 9]


def test_rows_that_could_not_be_written_wait(tmp_path, monkeypatch):
    log = Log(tmp_path / "log.jsonl")
    log.add({"step": 1})
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            log.flush()
    log.add({"step": 2})
    log.flush()
    assert rows(tmp_path / "log.jsonl") == [1, 2]


def test_a_log_that_was_cut_is_not_filled_with_nothing(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    log = Log(tmp_path / "log.jsonl", 100)
    assert log.missing == 88
    log.add({"step": 9})
    log.flush()
    assert rows(tmp_path / "log.jsonl") == [1, 9]


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(b""), Path.unlink])
def test_a_log_that_is_emptied_or_deleted_during_a_run_goes_on(tmp_path, change):
    log = Log(tmp_path / "log.jsonl")
    for step in (1, 2):
        log.add({"step": step})
        log.flush()
    change(tmp_path / "log.jsonl")
    log.add({"step": 3})
    log.flush()
    assert rows(tmp_path / "log.jsonl") == [3]
    assert log.position == (tmp_path / "log.jsonl").stat().st_size


def run(path, **options):
    data = ProceduralShapes(4, image_size=64, seed=0)
    student = tiny_gfl(seed=2, num_classes=len(data.class_names))
    config = TrainConfig(steps=3, batch_size=2)
    return train(Distiller(None, student), data, config, seed=0, folder=RunFolder(path, **options))


def test_tensorboard_has_every_step(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path / "mine", trackers=("tensorboard",))
    found = EventAccumulator(str(tmp_path / "mine" / "mine")).Reload()
    assert {"task/cls", "lr", "gradient_norm"} <= set(found.Tags()["scalars"])
    assert [event.step for event in found.Scalars("task/cls")] == [1, 2, 3]


@pytest.mark.parametrize(("name", "message"), [("tensorbord", "no tracker 'tensorbord'"), ("swanlab", "pip install")])
def test_a_tracker_that_is_not_there_is_told(tmp_path, name, message):
    with pytest.raises(KDError, match=message):
        run(tmp_path, trackers=(name,))


def test_speed_is_written_beside(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_SPEED_SECONDS", 0.0)
    run(tmp_path)
    found = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found] == [1, 2, 3]
    for row in found:
        assert row["images_per_second"] > 0
        assert 0 <= row["waiting_for_images"] <= 1
        assert row["memory_mb"] > 50
