import io

import pytest
from rich.console import Console

from kdtoolkit.benchmark.report.store import print_comparison
from kdtoolkit.benchmark.run_pair import compare_runs
from kdtoolkit.benchmark.suite import BASELINE, TEACHER
from kdtoolkit.errors import KDError
from tests.benchmark._runs import FINGERPRINTS, of, store_run
from tests.benchmark._suite import made_up, tiny


def run_of(root, aps, *, teacher="weights", suite=None, **changes):
    cells = (
        of(row, seed, ap, teacher=teacher, **changes) for row, values in aps.items() for seed, ap in values.items()
    )
    return store_run(root, of(TEACHER, 0, 30.0, teacher=teacher), *cells, suite=suite or tiny(("seeds: 2", "seeds: 9")))


def test_rows_are_subtracted_seed_by_seed(tmp_path):
    one = run_of(tmp_path / "one", {BASELINE: {0: 20.0, 1: 22.0, 2: 21.0}, "PKD": {0: 25.0}})
    two = run_of(tmp_path / "two", {BASELINE: {1: 24.0, 2: 23.5, 5: 90.0}, "CrossKD+PKD": {0: 1.0}})
    pair = compare_runs(one, two)
    assert pair.refusal == ""
    assert [row.row for row in pair.rows] == [TEACHER, BASELINE]
    found = pair.rows[1].difference
    assert (found.mean, found.pairs) == (pytest.approx(2.25), 2)
    half = 12.706 * 0.3536 / 2**0.5  # the t quantile of one degree of freedom; the deviation of 2.0 and 2.5
    assert (found.low, found.high) == (pytest.approx(2.25 - half, abs=0.01), pytest.approx(2.25 + half, abs=0.01))
    assert pair.rows[1].first.mean == 21.0
    assert pair.differences["seeds"] == ("0; 1; 2", "0; 1; 2; 5")


def test_rows_are_judged_together(tmp_path):
    one = run_of(tmp_path / "one", {BASELINE: {0: 20.0, 1: 22.0, 2: 21.0}, "PKD": {0: 22.0, 1: 24.0, 2: 23.0}})
    two = run_of(tmp_path / "two", {BASELINE: {0: 21.0, 1: 24.0, 2: 22.4}, "PKD": {0: 23.0, 1: 22.0, 2: 24.5}})
    pair = compare_runs(one, two)
    teacher, baseline, _ = (row.difference for row in pair.rows)
    assert (teacher.p, teacher.p_holm) == (None, None)
    assert baseline.low > 0
    assert baseline.p_holm == pytest.approx(2 * baseline.p)
    console = Console(width=200, file=io.StringIO())
    print_comparison(pair, console)
    words = {line.split()[0]: line for line in console.file.getvalue().splitlines() if line.strip()}
    assert "cannot be told apart" in words[BASELINE]  # its interval alone is above 0
    assert "equal" in words[TEACHER]


def test_what_differs_is_named(tmp_path):
    aps = {BASELINE: {0: 20.0}, "PKD": {0: 25.0}}
    one = run_of(tmp_path / "one", aps)
    changed = tiny(("seeds: 2", "seeds: 9"), ("name: tiny", "name: second"))
    student = changed.student.model_copy(
        update={"train": changed.student.train.model_copy(update={"lr": 0.5, "steps": 7})}
    )
    two = run_of(
        tmp_path / "two",
        aps,
        teacher="of a different training",
        suite=changed,
        detector=student,
        versions={"kdtoolkit": "0.1", "python": "3.0"},
        machine="a second machine",
        steps=7,
    )
    pair = compare_runs(one, two)
    assert pair.refusal == ""
    assert pair.differences.pop("teacher") == ("weights", "of a different training")
    assert pair.differences.pop("student train.lr")[1] == "0.5"
    assert pair.differences.pop("student train.steps") == ("2", "7")
    assert pair.differences == {
        "suite": ("tiny", "second"),
        "steps of baseline": ("100", "7"),
        "steps of PKD": ("100", "7"),
        "kdtoolkit": ("0.0", "0.0; 0.1"),
        "hardware": ("a machine, 1 thread a cell", "a machine, 1 thread a cell; a second machine, 1 thread a cell"),
    }


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"fingerprints": {**FINGERPRINTS, "val_data": "more images"}}, "were evaluated on different images"),
        ({"fingerprints": {}}, "do not say on which images they were evaluated"),
    ],
)
def test_aps_on_different_images_are_not_subtracted(tmp_path, changes, told):
    aps = {BASELINE: {0: 20.0, 1: 21.0}}
    one = run_of(tmp_path / "one", aps)
    two = store_run(tmp_path / "two", *(made_up(BASELINE, seed, 20.0, **changes) for seed in (0, 1)))
    pair = compare_runs(one, two)
    assert told in pair.refusal
    assert [(row.row, row.difference) for row in pair.rows] == [(BASELINE, None)]


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(KDError, match="is not a folder of `kd benchmark run`"):
        compare_runs(tmp_path, tmp_path)
