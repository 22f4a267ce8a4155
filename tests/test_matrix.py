import io
import json
import re

import pytest
import torch
from rich.console import Console

from kdtoolkit.adapters.native import DenseAdapter
from kdtoolkit.contract import Capability, Method
from kdtoolkit.errors import IncompatibleError, KDError
from kdtoolkit.matrix import Cell, Matrix, Outcome, families, run_matrix
from kdtoolkit.matrix_tables import print_matrix, to_markdown
from kdtoolkit.methods import LD, PKD, CrossKD, all_methods
from tests.conftest import first_of_each_kind, tiny_fcos, tiny_gfl

PAIR = {
    "GFL": lambda num_classes: tiny_gfl(seed=0, num_classes=num_classes),
    "FCOS": lambda num_classes: tiny_fcos(seed=0, num_classes=num_classes),
}


class Base(Method):
    needs = frozenset({Capability.FEATURES})
    terms = ("feature",)
    paper = "none"

    def forward(self, exchange):
        return {"feature": exchange.student.features[0].square().mean()}


class RefusesLate(Base):
    def forward(self, exchange):
        raise IncompatibleError("sizes [of 3] differ")


class Breaks(Base):
    def forward(self, exchange):
        raise ZeroDivisionError("by\nzero")


class BreaksInSetup(Base):
    def setup(self, student, teacher):
        raise KeyError("levels")


class NotFinite(Base):
    def forward(self, exchange):
        return {"feature": exchange.student.features[0].sum() * float("inf")}


class NotFiniteGradient(Base):
    def forward(self, exchange):
        return {"feature": (exchange.student.features[0] * 0).sqrt().sum()}


class NoGradient(Base):
    def forward(self, exchange):
        return {"feature": exchange.student.features[0].detach().sum() + 0 * exchange.student.features[0].sum()}


FAULTS = {
    RefusesLate: Cell(Outcome.REFUSED_LATE, "sizes [of 3] differ"),
    Breaks: Cell(Outcome.FAILED, "ZeroDivisionError: by zero"),
    BreaksInSetup: Cell(Outcome.FAILED, "KeyError: 'levels'"),
    NotFinite: Cell(Outcome.FAILED, "losses are not finite: feature nan"),
    NotFiniteGradient: Cell(Outcome.FAILED, "the gradient is not finite"),
    NoGradient: Cell(Outcome.FAILED, "no gradient reaches the student's pyramid"),
}


@pytest.fixture(scope="module")
def matrix():
    methods = {cls.__name__: cls for cls in (CrossKD, PKD, LD, Base, RefusesLate, Breaks)}
    return run_matrix(PAIR, methods)


def printed(matrix, method=None):
    out = io.StringIO()
    print_matrix(matrix, Console(file=out, width=120), method)
    return out.getvalue()


def test_it_tells_what_works_from_what_is_refused(matrix):
    assert matrix.families == ("GFL", "FCOS")
    assert len(matrix.cells) == 6 * 4
    for method in ("CrossKD", "PKD", "Base"):
        assert matrix.share(method) == 1
    assert matrix.cells["LD", "GFL", "GFL"] == Cell(Outcome.WORKS)
    refused = matrix.cells["LD", "FCOS", "GFL"]
    assert refused == Cell(Outcome.REFUSED, "it needs distributions, which the student does not show")
    assert matrix.count(Outcome.REFUSED, "LD") == 3
    assert matrix.count(Outcome.REFUSED_LATE) == matrix.count(Outcome.FAILED) == 4
    assert matrix.share() == pytest.approx(13 / 24)


@pytest.mark.parametrize("method", FAULTS, ids=lambda cls: cls.__name__)
def test_no_error_escapes(method):
    cell = run_matrix({"GFL": PAIR["GFL"]}, {"method": method}).cells["method", "GFL", "GFL"]
    expected = FAULTS[method]
    assert cell.outcome == expected.outcome
    if method is NotFinite:
        assert cell.reason.startswith("losses are not finite: feature ")
    else:
        assert cell.reason == expected.reason


def test_a_detector_that_breaks_spoils_its_own_pairs_alone():
    def broken(num_classes):
        model = PAIR["GFL"](num_classes)
        del model.predictors["reg"]
        return model

    families = {**PAIR, "broken": broken, "unknown": lambda k: torch.nn.Linear(k, 1)}
    matrix = run_matrix(families, {"PKD": PKD, "CrossKD": CrossKD})
    assert matrix.count(Outcome.WORKS, "CrossKD") == 4
    assert matrix.count(Outcome.WORKS, "PKD") == 6  # which asks for no teacher's head
    assert matrix.count(Outcome.FAILED) == 22
    assert matrix.cells["PKD", "broken", "GFL"].reason == "as a student alone: KeyError: 'reg'"
    assert matrix.cells["CrossKD", "GFL", "broken"].reason == "KeyError: 'reg'"
    assert "as a teacher alone: no adapter" in matrix.cells["PKD", "GFL", "unknown"].reason
    assert "no adapter for torch.nn" in matrix.cells["PKD", "unknown", "GFL"].reason


def test_it_prints_counts_of_pairs_and_one_method_with_reasons(matrix):
    overview = printed(matrix)
    assert "methods that work of 6" in overview
    assert "54% work (13 works ✓, 3 refused ·, 4 refused late ~, 4 failed ✗)" in overview
    ld = printed(matrix, "LD")
    assert re.search(r"^ *1 GFL +✓ +·1 *$", ld, re.MULTILINE)
    assert "  2  it needs distributions, which the student does not show" in ld
    assert "sizes [of 3] differ" in printed(matrix, "RefusesLate")
    with pytest.raises(KDError, match="no method 'Nothing'; there are CrossKD, PKD"):
        printed(matrix, "Nothing")


def test_markdown_lists_each_reason_once(matrix):
    text = to_markdown(matrix)
    assert "## CrossKD, PKD, Base\n\n100% work" in text  # equal outcomes, one table
    assert "| student \\ teacher | 1 | 2 |\n|---|:-:|:-:|\n| 1 GFL | ✓ | ✓ |\n| 2 FCOS | ✓ | ✓ |" in text
    assert "| 1 GFL | ✓ | ·<sup>1</sup> |\n| 2 FCOS | ·<sup>2</sup> | ·<sup>2</sup> |" in text
    assert text.count("which the student does not show") == 1
    assert "3. sizes [of 3] differ\n4. ZeroDivisionError: by zero\n" in text


def test_it_is_plain_data(matrix):
    data = json.loads(json.dumps(matrix.to_json()))
    assert data["counts"] == {"works": 13, "refused": 3, "refused late": 4, "failed": 4}
    assert len(data["cells"]) == 24
    assert {"method": "PKD", "student": "GFL", "teacher": "FCOS", "outcome": "works"} in data["cells"]


def test_an_empty_matrix_has_no_share():
    assert Matrix((), (), {}).share() == 0


def test_families_are_the_examples_of_all_adapters():
    found = families()
    assert found.keys() >= DenseAdapter.examples().keys()
    assert {"GFL", "ATSS", "FCOS", "RetinaNet"} <= found.keys()


def test_two_examples_of_one_name_are_refused(monkeypatch):
    class Other(DenseAdapter):
        pass

    monkeypatch.setattr("kdtoolkit.matrix.adapter_classes", lambda load: [DenseAdapter, Other])
    with pytest.raises(KDError, match=r"two adapters have an example called 'GFL': rename that of .*Other"):
        families()


def all_families():
    return families()


def one_of_each_kind():
    found = families()
    return {name: found[name] for name in first_of_each_kind()}


@pytest.mark.parametrize("some", [one_of_each_kind, pytest.param(all_families, marks=pytest.mark.slow)])
def test_nothing_fails_between_any_two_families_that_are_installed(some):
    """What a method cannot do it must refuse, with a reason."""
    matrix = run_matrix(some(), all_methods())
    failures = {key: cell.reason for key, cell in matrix.cells.items() if cell.outcome == Outcome.FAILED}
    assert not failures
    assert all(cell.reason for cell in matrix.cells.values() if cell.outcome != Outcome.WORKS)
    assert matrix.share("PKD") > 0.5


def test_all_columns_are_printed_in_narrow_terminals():
    names = tuple(f"family {i}" for i in range(30))
    cells = {("PKD", a, b): Cell(Outcome.REFUSED, f"reason {a}") for a in names for b in names}
    out = io.StringIO()
    matrix = Matrix(names, ("PKD",), cells)
    for method in (None, "PKD"):
        print_matrix(matrix, Console(file=out, width=60), method)
    text = out.getvalue()
    assert "…" not in text
    assert text.count(" 30") >= 2
    assert "·30" in text
