import errno
import json
import os

import pytest
import torch

from kdtoolkit.benchmark.store import (
    FORMAT,
    Store,
    StoreError,
    are_whole,
    intact_result,
    read_result,
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
