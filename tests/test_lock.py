"""A folder is held by one process, and is free again however that process ends."""

import multiprocessing
import os
import signal

import pytest

from kdtoolkit import KDError
from kdtoolkit.lock import hold


def hold_until_killed(folder, held):
    with hold(folder):
        held.set()
        signal.pause()


def test_a_second_process_is_told_who_holds_the_folder_and_a_killed_one_holds_none(tmp_path):
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=hold_until_killed, args=(tmp_path, held))
    process.start()
    assert held.wait(20)
    with (
        pytest.raises(KDError, match=rf"process {process.pid} on .* works in .*: wait until it ends, stop it, or"),
        hold(tmp_path),
    ):
        pass
    (tmp_path / ".step.json.123.partial").write_text("half")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with hold(tmp_path):
        assert not list(tmp_path.glob(".*.partial"))  # what the killed one left half written
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"]


def test_a_holder_may_be_waited_for(tmp_path):
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=hold_until_killed, args=(tmp_path, held))
    process.start()
    assert held.wait(20)
    told = []

    def waiting(holder):
        told.append(holder)
        os.kill(process.pid, signal.SIGKILL)

    with hold(tmp_path, waiting):
        process.join()
    (holder,) = told
    assert holder.startswith(f"process {process.pid} on ")
    with hold(tmp_path, told.append):
        assert len(told) == 1


def test_what_another_run_below_is_writing_stays(tmp_path):
    with hold(tmp_path / "mine"):
        writing = tmp_path / "mine" / "checkpoints" / ".step.json.123.partial"
        leftover = tmp_path / "checkpoints" / ".step.json.124.partial"
        for path in (writing, leftover):
            path.parent.mkdir()
            path.write_text("half")
        with hold(tmp_path):
            assert writing.exists()
            assert not leftover.exists()


def test_errors_of_the_block_are_its_own_and_free_the_folder(tmp_path):
    with pytest.raises(OSError, match="mine"), hold(tmp_path):
        raise OSError("mine")
    with hold(tmp_path):
        pass
