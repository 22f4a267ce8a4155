import pytest

from kdtoolkit.tuning.halving import Halving


def test_a_bracket_ends_with_one_trial():
    plan = Halving(steps=900, trials=9, reduction=3)
    assert plan.rungs == (100, 300, 900)
    assert plan.counts == (9, 3, 1)
    assert plan.cost == 9 * 100 + 3 * 200 + 600
    assert plan.evaluations == 13


@pytest.mark.parametrize("reduction", [2, 3, 4])
@pytest.mark.parametrize("trials", [1, 5, 18, 31])
@pytest.mark.parametrize("steps", [1, 4, 250])
def test_the_cost_is_that_of_trials_one_by_one(reduction, trials, steps):
    plan = Halving(steps, trials, reduction)
    assert sum(plan.brackets) == trials
    trained = 0
    for count in plan.brackets:
        done = 0
        for rung in plan.rungs:
            trained += count * (rung - done)
            done, count = rung, max(1, count // reduction)
    assert plan.cost == trained
    assert plan.rungs[-1] == steps
    assert plan.kept(1) == 1
