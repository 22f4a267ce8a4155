"""`kd distill --budget`."""

import pytest

import kdtoolkit
from kdtoolkit.errors import KDError
from kdtoolkit.method_use import MethodUse
from kdtoolkit.tuning import runs, spend
from kdtoolkit.tuning.budget import Costs
from kdtoolkit.tuning.report import TuneReport
from kdtoolkit.tuning.study import Trial
from kdtoolkit.workflow.options import TuneOptions, read_options
from tests.workflow._data import TINY


def distill(teacher, shapes, out, **changes):
    words = {"batch_size": 4, "student_weights": "none", "allow_weak_teacher": True, "quiet": True, "method": "PKD"}
    return kdtoolkit.distill(teacher, TINY, shapes, out=out, **words | changes)


@pytest.mark.slow
def test_a_third_is_for_the_search_and_the_rest_for_the_best(teacher, shapes, tmp_path, monkeypatch):
    # As on a machine that takes seconds for a step; its search is short.
    monkeypatch.setattr(runs, "measured", lambda *_: Costs(step=2.0, image=0.5))
    trained = []
    monkeypatch.setattr(spend, "run", lambda options, reasons: trained.append(options))
    for baseline in (False, True):
        distill(teacher, shapes, tmp_path / "student", budget="20m", compare_baseline=baseline)
    found = TuneReport.read(tmp_path / "student-search")
    assert found.finished
    assert found.confirmation is None
    options = read_options(TuneOptions, tmp_path / "student-search" / "run.yaml")
    assert (options.budget, options.seeds) == ("400s", 0)
    assert found.steps >= 90
    alone, compared = trained
    assert alone.method == found.best.methods
    assert (alone.out, alone.budget, alone.epochs) == (tmp_path / "student", None, None)
    step = found.best.seconds / found.best.step
    evaluations = spend.EVALUATIONS * 4 * 0.5
    assert alone.steps * step + evaluations == pytest.approx(1200 - found.seconds, abs=2 * step)
    assert 2 * (compared.steps * step + evaluations) == pytest.approx(1200 - found.seconds, abs=4 * step)


def searched(folder, *, steps, seconds):
    """A finished search whose best trial has trained `steps` steps of half a second each."""
    methods = (MethodUse.model_validate("PKD"),)
    return TuneReport(
        title="",
        folder=folder,
        plan={},
        given={},
        made_of={},
        candidates=(),
        steps=steps,
        planned=1,
        val_images=4,
        costs=Costs(step=0.5, image=0.5),
        trials=[Trial(number=0, methods=methods, scores={steps: 9.0}, seconds=steps / 2, state="finished")],
        seconds=seconds,
        searched=True,
        finished=True,
    )


@pytest.mark.parametrize(("took", "baseline"), [(50, False), (50, True), (85, False)])
def test_the_student_has_the_steps_of_a_trial_even_if_the_search_took_too_long(
    teacher, shapes, tmp_path, monkeypatch, capsys, took, baseline
):
    trained = []
    monkeypatch.setattr(spend, "tune", lambda options: searched(tmp_path, steps=120, seconds=took))
    monkeypatch.setattr(spend, "run", lambda options, reasons: trained.append(options))
    distill(teacher, shapes, tmp_path / "student", budget="80s", compare_baseline=baseline, quiet=False)
    assert [options.steps for options in trained] == [120]
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        f"the search took {took} s of 80s, and {max(0, 80 - took)} s are left. PKD is trained for 120 steps" in printed
    )
    needed = "2.9 min, 52 s" if baseline else "86 s, 26 s"
    assert f"That takes about {needed} of it for evaluations, so the budget is exceeded" in printed


@pytest.mark.parametrize(("left", "why"), [(0, "a training of the search"), (27, "the search left time for")])
def test_the_report_says_that_the_search_chose(teacher, shapes, tmp_path, monkeypatch, left, why):
    found = searched(tmp_path, steps=1, seconds=80 - left)  # 26 s are for evaluations
    monkeypatch.setattr(spend, "tune", lambda options: found)
    report = distill(teacher, shapes, tmp_path / "student", budget="80s")
    assert report.plan["method"] == "PKD (the search chose it)"
    assert f"(as many steps as {why})" in report.plan["schedule"]
    assert report.plan["batch"] == "4 images (you chose it)"
    assert "the search chose it" in (tmp_path / "student" / "report.md").read_text()


def test_a_search_without_a_result_ends_the_run(teacher, shapes, tmp_path, monkeypatch):
    nothing = TuneReport(
        title="", folder=tmp_path, plan={}, given={}, made_of={}, candidates=(), steps=9, planned=1, val_images=4
    )
    monkeypatch.setattr(spend, "tune", lambda options: nothing)
    with pytest.raises(KDError, match="no trial of the search could be trained, so there is nothing to train with"):
        distill(teacher, shapes, tmp_path / "student", budget="1h")


def test_a_folder_that_cannot_be_used_is_told_before_the_search(teacher, shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(spend, "tune", None)  # nothing is searched
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "notes.txt").touch()
    with pytest.raises(KDError, match="holds files that are no run of kdtoolkit"):
        distill(teacher, shapes, tmp_path / "student", budget="1h")
    with pytest.raises(KDError, match="holds a run that no search belongs to: choose a new folder"):
        distill(teacher, shapes, teacher, budget="1h")
