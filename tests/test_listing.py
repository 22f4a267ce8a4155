"""What is read from files is what their classes say."""

import io

import pytest
from rich.console import Console

from kdtoolkit import listing
from kdtoolkit.benchmark.suite_file import load_suite
from kdtoolkit.listing import all_method_facts, embedded_suites, facts_of, print_method, print_methods, print_suites
from kdtoolkit.methods import PKD, CrossKD, all_methods

SOURCE = '''
from kdtoolkit.contract import Capability, Method
from kdtoolkit.methods.pkd import PKD


class First(Method):
    """Does [this]."""

    needs = frozenset({Capability.PREDICTIONS, Capability.ASSIGNMENT})
    terms = ("cls",)
    paper = "none"

    def __init__(self, factor: float, plain: int = 2, *, weight: float = -1e-6) -> None:
        pass


class Helper(Base):
    pass
'''
INHERITS = """
class Second(PKD):
    terms = ("cls",)
"""
COMPUTES = """
class Third(Method):
    needs = NEEDS
    terms = ("cls",)
    paper = "none"

    def __init__(self) -> None:
        pass
"""


def printed(show, *arguments, width=80):
    out = io.StringIO()
    show(*arguments, Console(file=out, width=width))
    return out.getvalue()


def test_what_is_read_from_the_files_is_what_the_classes_say():
    read = all_method_facts()
    assert list(read) == list(all_methods())
    for name, method in all_methods().items():
        assert read[name] == facts_of(method)


def test_a_new_method_is_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "METHODS", tmp_path)
    (tmp_path / "first.py").write_text(SOURCE)
    (tmp_path / "_common.py").write_text(COMPUTES)
    (first,) = all_method_facts().values()
    assert (first.name, first.doc) == ("First", "Does [this].")
    assert first.needs == ("assignment", "predictions")
    assert first.arguments == {"plain": "2", "weight": "-1e-06"}
    assert "Does [this]." in printed(print_method, first)
    assert "Does [this]." in printed(print_methods, {"First": first})


@pytest.mark.parametrize("more", [INHERITS, COMPUTES])
def test_a_fact_that_is_not_written_down_is_asked_of_the_class(tmp_path, monkeypatch, more):
    monkeypatch.setattr(listing, "METHODS", tmp_path)
    (tmp_path / "first.py").write_text(SOURCE + more)
    assert all_method_facts()["CrossKD"] == facts_of(CrossKD)


def test_methods_of_other_packages_are_listed(monkeypatch):
    class Other(PKD):
        """Theirs."""

    class Entry:
        name, value, dist = "other", "other:Other", None

        def load(self):
            return Other

    for module in ("kdtoolkit.plugins", "kdtoolkit.listing"):
        monkeypatch.setattr(f"{module}.entries", lambda group: [Entry()] if group == "kdtoolkit.methods" else [])
    known = all_method_facts()
    assert known["Other"].doc == "Theirs."
    assert known["Other"].paper == PKD.paper
    assert known["CrossKD"] == facts_of(CrossKD)


def test_suites_are_listed_with_what_they_say():
    out = printed(print_suites, width=200)
    for name in embedded_suites():
        suite = load_suite(name)
        (line,) = (line for line in out.splitlines() if line.split()[0] == name)
        assert f" {suite.expected_minutes:g} min " in line
        assert f" {suite.seeds} " in line
        assert suite.description in line


@pytest.mark.parametrize("width", [80, 120])
def test_no_word_is_cut(width):
    facts = all_method_facts()
    texts = [printed(print_suites, width=width), printed(print_methods, facts, width=width)]
    texts += [printed(print_method, each, width=width) for each in facts.values()]
    shown = set()
    for text in texts:
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= width
        shown |= {word.strip(",;:") for word in text.split()}
    for each in facts.values():
        written = {*" ".join(each.needs).split(), *each.terms, *each.arguments, *each.doc.split(), *each.paper.split()}
        assert {word.strip(",;:") for word in written} <= shown | {"Args"}
