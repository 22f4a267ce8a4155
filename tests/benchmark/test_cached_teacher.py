"""Cells that share what their teacher showed: each is charged for the views it was shown, whoever asked."""

import io
from dataclasses import replace
from functools import partial

import pytest
from rich.console import Console

from kdtoolkit.benchmark import cell
from kdtoolkit.benchmark.board import build_board
from kdtoolkit.benchmark.datasets import load_data
from kdtoolkit.benchmark.needs import place_of, places_of_data
from kdtoolkit.benchmark.parcels import cache_folder
from kdtoolkit.benchmark.plan import Plan
from kdtoolkit.benchmark.record import record
from kdtoolkit.benchmark.remote import Sent, run_shipped
from kdtoolkit.benchmark.runner import run_suite
from kdtoolkit.benchmark.store import CachedTeacher, Store, read_result, write_atomic, write_result
from kdtoolkit.benchmark.suite import BASELINE
from kdtoolkit.benchmark.workers import Workers
from tests.benchmark._suite import made_up, tiny
from tests.benchmark.test_remote import node  # noqa: F401

CACHED = (
    "args: *detector\n  train: {steps: 2, batch_size: 2, warmup_steps: 0}",
    "args: *detector\n  train: {steps: 8, batch_size: 2, warmup_steps: 0, teacher_cache: disk}",
)


def planned(root):
    """The plan of a suite with a teacher cache, whose teacher is trained."""
    suite, store = tiny(CACHED), Store(root / "run")
    sets = load_data(suite.data, store.pictures)
    plan = Plan(suite, store, sets, device="cpu", threads=1)
    cell.run(plan.teacher_task(), lambda report: None)
    return plan, sets


@pytest.mark.slow
def test_cells_share_a_folder_beside_the_teachers(tmp_path):
    plan, _ = planned(tmp_path)
    folder = tmp_path / "teacher_cache" / plan.teacher_task().result.stem
    assert plan.teacher_cache == folder
    tasks = [plan.cell("PKD", 0), plan.cell("PKD", 0), plan.cell("CrossKD+PKD", 0)]
    tasks = [replace(task, result=tmp_path / f"cell{place}.json") for place, task in enumerate(tasks)]
    found = []
    for task in tasks:
        cell.run(task, lambda report: None)
        found.append(read_result(task.result))
    first, again, more = (each.cached for each in found)
    assert 4 < first.views == first.misses <= 8  # images, and their mirror images
    assert (again.misses, again.hits, again.views) == (0, 16, first.views)
    assert more.misses == more.views == first.views  # the maps were there, the predictions were not
    assert first.seconds_spared == more.seconds_spared == 0 < again.seconds_spared
    assert found[0].history == found[1].history  # to the last bit
    assert sum(path.is_file() for path in folder.rglob("*")) == first.views
    assert plan.cell(BASELINE, 0).teacher_cache is None
    assert f"0 asked about, of {again.views} different ones" in record(tasks[1].result, found[1])["teacher cache"]
    for task, result in zip(tasks[1:], found[1:], strict=True):
        write_result(plan.store.result_path(task.entry, 0), result)
        plan.store.result_path(task.entry, 0).with_suffix(".pt").write_bytes(task.weights.read_bytes())
    write_atomic(plan.store.suite_path, plan.suite.to_yaml().encode())
    fact = build_board(plan.store.root).facts["teacher cache"]
    assert fact.startswith(f"2 cells asked the teacher about {more.misses} of 32 images, and found the rest.")


def test_the_cost_of_a_cell_has_each_view_once():
    alone = made_up("PKD", 0, 20.0, cpu_seconds=30.0, threads=2, steps=100)
    asked = CachedTeacher(hits=760, misses=40, views=40, seconds_of_view=0.5)
    found = CachedTeacher(hits=800, misses=0, views=40, seconds_of_view=0.5)
    again = CachedTeacher(hits=700, misses=100, views=40, seconds_of_view=0.5)  # a full cache took some of them only
    assert alone.cost_per_step == pytest.approx(0.15)
    assert alone.model_copy(update={"cached": asked}).cost_per_step == pytest.approx(0.15)
    assert alone.model_copy(update={"cached": found}).cost_per_step == pytest.approx(0.15 + 40 * 0.5 / 2 / 100)
    assert alone.model_copy(update={"cached": again}).cost_per_step == pytest.approx(0.15)
    on_gpu = alone.model_copy(update={"cached": found, "device": "a GPU"})
    assert on_gpu.cost_per_step == pytest.approx((20 + 40 * 0.5) / 100)
    assert on_gpu.cost_ms == pytest.approx(1000 * on_gpu.cost_per_step)  # the median step, 200 ms, lacks the passes
    assert on_gpu.model_copy(update={"cached": None}).cost_ms == 200


def test_a_run_tells_the_size_of_a_cache_that_others_write_to(tmp_path):
    suite, store, workers = tiny(CACHED), Store(tmp_path / "run"), Workers("cpu", 1)
    console = Console(file=io.StringIO(), width=200)
    plan = Plan(suite, store, load_data(suite.data, store.pictures), device="cpu", threads=workers.threads)
    plan.teacher_cache.mkdir(parents=True)
    (plan.teacher_cache / "view").write_bytes(bytes(3000))
    (plan.teacher_cache / ".gone.1.partial").symlink_to(tmp_path / "nothing")  # listed, and its size cannot be read
    run_suite(suite, store.root, console=console, executor=workers, seconds=0)
    assert f"teacher cache: {plan.teacher_cache}, 3 kB;" in console.file.getvalue()


@pytest.mark.slow
def test_a_machine_elsewhere_has_a_cache_of_its_own(tmp_path, node):  # noqa: F811
    plan, sets = planned(tmp_path)
    task = plan.cell("PKD", 0)
    places = [*places_of_data(task.data, sets, task.pictures), place_of(task.teacher_weights)]
    sent = [Sent(each.path, each.inside, each.parcel.digest, partial(each.parcel.pieces)) for each in places]
    *_, done = run_shipped(task, sent, "cell")
    assert done.failure is None
    assert not task.teacher_cache.exists()
    assert any((cache_folder() / "teacher_cache" / task.teacher_cache.name).rglob("*"))
