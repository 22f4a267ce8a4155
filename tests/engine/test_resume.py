"""A run that is stopped and started again ends as one that was never stopped: to the last bit, or it says why not."""

import errno
import hashlib
import json
import multiprocessing
import os
import resource
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdtoolkit import Distiller, KDError
from kdtoolkit.data import Augmentation, InputSize, ProceduralShapes
from kdtoolkit.engine import folder, measuring
from kdtoolkit.engine.evaluate import evaluate
from kdtoolkit.engine.train import RunFolder, TrainConfig, Validation, train
from kdtoolkit.errors import UnwritableError
from kdtoolkit.files import write_atomic
from kdtoolkit.lock import hold
from kdtoolkit.methods import FBKD, MGD, PKD, CrossKD
from tests.conftest import tiny_gfl

CLASSES = len(ProceduralShapes(1).class_names)
CASES = {
    "methods that learn and draw": {"methods": (FBKD, MGD)},
    "sgd, moving average, frozen parts, teacher cache in memory": {
        "teacher_cache": "memory",
        "optimizer": "sgd",
        "lr": 0.01,
        "ema": 0.9,
        "frozen": ("backbone.conv1",),
        "frozen_statistics": ("backbone",),
    },
    "float16, accumulated, teacher cache on disk": {
        "precision": "float16",
        "accumulation": 2,
        "channels_last": True,
        "teacher_cache": "disk",
        "teacher_cache_precision": "bfloat16",
    },
    "shares that are held": {"methods": (lambda: PKD().held_at(share=0.1), lambda: FBKD().held_at(share=0.2))},
    "sizes and mixed images, read ahead": {
        "input_size": InputSize(short=(64, 96), long=128),
        "augmentation": Augmentation(mosaic=0.5, mixup=0.5, photometric=0.5),
        "workers": 1,
    },
}


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def data():
    return ProceduralShapes(10, image_size=64, seed=0)


def run(
    data,
    folder,
    *,
    stop=None,
    by=None,
    seed=0,
    methods=(CrossKD, PKD),
    saves=2,
    steps=7,
    evaluated=None,
    scale=1.0,
    until=None,
    **changes,
):
    """Train; `stop` is the step that is interrupted, by an exception if `by` is None. Gives student and result."""
    teacher = tiny_gfl(seed=1, num_classes=CLASSES, neck_channels=8)
    student = tiny_gfl(seed=2, num_classes=CLASSES)

    def interrupt(module, args):
        if stop is not None and student.training and distiller.calls > (stop - 1) * distiller.accumulation:
            if by is None:
                raise Stopped
            by()

    student.neck.register_forward_pre_hook(interrupt)
    config = TrainConfig(**{"steps": steps, "batch_size": 4, "warmup_steps": 2, **changes})
    distiller = Distiller(teacher, student, [method() for method in methods], teacher_scale=scale)
    where = None if folder is None else RunFolder(folder, save_steps=saves)
    found = train(distiller, data, config, seed=seed, folder=where, validation=evaluated, until=until)
    return student, found


@pytest.fixture
def ctrl_c():
    """What Ctrl-C does in a program of its own."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield partial(signal.raise_signal, signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def stopped(data, folder, step, **changes):
    with pytest.raises(Stopped):
        run(data, folder, stop=step, **changes)


def digest(module):
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in module.state_dict().values())).hexdigest()


@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_ends_like_one_that_was_not(data, tmp_path, case):
    changes = {"methods": (CrossKD, PKD), **CASES[case]}
    if case == "methods that learn and draw":
        changes["evaluated"] = Validation(data, every_steps=3)
    whole, expected = run(data, tmp_path / "whole", **changes)
    for step in (6, 4):  # the second stop comes before the checkpoint of the first
        stopped(data, tmp_path / "stopped", step, **changes)
        if step == 6:
            torch.manual_seed(step)  # what others draw meanwhile changes nothing
    found, result = run(data, tmp_path / "stopped", **changes)
    assert digest(found) == digest(whole)
    for name in ("history", "warnings", "notices", "evaluations"):
        assert getattr(result, name) == getattr(expected, name), name
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*") if path.is_file()}
        for name in ("whole", "stopped")
    ]
    for name in ("log.jsonl", "student.safetensors", *(["best.safetensors"] if "evaluated" in changes else [])):
        assert files[0][name] == files[1][name], name


def test_a_training_in_parts_ends_like_one_in_a_whole(data, tmp_path):
    changes = {"ema": 0.9, "saves": 100, "evaluated": Validation(data)}
    whole, expected = run(data, tmp_path / "whole", **changes)
    for until in (3, 3, 5):  # the second call finds nothing to do
        _, paused = run(data, tmp_path / "parts", until=until, **changes)
        assert paused.steps == until
    found, result = run(data, tmp_path / "parts", **changes)
    assert digest(found) == digest(whole)
    assert result.history == expected.history
    assert [row["step"] for row in result.evaluations] == [3, 5, 7]
    assert result.evaluations[-1] == expected.evaluations[-1]
    assert load_file(tmp_path / "parts" / "student.safetensors").keys() == found.state_dict().keys()


@pytest.mark.parametrize("until", [0, 8])
def test_the_step_to_stop_after_is_one_of_the_schedule(data, until):
    with pytest.raises(KDError, match=rf"until \({until}\) is a step of the schedule: it must be from 1 to 7"):
        run(data, None, until=until)


def test_without_a_folder_it_is_the_same_run(data, tmp_path):
    assert digest(run(data, None)[0]) == digest(run(data, tmp_path)[0])


def test_a_finished_run_is_not_run_again(data, tmp_path):
    student, result = run(data, tmp_path)
    again, same = run(data, tmp_path, stop=1)
    assert digest(again) == digest(student)
    assert (same.history, same.seconds, same.step_ms) == (result.history, result.seconds, result.step_ms)


def test_the_log_has_a_line_a_step(data, tmp_path):
    run(data, tmp_path, evaluated=Validation(data, every_epochs=1))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "lr" in row]
    assert [row["step"] for row in steps] == list(range(1, 8))
    assert {"task/cls", "crosskd/box", "pkd/feature", "gradient_norm"} < steps[0].keys()
    assert [row["step"] for row in rows if "eval/ap" in row] == [3, 5, 7]  # 10 images, 4 a step


@pytest.mark.parametrize(("aps", "kept"), [((0.0, 0.0, 0.0), 7), ((2.0, 3.0, 1.0), 6), ((2.0, 2.0, 0.0), 6)])
def test_of_equally_good_weights_the_last_are_kept(data, tmp_path, monkeypatch, aps, kept):
    found, students = iter(aps), {}

    def scored(adapter, *_, **__):
        students[3 * len(students) + 3 if len(students) < 2 else 7] = digest(adapter.model)
        return replace(evaluate(adapter, data), ap=next(found))

    monkeypatch.setattr(measuring, "evaluate", scored)
    student, _ = run(data, tmp_path, evaluated=Validation(data, every_steps=3))
    student.load_state_dict(load_file(tmp_path / "best.safetensors"))
    assert digest(student) == students[kept]


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_last_checkpoints_stay(data, tmp_path):
    run(data, tmp_path, saves=1)
    assert checkpoints(tmp_path) == [f"step-0000000{n}.{end}" for n in (6, 7) for end in ("json", "safetensors")]


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.write_bytes(b""), Path.unlink])
@pytest.mark.parametrize("kind", ["json", "safetensors"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(data, tmp_path, caplog, kind, damage):
    stopped(data, tmp_path, 6)
    path = tmp_path / "checkpoints" / f"step-00000004.{kind}"
    damage(path)
    found, result = run(data, tmp_path)
    assert digest(found) == digest(run(data, None)[0])
    if path.suffix == ".json" and damage is Path.unlink:  # as of a run that was killed while it wrote
        assert result.notices == []
    else:
        assert [str(path) in notice and "going on from the checkpoint before it" in notice for notice in result.notices]
        assert result.notices[0] in caplog.text


def test_damaged_checkpoints_do_not_push_out_whole_ones(data, tmp_path):
    stopped(data, tmp_path, 7, saves=1)
    for step in (5, 6):
        flip(tmp_path / "checkpoints" / f"step-0000000{step}.safetensors")
    stopped(data, tmp_path / "early", 5, saves=1)
    for kind in ("json", "safetensors"):
        name = f"step-00000004.{kind}"
        (tmp_path / "checkpoints" / name).write_bytes((tmp_path / "early" / "checkpoints" / name).read_bytes())
    stopped(data, tmp_path, 6, saves=1)  # from step 4, and saves step 5
    assert checkpoints(tmp_path) == [f"step-0000000{n}.{end}" for n in (4, 5) for end in ("json", "safetensors")]


def test_an_error_leaves_the_rows_of_the_log(data, tmp_path):
    stopped(data, tmp_path, 6, saves=100)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_a_log_that_was_changed_meanwhile_is_told(data, tmp_path):
    stopped(data, tmp_path, 4)
    (tmp_path / "log.jsonl").write_text("")
    _, result = run(data, tmp_path)
    assert result.notices == [f"{tmp_path / 'log.jsonl'} was cut or changed meanwhile: lines are missing in it"]


def test_if_all_checkpoints_are_damaged_nothing_is_thrown_away(data, tmp_path):
    stopped(data, tmp_path, 6)
    for path in (tmp_path / "checkpoints").glob("*.safetensors"):
        flip(path)
    with pytest.raises(KDError, match=r"No whole checkpoint is left in .*: delete the folder to start again"):
        run(data, tmp_path)
    assert len(checkpoints(tmp_path)) == 4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"lr": 1e-3}, "lr"),
        ({"methods": (CrossKD,)}, "methods, method_settings"),
        ({"methods": (lambda: PKD(weight=2),)}, "method_settings"),
        ({"methods": (lambda: PKD().scheduled(warmup=3),)}, "method_settings"),
        ({"methods": (lambda: PKD().at_strides(8),)}, "method_settings"),
        ({"scale": 0.5}, "teacher_scale, method_settings"),  # PKD compares different levels
        ({"evaluated": Validation(ProceduralShapes(4, image_size=64, seed=9))}, "validation"),
        ({"steps": 9}, "steps"),
    ],
)
def test_another_run_does_not_go_on_in_its_folder(data, tmp_path, changes, named):
    stopped(data, tmp_path, 4, methods=(PKD,))
    changes = {"methods": (PKD,), **changes}
    with pytest.raises(KDError, match=rf"began with different settings \({named}\): choose another folder"):
        run(data, tmp_path, **changes)


def test_a_run_goes_on_with_the_share_that_it_held(data, tmp_path):
    stopped(data, tmp_path, 4, methods=(lambda: PKD().held_at(share=0.1),))
    with pytest.raises(KDError, match=r"different settings \(held_shares\)"):
        run(data, tmp_path, methods=(lambda: PKD().held_at(share=0.9),))
    run(data, tmp_path, methods=(lambda: PKD().held_at(share=0.1),))


def test_nested_arguments_and_whole_numbers_are_compared_by_value(data, tmp_path):
    stopped(data, tmp_path, 4, methods=(lambda: CrossKD(box_weight=2.0),))
    with pytest.raises(KDError, match=r"different settings \(method_settings\)"):
        run(data, tmp_path, methods=(lambda: CrossKD(box_weight=3),))
    run(data, tmp_path, methods=(lambda: CrossKD(box_weight=2),))


def rewrite(folder, change):
    """Change the facts that the checkpoints in a run's folder hold."""
    for path in (folder / "checkpoints").glob("*.json"):
        described = json.loads(path.read_text())
        facts = json.loads(described["facts"])
        change(facts)
        described["facts"] = json.dumps(facts)
        described["facts_sha256"] = hashlib.sha256(described["facts"].encode()).hexdigest()
        path.write_text(json.dumps(described))


def test_a_folder_of_an_earlier_version_goes_on(data, tmp_path):
    stopped(data, tmp_path, 4)

    def shorten(facts):
        later = "method_settings held_shares teacher_scale validation processor threads precision"
        for name in later.split():
            del facts["made_of"][name]
        del facts["made_of"]["config"]["teacher_cache"]
        del facts["cpu_seconds"]

    rewrite(tmp_path, shorten)
    student, result = run(data, tmp_path)
    other, whole = run(data, None)
    assert digest(student) == digest(other)
    assert result.notices == []
    assert result.cpu_seconds is None  # that of the first steps is not known
    assert whole.cpu_seconds > 0


def test_a_run_that_goes_on_elsewhere_says_so(data, tmp_path):
    stopped(data, tmp_path, 4)
    rewrite(tmp_path, lambda facts: facts["made_of"].update(processor="Abacus", threads=99, precision="bfloat16"))
    _, result = run(data, tmp_path)
    assert len(result.notices) == 3
    for notice, began in zip(result.notices, ("processor Abacus", "threads 99", "precision bfloat16"), strict=True):
        assert f"began with {began} and goes on with" in notice


def test_readers_may_be_added(data, tmp_path):
    stopped(data, tmp_path, 4)
    assert digest(run(data, tmp_path, workers=1)[0]) == digest(run(data, None)[0])


def test_a_folder_in_use_is_refused_with_its_holder(data, tmp_path):
    with hold(tmp_path), pytest.raises(KDError, match=rf"process {os.getpid()} on .* works in .*: wait until it ends"):
        run(data, tmp_path)


def test_a_folder_that_cannot_be_written_is_one_sentence(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UnwritableError, match=r"cannot write .*file.*: Not a directory: correct that, or choose another folder"
    ):
        run(data, tmp_path / "file" / "run")


def test_a_full_disk_leaves_the_last_good_checkpoint_and_says_so(data, tmp_path, monkeypatch):
    sync = os.fsync

    def full(handle):
        if any(tmp_path.glob("checkpoints/.step-0000000[34].*")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    student, result = run(data, tmp_path, saves=1)
    assert len(result.notices) == 1
    told = "checkpoints: No space left on device; the last whole checkpoint is of step 2. Training goes on"
    assert told in result.notices[0]
    assert digest(student) == digest(run(data, None)[0])
    run(data, tmp_path / "other", saves=1)
    assert (tmp_path / "log.jsonl").read_bytes() == (tmp_path / "other" / "log.jsonl").read_bytes()


@pytest.mark.parametrize("failing", [(2, 3), range(2, 99)])
def test_the_best_weights_wait_until_they_can_be_written(data, tmp_path, monkeypatch, failing):
    aps, students, attempts = iter((0.0, 3.0, 1.0, 3.0, 1.0)), [], []

    def scored(adapter, *_, **__):
        students.append(digest(adapter.model))
        return replace(evaluate(adapter, data), ap=next(aps))

    def write(path, content):
        if path.name == "best.safetensors":
            attempts.append(path)
            if len(attempts) in failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_atomic(path, content)

    monkeypatch.setattr(measuring, "evaluate", scored)
    monkeypatch.setattr(folder, "write_atomic", write)
    evaluated = Validation(data, every_steps=3)
    if len(failing) == 2:
        student, result = run(data, tmp_path, saves=1, evaluated=evaluated)
        assert "best.safetensors: No space left on device; the last whole checkpoint is of step 5" in result.notices[0]
    else:
        with pytest.raises(
            UnwritableError, match=r"best.safetensors: No space left .* of step 5. Free space, and start"
        ):
            run(data, tmp_path, saves=1, evaluated=evaluated)
        monkeypatch.setattr(folder, "write_atomic", write_atomic)
        student, _ = run(data, tmp_path, saves=1, evaluated=evaluated)
    student.load_state_dict(load_file(tmp_path / "best.safetensors"))
    assert digest(student) == students[1]


def test_a_checkpoint_that_is_larger_than_may_be_written_is_told(data, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))  # room for the log and the weights
    try:
        with pytest.raises(
            UnwritableError,
            match=r"cannot write .*checkpoints.*: File too large; there is none yet. Allow larger files",
        ):
            run(data, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoints(tmp_path) == []  # nothing half written
    assert digest(run(data, tmp_path)[0]) == digest(run(data, None)[0])


def test_ctrl_c_is_followed_by_a_checkpoint_of_the_step(data, tmp_path, ctrl_c, caplog):
    changes = {"saves": None, "evaluated": Validation(data, every_steps=3)}
    whole, _ = run(data, tmp_path / "whole", **changes)
    for step in (3, 5, 7):  # 3 and 7 are evaluated, and 7 is the last one
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / "stopped", stop=step, by=ctrl_c, **changes)
        assert checkpoints(tmp_path / "stopped")[-1] == f"step-0000000{step}.safetensors"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "Ctrl-C again ends at once" in caplog.text
    student, _ = run(data, tmp_path / "stopped", **changes)
    assert digest(student) == digest(whole)
    assert (tmp_path / "stopped" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()


def test_a_second_ctrl_c_ends_at_once(data, tmp_path, ctrl_c):
    def twice():
        ctrl_c()
        ctrl_c()
        raise AssertionError("it goes on")

    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path, stop=3, by=twice, saves=None)
    assert checkpoints(tmp_path) == []


def test_a_run_without_a_folder_has_nothing_to_save(data, ctrl_c, caplog):
    with pytest.raises(KeyboardInterrupt):
        run(data, None, stop=3, by=ctrl_c)
    assert not caplog.text


def killed_while_it_writes(folder, writes):
    """A process of its own: killed by SIGKILL in the flush number `writes` of a file to the disk."""
    torch.set_num_threads(1)
    sync, left = os.fsync, [writes]

    def end(handle):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(handle)

    os.fsync = end
    run(ProceduralShapes(10, image_size=64, seed=0), folder)


@pytest.mark.slow
def test_sigkill_while_a_checkpoint_is_written(data, tmp_path):
    context = multiprocessing.get_context("spawn")
    for writes in (6, 9, 14):
        process = context.Process(target=killed_while_it_writes, args=(tmp_path / "killed", writes))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    torch.set_num_threads(1)
    student, _ = run(data, tmp_path / "killed")
    whole, _ = run(data, tmp_path / "whole")
    assert digest(student) == digest(whole)
    assert (tmp_path / "killed" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
    assert not list((tmp_path / "killed").rglob("*.partial"))
