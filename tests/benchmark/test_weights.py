"""Detectors with weights in suites: what is trained, what is not, and what a cell's key depends on."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from kdtoolkit.benchmark.datasets import load_data
from kdtoolkit.benchmark.plan import Plan, check_methods
from kdtoolkit.benchmark.store import Store, read_result
from kdtoolkit.benchmark.suite import change
from kdtoolkit.benchmark.suite_file import load_suite
from kdtoolkit.engine.evaluate import evaluate
from kdtoolkit.errors import KDError
from kdtoolkit.models import open_detector, save_detector
from tests._opened import stirred
from tests.benchmark._suite import TINY, tiny
from tests.benchmark.test_runner import run

TRAIN = "  train: {steps: 3, batch_size: 2, warmup_steps: 0}\n"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A trained teacher for the classes of the drawn images, in a folder of its own."""
    suite = tiny()
    names = load_data(suite.data).val.class_names
    detector = open_detector(suite.teacher.model, class_names=names, args=suite.teacher.args)
    stirred(detector.model)
    return save_detector(detector, tmp_path_factory.mktemp("teacher")).file


def suite_in(folder, *changes):
    text = TINY
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    (folder / "suite.yaml").write_text(text)
    return load_suite(str(folder / "suite.yaml"))


@pytest.mark.slow
def test_a_teacher_with_weights_is_evaluated_and_teaches(teacher, tmp_path):
    (tmp_path / "teacher.safetensors").symlink_to(teacher)
    suite = suite_in(tmp_path, (TRAIN, "  weights: teacher.safetensors\n"), ("seeds: 2", "seeds: 1"))
    assert suite.teacher.weights == str(teacher)  # found beside the suite, whatever the working directory is
    outcome, text = run(suite, tmp_path / "runs" / "tiny", only=["PKD"])
    assert outcome.failures == {}, text
    assert "teacher: kdtoolkit/gfl, evaluated only" in text
    assert "not trained" in text
    result = read_result(Store(tmp_path / "runs" / "tiny").teacher_copy)
    sets = load_data(suite.data)
    model = open_detector(suite.teacher.model, weights=teacher, args=suite.teacher.args).model
    assert (result.steps, result.history) == (0, [])
    assert result.evaluation["ap"] == pytest.approx(evaluate(model, sets.val).ap, abs=1e-6)


def test_students_start_from_their_weights(teacher, tmp_path):
    suite = suite_in(tmp_path, ("  args: *detector\n", f"  args: *detector\n  weights: {teacher}\n"))

    def parts(suite):
        plan = Plan(suite, Store(tmp_path), load_data(suite.data), device="cpu", threads=1)
        return plan.cell("PKD", 0).parts

    assert parts(suite)["weights"]
    assert "weights" not in parts(tiny())


def test_a_key_depends_on_the_content_of_the_weights(tmp_path):
    def key():
        suite = tiny((TRAIN, f"  weights: {tmp_path}/x.safetensors\n"))
        plan = Plan(suite, Store(tmp_path), load_data(suite.data), device="cpu", threads=1)
        return plan.teacher_task().parts["weights"], plan.cell("PKD", 0).parts["teacher"]

    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    before = key()
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    assert all(old != new for old, new in zip(before, key(), strict=True))


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ("", "suite tiny, teacher: 'kdtoolkit/gfl' has random weights: give it `weights`, or `train` to train it"),
        (TRAIN + "  weights: {file}\n", "is for the classes of the data already.*: delete its `train`"),
        ("  weights: {file}.pth\n", "suite tiny, teacher: there is no weights file"),
        ("  weights: pretrained\n", "publishes no weights 'pretrained'"),
    ],
)
def test_what_a_teacher_lacks_is_said_before_anything_runs(new, message, teacher):
    suite = tiny((TRAIN, new.replace("{file}", str(teacher))))
    with pytest.raises(KDError, match=message):
        check_methods(suite, load_data(suite.data), suite.entries)


def test_a_teacher_for_different_classes_is_refused(tmp_path):
    suite = tiny()
    detector = open_detector(suite.teacher.model, class_names=["ant", "bee"], args=suite.teacher.args)
    save_detector(replace(detector, trained=True), tmp_path)
    suite = change(suite, teacher={"model": str(tmp_path)})
    with pytest.raises(KDError, match=r"teacher: .* share no class: the student has disc, .* teacher has ant, bee"):
        check_methods(suite, load_data(suite.data), suite.entries)
