"""Runs are shown while they work, from their files alone; ended and dead ones are told as such."""

import io
import os
import socket
import subprocess
import sys
import threading

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kdtoolkit.benchmark import status as statuses
from kdtoolkit.benchmark import watch as watching
from kdtoolkit.benchmark.cell import Report
from kdtoolkit.benchmark.plan import Plan
from kdtoolkit.benchmark.status import POINTS, Status, StatusFile, read_status
from kdtoolkit.benchmark.store import Store, write_atomic
from kdtoolkit.benchmark.suite import BASELINE, TEACHER
from kdtoolkit.benchmark.watch import GONE_SECONDS, SILENT_SECONDS, State, watch
from kdtoolkit.cli import app
from kdtoolkit.errors import KDError
from tests.benchmark._suite import made_up, store_result, tiny

LOSSES = {"task/cls": 0.5, "task/box": 0.25, "pkd/feature": 3.0}


class Images:
    def fingerprint(self):
        return "0"


class Sets:
    teacher = student = val = Images()
    unlabelled = None


@pytest.fixture
def store(tmp_path):
    """A run with some finished cells."""
    store = Store(tmp_path / "runs" / "tiny")
    write_atomic(store.suite_path, tiny().to_yaml().encode())
    for row, seed, ap in ((BASELINE, 0, 20.0), (BASELINE, 1, 23.0), ("PKD", 0, 25.5)):
        store_result(store.result_path(row, seed), made_up(row, seed, ap))
    store_result(store.teacher_copy, made_up(TEACHER, 0, 40.0))
    return store


@pytest.fixture
def task(store):
    return Plan(tiny(), store, Sets(), device="cpu", threads=1).cell("PKD", 1)


def shown(path, *, once=True, terminal=False, **options):
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None, **options)
    watch(path, console=console, once=once)
    return console.file.getvalue()


def write(store, **changes):
    status = Status(**{"process": os.getpid(), "host": socket.gethostname(), "done": 4, "cells": 9, **changes})
    write_atomic(store.status_path, status.model_dump_json().encode())


def aged(store, seconds):
    """The status as if it had been written so long ago."""
    written = store.status_path.stat().st_mtime - seconds
    os.utime(store.status_path, (written, written))


def flat(text):
    return " ".join(text.split())


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_at_work_shows_cells_losses_ap_and_the_time_left(store, task, terminal, monkeypatch):
    monkeypatch.setattr(statuses, "WRITE_SECONDS", 0.0)
    file = StatusFile(store.status_path)
    report = Report("training", 2, LOSSES, 0.5, evaluated=((1, None), (1, 10.0), (2, 12.5)))
    for step in (1, 2):
        file.note(task, Report("training", step, {"task/cls": 3.0 - step}))
    file.update(4, 9, 750.0, {task: report}, {"baseline, seed 0": "no [red]space[/]"})
    text = shown(store.root, terminal=terminal)
    assert "tiny: 4 of 9 cells done, about 12 min left" in text
    assert f"process {os.getpid()} on {socket.gethostname()}" in flat(text)
    for part in ("PKD, seed 1  training  2/2  250 ms/step", "task 0.75  pkd 3", "loss █▁", "AP ▁█ 12.5 after step 2"):
        assert part in text
    assert "FAILED    baseline, seed 0: no [red]space[/]" in text  # no markup
    assert "baseline 2 21.5 20.0 to 23.0" in flat(text)
    assert "PKD 1 25.5" in flat(text)
    assert "teacher 1 40.0" in flat(text)


def test_terminals_without_unicode_get_curves_too(store, task):
    write(store, running=[cell(totals=((1, 2.0), (2, 1.0)))])
    console = Console(file=io.TextIOWrapper(io.BytesIO(), "ascii"), width=80)
    watch(store.root, console=console, once=True)
    console.file.seek(0)
    assert "loss #_" in console.file.read()


def cell(**changes):
    fields = {"name": "PKD, seed 1", "phase": "training", "step": 1, "steps": 2, "step_ms": None, "losses": {}}
    return {**fields, "totals": (), "evaluated": (), **changes}


@pytest.mark.parametrize(
    ("changes", "age", "state", "words"),
    [
        ({}, 0, State.RUNNING, "4 of 9 cells done, no estimate of the time left yet"),
        ({}, 60, State.RUNNING, "no sign of life for 6"),
        ({"cells": 0}, 0, State.RUNNING, "starting"),
        ({}, SILENT_SECONDS + 5, State.DEAD, "dead. Its last sign of life, 4 of 9 cells done, is 5."),
        ({"host": "elsewhere", "process": 1}, 0, State.RUNNING, "process 1 on elsewhere"),
        ({"host": "elsewhere"}, SILENT_SECONDS + 5, State.DEAD, "The same `kd benchmark run` goes on from there"),
        ({"ended": "with all its cells done"}, 7200, State.ENDED, "ended 2 h 0 min ago, with all its cells done"),
    ],
)
def test_each_state_of_a_run_is_told(store, changes, age, state, words):
    write(store, **changes)
    aged(store, age)
    assert watching.Watched(store.root).look().state is state
    assert words in flat(shown(store.root))


@pytest.mark.skipif(os.name != "posix", reason="only there are processes looked for by their numbers")
def test_a_killed_process_is_told_once_its_status_is_old(store):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    write(store, process=process.pid)
    assert watching.Watched(store.root).look().state is State.RUNNING  # a container of the same name may write it
    aged(store, GONE_SECONDS + 1)
    assert "dead" in shown(store.root, once=False)  # and it returns


@pytest.mark.parametrize("content", [None, b"{", b'{"process": "of a later version"}'])
def test_without_a_status_that_can_be_read_it_shows_what_is_stored(store, content):
    if content is not None:
        write_atomic(store.status_path, content)
    text = shown(store.root, once=False)
    assert "no run works here, or none that has left a status; it has 3 finished cells" in flat(text)
    assert "baseline 2 21.5" in flat(text)


def test_all_runs_of_a_folder_are_shown_and_those_at_work_in_full(store):
    write(store)
    older = Store(store.root.parent / "older")
    write_atomic(older.suite_path, tiny().to_yaml().encode())
    store_result(older.result_path("PKD", 0), made_up("PKD", 0, 77.0))
    write(older, ended="interrupted")
    text = shown(store.root.parent)
    assert "older: ended" in text
    assert "77.0" not in text
    assert "PKD 1 25.5" in flat(text)


@pytest.mark.parametrize("terminal", [True, False])
def test_it_follows_a_run_and_ends_with_it(store, monkeypatch, terminal):
    looks = iter(
        [
            lambda: write(store, done=4),
            lambda: (store_result(store.result_path("PKD", 1), made_up("PKD", 1, 30.5)), write(store, done=5)),
            lambda: write(store, done=5, ended="with all its cells done"),
        ]
    )
    write(store)
    monkeypatch.setattr(watching, "PLAIN_SECONDS", 0.0)
    monkeypatch.setattr(watching.time, "sleep", lambda seconds: next(looks)())
    text = shown(store.root, once=False, terminal=terminal)
    for part in ("4 of 9", "5 of 9", "ended", "PKD 2 28.0 25.5 to 30.5"):
        assert part in flat(text)


def test_clocks_that_differ_do_not_matter_after_the_first_change(store):
    write(store, host="elsewhere", done=4)
    aged(store, SILENT_SECONDS - 1)
    run = watching.Watched(store.root)
    assert run.look().age > SILENT_SECONDS - 10
    write(store, host="elsewhere", done=5)
    aged(store, 10 * SILENT_SECONDS)  # of a clock that is far behind
    seen = run.look()
    assert (seen.state, seen.status.done) == (State.RUNNING, 5)
    assert seen.age < 10


def test_the_loss_curve_of_a_long_cell_stays_short(store, task, monkeypatch):
    monkeypatch.setattr(statuses, "WRITE_SECONDS", 0.0)
    file = StatusFile(store.status_path)
    for step in range(1, 1001):
        file.note(task, Report("training", step, LOSSES))
    file.update(0, 1, None, {task: Report("training", 1000, LOSSES)}, {})
    points = read_status(store.status_path).running[0].totals
    assert POINTS <= len(points) <= 2 * POINTS
    assert points[0][0] == 1
    assert points[-1][0] > 900


def test_a_status_that_cannot_be_written_disturbs_nothing(store, task):
    store.status_path.mkdir()
    file = StatusFile(store.status_path)
    file.update(0, 1, None, {task: Report("training", 1, LOSSES)}, {})
    file.end("interrupted")


def test_a_folder_without_runs_is_told(tmp_path):
    with pytest.raises(KDError, match="there is no run of"):
        shown(tmp_path)


def test_the_command(store):
    write(store, ended="interrupted")
    found = CliRunner().invoke(app, ["benchmark", "watch", str(store.root)])
    assert found.exit_code == 0, found.output
    assert "interrupted" in found.output


def test_two_may_watch_while_it_is_written(store):
    """Files are complete at every moment: no look fails while they are replaced."""
    stop, errors = threading.Event(), []

    def look():
        run = watching.Watched(store.root)
        while not stop.is_set():
            try:
                run.look()
            except Exception as error:
                errors.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    for done in range(50):
        write(store, done=done)
    stop.set()
    thread.join()
    assert errors == []
