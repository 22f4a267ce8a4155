import pytest

from kdtoolkit.probe_words import Verdict, sentences, table, verdicts
from kdtoolkit.probing import Measured, Probe, Row


def row(name, share, cosine, margin=0.02, gain=0.0, **parts):
    """A row whose gradient has this share beside a task's of norm 1."""
    measured = Measured(share / (1 - share), 1.0, cosine, margin, gain)
    return Row(name, 0.5, {"all": measured, "neck": measured, **parts} if share else {})


def part(cosine, share=0.2):
    return Measured(share / (1 - share), 1.0, cosine, 0.02, 0.0)


def probed(*rows, held=None):
    task = Row("task", 1.0, {"all": Measured(1.0, 1.0, 1.0, 0.0, 1.0)})
    return Probe((task, Row("task/cls", 1.0, task.parts), *rows), {"all": 0.3}, 0.1, 4, 1.0, held or {})


@pytest.mark.parametrize(
    ("share", "cosine", "verdict", "said"),
    [
        (0.2, 0.0, Verdict.FINE, "pkd has a share of 20 %; it pulls neither with the task nor against it"),
        (0.2, 0.3, Verdict.FINE, "pulls with the task (cosine +0.30)"),
        (0.75, 0.0, Verdict.FINE, "outweighs the task: its gradient is 3 times the task's (share 75 %)"),
        (0.995, 0.0, Verdict.DROWNS, "drowns the task: its gradient is 199 times the task's (share > 99 %)"),
        (0.001, 0.0, Verdict.NOTHING, "does nothing: its share is 0.1 %"),
        (0.0, 0.0, Verdict.NOTHING, "has no gradient at the student"),
        (0.2, -0.4, Verdict.AGAINST, "it pulls against the task (cosine -0.40)"),
        (0.2, -0.03, Verdict.FINE, "neither with the task nor against it"),
    ],
)
def test_each_method_has_its_verdict(share, cosine, verdict, said):
    found = probed(row("pkd", share, cosine))
    assert verdicts(found) == {"pkd": [verdict]}
    assert said in next(iter(sentences(found)))


def test_a_cosine_that_changes_its_sign_from_batch_to_batch_says_nothing():
    assert verdicts(probed(row("pkd", 0.2, -0.2, margin=0.3))) == {"pkd": [Verdict.FINE]}
    assert verdicts(probed(row("pkd", 0.2, -0.2, margin=0.15))) == {"pkd": [Verdict.AGAINST]}


@pytest.mark.parametrize("cosine", [-0.4, 0.4])
def test_one_batch_gives_no_verdict_on_the_direction(cosine):
    found = probed(row("pkd", 0.2, cosine, margin=None, neck=Measured(0.25, 1.0, cosine, None, 0.0)))
    assert verdicts(found) == {"pkd": [Verdict.FINE]}
    assert f"has a cosine of {cosine:+.2f}, and one batch cannot tell" in next(iter(sentences(found)))


def test_a_method_may_drown_the_task_and_pull_against_it():
    found = probed(row("mimic", 0.995, -0.5, head=part(-0.6), neck=part(0.1)))
    assert verdicts(found)["mimic"] == [Verdict.DROWNS, Verdict.AGAINST]
    assert "at the head -0.60" in next(iter(sentences(found)))


@pytest.mark.parametrize(
    ("gain", "said"),
    [
        (-0.1, "(cosine -0.40), and undoes about 10 % of what the task's step gains"),
        (-0.004, "(cosine -0.40), and undoes about 0.4 % of what the task's step gains"),
        (-3.0, "(cosine -0.40), and undoes all of what the task's step gains"),
        (0.1, "(cosine -0.40)"),
    ],
)
def test_what_a_pull_undoes_is_measured_and_not_taken_from_the_share(gain, said):
    for share in (0.2, 0.9):
        assert next(iter(sentences(probed(row("pkd", share, -0.4, gain=gain))))).endswith(said)


@pytest.mark.parametrize(
    ("share", "cosine", "verdict", "said"),
    [
        (0.995, 0.0, Verdict.FINE, "pkd is held at a share of 20 %; it pulls neither with the task nor against it"),
        (0.001, 0.3, Verdict.FINE, "pkd is held at a share of 20 %; it pulls with the task"),
        (0.5, -0.4, Verdict.AGAINST, "undoes about 10 % of what the task's step gains"),
        (0.0, 0.0, Verdict.NOTHING, "has no gradient at the student"),
    ],
)
def test_a_held_method_is_judged_at_the_share_that_it_has_in_training(share, cosine, verdict, said):
    found = probed(row("pkd", share, cosine, gain=-0.4), held={"pkd": 0.2})  # held: a quarter of a share of 50 %
    assert verdicts(found) == {"pkd": [verdict]}
    assert said in next(iter(sentences(found)))
    assert table(found)[2].startswith("pkd (held) ")


def test_a_share_that_is_held_is_not_judged():
    assert verdicts(probed(row("pkd", 0.5, 0.0), held={"pkd": 0.995})) == {"pkd": [Verdict.FINE]}
    assert verdicts(probed(row("pkd", 0.5, 0.0), held={"pkd": 0.001})) == {"pkd": [Verdict.FINE]}


def test_a_pull_at_one_part_is_told():
    said = next(iter(sentences(probed(row("mimic", 0.2, 0.0, head=part(-0.3), neck=part(0.1))))))
    assert "pulls against the task at the head alone (cosine -0.30)" in said


def test_the_term_that_makes_most_of_a_method_is_named():
    found = probed(row("fgd", 0.8, 0.0), row("fgd/foreground", 0.79, 0.0), row("fgd/global", 0.001, 0.0))
    said = list(sentences(found))
    assert "most of it from fgd/foreground" in said[0]
    assert said[1] == "fgd/global does nothing: its share is 0.1 %"


def test_the_proposed_factor_gives_the_share():
    found = probed(row("pkd", 0.5, 0.0), row("ld", 0.0, 0.0))
    assert found.factor("pkd") == pytest.approx(1 / 9)
    assert found.factor("ld") is None


def test_the_table_has_a_line_for_each_row_and_none_twice():
    found = probed(row("pkd", 0.2, 0.1, neck=part(0.1)), row("pkd/feature", 0.2, 0.1, neck=part(0.1)))
    lines = table(found)
    assert len(lines) == 3  # header, task, pkd
    assert lines[0].split()[:5] == ["loss", "value", "gradient", "share", "cosine"]
    assert len({len(line) for line in lines}) == 1
    assert "20 %, +0.10" in lines[2]
    assert str(found).startswith(lines[0])
