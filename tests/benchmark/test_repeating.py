import json
import shlex

import pytest

from kdtoolkit.benchmark.datasets import load_data
from kdtoolkit.benchmark.plan import Plan
from kdtoolkit.benchmark.repeating import command, configuration
from kdtoolkit.benchmark.store import Store
from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME, TEACHER, change
from kdtoolkit.benchmark.suite_file import load_suite, parse_suite
from tests.benchmark._suite import made_up, tiny


def planned(suite, root):
    return Plan(suite, Store(root), load_data(suite.data), device="cpu", threads=1)


@pytest.mark.parametrize("row", [BASELINE, "PKD", "CrossKD+PKD", TEACHER])
def test_the_configuration_of_a_row_repeats_its_cells(tmp_path, row):
    suite = change(tiny(), plateau=True)
    plan = planned(suite, tmp_path)
    teacher = made_up(TEACHER, 0, 30.0, key_parts=plan.teacher_task().parts)
    results = [teacher] if row == TEACHER else [made_up(row, 0, 20.0, key_parts=plan.cell(row, 0).parts)]
    text = configuration(suite, row, results, teacher)
    again = planned(parse_suite(text, "again.yaml"), tmp_path)
    assert again.teacher_task().parts == plan.teacher_task().parts
    if row != TEACHER:
        assert again.cell(row, 0).parts == plan.cell(row, 0).parts
    assert list(again.suite.entries) == [name for name in suite.entries if name == row]
    assert (again.suite.plateau, again.suite.seeds) == (False, 1)


def test_a_longer_baseline_has_its_steps(tmp_path):
    text = configuration(tiny(), EQUAL_TIME, [made_up(EQUAL_TIME, 2, 20.0, stretch=2.5, steps=5)], None)
    again = parse_suite(text, "again.yaml")
    assert (again.student.train.steps, again.seeds, again.entries) == (5, 3, {})


def test_defaults_are_written_out():
    text = configuration(tiny(), "CrossKD+PKD", [made_up("CrossKD+PKD", 0, 20.0)], None)
    assert "# PKD: weight=3.0" in text
    assert "# CrossKD: stage=-1, cls_weight=1.0" in text
    assert "kdtoolkit 0.0" in text.splitlines()[0]
    assert "warmup: linear" in text


def test_files_are_named_without_their_folders(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "best.pth").touch()
    changes = {"data": {"root": tmp_path / "photos"}}
    suite = change(tiny(), teacher={"model": "kdtoolkit/gfl", "weights": str(tmp_path / "best.pth")}, **changes)
    text = configuration(suite, "PKD", [made_up("PKD", 0, 20.0)], None)
    assert str(tmp_path) not in text
    (tmp_path / "again.yaml").write_text(text)
    again = load_suite(str(tmp_path / "again.yaml"))
    assert (again.data.root, again.teacher.weights) == (tmp_path / "photos", str(tmp_path / "best.pth"))


def test_the_command_names_the_file_and_the_device():
    suite = tiny()
    assert (
        command(suite, "CrossKD+PKD", [made_up("PKD", 0, 20.0)])
        == "kd benchmark run tiny-CrossKD+PKD.yaml --device cpu"
    )
    assert shlex.split(command(suite, EQUAL_TIME, [made_up("PKD", 0, 20.0, device="H100")])) == [
        *("kd", "benchmark", "run", f"tiny-{EQUAL_TIME}.yaml"),
        *("--device", "cuda"),
    ]
    mixed = [made_up("PKD", 0, 20.0), made_up("PKD", 1, 20.0, device="H100")]
    assert "--device" not in command(suite, "PKD", mixed)
    own = change(suite, student=json.loads(suite.student.model_dump_json()) | {"model": "mine:detector"})
    assert "--allow-code" in command(own, "PKD", mixed)
