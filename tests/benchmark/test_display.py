import io

import pytest
from rich.console import Console

from kdtoolkit.benchmark.cell import Report
from kdtoolkit.benchmark.display import Display
from kdtoolkit.benchmark.estimate import Costs
from kdtoolkit.benchmark.plan import Plan
from kdtoolkit.benchmark.store import Store
from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME
from kdtoolkit.words import duration
from tests.benchmark._suite import tiny


class Images:
    def fingerprint(self):
        return "0"


class Sets:
    teacher = student = val = Images()
    unlabelled = None


@pytest.fixture
def plan(tmp_path):
    return Plan(tiny(), Store(tmp_path / "tiny"), Sets(), device="cpu", threads=1)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_gets_bars_and_losses_and_other_outputs_plain_lines(plan, terminal):
    console = Console(file=io.StringIO(), width=100, force_terminal=terminal)
    task = plan.cell("CrossKD+PKD", 1)
    with Display(console) as display:
        display.overall("tiny", 3, 9, "about 5 min left")
        display.started(task)
        losses = {"task/cls": 0.5, "task/box": 0.25, "pkd/feature": 3.0}
        display.progress(task, Report("training", 2, losses, 0.5))
        if terminal:
            display._live.refresh()
        display.ended(task, "finished  [bold]it[/] :dog: [/x] \\[")
    text = console.file.getvalue()
    assert "finished  [bold]it[/] :dog: [/x] \\[" in text  # no markup
    if terminal:
        for part in ("3/9 cells", "about 5 min left", "CrossKD+PKD, seed 1", "250 ms/step", "task 0.75", "pkd 3"):
            assert part in text
    else:
        assert text.splitlines() == ["started   CrossKD+PKD, seed 1: 2 steps", "finished  [bold]it[/] :dog: [/x] \\["]


def test_durations():
    assert [duration(s) for s in (0.4, 89, 91, 569, 3600, 12000)] == [
        "0 s",
        "89 s",
        "1.5 min",
        "9.5 min",
        "60 min",
        "3 h 20 min",
    ]


def test_the_time_left_by_hand(plan):
    costs = Costs()
    later = plan.cells([EQUAL_TIME])  # of 2 seeds
    baseline, pkd, teacher = plan.cell(BASELINE, 0), plan.cell("PKD", 0), plan.teacher_task()  # of 2, 2 and 3 steps
    assert costs.remaining([baseline], {}, 1, [], []) is None  # nothing is known yet
    costs.finished(BASELINE, 10.0)
    assert costs.remaining([baseline, pkd], {}, 1, [], []) is None  # nothing of the teacher
    costs.finished("teacher", 30.0)
    assert costs.remaining([baseline, pkd], {}, 1, [], []) == 20 + 2 * (10 + 30 / 3)  # with the teacher's forward
    costs.finished("PKD", 30.0)
    assert costs.remaining([baseline, pkd], {}, 2, [], []) == (20 + 60) / 2
    assert costs.remaining([baseline, pkd], {}, 0, [], []) is None  # no node of a cluster has room
    assert costs.remaining([], {pkd: Report("training", 1, {}, 30.0)}, 1, later, ["PKD"]) == 30 + 4 * 30
    assert costs.remaining([teacher, pkd], {}, 4, [], []) == 90 + 60 / 4  # methods wait for the teacher
    costs.ended(pkd, 65.0, 60.0)
    assert costs.remaining([teacher], {}, 1, later, []) == 90 + 3 * 5  # each cell also reads data and is scored


def test_a_training_that_went_on_from_a_checkpoint_is_not_subtracted_as_a_whole(plan):
    costs = Costs()
    pkd, baseline = plan.cell("PKD", 0), plan.cell(BASELINE, 0)
    costs.finished(BASELINE, 10.0)
    costs.running(pkd, Report("training", 2, {}, 900.0), 4.0)  # 900 s of it in an earlier run
    costs.ended(pkd, 50.0, 945.0)
    assert costs.remaining([baseline], {}, 1, [], []) == 20 + 5


def test_the_first_steps_of_a_running_cell_tell_its_cost(plan):
    costs = Costs()
    baseline, teacher = plan.cell(BASELINE, 0), plan.teacher_task()
    for task, pace in ((baseline, 0.5), (teacher, 2.0)):
        costs.running(task, Report("reading data"), 1.0)
        costs.running(task, Report("training", 1, {}, 3.0), 7.0)  # the first step is slow, and so was the start: 4 s
        assert costs.of(task.entry) is None
        costs.running(task, Report("training", 11, {}, 3.0 + 10 * pace), 7.0 + 10 * pace)
        assert costs.of(task.entry) == pace
    assert costs.remaining([baseline], {}, 1, [], []) == 4.0 + 2 * 0.5
