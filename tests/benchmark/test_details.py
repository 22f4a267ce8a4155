import json
import math

import pytest

from kdtoolkit.benchmark import details as module
from kdtoolkit.benchmark.cells import read_cells
from kdtoolkit.benchmark.runs import Run
from kdtoolkit.benchmark.store import Store, write_atomic
from kdtoolkit.benchmark.suite import BASELINE, TEACHER
from kdtoolkit.engine.breakdown import Bin, Breakdown
from kdtoolkit.engine.inference_cost import InferenceCost
from tests.benchmark._suite import made_up, store_result, tiny


def details(store, suite):
    return module.details(Run(store.root, suite, read_cells(store, suite)))


def run_of(folder, *results):
    """A run's store and suite, with made-up results."""
    store, suite = Store(folder / "tiny"), tiny()
    write_atomic(store.suite_path, suite.to_yaml().encode())
    for result in results:
        path = store.teacher_copy if result.entry == TEACHER else store.result_path(result.entry, result.seed)
        store_result(path, result)
    return store, suite


def broken_down(missed, *, cat=None, confidence=None, precision=None, count=0):
    bins = [Bin(low=0, high=0.5, confidence=None, precision=None, count=0)]
    bins.append(Bin(low=0.5, high=1, confidence=confidence, precision=precision, count=count))
    return Breakdown(
        errors={"missed": missed},
        by_class={"cat": cat, "dog": None},
        by_size={"small": 1.0},
        by_iou={"0.50": 2.0},
        calibration=bins,
        calibration_error=None if confidence is None else abs(confidence - precision),
    )


def timed(milliseconds, gflops=0.5):
    return InferenceCost(
        latency_ms=milliseconds, latency_iqr_ms=0.1, gflops=gflops, parameters=5, size=(64, 64), device="cpu", threads=1
    )


def history(*values, name="task/cls"):
    return [{"step": float(step), "lr": 0.1, name: value} for step, value in enumerate(values, 1)]


def test_curves_are_means_over_seeds_with_the_range_between_them(tmp_path):
    evaluations = [
        {"step": 50, "ap": 10.0, "ap50": 20.0, "conflict/PKD": None},
        {"step": 100, "ap": 14.0, "ap50": 30.0},
    ]
    other = [{"step": 50, "ap": 12.0, "ap50": 22.0}, {"step": 100, "ap": 16.0, "ap50": 34.0}]
    found = details(
        *run_of(
            tmp_path,
            made_up(BASELINE, 0, 14.0, history=history(3.0, 2.0, 1.0), evaluations=evaluations),
            made_up(BASELINE, 1, 16.0, history=history(5.0, 2.5, 1.0), evaluations=other),
        )
    ).curves[BASELINE]
    loss, ap = found["task/cls"], found["eval/ap"]
    assert loss.steps == (1, 2, 3)
    assert (loss.mean, loss.low, loss.high) == ((4.0, 2.25, 1.0), (3.0, 2.0, 1.0), (5.0, 2.5, 1.0))
    assert (ap.steps, ap.mean, ap.low, ap.high) == ((50, 100), (11.0, 15.0), (10.0, 14.0), (12.0, 16.0))
    assert found.keys() == {"lr", "task/cls", "eval/ap", "eval/ap50"}  # of the conflict there is no number


def test_numbers_that_are_not_finite_leave_the_other_seeds_curve(tmp_path):
    bad = math.nan
    lost = [{"step": step, "kd/loss": loss, "kd/all": bad} for step, loss in ((1, bad), (2, 3.0), (3, 5.0))]
    kept = [{"step": step, "kd/loss": loss, "kd/all": math.inf} for step, loss in ((1, 2.0), (2, 1.0), (3, 1.0))]
    store, suite = run_of(tmp_path, made_up("PKD", 0, 20.0), made_up("PKD", 1, 20.0))
    for seed, history in enumerate((lost, kept)):
        path = store.result_path("PKD", seed)
        path.write_text(json.dumps({**json.loads(path.read_text()), "history": history}))  # with the word NaN
    curves = details(store, suite).curves["PKD"]
    assert (curves["kd/loss"].steps, curves["kd/loss"].mean) == ((2, 3), (2.0, 3.0))
    assert "kd/all" not in curves


def test_all_points_of_a_curve_are_means_over_the_same_seeds(tmp_path):
    every = [{"step": step, "ap": ap} for step, ap in ((25, 5.0), (50, 10.0), (75, 12.0), (100, 14.0))]
    undefined = [{"step": 25, "ap": None}, {"step": 50, "ap": 20.0}, {"step": 100, "ap": 24.0}]
    at_the_end = [{"step": 100, "ap": 90.0}]  # of a suite without curves
    found = details(
        *run_of(
            tmp_path,
            made_up(BASELINE, 0, 14.0, evaluations=every),
            made_up(BASELINE, 1, 24.0, evaluations=undefined),
            made_up("PKD", 0, 14.0, evaluations=every),
            made_up("PKD", 1, 90.0, evaluations=at_the_end),
        )
    ).curves
    assert (found[BASELINE]["eval/ap"].steps, found[BASELINE]["eval/ap"].mean) == ((50, 100), (15.0, 19.0))
    assert (found["PKD"]["eval/ap"].steps, found["PKD"]["eval/ap"].mean) == ((25, 50, 75, 100), (5, 10, 12, 14))


def test_long_curves_keep_their_ends_and_at_most_150_points(tmp_path):
    store = run_of(tmp_path, made_up(BASELINE, 0, 14.0, history=history(*map(float, range(1000)))))
    curve = details(*store).curves[BASELINE]["task/cls"]
    assert len(curve.steps) == len(set(curve.steps)) == 150
    assert (curve.steps[0], curve.steps[-1]) == (1, 1000)
    assert curve.mean == tuple(step - 1 for step in curve.steps)


def test_breakdowns_are_means_over_seeds(tmp_path):
    found = details(
        *run_of(
            tmp_path,
            made_up("PKD", 0, 14.0, breakdown=broken_down(2.0, cat=40.0, confidence=0.6, precision=0.5, count=30)),
            made_up("PKD", 1, 16.0, breakdown=broken_down(3.0, confidence=0.9, precision=0.7, count=10)),
            made_up(BASELINE, 0, 15.0),  # of an earlier version
        )
    ).breakdown
    assert found.keys() == {"PKD"}
    parts = found["PKD"]
    assert (parts.errors, parts.by_class) == ({"missed": 2.5}, {"cat": 40.0, "dog": None})
    assert parts.calibration[0] == Bin(low=0, high=0.5, confidence=None, precision=None, count=0)
    assert parts.calibration[1].confidence == pytest.approx((30 * 0.6 + 10 * 0.9) / 40)
    assert parts.calibration[1].precision == pytest.approx((30 * 0.5 + 10 * 0.7) / 40)
    assert parts.calibration[1].count == 20
    assert parts.calibration_error == pytest.approx(0.15)


def test_all_students_have_one_latency_and_the_teacher_its_own(tmp_path):
    found = details(
        *run_of(
            tmp_path,
            made_up(TEACHER, 0, 30.0, inference=timed(9.0, gflops=3.0), parameters=99),
            *(
                made_up(BASELINE, seed, 15.0, inference=timed(2.0 + seed), train_seconds=10.0 + seed)
                for seed in range(2)
            ),
            made_up("PKD", 0, 16.0, inference=timed(2.5)),
        )
    ).costs
    assert {row: (cost.latency_ms, cost.gflops) for row, cost in found.items()} == {
        TEACHER: (9.0, 3.0),
        BASELINE: (2.5, 0.5),
        "PKD": (2.5, 0.5),
    }
    assert (found[BASELINE].train_seconds, found[BASELINE].step_ms) == pytest.approx((10.5, 200))
    assert found[TEACHER].parameters == 99


def test_times_of_different_hardware_are_not_mixed(tmp_path):
    costs = details(
        *run_of(
            tmp_path,
            made_up(BASELINE, 0, 15.0, inference=timed(2.0)),
            made_up(BASELINE, 1, 15.0, inference=timed(4.0), machine="a different machine"),
            made_up("PKD", 0, 16.0, inference=timed(2.5)),
        )
    ).costs
    assert (costs[BASELINE].latency_ms, costs[BASELINE].train_seconds, costs[BASELINE].step_ms) == (None, None, None)
    assert costs[BASELINE].gflops == 0.5
    assert (costs["PKD"].latency_ms, costs["PKD"].train_seconds) == (None, 20.0)


def test_a_run_without_results_has_no_details_but_limits(tmp_path):
    found = details(*run_of(tmp_path))
    assert found.curves == found.breakdown == found.costs == found.commands == found.settings == {}
    assert len(found.limits) >= 3
