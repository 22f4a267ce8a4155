"""Cells on a Ray cluster of this machine, with two workers."""

import io
import os
import signal
import socket
import tempfile
import threading
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from kdtoolkit.benchmark.board import build_board
from kdtoolkit.benchmark.datasets import load_data
from kdtoolkit.benchmark.keys import digest_of
from kdtoolkit.benchmark.plan import Plan
from kdtoolkit.benchmark.runner import run_suite
from kdtoolkit.benchmark.store import Store, holding, read_result, write_result
from kdtoolkit.benchmark.suite import BASELINE, change
from kdtoolkit.errors import KDError
from tests.benchmark._suite import tiny

ray = pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two CPUs, and a folder that stands for the disks of the nodes."""
    nodes = tmp_path_factory.mktemp("nodes")
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ray") as short:
        # Sockets lie in Ray's own folder, and their names may have 107 characters at most.
        environment = {"TMPDIR": str(nodes), "RAY_TMPDIR": short, "RAY_USAGE_STATS_ENABLED": "0"}
        for name, value in environment.items():
            patch.setenv(name, value)
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=80 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        yield nodes
        ray.shutdown()


def run(suite, root, executor=None, **options):
    console = Console(file=io.StringIO(), width=200)
    outcome = run_suite(suite, root, console=console, executor=executor, **options)
    return outcome, console.file.getvalue()


def long(steps):
    """A suite whose students take long enough to be killed midway."""
    train = {"steps": steps, "batch_size": 2, "warmup_steps": 0}
    return change(tiny(), student={**tiny().student.model_dump(), "train": train}, seeds=1)


def kill_one(workers, row, nodes, done):
    """Kill the process of Ray that runs a cell of this row, once it trains."""
    while not done.is_set():
        for task, place in workers.places().items():
            if task.entry == row and list(nodes.glob(f"kdtoolkit-*/cells/*/{task.run_folder.name}/checkpoints")):
                os.kill(place.process, signal.SIGKILL)
                return
        time.sleep(0.05)


def test_a_killed_worker_is_replaced_and_the_board_equals_the_local_one(cluster, tmp_path):
    from kdtoolkit.benchmark.ray_workers import RayWorkers

    suite, done = long(60), threading.Event()
    with RayWorkers(threads=1) as workers:
        assert (workers.slots, workers.threads, workers.hardware.device_name) == (2, 1, "cpu")
        killer = threading.Thread(target=kill_one, args=(workers, "PKD", cluster, done))
        killer.start()
        outcome, text = run(suite, tmp_path / "ray" / "long", workers, long_baselines=False)
        done.set()
        killer.join()
        assert len(workers) == 0
    assert outcome.failures == {}, text
    assert text.count("PKD, seed 0: its worker died on ") == 1
    assert "it is started again (1 of 3)" in text
    assert "a Ray cluster of 1 node" in text
    there = Store(tmp_path / "ray" / "long")
    outcome, text = run(suite, tmp_path / "local" / "long", jobs=2, long_baselines=False)
    assert outcome.failures == {}, text
    here = Store(tmp_path / "local" / "long")
    for row in (BASELINE, "PKD", "CrossKD+PKD"):
        ours, theirs = here.result_path(row, 0), there.result_path(row, 0)
        a, b = read_result(ours), read_result(theirs)
        assert (a.key, a.history, a.evaluation) == (b.key, b.history, b.evaluation)
        mine, sent = (torch.load(path.with_suffix(".pt"), weights_only=True) for path in (ours, theirs))
        assert all(torch.equal(mine[name], sent[name]) for name in mine)
    boards = [build_board(store.root) for store in (here, there)]
    assert [(row.entry, row.ap) for row in boards[0].rows] == [(row.entry, row.ap) for row in boards[1].rows]
    sent = [path for path in cluster.glob("kdtoolkit-*/*") if path.is_dir() and len(path.name) == 32]
    assert len(sent) == 2  # pictures and teacher, once each
    assert not list(cluster.glob("kdtoolkit-*/cells/*"))
    _, text = run(suite, there.root, long_baselines=False)  # the same cells, on this machine
    assert "all cells are done" in text


def test_a_second_run_of_the_same_workers_sends_the_teacher_as_it_is_then(cluster, tmp_path):
    from kdtoolkit.benchmark.ray_workers import RayWorkers

    suite, store = tiny(("seeds: 2", "seeds: 1")), Store(tmp_path / "tiny")
    with RayWorkers(threads=1) as workers:
        run(suite, store.root, workers, only=["PKD"], long_baselines=False)
        teacher = store.teacher_path(read_result(store.teacher_copy).key)
        weights = torch.load(teacher.with_suffix(".pt"), weights_only=True)
        weights[next(iter(weights))] *= 0.9
        torch.save(weights, teacher.with_suffix(".pt"))
        digest = digest_of(weights)
        trained = read_result(teacher)
        write_result(teacher, trained.model_copy(update={"fingerprints": {**trained.fingerprints, "teacher": digest}}))
        outcome, text = run(suite, store.root, workers, only=["PKD"], long_baselines=False, fresh=True)
    assert outcome.failures == {}, text
    assert read_result(store.result_path("PKD", 0)).fingerprints["teacher"] == digest


def test_each_cell_on_a_gpu_has_a_worker_of_its_own(cluster, tmp_path):
    from kdtoolkit.benchmark.ray_workers import cell_on

    suite = tiny()
    task = Plan(suite, Store(tmp_path / "tiny"), load_data(suite.data), device="cpu", threads=1).cell(BASELINE, 0)
    processes = []
    for _ in range(3):
        begun, done = map(ray.get, cell_on("cuda").remote(replace(task, source="of another version"), [], "cell"))
        assert "different kdtoolkit's source code" in done.failure.message  # it ends before it needs a GPU
        processes.append(begun.process)
    assert len(set(processes)) == 3


def test_a_failing_cell_is_not_run_again(cluster, tmp_path):
    from kdtoolkit.benchmark.ray_workers import RayWorkers

    suite = tiny(("PKD: [PKD]", "PKD: [{PKD: {weight: 1.0e+39}}]"), ("seeds: 2", "seeds: 1"))
    with RayWorkers(slots=2) as workers:
        outcome, text = run(suite, tmp_path / "tiny", workers, only=["PKD"], long_baselines=False)
    (reason,) = outcome.failures.values()
    assert "again" not in text.replace("the same command runs", "")
    kept = Store(tmp_path / "tiny").result_path("PKD", 0).with_suffix(".last-good.pt")
    assert str(kept) in reason
    assert kept.exists()


def test_a_teacher_that_another_run_trains_is_waited_for(cluster, tmp_path):
    from kdtoolkit.benchmark.ray_workers import RayWorkers

    suite, store = tiny(("seeds: 2", "seeds: 1")), Store(tmp_path / "tiny")
    task = Plan(suite, store, load_data(suite.data), device="cpu", threads=1).teacher_task()
    with RayWorkers(threads=1) as workers:
        workers.begin(load_data(suite.data, store.pictures))
        told = []
        released = threading.Event()

        def hold_it():
            with holding(task.lock_folder):
                held.set()
                assert released.wait(60)

        held = threading.Event()
        thread = threading.Thread(target=hold_it)
        thread.start()
        assert held.wait(60)
        workers.start(task)
        for _ in range(3):
            told += [event.notice for _, event in workers.events(timeout=0.1)]
        assert len(told) == 1
        assert told[0].startswith("teacher: waits for process")
        released.set()
        thread.join()
        end = time.monotonic() + 120
        while len(workers) and time.monotonic() < end:
            list(workers.events(timeout=1))
        assert read_result(task.result).entry == "teacher"
        assert not task.run_folder.exists()


def test_what_was_running_is_cancelled_and_the_next_run_goes_on(cluster, tmp_path):
    from kdtoolkit.benchmark.ray_workers import RayWorkers

    suite = long(100_000)
    with RayWorkers(threads=1) as workers:
        outcome, text = run(suite, tmp_path / "long", workers, only=["PKD"], long_baselines=False, seconds=25)
        assert outcome.out_of_time, text
        assert len(workers) == 0
        deadline = time.monotonic() + 30
        while ray.available_resources().get("CPU") != 2:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_impossible_demands_are_refused_in_words(cluster, tmp_path):
    from kdtoolkit.benchmark.ray_workers import RayWorkers

    with pytest.raises(KDError, match="no GPU among 1 node: use --device cpu"):
        RayWorkers(device="cuda")
    with pytest.raises(KDError, match="has 3 CPUs for a cell"):
        RayWorkers(threads=3)


def test_a_node_that_has_answered_is_not_cancelled(cluster, monkeypatch):
    """To cancel a task that is just ending aborts the process in Ray itself."""
    from kdtoolkit.benchmark.ray_workers import RayWorkers

    cancelled = []
    monkeypatch.setattr(ray, "cancel", cancelled.append)
    RayWorkers(threads=1)
    assert cancelled == []


class ToldError(Exception):
    pass


def test_waits_for_a_busy_cluster_or_one_that_must_grow_are_told(cluster, tmp_path, monkeypatch):
    from kdtoolkit.benchmark import ray_workers

    monkeypatch.setattr(ray_workers, "WAIT_SECONDS", 1.0)

    def tell(line):
        raise ToldError(line)

    with pytest.raises(ToldError, match="waiting for a node of the Ray cluster with 1 CPU and a GPU free for a cell"):
        ray_workers.RayWorkers(device="cuda", slots=2, tell=tell)
    monkeypatch.setattr(ray_workers, "WAIT_SECONDS", 30.0)
    busy = ray.remote(num_cpus=2)(lambda: time.sleep(600)).remote()
    while ray.available_resources().get("CPU"):
        time.sleep(0.1)
    try:
        suite, store = tiny(), Store(tmp_path / "tiny")
        with ray_workers.RayWorkers(threads=1, tell=tell) as workers:  # though no CPU is free
            sets = load_data(suite.data, store.pictures)
            workers.begin(sets)
            workers.start(Plan(suite, store, sets, device="cpu", threads=1).cell(BASELINE, 0))
            monkeypatch.setattr(ray_workers, "WAIT_SECONDS", 0.3)
            told = [event.notice for _ in range(5) for _, event in workers.events(timeout=0.2)]
            workers.stop()
    finally:
        ray.cancel(busy, force=True)
    (line,) = told
    assert line.startswith("no cell runs yet: waiting for a node of the Ray cluster with 1 CPU free")


@pytest.fixture
def unused():
    """A port of this machine at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"127.0.0.1:{port}"


def refused(address=None):
    """What a demand for a cluster that does not answer says, and whether it says so at once."""
    from kdtoolkit.benchmark.ray_workers import RayWorkers

    begun = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "is_initialized", lambda: False)
        with pytest.raises(KDError) as found:
            RayWorkers(address)
    assert time.monotonic() - begun < 10
    return str(found.value)


def test_an_address_where_no_cluster_answers_is_refused_at_once(unused, tmp_path, monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for address in (unused, "nowhere.invalid:1", f"{'x' * 70}:1", "127.0.0.1:99999"):
        text = refused(address)
        assert text.startswith(f"there is no Ray cluster at {address} (")
        assert "see `ray status` on its head" in text
    monkeypatch.setenv("RAY_ADDRESS", unused)
    assert f"at {unused}" in (text := refused())
    assert "the variable RAY_ADDRESS names it" in text
    monkeypatch.setenv("RAY_ADDRESS", "ray://somewhere:10001")
    assert "without the variable RAY_ADDRESS" in refused()
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    noted = tmp_path / "ray" / "ray_current_cluster"
    noted.parent.mkdir()
    noted.write_text(unused)
    assert f"{noted} names it: delete this file if the cluster has ended" in refused()
