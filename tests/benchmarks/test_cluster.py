"""The simulation of a cluster, where the answer is known."""

import pytest

from benchmarks.cluster.simulate import Costs, simulate

PLAIN = Costs(baseline=100.0, methods=(1.0,), teacher=1.0, spread=0.0, around=0.0, store=0.0, board=0.0)


def test_one_slot_takes_the_sum_and_many_take_the_longest_path():
    alone = simulate(rows=3, seeds=2, slots=1, costs=PLAIN)
    assert alone.seconds == pytest.approx(100 * (1 + 2 * 4 + 2))
    assert alone.used == pytest.approx(1)
    many = simulate(rows=3, seeds=2, slots=50, costs=PLAIN)
    assert many.seconds == pytest.approx(300)  # the teacher, a method, the baseline at equal time
    assert (many.teacher, many.equal_time) == pytest.approx((100, 100))


def test_a_driver_that_is_slower_than_the_cells_limits_them():
    slow = Costs(**{**PLAIN.__dict__, "store": 50.0})
    found = simulate(rows=10, seeds=5, slots=1000, costs=slow)
    cells = 1 + 11 * 5 + 5
    assert found.driver_busy > 0.9
    assert 50 * cells < found.seconds < 50 * cells + 300


def test_boards_take_no_more_than_their_share_of_the_time():
    costs = Costs(**{**PLAIN.__dict__, "board": 1.0})
    each = simulate(rows=10, seeds=10, slots=20, costs=Costs(**{**costs.__dict__, "board_share": None}))
    paused = simulate(rows=10, seeds=10, slots=20, costs=costs)
    assert each.driver_busy > 0.5
    assert paused.driver_busy < 0.15  # each board is of more cells than the one that the pause was measured by
    assert paused.seconds < each.seconds


def test_cells_whose_workers_die_cost_time():
    calm, deadly = (simulate(5, 10, 10, Costs(deaths=deaths)) for deaths in (0.0, 0.3))
    assert deadly.seconds > calm.seconds
