import pytest

from kdtoolkit.errors import KDError
from kdtoolkit.method_use import MethodUse
from kdtoolkit.tuning.report import Confirmation, TuneReport
from kdtoolkit.tuning.space import BASELINE
from kdtoolkit.tuning.study import Trial

PKD, CWD = ((MethodUse.model_validate(name),) for name in ("PKD", "CWD"))
ALONE = {1: 10.0, 2: 12.0, 3: 11.0}


def plus(added):
    return {seed: ap + each for (seed, ap), each in zip(ALONE.items(), added, strict=True)}


def report(tmp_path, **data):
    """A finished search; `data`: what the best trial added on each data set, by seed."""
    ap = {name: {"best": plus(added), "runner-up": plus((1, 2, 3)), BASELINE: ALONE} for name, added in data.items()}
    seconds = {row: dict.fromkeys((1, 2, 3), took) for row, took in (("best", 80), ("runner-up", 60), (BASELINE, 40))}
    rows = {"best": PKD, "runner-up": CWD, BASELINE: ()}
    confirmation = Confirmation(rows=rows, seeds=(1, 2, 3), ap=ap, seconds=seconds)
    trials = [
        Trial(number=0, methods=PKD, scores={1: 3.0, 3: 9.0}, seconds=70, state="finished"),
        Trial(number=1, methods=CWD, scores={1: 2.0}, seconds=20, state="out"),
        Trial(number=2, methods=CWD, scores={}, seconds=0, state="failed", reason="loss = nan"),
    ]
    return TuneReport(
        title="kd tune",
        folder=tmp_path,
        plan={"a|b": "c"},
        given={},
        made_of={},
        candidates=(),
        steps=3,
        planned=3,
        val_images=4,
        trials=trials,
        confirmation=confirmation if data else None,
        searched=True,
        finished=True,
    )


def test_a_winner_is_better_than_no_teacher(tmp_path):
    found = report(tmp_path, val=(3.0, 3.2, 2.8))
    assert found.winner == PKD
    text = "\n".join(found.sentences())
    assert "PKD has +3.0 [+2.5, +3.5] AP compared with the same training without teacher (val)." in text
    assert "PKD cannot be told apart from CWD: +1.0 [-1.8, +3.8] AP (val)." in text
    assert "PKD is the winner: it is better than the training without teacher with the same number of steps." in text
    assert found.confirmation_table()[1][0] == ["PKD", "14.0", "80 s"]


@pytest.mark.parametrize(
    "data", [{"val": (3.0, -3.0, 1.0)}, {"val": (3.0, 3.2, 2.8), "test": (3.0, -3.0, 1.0)}, {"val": (-0.1, -0.1, -0.2)}]
)
def test_what_is_not_shown_on_all_data_is_no_winner(tmp_path, data):
    found = report(tmp_path, **data)
    assert found.winner is None
    assert "There is no winner: PKD is the best of the search, and it is not shown" in "\n".join(found.sentences())


def test_a_confirmation_that_is_not_finished_has_no_winner(tmp_path):
    found = report(tmp_path, val=(3.0, 3.2, 2.8))
    del found.confirmation.ap["val"][BASELINE][3], found.confirmation.seconds[BASELINE][3]
    assert found.winner is None
    text = "\n".join(found.sentences())
    assert "The confirmation is not finished: 8 of 9 trainings are done." in text
    assert "no winner" not in text


@pytest.mark.parametrize("row", ["best", "runner-up", BASELINE])
def test_a_training_that_failed_is_told_and_the_two_that_are_compared_must_not_fail(tmp_path, row):
    found = report(tmp_path, val=(3.0, 3.2, 2.8))
    del found.confirmation.ap["val"][row][3], found.confirmation.seconds[row][3]
    found = found.model_copy(update={"confirmation": found.confirmation.with_failure(row, 3, "loss = nan")})
    assert found.confirmation.complete
    assert found.winner == (PKD if row == "runner-up" else None)
    text = "\n".join(found.sentences())
    assert "could not be trained with seed 3: loss = nan" in text
    assert ("There is no winner" in text) == (row != "runner-up")


def test_a_runner_up_that_is_better_leaves_no_winner(tmp_path):
    found = report(tmp_path, val=(3.0, 3.2, 2.8))
    found.confirmation.ap["val"]["runner-up"] = plus((5.0, 5.3, 4.7))
    assert found.winner is None
    text = "\n".join(found.sentences())
    assert "PKD has -2.0 [-2.2, -1.8] AP compared with CWD (val)." in text
    assert "CWD has +5.0 [+4.3, +5.7] AP compared with the same training without teacher (val)." in text
    assert "with fresh seeds it is better than PKD. `kd distill best.yaml --method CWD --out NEW-FOLDER`" in text
    assert "is the winner" not in text


def test_without_confirmation_the_report_says_so(tmp_path):
    found = report(tmp_path)
    assert found.winner is None
    assert "PKD is the best of 3 trials. It is not confirmed" in next(found.sentences())


def test_it_is_read_as_it_was_written(tmp_path):
    found = report(tmp_path, val=(3.0, 3.2, 2.8))
    found.write()
    assert TuneReport.read(tmp_path) == found
    text = (tmp_path / "tune.md").read_text()
    assert "| PKD | 14.0 | 80 s |" in text
    assert "| PKD | 3.0 | 9.0 | 70 s |" in text
    assert "- CWD: loss = nan" in text
    assert r"| a\|b | c |" in text


def test_a_damaged_report_is_named(tmp_path):
    (tmp_path / "tune.json").write_text("{")
    with pytest.raises(KDError, match=r"tune.json cannot be read: put a copy of it back"):
        TuneReport.read(tmp_path)
