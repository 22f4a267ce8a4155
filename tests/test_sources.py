import sys

import pytest

from kdtoolkit.contract import DetectorAdapter
from kdtoolkit.sources import modules_of, source_files
from tests._onelevel import OneLevel

FILES = {
    "single.py": "import beside\nimport torch\nfrom package.inner import x\nimport kdtoolkit\n",
    "beside.py": "if True:\n    from folder.deep import y\n",
    "unused.py": "",
    "package/__init__.py": "import single\n",
    "package/inner.py": "x = 1\n",
    "folder/deep.py": "y = 1\n",
    "folder/.hidden/copy.py": "",
}


def written(folder, monkeypatch):
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(folder)


ALL = {"single.py", "beside.py", "package/__init__.py", "package/inner.py", "folder/deep.py"}


@pytest.mark.parametrize(
    ("module", "expected"),
    [("single", ALL), ("package.inner", ALL), ("folder.deep", {"folder/deep.py"}), ("unused", {"unused.py"})],
)
def test_a_module_is_its_package_and_what_it_imports_beside_it(module, expected, tmp_path, monkeypatch):
    written(tmp_path, monkeypatch)
    assert set(source_files([module])) == expected
    for name in ("single", "beside", "package", "package.inner", "folder", "folder.deep"):
        sys.modules.pop(name, None)


def test_an_installed_package_stands_alone(tmp_path, monkeypatch):
    written(tmp_path / "site-packages", monkeypatch)
    assert set(source_files(["single"])) == {"single.py"}
    assert set(source_files(["package"])) == {"package/__init__.py", "package/inner.py"}


def test_a_module_without_a_file_has_none():
    assert source_files(["sys", "no_such_module", "no_such.module"]) == {}


def test_the_modules_of_a_class_are_those_of_its_own_bases():
    class Adapter(DetectorAdapter):
        pass

    assert modules_of(Adapter, DetectorAdapter) == {__name__}
    assert modules_of(DetectorAdapter, DetectorAdapter) == set()
    assert modules_of(type("More", (OneLevel,), {"__module__": "more"}), OneLevel) == {"more", "tests._onelevel"}
