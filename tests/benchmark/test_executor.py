"""The runner with an executor that only notes what it is asked for, and stores results that nothing has measured."""

import io

import torch
from rich.console import Console

from kdtoolkit.benchmark import runner
from kdtoolkit.benchmark.cell import Failure, Report
from kdtoolkit.benchmark.executor import Ended, Hardware
from kdtoolkit.benchmark.keys import key_of
from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME, TEACHER
from tests.benchmark._suite import made_up, store_result, tiny


class Noting:
    """Takes three cells at a time on hardware of its own. `fails`: cells that fail."""

    hardware = Hardware("cuda", "NVIDIA A100", "a cluster", "bfloat16")
    threads = 7
    slots = 3

    def __init__(self, fails=()):
        self.asked = []
        self.most = 0
        self.tasks = []
        self._fails = fails
        self._running = []

    def __len__(self):
        return len(self._running)

    def begin(self, sets):
        self.asked.append("begin")

    def start(self, task):
        self.asked.append(task.name)
        self.tasks.append(task)
        self._running.append(task)
        self.most = max(self.most, len(self._running))

    def events(self, timeout):
        task = self._running.pop(0)
        yield task, Report("training", 1)
        if task.name in self._fails:
            yield task, Ended(Failure("it failed"))
            return
        result = made_up(task.entry, task.seed, 20.0, key=key_of(task.parts), key_parts=task.parts, steps=task.steps)
        store_result(task.result, result)
        torch.save({}, task.weights)
        yield task, Ended(None)

    def stop(self):
        self.asked.append("stop")


def run(root, executor, **options):
    console = Console(file=io.StringIO(), width=200)
    outcome = runner.run_suite(tiny(), root, console=console, executor=executor, **options)
    return outcome, console.file.getvalue()


def test_an_executor_is_asked_for_no_more_than_it_has_room_for(tmp_path):
    executor = Noting()
    outcome, text = run(tmp_path / "tiny", executor)
    assert outcome.failures == {}
    assert executor.asked[0] == "begin"
    assert executor.asked[-1] == "stop"
    assert executor.asked.count("begin") == 1
    assert executor.most == 3
    assert [task.entry for task in executor.tasks[:2]] == [TEACHER, BASELINE]
    assert executor.tasks[-1].entry == EQUAL_TIME
    assert "on NVIDIA A100: 3 at a time, 7 threads each" in text


def test_keys_are_of_the_executors_hardware(tmp_path):
    executor = Noting()
    run(tmp_path / "tiny", executor)
    parts = executor.tasks[0].parts
    assert (parts["device"], parts["threads"]) == ("NVIDIA A100", "7")
    assert {task.device for task in executor.tasks} == {"cuda"}


def test_methods_wait_for_a_teacher_and_are_not_run_if_it_fails(tmp_path):
    executor = Noting(fails=[TEACHER])
    outcome, _ = run(tmp_path / "tiny", executor)
    assert {task.entry for task in executor.tasks} <= {TEACHER, BASELINE}
    assert outcome.failures["PKD, seed 0"] == "not run, because the teacher failed"


def test_boards_that_take_long_are_not_written_after_each_cell_but_at_the_end(tmp_path, monkeypatch):
    written = []
    write = runner.write_report
    monkeypatch.setattr(runner, "write_report", lambda views, root: written.append(write(views, root)))
    monkeypatch.setattr(runner, "BOARD_PAUSE", 1e6)
    executor = Noting()
    run(tmp_path / "tiny", executor)
    assert len(written) == 3  # after the first cell, and at the end without pictures and with them
    assert len(executor.tasks) == 9
