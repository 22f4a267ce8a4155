"""`kd benchmark`: the commands that look at stored results, and seeds as a range."""

import shutil
from pathlib import Path

import pytest

from kdtoolkit.benchmark.runs import open_run
from kdtoolkit.errors import KDError
from tests.benchmark._runs import store_run
from tests.benchmark._suite import TINY, tiny
from tests.benchmark.test_merge import machine
from tests.test_cli import kd

GOLDEN = Path(__file__).parents[1] / "benchmark" / "golden"


@pytest.fixture
def run(monkeypatch, capsys):
    return lambda *arguments: kd("benchmark", *arguments, monkeypatch=monkeypatch, capsys=capsys)


def test_list_names_all_runs_and_those_that_cannot_be_read(run, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(GOLDEN / "store_v2", tmp_path / name)
    (tmp_path / "two" / "suite.yaml").write_text("name: two\nsedes: 1\n")
    (tmp_path / "no run").mkdir()
    (tmp_path / "no run" / "suite.yaml").write_text("name: a suite alone\n")
    code, out, _ = run("list", tmp_path)
    assert code == 0
    row = next(line for line in out.splitlines() if line.strip().startswith("one "))
    assert "store_v2" in row
    assert "2 of 2" in row
    assert "suite.yaml, line 2: unknown key 'sedes'" in out
    assert "no run" not in out
    assert "AMD EPYC, 2 cores, Linux, 1 thread a cell" in out


def test_show_goes_from_the_run_to_a_cell(run, tmp_path):
    root = machine(tmp_path / "[red]", (0, 1))
    broken = open_run(root).store.result_path("PKD", 1)
    broken.write_text("{")
    broken.with_name("seed0.json").unlink()
    broken.with_name("seed0.error").write_text("no memory\nTraceback")
    code, out, _ = run("show", root)
    assert code == 0
    assert "[red]" in out
    assert next(line.split() for line in out.splitlines() if line.strip().startswith("PKD")) == [
        "PKD",
        "failed",
        "damaged",
    ]
    code, out, _ = run("show", root, "baseline", 1)
    assert code == 0
    assert "AP 21.0, AP50 42.0" in out
    assert "train_data trained, val_data measured" in out
    code, out, _ = run("show", root, "baseline")
    assert out.count("fingerprints") == 2
    assert run("show", root, "teacher")[1].count("fingerprints") == 1


def test_compare_and_merge_two_runs(run, tmp_path):
    one, two = machine(tmp_path / "one", (0, 1)), machine(tmp_path / "two", (1, 2))
    code, out, _ = run("compare", one, two)
    assert code == 0
    assert f"A = {one}, B = {two}" in out
    assert next(line.split() for line in out.splitlines() if line.strip().startswith("PKD"))[-1] == "equal"
    code, out, _ = run("merge", tmp_path / "all", one, two)
    assert code == 0
    assert "6 new cells; 2 cells with equal results were kept once" in out
    assert (tmp_path / "all" / "leaderboard.html").exists()


def test_mistakes_are_one_error_and_code_2(run, tmp_path):
    root = machine(tmp_path / "one", (0, 1))
    for arguments, part in (
        (["list", tmp_path / "none"], "does not exist"),
        (["show", root, "PKDD"], "has no row 'PKDD' (did you mean 'PKD'?)"),
        (["show", root, "PKD", 7], "has no result for seed 7; seeds with a result: 0, 1"),
        (["compare", root, tmp_path], "is not a folder of `kd benchmark run`"),
        (["merge", root], "Missing argument"),
        (["run", "quick", "--seeds", "5-3"], "'5-3' has no seed: write 5 for the seeds 0 to 4, or 3-5"),
        (["run", "quick", "--seeds", "few"], "'few' is neither a number of seeds, as 5, nor a range of them"),
        (["run", "quick", "--seeds", "36893488147419103232"], "nor a range of them, as 3-5, below a million"),
        (["run", "quick", "--seeds", "0"], "'0' has no seed"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert part.lower() in err.lower()
        assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_a_range_of_seeds_is_run(run, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    options = ["--out", tmp_path, "--only", "PKD", "--device", "cpu", "--quiet"]
    code, out, _ = run("run", tmp_path / "tiny.yaml", "--seeds", "3-4", *options)
    assert code == 0, out
    found = open_run(tmp_path / "tiny")
    assert found.suite.seeds == 5
    assert [result.seed for result in found.cells.rows["PKD"]] == [3, 4]
    assert "PKD: 2 of 5 seeds are done" in out


def test_a_share_of_the_seeds_keeps_the_seeds_of_the_folder(run, tmp_path, monkeypatch):
    (tmp_path / "tiny.yaml").write_text(TINY)
    store_run(tmp_path / "tiny", suite=tiny(("seeds: 2", "seeds: 8")))
    asked = []

    def stop(suite, root, **_):
        asked.append(suite.seeds)
        raise KDError("stopped")

    monkeypatch.setattr("kdtoolkit.benchmark.runner.run_suite", stop)
    for seeds in ("3-5", "0-2", "9-9", "3"):
        run("run", tmp_path / "tiny.yaml", "--out", tmp_path, "--device", "cpu", "--seeds", seeds)
    assert asked == [8, 8, 10, 3]
