"""The evidence suites, the order in which their cells are run, and the page that is made of their boards."""

import io

import pytest
from rich.console import Console

from benchmarks.evidence import page, run
from kdtoolkit.benchmark.store import Store, write_atomic
from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME, TEACHER
from kdtoolkit.benchmark.suite_file import load_suite
from tests.benchmark._suite import TINY, made_up, store_result, tiny

NAMES = [path.stem for path in sorted(run.SUITES.glob("*.yaml"))]


@pytest.mark.parametrize("name", NAMES)
def test_the_suites_are_valid(name):
    suite = load_suite(str(run.SUITES / f"{name}.yaml"))
    assert suite.name == f"evidence-{name}"
    trained = [section.train for section in (suite.teacher, suite.student) if section.train is not None]
    assert {train.precision for train in trained} == {"float32"}  # so that cells of all machines belong together
    if name in run.SETS:
        assert set(run.MAIN) <= set(suite.entries)
        assert suite.seeds == run.MAIN_SEEDS
        assert suite.plateau


def test_the_main_rows_of_all_sets_come_before_the_rest():
    work = list(run.portions(NAMES))
    first = [portion for portion in work if portion.rows == run.MAIN and not portion.long_baselines]
    assert work[: len(first)] == first
    assert [(portion.suite, portion.seeds) for portion in first[:5]] == [
        *((name, 1) for name in run.SETS),
        (run.SETS[0], 2),
    ]
    assert {portion.seeds for portion in first} == {1, 2, 3, 4, 5}
    assert all(portion.suite in run.SETS for portion in work[: len(first) + len(run.SETS)])
    assert {portion.suite for portion in work if not portion.rows} == set(NAMES)
    for (
        name
    ) in run.SETS:  # a row that is slower than all main rows makes the baseline at equal time longer, in all seeds
        *_, last = [portion for portion in work if portion.suite == name]
        assert (last.long_baselines, last.seeds) == (True, run.MAIN_SEEDS)
    assert {portion.suite for portion in run.portions(["chess"])} == {"chess"}


def test_cells_are_run_in_slices_and_a_suite_that_cannot_be_run_stops_no_other(tmp_path):
    (tmp_path / "good.yaml").write_text(TINY)
    (tmp_path / "bad.yaml").write_text(
        TINY.replace("name: tiny", "name: bad").replace("val_images: 4", "root: missing")
    )
    work = [run.Portion(name, ("PKD",), 1) for name in ("bad", "good")]
    console = Console(file=io.StringIO())

    def evidence(end=None):
        return run.Evidence(tmp_path, tmp_path / "runs", device="cpu", jobs=2, end=end)

    assert not evidence(end=0.0).run(work, console)
    assert not (tmp_path / "runs").exists()
    first = evidence()
    assert not first.run(work, console)
    assert list(first.problems) == ["bad"]
    store = Store(tmp_path / "runs" / "tiny")
    assert {path.parent.name for path in store.root.glob("cells/*/seed0.json")} == {BASELINE, "PKD"}
    assert not list(store.root.glob("cells/*/seed1.json"))
    assert evidence().run(work[1:], console)
    assert console.file.getvalue().count("started   PKD") == 1


APS = {
    BASELINE: [20.0, 22.0, 21.0],
    "PKD": [22.0, 24.2, 22.8],  # above the baseline, below it at equal time
    "CrossKD+PKD": [25.0, 21.5],
    EQUAL_TIME: [23.5, 25.8, 24.4],
}


@pytest.fixture
def boards(tmp_path):
    """The folder of boards, with one that was taken from a run of made-up results."""
    store = Store(tmp_path / "runs" / "evidence-bccd")
    write_atomic(store.suite_path, tiny(("seeds: 2", "seeds: 3")).to_yaml().encode())
    store_result(store.teacher_copy, made_up(TEACHER, 0, 31.0))
    for row, aps in APS.items():
        for seed, ap in enumerate(aps):
            result = made_up(row, seed, ap, ap_at_four_fifths=ap - 1 if row == BASELINE else None)
            store_result(store.result_path(row, seed), result)
    assert list(page.take(tmp_path / "runs", tmp_path / "boards")) == ["bccd"]
    return tmp_path / "boards"


def test_the_page_says_what_is_shown_and_what_is_not(boards):
    text = page.page(page.stored(boards))
    assert "| PKD | 1: bccd | - | - | - | - | 1: bccd |" in text
    assert "| PKD | 23.0 ± 1.1 | +2.0 [+1.5, +2.5] | -1.6 [-1.7, -1.4] | 20 % | - | 3 | 100 |" in text
    assert "| CrossKD+PKD | 23.2 ± 2.5 |" in text
    assert " | 79 % | 2 | 100 |" in text
    assert "- Above the baseline at equal steps: PKD." in text
    assert "- Below the baseline at equal time: PKD." in text
    assert "with fewer than 3 seeds: CrossKD+PKD (2)." in text
    assert "Plateau: the last fifth of the baseline's steps adds +1.0 AP." in text
    assert "| [bccd](#bccd) |" not in text  # the board has neither CrossKD nor ObjectKD
    assert "## What these boards do not show" in text


def test_one_method_is_compared_over_all_boards(boards):
    board = page.stored(boards)["bccd"]
    rows = [row | ({"entry": "ObjectKD"} if row["entry"] == "PKD" else {}) for row in board["rows"]]
    text = page.page({"bccd": board | {"rows": rows, "warnings": ["the teacher is no better."]}})
    assert "| [bccd](#bccd) | 31.0 | 21.0 ± 1.0 | ObjectKD | 23.0 ± 1.1 | +2.0 [+1.5, +2.5] | 20 % | 3 |" in text
    assert "- Warning: the teacher is no better.\n" in text


def test_main_rows_are_judged_apart_from_all_others():
    def row(entry, p, mean=1.0, pairs=5):
        found = {"mean": mean, "low": None, "high": None, "pairs": pairs, "p": p, "p_holm": 1.0, "over": "seeds"}
        return {"entry": entry, "methods": ["some"], "versus_baseline": found, "versus_equal_time": None}

    main = [row("CrossKD", 0.01), row("PKD", 0.02), row("CrossKD+PKD", 0.01, mean=-1.0)]
    others = [row(f"other {i}", 0.02) for i in range(9)]
    found = page.verdicts({"rows": [*main, *others, row("few", 0.001, pairs=2)]}, "versus_baseline")
    # Both directions of three rows are six tests: 0.005 * 6 and 0.01 * 4 are below 0.05. Of nine rows 0.01 * 18 is not.
    assert [found[name] for name in ("CrossKD", "PKD", "CrossKD+PKD", "few")] == ["shown", "shown", "hurts", ""]
    assert {found[f"other {i}"] for i in range(9)} == {"not shown"}
    assert set(page.verdicts({"rows": main}, "versus_equal_time").values()) == {""}


def test_the_combination_is_compared_with_each_method_that_has_enough_seeds(boards):
    board = page.stored(boards)["bccd"]
    assert "against each single method" not in page.page({"bccd": board})  # it has two seeds here
    found = {"mean": 1.2, "low": 0.3, "high": 2.1, "pairs": 4, "p": 0.021, "p_holm": 0.3, "over": "seeds"}
    text = page.page({"bccd": board | {"pairs": {"CrossKD+PKD": {"PKD": found, BASELINE: found}}}})
    assert "| bccd | PKD | +1.2 [+0.3, +2.1] | 0.021 | 4 | above |" in text
    assert f"| bccd | {BASELINE} |" not in text


def test_a_choice_is_judged_by_the_seeds_that_both_of_its_rows_have(boards):
    board = page.stored(boards)["bccd"]

    def with_crosskd(aps):
        row = next(row for row in board["rows"] if row["entry"] == "PKD")
        changed = {"entry": "CrossKD", "aps": {str(seed): ap for seed, ap in enumerate(aps)}}
        return board | {"rows": [*board["rows"], row | changed]}

    two = {"bccd": with_crosskd([30.0, 31.0, 32.0, 40.0]), "bccd-lite1": with_crosskd([31.0, 32.1, 32.9])}
    text = page.page(two)
    line = "| a teacher one size up (lite1), not two (lite2); CrossKD | bccd | 32.0 | 31.0 | +1.0 [+0.8, +1.2] |"
    assert f"{line} 0.003 | 3 | above |" in text
    assert "as wide as the teacher" not in text  # there is no such board
    two["bccd-lite1"] = with_crosskd([31.0, 32.1])  # too few seeds
    assert "a teacher one size up" not in page.page(two)
