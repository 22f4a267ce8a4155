"""The examples run, and use public names alone; packages are written as anybody's and reached through entry points."""

import ast
import runpy
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
import yaml

from kdtoolkit.data.tools.convert import convert
from kdtoolkit.libraries import ENTRY_POINTS, adapt
from kdtoolkit.models import Detector, build_model, save_detector
from kdtoolkit.testing import check_adapter
from tests.cli.test_detect import TINY
from tests.workflow._blobs import BOX, COLOURS, dataset, picture, right

EXAMPLES = Path(__file__).parents[1] / "examples"
PROJECTS = sorted(EXAMPLES.glob("*/pyproject.toml"))
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.fixture(params=PROJECTS, ids=lambda path: path.parent.name)
def project(request):
    return request.param


def _announced(project):
    """Adapters by the name of their entry point, as written in pyproject.toml."""
    return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["entry-points"][ENTRY_POINTS]


def test_there_are_examples():
    assert PROJECTS


def test_only_public_names_of_kdtoolkit_are_used(project):
    found = []
    for file in project.parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kdtoolkit":
                found += [*(node.module or "").split("."), *(alias.name for alias in node.names)]
    assert "DetectorAdapter" in found
    assert [name for name in found if name.startswith("_")] == []


def test_its_detectors_are_adapted_and_keep_the_contract(project):
    installed = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    announced = _announced(project)
    if absent := sorted(announced.keys() - installed.keys()):
        pytest.skip(f"{', '.join(absent)} is not installed: pip install -e examples/{project.parent.name}")
    for name, target in announced.items():
        assert installed[name].value == target
        adapter = installed[name].load()
        assert adapter.examples()
        for build in adapter.examples().values():
            torch.manual_seed(0)
            model = build(3)
            assert type(adapt(model)) is adapter
            reason = "its own tests compare it with its library"
            check_adapter(model, own=reason, own_losses=reason)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A small data set in COCO's format, one in YOLO's, images without labels, and a detector that finds something."""
    root = tmp_path_factory.mktemp("places")
    for split in ("train", "val"):
        dataset(
            root / "data", [right("red", 0.9), right("green", 0.8), right("blue", 0.7), right("red", 0.6)], split=split
        )
    for name in "ab":
        picture(root / "photos" / f"{name}.png", ("red", 0.9, BOX))
    convert(root / "data", root / "yolo", "yolo", progress=lambda *_: None)
    torch.manual_seed(0)
    model = build_model(TINY, 3)
    model.predictors["cls"].bias.data += 4  # so that it finds something
    save_detector(Detector(model, TINY, COLOURS, "nowhere", True, image_size=96), root / "teacher")
    return root


@pytest.fixture
def run(places, tmp_path, monkeypatch, capsys):
    """Run a script with arguments in a folder of its own; what it prints."""

    def call(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_a_method_of_ones_own(run, places):
    out = run("own_method", "--data", places / "data", "--teacher", places / "teacher", "--steps", 2)
    assert "cosinefeatures/feature" in out
    assert "student: AP50 " in out


def test_pseudo_labels(run, places, tmp_path, monkeypatch):
    monkeypatch.setattr("kdtoolkit.engine.thresholds.LEAST_PRECISION", 0)  # this teacher knows nothing
    command = ["--data", places / "data", "--images", places / "photos", "--teacher", places / "teacher"]
    out = run("pseudo_labels", *command, "--out", tmp_path / "out", "--steps", 1, "--image-size", 64)
    assert "| class | score | precision" in out
    assert "student: AP50 " in out


@pytest.mark.slow
def test_export(run, places, tmp_path):
    pytest.importorskip("onnxruntime")
    command = ["--model", places / "teacher", "--data", places / "data", "--photo", places / "photos" / "a.png"]
    out = run("export_onnx", *command, "--out", tmp_path / "model.onnx")
    assert out.splitlines()[0].split()[0] in COLOURS


@pytest.mark.slow
def test_the_trainer_of_ultralytics(run, places, tmp_path, monkeypatch):
    ultralytics = pytest.importorskip("ultralytics")
    from ultralytics.nn.tasks import yaml_model_load

    monkeypatch.setenv("YOLO_OFFLINE", "1")
    config = {**yaml_model_load("yolo11n.yaml"), "nc": 3, "scales": {"n": [0.33, 0.0625, 1024]}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    ultralytics.YOLO(tmp_path / "tiny.yaml").save(tmp_path / "teacher.pt")
    out = run(
        "ultralytics_trainer",
        *("--data", places / "yolo" / "data.yaml", "--teacher", tmp_path / "teacher.pt"),
        *("--student", tmp_path / "tiny.yaml", "--epochs", 1, "--image-size", 64, "--project", tmp_path / "runs"),
    )
    best = Path(out.rpartition("the plain student: ")[2].strip())
    assert ultralytics.YOLO(best).names == {0: "red", 1: "green", 2: "blue"}


def test_every_script_has_a_test_and_a_row():
    tests = [Path(__file__), Path(__file__).parent / "integrations" / "test_docs.py"]  # that one runs the plain loop
    text = "".join(path.read_text("utf-8") for path in tests)
    table = (EXAMPLES / "README.md").read_text("utf-8")
    for name in SCRIPTS:
        assert f'"{name}"' in text or f'"{name}.py"' in text
        assert f"[{name}.py]({name}.py)" in table
