"""Cells of two machines in one folder: from made-up runs, and from runs of this machine."""

import gzip
import json
import shutil

import pytest

from kdtoolkit.benchmark.board import build_board
from kdtoolkit.benchmark.detections_file import detections_path, read_detections, read_ground_truth
from kdtoolkit.benchmark.merge import Merged, merge
from kdtoolkit.benchmark.runs import open_run
from kdtoolkit.benchmark.store import Store, read_result
from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME, TEACHER, change
from kdtoolkit.errors import KDError
from tests.benchmark._runs import FINGERPRINTS, of, store_run
from tests.benchmark._suite import store_result, tiny
from tests.benchmark.test_runner import run


def machine(root, seeds, *, teacher="weights", rows=(BASELINE, "PKD"), machine="a machine", suite=None, **changes):
    """A run of some seeds; the AP of a cell is 20 and its seed."""
    cells = (of(row, seed, 20.0 + seed, teacher=teacher, machine=machine, **changes) for row in rows for seed in seeds)
    suite = suite or tiny(("seeds: 2", f"seeds: {max(seeds) + 1}"))
    return store_run(root, of(TEACHER, 0, 30.0, teacher=teacher), *cells, suite=suite)


def test_seeds_of_two_machines_come_together(tmp_path):
    one = machine(tmp_path / "one" / "tiny", (0, 1))
    two = machine(tmp_path / "two" / "tiny", (2, 3, 4), machine="a second machine")
    out = tmp_path / "all"
    assert merge(out, [one, two]) == Merged(new=10, twice=0, left_out=())
    merged = open_run(out)
    assert merged.suite.seeds == 5
    assert [result.seed for result in merged.cells.rows["PKD"]] == [0, 1, 2, 3, 4]
    assert {result.machine for result in merged.cells.rows["PKD"]} == {"a machine", "a second machine"}
    assert merged.store.result_path("PKD", 3).with_suffix(".pt").read_bytes() == f"PKD, seed 3 {two}".encode()
    board = build_board(out)
    assert board.teacher.ap == 30.0
    assert any(words.startswith("the cells were measured on different hardware") for words in board.warnings)
    assert merge(out, [one, two]) == Merged(new=0, twice=10, left_out=())


def test_a_run_in_the_folder_keeps_its_cells(tmp_path):
    one = machine(tmp_path / "one", (0, 1))
    two = machine(tmp_path / "two", (1, 2), rows=(BASELINE, "CrossKD+PKD"))
    assert merge(one, [two]) == Merged(new=3, twice=1, left_out=())
    assert {row: len(cells) for row, cells in open_run(one).cells.rows.items() if cells} == {
        BASELINE: 3,
        "PKD": 2,
        "CrossKD+PKD": 2,
    }


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"teacher": "of a different training"}, "taught by a different teacher (of a different training instead of w"),
        (
            {"fingerprints": {**FINGERPRINTS, "val_data": "more images", "teacher": "weights"}},
            "evaluated on different images (more images instead of measured)",
        ),
        (
            {"methods": "PKD with a weight"},
            "baseline, seed 2 was trained with different settings than its row (methods PKD",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused_before_anything_is_written(tmp_path, changes, told):
    one, two = machine(tmp_path / "one", (0, 1)), machine(tmp_path / "two", (2, 3), **changes)
    with pytest.raises(KDError) as error:
        merge(tmp_path / "all", [one, two])
    assert f"{two} cannot be merged with {one}" in str(error.value)
    assert told in str(error.value)
    assert not (tmp_path / "all").exists()


def trained(suite):
    """The settings of a suite's students, as their results have them."""
    return {"detector": suite.student, "steps": suite.student.train.steps}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("train: {steps: 2,", "train: {steps: 4,"), "trained with different settings (train.steps 4 instead of 2)"),
        (("train: {steps: 2,", "train: {lr: 0.5, steps: 2,"), "different settings (train.lr 0.5 instead of "),
    ],
)
def test_rows_that_were_trained_differently_are_refused_though_no_row_is_in_both(tmp_path, change, told):
    different = tiny(("seeds: 2", "seeds: 1"), change)
    one = machine(tmp_path / "one", (0,), rows=(BASELINE,), **trained(tiny()))
    two = machine(tmp_path / "two", (0,), rows=("PKD",), suite=different, **trained(different))
    with pytest.raises(KDError) as error:
        merge(tmp_path / "all", [one, two])
    assert f"{two} cannot be merged with {one}: PKD, seed 0 was" in str(error.value)
    assert told in str(error.value)
    assert not (tmp_path / "all").exists()


def test_suites_that_teach_in_a_different_way_are_refused(tmp_path):
    scaled = change(tiny(), teacher_scale=0.5)
    one, two = machine(tmp_path / "one", (0,)), machine(tmp_path / "two", (1,), suite=scaled, rows=(BASELINE,))
    with pytest.raises(KDError, match=r"teacher_scale of its suite is 0\.5 instead of 1\.0"):
        merge(tmp_path / "all", [one, two])


def test_a_cell_of_the_folder_that_is_left_out_is_kept_with_its_files(tmp_path):
    one, two = machine(tmp_path / "one", (0, 1)), machine(tmp_path / "two", (1,))
    path = Store(one).result_path("PKD", 1)
    foreign = of("PKD", 1, 77.0, fingerprints={**FINGERPRINTS, "train_data": "more images", "teacher": "weights"})
    store_result(path, foreign)
    own = path.with_suffix(".pt").read_bytes()
    merged = merge(one, [two])
    assert [words.partition(":")[0] for words in merged.left_out] == ["PKD, seed 1 is left out"]
    assert read_result(path).evaluation["ap"] == 21.0
    assert read_result(path.with_name("seed1.json.old")) == foreign
    assert path.with_name("seed1.pt.old").read_bytes() == own


def ground_truth(root, fingerprint):
    content = gzip.compress(json.dumps({"fingerprint": fingerprint, "truth": {}}).encode())
    Store(root).ground_truth_path.write_bytes(content)


def test_the_ground_truth_is_the_first_one_that_is_whole_and_of_the_cells(tmp_path):
    runs = [machine(tmp_path / name, (seed,)) for seed, name in enumerate(("one", "two", "three"))]
    Store(runs[0]).ground_truth_path.write_bytes(b"damaged")
    ground_truth(runs[1], "different images")
    ground_truth(runs[2], "measured")
    for out in (tmp_path / "all", runs[0]):
        merge(out, runs)
        assert read_ground_truth(Store(out).ground_truth_path).fingerprint == "measured"


def test_an_entry_with_different_methods_is_refused(tmp_path):
    changed = tiny(("weight: 3.0", "weight: 4.0"))
    one, two = machine(tmp_path / "one", (0,)), machine(tmp_path / "two", (1,), suite=changed)
    with pytest.raises(KDError, match=r"entry 'CrossKD\+PKD' has different methods in the two suites"):
        merge(tmp_path / "all", [one, two])


def test_a_cell_that_does_not_belong_to_its_run_is_named_and_the_rest_is_merged(tmp_path):
    one = machine(tmp_path / "one", (0, 1))
    store_result(Store(one).result_path("PKD", 1), of("PKD", 1, 20.0, teacher="of a different training"))
    merged = merge(tmp_path / "all", [one])
    assert merged.new == 3
    assert merged.left_out[0].startswith("PKD, seed 1 is left out: it was taught by a different teacher")


def test_unequal_results_of_a_cell_are_named(tmp_path):
    one, two = machine(tmp_path / "one", (0, 1)), machine(tmp_path / "two", (1,))
    store_result(Store(two).result_path("PKD", 1), of("PKD", 1, 20.0))
    with pytest.raises(KDError) as error:
        merge(tmp_path / "all", [one, two])
    assert f"PKD, seed 1 (AP 21.00 in {one}, 20.00 in {two})" in str(error.value)
    assert "baseline" not in str(error.value)
    assert not (tmp_path / "all").exists()


def test_schedules_of_equal_time_may_differ(tmp_path):
    one = machine(tmp_path / "one", (0,), rows=(EQUAL_TIME,), steps=150, stretch=1.5)
    two = machine(tmp_path / "two", (1,), rows=(EQUAL_TIME,), steps=160, stretch=1.6)
    merge(tmp_path / "all", [one, two])
    board = build_board(tmp_path / "all")
    assert board.facts[EQUAL_TIME].startswith("150; 160 steps")
    assert any("different lengths (seed 0: 150 steps, seed 1: 160 steps)" in words for words in board.warnings)


def test_a_damaged_result_is_named_and_the_rest_is_merged(tmp_path):
    one, two = machine(tmp_path / "one", (0, 1)), machine(tmp_path / "two", (2,))
    broken = Store(two).result_path("PKD", 2)
    broken.write_text("{")
    assert merge(tmp_path / "all", [one, two]) == Merged(
        new=5,
        twice=0,
        left_out=(f"PKD, seed 2 is left out, since {broken} is damaged: `kd benchmark run` trains the cell again",),
    )


def test_a_cell_takes_the_place_of_a_damaged_one_which_is_kept_beside_it(tmp_path):
    one, two = machine(tmp_path / "one", (0, 1)), machine(tmp_path / "two", (1,))
    broken = Store(one).result_path("PKD", 1)
    broken.write_text("{")
    detections_path(broken).write_bytes(b"of the damaged result")
    broken.with_suffix(".pt").write_bytes(b"its weights")
    broken.with_suffix(".error").write_text("out of luck\n")
    merged = merge(one, [two])
    assert merged.new == 1
    assert merged.kept_aside == (f"{broken} did not belong to its run: it is kept as seed1.json.old",)
    assert broken.with_name("seed1.pt.old").read_bytes() == b"its weights"
    assert broken.with_name("seed1.detections.npz.old").read_bytes() == b"of the damaged result"
    assert open_run(one).cells.left_out == ()
    assert broken.with_suffix(".json.old").read_text() == "{"
    assert not detections_path(broken).exists()
    assert not broken.with_suffix(".error").exists()


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(KDError, match="is not a folder of `kd benchmark run`"):
        merge(tmp_path / "all", [tmp_path])


@pytest.mark.slow
def test_a_second_machine_with_the_first_ones_teacher_adds_its_seeds(tmp_path):
    suite = tiny(("seeds: 2", "seeds: 1"))
    here, there = tmp_path / "here" / "tiny", tmp_path / "there" / "tiny"
    assert run(suite, here, only=["PKD"], long_baselines=False)[0].failures == {}
    shutil.copytree(here.parent / "teachers", there.parent / "teachers")
    more = change(suite, seeds=2)
    options = {"only": ["PKD"], "long_baselines": False, "any_version": True, "seeds": range(1, 2)}
    outcome, text = run(more, there, **options)
    assert outcome.failures == {}, text
    assert "teacher: taken from" in text
    assert merge(here, [there]) == Merged(new=2, twice=0, left_out=())
    assert [result.seed for result in open_run(here).cells.rows["PKD"]] == [0, 1]
    path = Store(here).result_path("PKD", 1)
    assert read_detections(detections_path(path), read_result(path)) is not None
    outcome, text = run(more, here, only=["PKD"], long_baselines=False, any_version=True)
    assert "all cells are done" in text
