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
    confirmation = Confirmation(rows={"best": PKD, "runner-up": CWD, BASELINE: ()}, seeds=(1, 2, 3), ap=ap)
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
        finished=True,
    )


def test_a_winner_is_better_than_no_teacher(tmp_path):
    found = report(tmp_path, val=(3.0, 3.2, 2.8))
    assert found.winner == PKD
    text = "\n".join(found.sentences())
    assert "PKD has +3.0 [+2.5, +3.5] AP compared with the same training without teacher (val)." in text
    assert "PKD cannot be told apart from CWD: +1.0 [-1.8, +3.8] AP (val)." in text
    assert "PKD is the winner" in text


@pytest.mark.parametrize(
    "data", [{"val": (3.0, -3.0, 1.0)}, {"val": (3.0, 3.2, 2.8), "test": (3.0, -3.0, 1.0)}, {"val": (-3.0, -3.2, -2.8)}]
)
def test_what_is_not_shown_on_all_data_is_no_winner(tmp_path, data):
    found = report(tmp_path, **data)
    assert found.winner is None
    assert "There is no winner: PKD is the best of the search, and it is not shown" in "\n".join(found.sentences())


def test_a_confirmation_that_is_not_finished_has_no_winner(tmp_path):
    found = report(tmp_path, val=(3.0, 3.2, 2.8))
    del found.confirmation.ap["val"][BASELINE][3]
    assert found.winner is None


def test_without_confirmation_the_report_says_so(tmp_path):
    found = report(tmp_path)
    assert found.winner is None
    assert "PKD is the best of 3 trials. It is not confirmed" in next(found.sentences())


def test_it_is_read_as_it_was_written(tmp_path):
    found = report(tmp_path, val=(3.0, 3.2, 2.8))
    found.write()
    assert TuneReport.read(tmp_path) == found
    text = (tmp_path / "tune.md").read_text()
    assert "| PKD | 14.0 |" in text
    assert "| PKD | 3.0 | 9.0 | 70 s |" in text
    assert "- CWD: loss = nan" in text
    assert r"| a\|b | c |" in text


def test_a_damaged_report_is_named(tmp_path):
    (tmp_path / "tune.json").write_text("{")
    with pytest.raises(KDError, match=r"tune.json cannot be read: put a copy of it back"):
        TuneReport.read(tmp_path)
