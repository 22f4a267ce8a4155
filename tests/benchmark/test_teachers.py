"""What a suite may take from its teacher: first weights, some of its classes, its answers on images without labels."""

import csv
import io
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from kdtoolkit.benchmark import cell
from kdtoolkit.benchmark.board import build_board
from kdtoolkit.benchmark.datasets import load_data
from kdtoolkit.benchmark.plan import Plan, check_methods
from kdtoolkit.benchmark.report import View, to_csv, to_json, to_markdown, write_report
from kdtoolkit.benchmark.store import Store, read_result
from kdtoolkit.benchmark.suite import BASELINE
from kdtoolkit.benchmark.suite_file import load_suite
from kdtoolkit.errors import KDError
from kdtoolkit.models import open_detector, save_detector
from tests._opened import stirred
from tests.benchmark._suite import TINY, tiny
from tests.benchmark.test_runner import run
from tests.data._results import entry, found_in, write
from tests.workflow._data import write_shapes

TRAIN = "  train: {steps: 3, batch_size: 2, warmup_steps: 0}\n"
STUDENT = "  train: {steps: 2, batch_size: 2, warmup_steps: 0}\n"
NAMES = load_data(tiny().data).val.class_names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of a suite, with a teacher of other classes and images without labels beside it."""
    root = tmp_path_factory.mktemp("suite")
    suite = tiny()
    names = ["ball", "person", *reversed(NAMES[1:])]  # a ball is what the data calls its first class
    detector = open_detector(suite.teacher.model, class_names=names, args=suite.teacher.args)
    stirred(detector.model)
    save_detector(replace(detector, trained=True), root / "teacher")
    (root / "photos").mkdir()
    for i in range(4):
        Image.new("RGB", (64, 64), (40 * i, 90, 20)).save(root / f"photos/{i}.png")
    return root


def suite_in(folder, *changes):
    text = TINY
    for old, new in (("seeds: 2", "seeds: 1"), *changes):
        assert old in text
        text = text.replace(old, new, 1)
    (folder / "suite.yaml").write_text(text)
    return load_suite(str(folder / "suite.yaml"))


def plan_of(suite, root):
    return Plan(suite, Store(root / "run"), load_data(suite.data), device="cpu", threads=torch.get_num_threads())


OTHER_CLASSES = ("  model: kdtoolkit/gfl\n", "  model: teacher\n"), (TRAIN, "")
MAPPED = ("entries:", f"class_map: {{{NAMES[0]}: ball}}\nentries:")
UNLABELLED = ("data:\n", "data:\n  unlabelled: photos\n")


@pytest.mark.slow
def test_a_board_whose_students_inherit_from_a_teacher_of_different_classes(folder, tmp_path):
    suite = suite_in(folder, *OTHER_CLASSES, MAPPED, UNLABELLED, ("entries:", "init: teacher\nentries:"))
    suite = suite.model_copy(update={"teacher": suite.teacher.model_copy(update={"args": {}})})
    outcome, text = run(suite, tmp_path / "runs" / "tiny", only=["PKD"])
    assert outcome.failures == {}, text
    assert "all students start from the teacher's weights" in text
    assert "4 without labels" in text
    store = Store(tmp_path / "runs" / "tiny")
    taken = read_result(store.result_path(BASELINE, 0)).inherited
    assert taken == "the student starts from the teacher's weights in scales, backbone, neck, towers, predictors"
    assert read_result(store.teacher_copy).inherited == ""
    board = build_board(store.root)
    assert {row.entry: row.init for row in board.rows}["PKD"] == "teacher"
    assert board.facts["init"] == taken
    view = View.of(store.root)
    assert "| init |" in to_markdown([view])
    assert [row["init"] for row in csv.DictReader(io.StringIO(to_csv([view])))][:2] == ["", "teacher"]
    assert json.loads(to_json([view]))["rows"][0]["init"] == "teacher"
    write_report([view], tmp_path)
    assert ">init" in (tmp_path / "leaderboard.html").read_text()


def test_a_cell_learns_from_images_without_labels_and_its_key_says_so(folder, tmp_path):
    with_photos, without = (plan_of(suite_in(folder, *changes), tmp_path) for changes in ((UNLABELLED,), ()))
    parts = [plan.cell("PKD", 0).parts for plan in (with_photos, without)]
    assert set(parts[0]) - set(parts[1]) == {"unlabelled"}
    assert with_photos.cell(BASELINE, 0).parts == without.cell(BASELINE, 0).parts
    cell.run(with_photos.teacher_task(), lambda report: None)
    cell.run(with_photos.cell("PKD", 0), lambda report: None)
    first, second = read_result(with_photos.cell("PKD", 0).result).history
    assert set(first) > set(second) == {"step", "lr", "pkd/feature"}


def test_first_weights_and_class_maps_are_parts_of_keys(folder, tmp_path):
    plain, inheriting = (
        plan_of(suite_in(folder, *changes), tmp_path) for changes in ((), (("entries:", "init: teacher\nentries:"),))
    )
    assert plain.cell(BASELINE, 0).parts["teacher"] == "none"
    parts = inheriting.cell(BASELINE, 0).parts
    assert parts["init"] == "teacher"
    assert parts["teacher"] == plain.cell("PKD", 0).parts["teacher"]
    assert plain.teacher_task().parts == inheriting.teacher_task().parts
    same, mapped = (plan_of(suite_in(folder, *OTHER_CLASSES, *changes), tmp_path) for changes in ((), (MAPPED,)))
    assert "class_map" not in same.cell("PKD", 0).parts
    assert "class_map" not in mapped.cell(BASELINE, 0).parts
    assert "ball" in mapped.cell("PKD", 0).parts["class_map"]
    assert "ball" in mapped.teacher_task().parts["class_map"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ((MAPPED,), "class_map is for a teacher that keeps the classes of its weights"),
        (((STUDENT, STUDENT.replace("steps: 2", "steps: 2, unlabelled_share: 0.5")),), "unlabelled_share needs images"),
        (((TRAIN, TRAIN.replace("steps: 3", "steps: 3, unlabelled_share: 0.5")),), "trained on labels alone"),
        (
            ((TRAIN, TRAIN.replace("steps: 3", "steps: 3, teacher_cache: disk")),),
            "only a student with a teacher has one",
        ),
        ((("entries:", "init: pretrained\nentries:"),), "init = 'pretrained': input should be 'teacher'"),
    ],
)
def test_options_that_do_not_go_together_are_named(changes, says):
    with pytest.raises(KDError, match=says):
        tiny(*changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ((*OTHER_CLASSES, ("entries:", "class_map: {disk: ball}\nentries:")), r"student has no class 'disk' \(did you"),
        ((UNLABELLED, (STUDENT, STUDENT.replace("steps: 2", "steps: 2, unlabelled_share: 0.1"))), "PKD: none of the 2"),
        (
            (
                ("entries:", "init: teacher\nentries:"),
                (
                    "student:\n  model: kdtoolkit/gfl\n  args: *detector",
                    "student:\n  model: torchvision/fcos_resnet50_fpn",
                ),
            ),
            "init: nothing of GFL fits torchvision FCOS",
        ),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(folder, changes, says):
    suite = suite_in(folder, *changes)
    if suite.teacher.train is None:
        suite = suite.model_copy(update={"teacher": suite.teacher.model_copy(update={"args": {}})})
    with pytest.raises(KDError, match=says):
        check_methods(suite, load_data(suite.data), suite.entries)


# A teacher that is a file of detections ------------------------------------------------------------------------------

FILE = (
    (
        "  image_size: 64\n  teacher_images: 8\n  student_images: 4\n  val_images: 4\n",
        "  root: shapes\n  image_size: 64\n",
    ),
    ("  model: kdtoolkit/gfl\n", "  model: d.json\n"),
    (TRAIN, ""),
    ("  PKD: [PKD]\n  CrossKD+PKD: [CrossKD, {PKD: {weight: 3.0}}]\n", "  ObjectKD: [ObjectKD]\n"),
)


def with_file(root, *splits):
    """The suite in `root`, with a teacher that has found the objects of these splits."""
    write(root / "d.json", found_in(write_shapes(root / "shapes"), *splits))
    suite = suite_in(root, *FILE)
    return suite.model_copy(update={"teacher": suite.teacher.model_copy(update={"args": {}})})


def test_a_file_of_detections_is_a_teacher(tmp_path):
    suite = with_file(tmp_path, "train", "val")
    check_methods(suite, load_data(suite.data), suite.entries)
    plan = plan_of(suite, tmp_path)
    cell.run(plan.teacher_task(), lambda report: None)
    teacher = read_result(plan.teacher_task().result)
    assert (teacher.evaluation["ap"], teacher.warnings) == (pytest.approx(100), [])
    cell.run(plan.cell("ObjectKD", 0), lambda report: None)
    history = read_result(plan.cell("ObjectKD", 0).result).history
    assert [row["objectkd/missed"] for row in history] == [0.0] * len(history)
    before = plan.cell("ObjectKD", 0).parts["teacher"]
    write(tmp_path / "d.json", found_in(tmp_path / "shapes", "train"))
    assert plan_of(suite, tmp_path).cell("ObjectKD", 0).parts["teacher"] != before


@pytest.mark.slow
def test_a_board_says_that_its_teacher_could_not_be_measured(tmp_path):
    outcome, text = run(with_file(tmp_path, "train"), tmp_path / "runs" / "tiny")
    assert outcome.failures == {}, text
    board = build_board(tmp_path / "runs" / "tiny")
    assert board.teacher.metrics["ap"] is None
    assert any("teacher: the AP is unknown: " in warning for warning in board.warnings)
    assert not any("nothing to learn from it" in warning for warning in board.warnings)
    write_report([View.of(tmp_path / "runs" / "tiny")], tmp_path)


def test_a_file_of_different_images_fails_before_anything_is_trained(tmp_path):
    suite = with_file(tmp_path, "val")
    with pytest.raises(KDError, match=r"suite tiny, teacher: .*d.json has no detection on 12 of the 12 images"):
        check_methods(suite, load_data(suite.data), suite.entries)
    write(tmp_path / "d.json", [entry("train0.png", 1), entry(1000, 1)])
    with pytest.raises(KDError, match=r"suite tiny, teacher: .*d.json: detection 1 .*1000, and the data has no"):
        check_methods(suite, load_data(suite.data), suite.entries)
