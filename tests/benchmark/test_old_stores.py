"""Stores that earlier versions have written: they are read, listed, shown, compared, reported and merged.

`golden/store_v1` was written by version 0.1.0 before results had a format. `golden/store_v2` is of format 2.
"""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from kdtoolkit.benchmark.board import build_board
from kdtoolkit.benchmark.detections_file import detections_path, read_detections, read_ground_truth
from kdtoolkit.benchmark.merge import merge
from kdtoolkit.benchmark.report import View, write_report
from kdtoolkit.benchmark.report.store import print_comparison, print_records, print_runs, print_states
from kdtoolkit.benchmark.run_pair import compare_runs
from kdtoolkit.benchmark.runs import open_run
from kdtoolkit.benchmark.suite import TEACHER
from kdtoolkit.engine.scoring import precisions

GOLDEN = Path(__file__).parent / "golden"
FORMATS = {"store_v1": 1, "store_v2": 2}


def printed(printer, *arguments):
    console = Console(width=80, file=io.StringIO())
    printer(*arguments, console)
    return console.file.getvalue()


@pytest.fixture(params=FORMATS)
def root(request, tmp_path):
    return Path(shutil.copytree(GOLDEN / request.param, tmp_path / request.param))


def test_the_board_has_the_numbers_that_it_had(root):
    board = build_board(root)
    stored = json.loads((root / "leaderboard.json").read_text("utf-8"))
    assert board.teacher.ap == pytest.approx(
        stored["teacher"]["metrics"]["ap"]["mean"], abs=1e-4
    )  # six digits are kept
    assert {row.entry: (row.ap, row.seeds) for row in board.rows} == {
        row["entry"]: (pytest.approx(row["metrics"]["ap"]["mean"], abs=1e-4), tuple(row["seeds"]))
        for row in stored["rows"]
    }
    assert not any("left out" in words for words in board.warnings)
    write_report([View.of(root)], root)
    assert root.name in (root / "leaderboard.md").read_text("utf-8")
    assert root.name in (root / "leaderboard.html").read_text("utf-8")


def test_every_cell_says_what_it_is_of(root):
    run = open_run(root)
    assert len(run.results) == 9
    for result in run.results:
        assert result.format == FORMATS[root.name]
        assert set(result.fingerprints) >= {"train_data", "val_data"}
        assert result.fingerprints["val_data"] == run.cells.teacher.fingerprints["val_data"]
    assert {result.teacher_key for result in run.cells.rows["PKD"]} == {run.cells.teacher.key}


def test_it_is_listed_and_shown(root):
    assert f"{root.name}" in printed(print_runs, root.parent)
    assert "2 of 2" in printed(print_runs, root)
    run = open_run(root)
    states = printed(print_states, run)
    assert not any(word in states for word in ("damaged", "not run", "failed"))
    for row in (*run.rows, TEACHER):
        shown = printed(print_records, run, row, 0)
        assert re.search(rf"^format +{FORMATS[root.name]} *$", shown, re.MULTILINE)
        assert "AP50" in shown


def test_it_is_merged_and_compared(root, tmp_path):
    assert merge(tmp_path / "all", [root]).new == 8
    pair = compare_runs(root, tmp_path / "all")
    assert (pair.differences, pair.refusal) == ({}, "")
    assert all(row.difference.mean == 0 for row in pair.rows)
    assert "all settings, data, versions and hardware are equal" in printed(print_comparison, pair)


def test_a_store_of_format_2_has_all_that_a_cell_records():
    for result in open_run(GOLDEN / "store_v2").results:
        assert result.suite == "store_v2"
        assert result.settings["steps"] == result.steps
        assert result.settings["data"]["val_images"] == 8
        assert result.inference.parameters == result.parameters
        assert result.breakdown.by_class.keys() == result.per_class.keys()
        assert ("teacher" in result.fingerprints) == (result.entry in ("PKD", TEACHER))
        if result.entry != TEACHER:
            assert [point["ap"] for point in result.evaluations][-1] == result.evaluation["ap"]


def test_ap_can_be_computed_again_from_a_store_of_format_2():
    run = open_run(GOLDEN / "store_v2")
    truth = read_ground_truth(run.store.ground_truth_path)
    paths = {(row, seed): run.store.result_path(row, seed) for row in run.rows for seed in range(run.suite.seeds)}
    for result in run.results:
        path = run.store.teacher_copy if result.entry == TEACHER else paths[result.entry, result.seed]
        assert truth.fingerprint == result.fingerprints["val_data"]
        document, found = truth.of(result, read_detections(detections_path(path)))
        precision = precisions(document, found)[..., 0]  # objects of all areas
        assert 100 * precision[precision > -1].mean() == pytest.approx(result.evaluation["ap"], abs=1e-6)
