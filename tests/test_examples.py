"""The packages in examples/ are written as anybody's: reached through entry points, by public names alone."""

import ast
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from kdtoolkit.libraries import ENTRY_POINTS, adapt
from kdtoolkit.testing import check_adapter

PROJECTS = sorted((Path(__file__).parents[1] / "examples").glob("*/pyproject.toml"))


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
