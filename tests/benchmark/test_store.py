import errno
import json
import os
from pathlib import Path

import pytest
import torch

from kdtoolkit.benchmark.store import (
    FORMAT,
    Computed,
    DamagedError,
    Store,
    StoreError,
    are_whole,
    intact_result,
    read_result,
    set_aside,
    usable_result,
    write_atomic,
    write_result,
    write_weights,
)
from kdtoolkit.errors import KDError
from tests.benchmark._suite import made_up


def test_results_read_back(tmp_path):
    result = made_up("PKD", 1, 12.5)
    path = Store(tmp_path / "run").result_path("PKD", 1)
    assert read_result(path) is None
    model = torch.nn.Linear(2, 1)
    write_weights(path.with_suffix(".pt"), model)
    write_result(path, result)
    assert read_result(path) == result
    assert are_whole(path.with_suffix(".pt"))
    weights = torch.load(path.with_suffix(".pt"), weights_only=True)
    assert torch.equal(weights["weight"], model.weight)
    assert sorted(file.name for file in path.parent.iterdir()) == ["seed1.json", "seed1.pt"]


def test_a_result_of_an_earlier_version_counts_as_computed_plainly(tmp_path):
    path = tmp_path / "seed0.json"
    stored = made_up("PKD", 0, 12.5, key_parts={"precision": "bfloat16"}).model_dump(mode="json")
    del stored["computed"]
    path.write_text(json.dumps(stored))
    assert read_result(path).computed == Computed(precision="bfloat16", channels_last=False, winograd=False)


@pytest.mark.parametrize("size", [0, 10, -1])
def test_what_was_cut_short_is_not_whole(tmp_path, size):
    path = tmp_path / "seed0.json"
    write_weights(path.with_suffix(".pt"), torch.nn.Linear(2, 1))
    write_result(path, made_up("PKD", 0, 12.5))
    for file in (path, path.with_suffix(".pt")):
        file.write_bytes(file.read_bytes()[:size])
    assert not are_whole(path.with_suffix(".pt"))
    with pytest.raises(KDError, match=r"seed0\.json is damaged"):
        read_result(path)
    assert not are_whole(tmp_path / "absent.pt")


def test_a_result_of_a_newer_version_is_an_error_and_stays(tmp_path):
    path = tmp_path / "seed0.json"
    newer = {"format": FORMAT + 1, "entry": ["of", "a", "new", "kind"]}
    path.write_text(json.dumps(newer))
    write_weights(path.with_suffix(".pt"), torch.nn.Linear(2, 1))
    for read in (read_result, intact_result, lambda path: usable_result(path, lambda found: True)):
        with pytest.raises(KDError, match=r"seed0\.json was made by a newer kdtoolkit, in format 3.*pip install -U"):
            read(path)
    assert json.loads(path.read_text()) == newer


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "board.md"
    write_atomic(path, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"cannot write .*board\.md: No space left on device"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot write .*file/run"), Store(tmp_path / "file" / "run").lock():
        pass


def test_only_one_holds_the_lock(tmp_path):
    store = Store(tmp_path / "run")
    held = rf"process {os.getpid()} on .* works in .*run: wait until it ends"
    with store.lock(), pytest.raises(KDError, match=held), Store(store.root).lock():
        pass
    with store.lock():  # free again
        pass


def test_the_lock_clears_what_a_killed_run_left(tmp_path):
    leftover = tmp_path / "run" / "cells" / "PKD" / ".seed0.pt.123.partial"
    leftover.parent.mkdir(parents=True)
    leftover.write_text("half")
    with Store(tmp_path / "run").lock():
        assert not leftover.exists()


def test_nothing_that_is_set_aside_takes_the_place_of_what_was_set_aside_before(tmp_path):
    path = tmp_path / "seed0.json"
    for content in ("first", "second", "third"):
        for file in (path, path.with_suffix(".pt"), path.with_suffix(".detections.npz")):
            file.write_text(content)
        old = set_aside(path)
        assert not path.exists()
        for name in ("seed0.json", "seed0.pt", "seed0.detections.npz"):
            assert (tmp_path / f"{name}{old.name.removeprefix('seed0.json')}").read_text() == content
    assert old.name == "seed0.json.old3"


def test_a_file_that_cannot_be_read_is_not_damaged(tmp_path, monkeypatch):
    path = tmp_path / "seed0.json"
    write_result(path, made_up("PKD", 0, 12.5))
    write_weights(path.with_suffix(".pt"), torch.nn.Linear(2, 1))

    def refused(*_, **__):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "open", refused)
    monkeypatch.setattr(Path, "read_bytes", refused)
    for read in (intact_result, lambda file: are_whole(file.with_suffix(".pt"))):
        with pytest.raises(KDError, match=r"cannot read .*seed0\.(json|pt): Permission denied") as error:
            read(path)
        assert not isinstance(error.value, DamagedError)


def test_a_result_without_a_metric_is_damaged(tmp_path):
    path = tmp_path / "seed0.json"
    raw = json.loads(made_up("PKD", 0, 12.5).model_dump_json())
    path.write_text(json.dumps({**raw, "evaluation": {}}))
    with pytest.raises(DamagedError, match=r"seed0\.json is damaged"):
        read_result(path)
