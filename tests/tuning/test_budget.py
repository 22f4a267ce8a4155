import pytest

from kdtoolkit.errors import KDError
from kdtoolkit.tuning.budget import Costs, Wanted, fit, rest

COSTS = Costs(step=0.1, image=0.01)
WANTED = Wanted(trials=18, most_trials=60, most_steps=1000, reduction=3, held_out=40)


def seconds(plan, wanted=WANTED):
    return wanted.seconds(COSTS, plan.steps, plan.trials)


@pytest.mark.parametrize("budget", [100, 200, 400])
@pytest.mark.parametrize("whole", [0, 9])
def test_a_training_has_as_many_steps_as_fit(budget, whole):
    wanted = Wanted(18, 60, 1000, 3, 40, whole, evaluated=20)
    plan = fit(budget, COSTS, wanted)
    assert plan.trials <= 18
    assert seconds(plan, wanted) <= budget
    if plan.trials == 18:
        assert wanted.seconds(COSTS, plan.steps + 1, 18) > budget
    else:
        assert plan.steps >= 90
        assert wanted.seconds(COSTS, 90, plan.trials + 1) > budget


def test_more_time_than_a_search_needs_is_for_more_trials():
    plan = fit(1000, COSTS, WANTED)
    assert plan.steps == 1000
    assert plan.trials > 18
    assert WANTED.seconds(COSTS, 1000, plan.trials + 1) > 1000
    assert fit(1e6, COSTS, WANTED).trials == 60


def test_too_short_a_budget_says_what_it_would_take():
    message = "the budget is too short: 3 trials of 90 steps take about 13 s here, and have 5 s"
    with pytest.raises(KDError, match=message):
        fit(5, COSTS, WANTED)


def test_what_is_left_is_shared_out():
    assert rest(1000, step=0.5, evaluating=100, trainings=1) == 1800
    assert rest(1000, step=0.5, evaluating=100, trainings=2) == 800
    assert rest(-5, step=0.5, evaluating=100, trainings=1) == 0
