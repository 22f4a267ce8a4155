"""Runs of real cells, a few steps each."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from kdtoolkit.benchmark import cell
from kdtoolkit.benchmark.board import build_board
from kdtoolkit.benchmark.cell import build_detector
from kdtoolkit.benchmark.datasets import load_data
from kdtoolkit.benchmark.executor import Hardware
from kdtoolkit.benchmark.keys import difference, key_of
from kdtoolkit.benchmark.plan import Plan
from kdtoolkit.benchmark.runner import run_suite
from kdtoolkit.benchmark.runs import open_run
from kdtoolkit.benchmark.status import read_status
from kdtoolkit.benchmark.store import Store, read_result, write_atomic, write_result
from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME, TWICE, change
from kdtoolkit.engine.evaluate import evaluate
from kdtoolkit.engine.hardware import cores
from kdtoolkit.errors import KDError
from tests.benchmark._runs import of, store_run
from tests.benchmark._suite import made_up, store_result, tiny

CELLS = [(row, seed) for row in (BASELINE, "PKD", "CrossKD+PKD", EQUAL_TIME) for seed in (0, 1)]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(suite, root, **options):
    console = Console(file=io.StringIO(), width=200)
    outcome = run_suite(suite, root, console=console, **{"jobs": 2, **options})
    return outcome, console.file.getvalue()


def dates(root):
    """When each result was written."""
    return {path.relative_to(root): path.stat().st_mtime_ns for path in root.glob("cells/*/*.json")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs") / "tiny"
    outcome, text = run(tiny(), root)
    assert outcome.failures == {}, text
    return root


def test_every_cell_is_stored_and_on_the_board(finished):
    for row, seed in CELLS:
        result = read_result(Store(finished).result_path(row, seed))
        assert (result.entry, result.seed) == (row, seed)
        assert result.steps >= 2
        assert result.peak_memory_mb > 50
        assert result.train_seconds > 0
        assert result.history[-1]["step"] == result.steps
    terms = read_result(Store(finished).result_path("CrossKD+PKD", 0)).history[0]
    assert {"crosskd/cls", "pkd/feature"} <= terms.keys()
    board = build_board(finished)
    assert {row.entry for row in board.rows} == {BASELINE, "PKD", "CrossKD+PKD", EQUAL_TIME}
    assert board.teacher.steps == 3
    for ending in ("md", "csv", "json", "html"):
        assert (finished / f"leaderboard.{ending}").stat().st_size > 100


def test_a_run_leaves_how_it_ended(finished):
    status = read_status(Store(finished).status_path)
    assert (status.process, status.ended) == (os.getpid(), "with all its cells done")
    assert (status.done, status.running, status.seconds_left) == (status.cells, (), None)
    assert status.done >= len(CELLS)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_images_without_a_box_are_refused_before_anything_is_trained(tmp_path, device):
    last = int(torch.randperm(12, generator=torch.Generator().manual_seed(0))[-1])  # which no part of the 12 takes
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in range(12)],
        "annotations": [{"image_id": last, "category_id": 1, "bbox": [10, 10, 30, 20]}],
        "categories": [{"id": 1, "name": "fox"}],
    }
    for folder in ("images", "annotations"):
        (tmp_path / folder).mkdir()
    for i in range(12):
        Image.new("L", (64, 48), 20 * i).save(tmp_path / "images" / f"{i}.png")
    for split in ("train", "val"):
        (tmp_path / "annotations" / f"{split}.json").write_text(json.dumps(document))
    for counts, role in (({}, "the teacher"), ({"teacher_images": 12, "student_images": 12}, "evaluation")):
        suite = change(tiny(), data={"root": tmp_path, **counts})
        with pytest.raises(KDError, match=rf"data for {role}: \d images of .*, chosen by seed 0, have no box"):
            run(suite, tmp_path / "runs", device=device)
    assert not (tmp_path / "runs").exists()


def test_stored_weights_are_the_student_that_was_measured(finished):
    suite, path = tiny(), Store(finished).result_path("PKD", 1)
    sets = load_data(suite.data)
    student = build_detector(suite.student, sets.val.class_names, 5).model
    student.load_state_dict(torch.load(path.with_suffix(".pt"), weights_only=True))
    assert evaluate(student, sets.val).ap == pytest.approx(read_result(path).evaluation["ap"], abs=1e-6)


def test_rows_of_a_seed_start_alike_and_differ_by_their_methods(finished):
    def weights(row):
        return torch.load(Store(finished).result_path(row, 0).with_suffix(".pt"), weights_only=True)

    first = {row: read_result(Store(finished).result_path(row, 0)).history[0] for row in (BASELINE, "PKD")}
    assert first[BASELINE]["task/cls"] == first["PKD"]["task/cls"]
    assert any(not torch.equal(a, b) for a, b in zip(weights(BASELINE).values(), weights("PKD").values(), strict=True))


def test_the_same_suite_gives_the_same_students(finished, tmp_path):
    run(tiny(), tmp_path / "tiny", only=["PKD"])
    for row, seed in ((BASELINE, 0), ("PKD", 1)):
        ours, theirs = (Store(root).result_path(row, seed) for root in (tmp_path / "tiny", finished))
        assert read_result(ours).history == read_result(theirs).history
        weights = [torch.load(path.with_suffix(".pt"), weights_only=True) for path in (ours, theirs)]
        assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))


def test_a_run_may_be_cut_into_slices(tmp_path):
    root, suite = tmp_path / "tiny", change(tiny(), plateau=True)
    outcome, text = run(suite, root, only=["PKD"], seeds=range(1), long_baselines=False, seconds=0.0)
    assert outcome.out_of_time
    assert not dates(root)
    outcome, text = run(suite, root, only=["PKD"], seeds=range(1), long_baselines=False)
    assert (outcome.failures, outcome.out_of_time) == ({}, False), text
    assert {str(path) for path in dates(root)} == {f"cells/{row}/seed0.json" for row in (BASELINE, "PKD")}
    assert "PKD: 1 of 2 seeds are done" in build_board(root).warnings
    _, text = run(suite, root, only=["PKD"], seeds=range(1))
    assert {path.parts[1] for path in dates(root)} == {BASELINE, "PKD", EQUAL_TIME, TWICE}
    assert read_result(Store(root).result_path(TWICE, 0)).steps == 4
    _, text = run(suite, root, only=["PKD"], seeds=range(1))
    assert "all cells are done" in text


def test_the_baseline_is_evaluated_after_four_fifths_of_its_steps_where_the_suite_asks_for_it(tmp_path):
    for plateau in (True, False):
        student = {**tiny().student.model_dump(), "train": {"steps": 5, "batch_size": 2}}
        suite = change(tiny(), student=student, plateau=plateau)
        plan = Plan(suite, Store(tmp_path / str(plateau)), load_data(suite.data), device="cpu", threads=1)
        cell.run(plan.cell(BASELINE, 0), lambda report: None)
    early, without = (read_result(Store(tmp_path / name).result_path(BASELINE, 0)) for name in ("True", "False"))
    assert early.ap_at_four_fifths is not None
    assert without.ap_at_four_fifths is None
    assert early.history == without.history
    assert early.evaluation == without.evaluation


def test_what_is_done_is_not_run_again(finished, monkeypatch):
    before = dates(finished)
    monkeypatch.setattr("kdtoolkit.data.shapes._Scene", None)  # nor is anything drawn
    outcome, text = run(tiny(), finished)
    assert dates(finished) == before
    assert text.strip() == f"{finished}: all cells are done, so nothing is run (--fresh runs them again)"
    assert outcome.failures == {}


def test_a_run_that_was_killed_before_its_last_board_gets_it_from_the_next_call(finished, tmp_path):
    store = Store(shutil.copytree(finished.parent, tmp_path / "runs") / finished.name)
    ended = read_status(store.status_path)
    write_atomic(store.status_path, ended.model_copy(update={"ended": "", "done": 0}).model_dump_json().encode())
    (store.root / "leaderboard.md").unlink()
    fewer = tiny(("  PKD: [PKD]\n", ""))
    outcome, text = run(fewer, store.root)
    assert outcome.failures == {}
    assert "all cells are done" in text
    assert "CrossKD+PKD" in (store.root / "leaderboard.md").read_text()
    assert {row.entry for row in build_board(store.root).rows} == {BASELINE, "CrossKD+PKD", EQUAL_TIME}
    status = read_status(store.status_path)
    assert (status.ended, status.done, status.cells) == ("with all its cells done", 6, 6)


@pytest.mark.parametrize("where", ["_keep_teacher", "_write_board"])
@pytest.mark.parametrize(("stop", "words"), [(KeyboardInterrupt, "interrupted"), (OSError, "with an error")])
def test_the_status_of_a_done_run_ends_however_the_call_is_stopped(finished, tmp_path, monkeypatch, where, stop, words):
    store = Store(shutil.copytree(finished.parent, tmp_path / "runs") / finished.name)

    def stopped(*_, **__):
        raise stop

    monkeypatch.setattr(f"kdtoolkit.benchmark.runner._Run.{where}", stopped)
    with pytest.raises(stop):
        run(tiny(), store.root)
    assert read_status(store.status_path).ended == words


def test_a_run_folder_that_a_killed_run_left_beside_its_result_is_deleted(finished, tmp_path):
    root = shutil.copytree(finished.parent, tmp_path / "runs") / finished.name
    suite = tiny()
    plan = Plan(suite, Store(root), load_data(suite.data), device="cpu", threads=max(1, cores() // 2))
    _, stretch = plan.stretch()
    left = [plan.teacher_task(), plan.cell("PKD", 1), plan.cell(EQUAL_TIME, 0, stretch)]
    before = dates(root)
    for task in left:
        (task.run_folder / "checkpoints").mkdir(parents=True)
        outcome, text = run(suite, root)
        assert outcome.failures == {}
        assert not task.run_folder.exists(), text
    assert dates(root) == before


def test_the_first_lines_say_what_will_be_done_and_how_long_it_takes(tmp_path):
    suite = tiny(("train: {steps: 3,", "train: {steps: 12, precision: auto,"), ("seeds: 2", "seeds: 1"))
    suite = change(suite, student={**suite.student.model_dump(), "train": {"steps": 12, "batch_size": 2}})
    _, text = run(suite, tmp_path / "tiny", only=["PKD"])
    first = text.partition("started")[0]
    for part in ("kdtoolkit/gfl, 12 steps", "1 seed each of baseline, PKD", "2 at a time, 1 thread each", "float32"):
        assert part in first
    assert f"results: {tmp_path / 'tiny'}" in first
    assert "took " in text.splitlines()[-1]


def test_drawn_pictures_serve_all_cells(finished):
    files = list((finished.parent / "pictures").iterdir())
    assert len(files) == 2  # for training and for evaluation
    suite = tiny()
    ours, theirs = load_data(suite.data), load_data(suite.data, finished.parent / "pictures")
    for mine, kept in ((ours.student, theirs.student), (ours.val, theirs.val)):
        assert mine.coco() == kept.coco()
        assert all(torch.equal(mine[i][0], kept[i][0]) for i in range(len(mine)))


def hardware(precision):
    return Hardware("cpu", "cpu", "a machine", precision)


def test_a_key_knows_precision_device_and_threads(tmp_path):
    suite = tiny(
        (
            "model: kdtoolkit/gfl\n  args: *detector\n  train: {steps: 2,",
            "model: kdtoolkit/gfl\n  args: *detector\n  train: {steps: 2, precision: auto,",
        )
    )
    sets = load_data(suite.data)

    def parts(precision, threads):
        plan = Plan(suite, Store(tmp_path), sets, device="cpu", threads=threads, hardware=hardware(precision))
        return plan.cell("PKD", 0).parts

    ours, other = parts("bfloat16", 1), parts("float32", 2)
    assert (ours["precision"], ours["device"], ours["threads"]) == ("bfloat16", "cpu", "1")
    assert difference(ours, other) == ("changed: detector, teacher, precision (bfloat16 -> float32), threads (1 -> 2)")


def test_damaged_files_are_named_and_trained_again(finished, tmp_path):
    runs = shutil.copytree(finished.parent, tmp_path / "runs")
    root = runs / finished.name
    (teacher,) = (runs / "teachers").glob("*.pt")
    result = Store(root).result_path("PKD", 0)
    weights = Store(root).result_path("PKD", 1).with_suffix(".pt")
    equal = Store(root).result_path(EQUAL_TIME, 0)
    for path in (teacher, result, weights, equal):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = dates(root)
    outcome, text = run(tiny(), root)
    assert outcome.failures == {}
    for name, path in (("teacher", teacher), ("PKD, seed 1", weights)):
        assert f"{name} is trained again, since {path} is missing or damaged" in text
    for name, path in (("PKD, seed 0", result), (f"{EQUAL_TIME}, seed 0", equal)):
        assert f"{name} is trained again, since {path} is damaged" in text
    changed = {path for path, date in dates(root).items() if date != before.get(path)}
    assert changed >= {
        result.relative_to(root),
        weights.relative_to(root).with_suffix(".json"),
        equal.relative_to(root),
    }
    assert not any(path.parent.name in (BASELINE, "CrossKD+PKD") for path in changed)
    assert all(torch.load(path, weights_only=True) for path in (teacher, weights))


def test_cells_of_a_teacher_that_was_trained_again_to_other_weights_are_run_again(finished, tmp_path):
    store = Store(shutil.copytree(finished.parent, tmp_path / "runs") / finished.name)
    (teacher,) = store.teachers.glob("*.json")
    had, now = "other weights", read_result(teacher).fingerprints["teacher"]
    for path in (teacher, store.result_path("PKD", 0)):
        result = read_result(path)
        write_result(path, result.model_copy(update={"fingerprints": {**result.fingerprints, "teacher": had}}))
    teacher.with_suffix(".pt").unlink()  # trained again, it has its own weights again
    outcome, text = run(tiny(), store.root, seeds=range(1), long_baselines=False)
    assert outcome.failures == {}
    after = text.partition("finished  teacher")[2]
    assert "PKD, seed 0 is out of date (its teacher was trained again and has other weights)" in after
    assert text.count("started ") == 2  # the teacher and this cell
    assert read_result(store.result_path("PKD", 0)).fingerprints["teacher"] == now
    assert open_run(store.root).cells.left_out == ()


def test_a_result_that_does_not_know_its_teachers_weights_stays(finished, tmp_path):
    root = shutil.copytree(finished.parent, tmp_path / "runs") / finished.name
    suite = tiny()
    plan = Plan(suite, Store(root), load_data(suite.data), device="cpu", threads=max(1, cores() // 2))
    task = plan.cell("PKD", 0)
    result = plan.result(task)
    for teacher, stays in (("other weights", False), ("", True)):
        write_result(task.result, result.model_copy(update={"fingerprints": {"teacher": teacher}}))
        assert (plan.result(task) is not None) == (plan.why_unusable(task) is None) == stays


def test_equal_time_goes_by_costs_on_the_same_hardware(tmp_path):
    suite = tiny()
    store = Store(tmp_path / "tiny")
    plan = Plan(suite, store, load_data(suite.data), device="cpu", threads=1)
    for row, seconds, machine in ((BASELINE, 10.0, "slow"), ("PKD", 30.0, "slow"), ("CrossKD+PKD", 4.0, "fast")):
        store_result(store.result_path(row, 0), made_up(row, 0, 20.0, cpu_seconds=seconds, machine=machine))
    assert plan.stretch() == ("PKD", pytest.approx(3.0))
    store_result(store.result_path(BASELINE, 1), made_up(BASELINE, 1, 20.0, cpu_seconds=1.0, machine="fast"))
    assert plan.stretch() == ("CrossKD+PKD", pytest.approx(4.0))
    for seed in (0, 1):
        store_result(store.result_path(BASELINE, seed), made_up(BASELINE, seed, 20.0, machine="a third"))
    assert plan.stretch() is None


def test_any_version_keeps_results_of_different_source_code_and_their_teacher(finished, tmp_path, monkeypatch):
    root = shutil.copytree(finished.parent, tmp_path / "runs") / finished.name
    monkeypatch.setattr("kdtoolkit.benchmark.keys.source_digest", lambda *_: "of a later version")
    before = dates(root)
    _, text = run(tiny(), root, any_version=True)
    assert "all cells are done" in text
    more = tiny(("entries:", "entries:\n  LD: [LD]"), ("weight: 3.0", "weight: 4.0"))
    outcome, text = run(more, root, any_version=True)
    assert outcome.failures == {}
    changed = {path.parts[1] for path, date in dates(root).items() if before.get(path) != date}
    assert changed >= {"LD", "CrossKD+PKD"}
    assert changed <= {"LD", "CrossKD+PKD", EQUAL_TIME}
    assert "CrossKD+PKD, seed 0 is out of date (changed: methods, code)" in text
    store = Store(root)
    taught_by = {read_result(store.result_path(row, 0)).key_parts["teacher"] for row in ("PKD", "LD")}
    assert taught_by == {read_result(store.teacher_copy).key}
    with pytest.raises(KDError, match="nothing to keep"):
        run(tiny(), root, any_version=True, fresh=True)


def test_any_version_keeps_results_whose_precision_the_hardware_chose(tmp_path):
    def plan(suite, hardware_has):
        sets, store = load_data(suite.data), Store(tmp_path / "tiny")
        return Plan(suite, store, sets, device="cpu", threads=1, hardware=hardware(hardware_has), any_version=True)

    def suite(precision):
        return tiny(
            ("{steps: 3,", f"{{steps: 3, precision: {precision},"),
            ("{steps: 2,", f"{{steps: 2, precision: {precision},"),
        )

    before = plan(suite("auto"), "bfloat16")
    taught = before.cell("PKD", 0)
    for task in (before.teacher_task(), taught):
        result = made_up(task.entry, 0, 20.0, key=key_of(task.parts), key_parts=task.parts)
        store_result(task.result, result)
        torch.save({}, task.weights)
    after = plan(suite("auto"), "float32")
    assert after.cell("PKD", 0).parts["precision"] == "float32"
    assert after.set_aside_unusable() == {}
    assert after.result(after.cell("PKD", 0)).key_parts["precision"] == "bfloat16"
    assert after.teacher_task().result == before.teacher_task().result
    named = plan(suite("float32"), "bfloat16").set_aside_unusable()
    assert "precision (bfloat16 -> float32)" in named["PKD, seed 0"]


def test_a_changed_entry_is_run_again_and_no_other(finished):
    before = dates(finished)
    _, text = run(tiny(("weight: 3.0", "weight: 4.0")), finished)
    changed = {path.parts[1] for path, date in dates(finished).items() if before.get(path) != date}
    assert "CrossKD+PKD" in changed
    assert changed <= {"CrossKD+PKD", EQUAL_TIME}  # the latter if the new cells were slower
    assert "CrossKD+PKD, seed 0 is out of date (changed: methods)" in text


def test_a_student_that_diverges_is_kept_as_it_was_before(tmp_path):
    suite = tiny(("PKD: [PKD]", "PKD: [{PKD: {weight: 1.0e+39}}]"), ("seeds: 2", "seeds: 1"))
    outcome, _ = run(suite, tmp_path / "tiny", only=["PKD"])
    kept = Store(tmp_path / "tiny").result_path("PKD", 0).with_suffix(".last-good.pt")
    (reason,) = outcome.failures.values()
    assert "step 1: pkd/feature = inf (student: all finite" in reason
    assert str(kept) in reason
    student = build_detector(suite.student, load_data(suite.data).val.class_names, 5).model
    student.load_state_dict(torch.load(kept, weights_only=True))


def test_more_seeds_run_only_the_new_ones_and_fresh_runs_what_is_named(finished):
    suite = tiny(("  CrossKD+PKD: [CrossKD, {PKD: {weight: 3.0}}]\n", ""), ("seeds: 2", "seeds: 3"))
    before = dates(finished)
    run(suite, finished)
    after = dates(finished)
    assert {path.parts[1] for path in after.keys() - before.keys()} >= {BASELINE, "PKD"}
    kept = [path for path in before if path.parts[1] in (BASELINE, "PKD")]
    assert [after[path] for path in kept] == [before[path] for path in kept]
    run(suite, finished, only=["PKD"], fresh=True)
    again = {path.parts[1] for path, date in dates(finished).items() if after.get(path) != date}
    assert "PKD" in again
    assert again <= {"PKD", EQUAL_TIME}


def test_a_killed_worker_costs_its_cell_and_the_next_call_runs_it(tmp_path):
    flag = tmp_path / "flag"
    flag.write_text("")
    suite = tiny(("model: kdtoolkit/gfl\n  args: *detector", "model: tests.benchmark._models:fragile\n  args: {}"))
    args = {**tiny().student.args, "flag": str(flag)}
    suite = change(suite, student=suite.student.model_copy(update={"args": args}), seeds=1)
    outcome, text = run(suite, tmp_path / "tiny")
    assert list(outcome.failures) == ["baseline, seed 0"]
    assert "SIGKILL" in outcome.failures["baseline, seed 0"]
    assert "finished  CrossKD+PKD, seed 0" in text
    error = Store(tmp_path / "tiny").result_path(BASELINE, 0).with_suffix(".error")
    assert "SIGKILL" in error.read_text()
    outcome, text = run(suite, tmp_path / "tiny")
    assert outcome.failures == {}
    assert "started   baseline, seed 0" in text
    assert "started   PKD" not in text
    assert "baseline (equal time)" in text
    assert not error.exists()


def test_a_run_waits_for_a_teacher_that_another_run_trains_and_does_not_delete_its_folder(tmp_path):
    suite = tiny(("seeds: 2", "seeds: 1"), ("  CrossKD+PKD: [CrossKD, {PKD: {weight: 3.0}}]\n", ""))
    store = Store(tmp_path / "tiny")
    teacher = Plan(suite, store, load_data(suite.data), device="cpu", threads=1).teacher_task()
    training, go_on = threading.Event(), threading.Event()

    def pause(report):
        if report.phase == "training":
            training.set()
            assert go_on.wait(60)

    console = Console(file=io.StringIO(), width=200)
    with ThreadPoolExecutor() as threads:
        try:
            first = threads.submit(cell.run, teacher, pause)
            assert training.wait(60)
            options = {"jobs": cores(), "fresh": True}  # one thread a cell
            second = threads.submit(run_suite, suite, store.root, console=console, **options)
            deadline = time.monotonic() + 60
            while not second.done() and "waits for process" not in console.file.getvalue():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert teacher.run_folder.exists()
        finally:
            go_on.set()
        first.result()
        date = teacher.result.stat().st_mtime_ns
        assert second.result().failures == {}
    text = console.file.getvalue()
    assert text.count(f"teacher: waits for process {os.getpid()} on ") == 1
    assert "finished  PKD, seed 0" in text
    assert teacher.result.stat().st_mtime_ns == date
    assert not teacher.run_folder.exists()


def test_a_disk_that_takes_no_cells_ends_the_run_with_one_error(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "cells").write_text("not a folder")
    with pytest.raises(KDError, match=r"cannot write .*cells"):
        run(tiny(), tmp_path / "tiny")


def test_a_method_that_cannot_work_is_found_before_anything_runs(tmp_path):
    suite = tiny(("CrossKD, {PKD", "{CrossKD: {stage: 9}}, {PKD"))
    with pytest.raises(KDError, match=r"suite tiny, CrossKD\+PKD: .*no stage 9"):
        run(suite, tmp_path / "tiny")
    assert not (tmp_path / "teachers").exists()


def test_an_unknown_entry_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(
        KDError, match=r"tiny has no entry 'PDK' \(did you mean 'PKD'\?\); it has baseline, PKD, CrossKD\+PKD"
    ):
        run(tiny(), tmp_path / "tiny", only=["PDK"])


def test_the_stretch_stands_until_it_is_five_percent_short(tmp_path):
    suite, store = tiny(), Store(tmp_path / "tiny")
    plan = Plan(suite, store, load_data(suite.data), device="cpu", threads=1)
    assert plan.stretch() is None
    for seed in range(2):
        store_result(store.result_path(BASELINE, seed), made_up(BASELINE, seed, 1.0, cpu_seconds=20.0))
        store_result(store.result_path("PKD", seed), made_up("PKD", seed, 1.0, cpu_seconds=30.0 + 20 * seed))
    assert plan.stretch() == ("PKD", 2.0)
    assert plan.cell(EQUAL_TIME, 0, 2.0).steps == 4
    assert plan.cell(EQUAL_TIME, 0, 1.01).steps == 3  # rounded up
    for stored, expected in ((1.95, 1.95), (2.5, 2.5), (1.9, 2.0)):
        for seed in range(2):
            store_result(store.result_path(EQUAL_TIME, seed), made_up(EQUAL_TIME, seed, 1.0, stretch=stored))
        assert plan.stretch() == ("PKD", expected)


# A teacher that never gets done: the run is in the middle of its work whenever it is stopped.
ENDLESS = ("train: {steps: 3,", "train: {steps: 1000000,")


@pytest.fixture
def endless(tmp_path):
    """A running `kd benchmark run` whose baselines are done."""
    (tmp_path / "tiny.yaml").write_text(tiny(ENDLESS).to_yaml())
    command = [sys.executable, "-m", "kdtoolkit", "benchmark", "run", "tiny.yaml", "--jobs", "2"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Whoever runs the tests in a shell's background has it ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for line in process.stdout:
            if line.startswith("finished  baseline, seed 1"):
                break
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()


def session(leader):
    """Processes of a session that are alive: the run, its fork server, its workers."""
    alive = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[3] == str(leader) and fields[0] != "Z":
            alive.append(int(path.parent.name))
    return alive


def wait_until_gone(leader):
    deadline = time.monotonic() + 30  # it takes a fraction of a second, unless the machine is busy
    while session(leader) and time.monotonic() < deadline:
        time.sleep(0.05)
    return session(leader)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks processes up in /proc")
def test_killing_the_run_leaves_no_process_and_no_lost_cell(endless, tmp_path):
    assert len(session(endless.pid)) >= 3
    os.kill(endless.pid, signal.SIGKILL)
    assert wait_until_gone(endless.pid) == []
    root = tmp_path / "runs" / "tiny"
    before = dates(root)
    assert {path.parts[1] for path in before} == {BASELINE}
    outcome, text = run(tiny(), root)  # a shorter teacher: the baselines do not depend on it
    assert outcome.failures == {}
    assert "started   baseline, seed" not in text
    assert {path: dates(root)[path] for path in before} == before
    assert len(dates(root)) == len(CELLS)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks processes up in /proc")
def test_ctrl_c_tells_how_to_go_on(endless, tmp_path):
    os.killpg(endless.pid, signal.SIGINT)
    text = endless.stdout.read()
    assert endless.wait(10) == 130
    assert "the same command goes on from there" in text
    assert "Traceback" not in text
    assert wait_until_gone(endless.pid) == []
    assert (tmp_path / "runs" / "tiny" / "leaderboard.md").exists()


def test_a_new_suite_never_lies_over_results_of_an_old_one(tmp_path, monkeypatch):
    root = store_run(tmp_path / "tiny", of("PKD", 0, 20.0), suite=tiny(("steps: 2", "steps: 9")))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("kdtoolkit.benchmark.runner.write_atomic", killed)
    monkeypatch.setattr("kdtoolkit.benchmark.runner._Run._write_board", lambda *_, **__: None)
    run(tiny(), root)
    assert open_run(root).suite.student.train.steps == 9
    assert open_run(root).results == []
    assert Store(root).result_path("PKD", 0).with_name("seed0.json.old").exists()


@pytest.mark.slow
def test_a_fault_of_the_pictures_comes_after_the_run_has_ended(finished, tmp_path, monkeypatch):
    root = shutil.copytree(finished.parent, tmp_path / "runs") / finished.name
    Store(root).result_path("PKD", 0).unlink()

    def broken(*_):
        raise RuntimeError("a fault of the pictures")

    monkeypatch.setattr("kdtoolkit.benchmark.report.view.gallery", broken)
    with pytest.raises(RuntimeError, match="a fault of the pictures"):
        run(tiny(), root)
    assert read_status(Store(root).status_path).ended == "with all its cells done"
    assert {row.entry for row in build_board(root).rows} >= {BASELINE, "PKD"}
