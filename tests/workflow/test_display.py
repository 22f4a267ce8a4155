import io
import time

import pytest
from rich.console import Console

from kdtoolkit.engine.result import Progress
from kdtoolkit.workflow import display
from kdtoolkit.workflow.display import Clock, Display


def progress(step, seconds, steps=100, **rest):
    return Progress(step, steps, {"task/cls": 1.0, "task/box": 2.0, "pkd/feature": 0.5}, seconds, **rest)


def test_the_clock_counts_steps_and_evaluations_that_are_left():
    clock = Clock(100, 4, evaluation_seconds=30.0)
    assert clock.left(progress(1, 5.0), 5.0) is None  # the first steps are slower
    assert clock.left(progress(5, 9.0), 9.0) is None
    assert clock.left(progress(21, 25.0), 25.0) == pytest.approx(79 + 4 * 30)
    # The first evaluation has taken 10 s, during which no step was done.
    assert clock.left(progress(31, 35.0), 45.0) == pytest.approx(69 + 3 * 10)
    assert clock.left(progress(100, 104.0), 144.0) == pytest.approx(0)


def test_a_run_of_one_step_has_no_time_left():
    assert Clock(1, 1, 0.0).left(progress(1, 3.0, steps=1), 3.0) == 0


def shown(reports, *, another=False, terminal=False):
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=terminal)
    with Display(console, console) as shows:
        show = shows.training("training", Clock(100, 1, 0.0), another=another)
        for report in reports:
            show(report)
    return out.getvalue()


def test_warnings_hold_no_control_characters():
    out = io.StringIO()
    console = Console(file=out, width=80)
    Display(console, console).warn("class \x1b]0;title\x07 [red]")
    assert out.getvalue().startswith("warning: class ")
    assert "[red]" in out.getvalue()
    assert not {"\x1b", "\x07"} & set(out.getvalue())


def test_lines_say_when_it_ends_and_warnings_come_once(monkeypatch):
    monkeypatch.setattr(display, "PLAIN_SECONDS", -1.0)
    warned = [progress(step, float(step), warnings=("a term does nothing",)) for step in (1, 20, 40)]
    text = shown(warned)
    assert text.count("warning: a term does nothing") == 1
    assert "training: about 80 s; the run ends at about" in text
    assert "training: step 40/100  60 s left  task 3  pkd 0.5" in text
    assert "without teacher; the run ends by about" in shown(warned, another=True)


def test_a_long_training_says_how_to_shorten_it():
    assert "Fewer --epochs" in shown([progress(1, 1.0), progress(20, 1.0 + 19 * 1000)])
    assert "Fewer --epochs" not in shown([progress(1, 1.0), progress(20, 20.0)])


def test_a_terminal_shows_bars():
    text = shown([progress(1, 1.0), progress(20, 20.0)], terminal=True)
    assert "20/100" in text
    assert "80 s left" in text
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=True), Console(file=out)) as shows:
        count = shows.counting("checking images")
        count(1, 2)
        time.sleep(0.3)  # the terminal is drawn ten times a second
        count(2, 2)
    assert "checking images" in out.getvalue()
