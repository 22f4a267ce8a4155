import inspect

import pytest

import kdtoolkit.methods
from kdtoolkit.contract import Method
from kdtoolkit.errors import KDError
from kdtoolkit.libraries import adapt, adapter_classes
from kdtoolkit.methods import all_methods
from tests.conftest import tiny_gfl

SOURCE = '''"""A new method, as somebody who read docs/own_method.md writes it."""

from kdtoolkit.contract import Capability, Method


class Newest(Method):
    """Adds the student's features.

    Args:
        weight: factor.
    """

    needs = frozenset({Capability.FEATURES})
    terms = ("sum",)
    paper = "none"

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, exchange):
        return {"sum": self.weight * exchange.student.features[0].float().sum()}
'''


@pytest.fixture
def fresh():
    kdtoolkit.methods._own_methods.cache_clear()
    yield
    kdtoolkit.methods._own_methods.cache_clear()


def test_a_new_method_is_one_file(tmp_path, monkeypatch, fresh):
    (tmp_path / "newest.py").write_text(SOURCE)
    monkeypatch.setattr(kdtoolkit.methods, "__path__", [*kdtoolkit.methods.__path__, str(tmp_path)])
    assert all_methods()["Newest"] is kdtoolkit.methods.Newest
    with pytest.raises(AttributeError, match="Newer"):
        kdtoolkit.methods.Newer  # noqa: B018


def test_every_method_that_is_found_can_be_imported_with_its_type():
    assert {*kdtoolkit.methods.__all__} - {"all_methods", "published_settings"} <= set(all_methods())
    for name, cls in all_methods().items():
        assert issubclass(cls, Method)
        assert getattr(kdtoolkit.methods, name) is cls
        assert inspect.getmodule(cls).__doc__.splitlines()[0].endswith(".")
        assert all(p.default is not p.empty for p in inspect.signature(cls).parameters.values())


def test_a_broken_package_is_named(monkeypatch):
    class Entry:
        name, value, dist = "lost", "lost_package:Lost", None

        def load(self):
            raise ModuleNotFoundError("No module named 'lost_package'")

    monkeypatch.setattr("kdtoolkit.plugins.entries", lambda group: [Entry()])
    for load in (all_methods, adapter_classes):
        with pytest.raises(KDError, match=r"lost_package:Lost \(kdtoolkit\.\w+\), which cannot be loaded"):
            load()
    assert adapt(tiny_gfl(seed=0)).spec.name == "GFL"  # known without it
