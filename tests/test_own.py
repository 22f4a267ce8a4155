"""The code blocks of docs/own_method.md and docs/own_detector.md are whole files, and they run."""

import importlib
import re
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import kdtoolkit.methods
from kdtoolkit.listing import all_method_facts, facts_of
from kdtoolkit.methods import all_methods
from kdtoolkit.testing import check_method
from tests import _onelevel
from tests.conftest import tiny_atss, tiny_gfl

DOCS = Path(__file__).parents[1] / "docs"
TEXT = "".join((DOCS / name).read_text("utf-8") for name in ("own_method.md", "own_detector.md"))
FILES = dict(re.findall(r"^```python\n# (\S+)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE))
METHODS = [path for path in FILES if path.startswith("kdtoolkit/methods/")]
TESTS = [path for path in FILES if Path(path).name.startswith("test_")]


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The files, where they can be imported: methods among kdtoolkit's own, all others as modules of their own."""
    (tmp_path / "methods").mkdir()
    for path, code in FILES.items():
        (tmp_path / ("methods" if path in METHODS else ".") / Path(path).name).write_text(code, "utf-8")
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(kdtoolkit.methods, "__path__", [*kdtoolkit.methods.__path__, str(tmp_path / "methods")])
    monkeypatch.setitem(sys.modules, "onelevel", _onelevel)
    kdtoolkit.methods._own_methods.cache_clear()
    yield tmp_path
    kdtoolkit.methods._own_methods.cache_clear()
    for name in set(sys.modules) - before:
        if name.rpartition(".")[2] in {Path(path).stem for path in FILES}:
            del sys.modules[name]


def test_every_block_is_a_file():
    assert TEXT.count("```python") == len(FILES)
    assert len(METHODS) == 4


@pytest.mark.parametrize("path", TESTS)
def test_the_tests_pass(path, written):
    module = importlib.import_module(Path(path).stem)
    tests = [function for name, function in vars(module).items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()


@pytest.mark.parametrize("path", METHODS)
def test_a_method_is_found_and_keeps_the_contract(path, written, monkeypatch):
    (name,) = re.findall(r"^class (\w+)\(\w*Method\)", FILES[path], re.MULTILINE)
    assert check_method(all_methods()[name], tiny_gfl(seed=1), tiny_atss(seed=2)).refused is None
    # `kd methods` reads what the class says.
    monkeypatch.setattr("kdtoolkit.listing.METHODS", written / "methods")
    for base in ("features.py", "predictions.py"):
        (written / "methods" / base).write_text((Path(kdtoolkit.methods.__file__).parent / base).read_text("utf-8"))
    assert all_method_facts()[name] == facts_of(all_methods()[name])


def test_what_is_announced_is_in_a_block(written):
    blocks = re.findall(r"^```toml\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    points = [group for block in blocks for group in tomllib.loads(block)["project"]["entry-points"].items()]
    assert [group for group, _ in points] == ["kdtoolkit.methods", "kdtoolkit.adapters"]
    (adapter,) = points[1][1].values()
    found = EntryPoint("onelevel", adapter, "kdtoolkit.adapters").load()
    assert found.matches(_onelevel.OneLevel(3))
