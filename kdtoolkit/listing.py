"""Lists of methods and of embedded suites, read from their files without importing torch.

Importing torch takes seconds, and a list of names does not need it.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdtoolkit.errors import KDError
from kdtoolkit.options import did_you_mean
from kdtoolkit.plugins import entries

if TYPE_CHECKING:
    from kdtoolkit.contract import Method

_WITHOUT_LABELS = {
    "images": "it works on images without labels, and needs no objects",
    "detections": "it works on images without labels: the teacher's detections stand for the objects",
    "skips": "it is not run on images without labels",
}
METHODS = Path(__file__).parent / "methods"
SUITES = Path(__file__).parent / "benchmark" / "suites"


@dataclass(frozen=True)
class MethodFacts:
    """What a method's file says about it.

    Attributes:
        name: the class's name.
        idea: the file's docstring.
        doc: the class's docstring.
        needs: the capabilities that both detectors must have.
        unlabelled: what it does with images without labels: "images", "detections" or "skips".
        terms: the names of the loss terms.
        paper: where the method comes from.
        arguments: the default of each argument, as Python writes it.
        settings: the docstring of each named constructor, by a name such as `CrossKD.for_fcos`.
    """

    name: str
    idea: str
    doc: str
    needs: tuple[str, ...]
    unlabelled: str
    terms: tuple[str, ...]
    paper: str
    arguments: Mapping[str, str]
    settings: Mapping[str, str]


def all_method_facts() -> dict[str, MethodFacts]:
    """The facts about every method that `kdtoolkit.methods.all_methods` finds, by name and in that order.

    Our own files are read, not imported. All methods are imported if reading is not enough: if another package
    announces a method, or if a file computes a fact instead of writing it down.
    """
    if not entries("kdtoolkit.methods"):
        try:
            return {facts.name: facts for facts in _written(sorted(METHODS.glob("[!_]*.py")))}
        except (KeyError, ValueError):
            pass
    from kdtoolkit.methods import all_methods

    return {name: facts_of(method) for name, method in all_methods().items()}


def facts_of(method: type[Method]) -> MethodFacts:
    """The facts about a method's class. Raises KDError if it does not say what a method must say."""
    from kdtoolkit.contract.method import check_facts
    from kdtoolkit.methods import published_settings

    check_facts(method)
    parameters = inspect.signature(method).parameters.values()
    return MethodFacts(
        name=method.__name__,
        idea=inspect.getdoc(sys.modules[method.__module__]) or "",
        doc=inspect.cleandoc(method.__doc__ or ""),
        needs=tuple(sorted(method.needs)),
        unlabelled=method.unlabelled,
        terms=method.terms,
        paper=getattr(method, "paper", ""),
        arguments={p.name: repr(p.default) for p in parameters if p.default is not p.empty},
        settings={name: inspect.getdoc(make) or "" for name, make in published_settings(method).items()},
    )


def _written(files: Iterable[Path]) -> Iterator[MethodFacts]:
    """The facts about the methods in some files. Raises KeyError or ValueError where a fact is not written down."""
    modules = [ast.parse(path.read_text("utf-8")) for path in files]
    classes = {node.name: node for module in modules for node in module.body if isinstance(node, ast.ClassDef)}
    bases = {"Method"} | {  # and methods of files that are not read
        alias.asname or alias.name
        for module in modules
        for node in module.body
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("kdtoolkit.methods")
        for alias in node.names
        if alias.name not in classes
    }
    for module in modules:
        for node in module.body:
            if isinstance(node, ast.ClassDef) and not _is_abstract(node):
                lineage = _lineage(node.name, classes)
                if not bases.isdisjoint(lineage):
                    known = [classes[name] for name in lineage if name in classes]
                    yield _facts_written(known, ast.get_docstring(module) or "")


def _is_abstract(node: ast.ClassDef) -> bool:
    functions = (line for line in node.body if isinstance(line, ast.FunctionDef))
    return any(ast.unparse(each) == "abstractmethod" for function in functions for each in function.decorator_list)


def _lineage(name: str, classes: Mapping[str, ast.ClassDef]) -> list[str]:
    """A class and the classes that it inherits from, by name, the class itself first."""
    bases = [ast.unparse(base) for base in classes[name].bases] if name in classes else []
    return [name, *(each for base in bases for each in _lineage(base, classes))]


def _facts_written(lineage: Sequence[ast.ClassDef], idea: str) -> MethodFacts:
    """The facts about the first class of a lineage. It may inherit some of them from the others."""
    node, body = lineage[0], [line for each in reversed(lineage) for line in each.body]
    values = {ast.unparse(line.target): line.value for line in body if isinstance(line, ast.AnnAssign) and line.value}
    assigned = (line for line in body if isinstance(line, ast.Assign))
    values |= {ast.unparse(target): line.value for line in assigned for target in line.targets}
    functions = {line.name: line for line in body if isinstance(line, ast.FunctionDef)}
    needs = re.fullmatch(r"frozenset\(\{(Capability\.\w+(?:, Capability\.\w+)*)\}\)", ast.unparse(values["needs"]))
    if needs is None:
        raise ValueError("the class does not say `needs = frozenset({Capability...})` literally")
    init = functions["__init__"].args
    defaults = [*zip(init.args[-len(init.defaults) :], init.defaults, strict=False)]  # the last ones have defaults
    defaults += [(name, value) for name, value in zip(init.kwonlyargs, init.kw_defaults, strict=True) if value]
    return MethodFacts(
        name=node.name,
        idea=idea,
        doc=ast.get_docstring(node) or "",
        needs=tuple(sorted(needs[1].replace("Capability.", "").replace("_", " ").lower().split(", "))),
        unlabelled=ast.literal_eval(values["unlabelled"]) if "unlabelled" in values else "detections",  # of Method
        terms=ast.literal_eval(values["terms"]),
        paper=ast.literal_eval(values["paper"]),
        arguments={argument.arg: repr(ast.literal_eval(value)) for argument, value in defaults},
        settings={
            f"{node.name}.{name}": ast.get_docstring(function) or ""
            for name, function in sorted(functions.items())
            if name.startswith("for_")
        },
    )


def print_methods(methods: Mapping[str, MethodFacts], console: Console) -> None:
    """Print each method's name, what it does, what it needs, and its paper."""
    table = definitions()
    for name, facts in methods.items():
        text = Text(_reflow(facts.doc.partition("\n\n")[0]))
        text.append(f"\nneeds {', '.join(facts.needs)}; {facts.paper}", style="dim")
        table.add_row(Text(name), text)
    console.print(table)
    console.print("\n`kd methods NAME` shows one with its arguments.", highlight=False)


def print_method(facts: MethodFacts, console: Console) -> None:
    """Print a method's idea, paper, needs, loss terms, arguments with their defaults, and named constructors."""
    doc, _, rest = facts.doc.partition("\n\nArgs:\n")
    console.print(Text(facts.name, style="bold"))
    console.print(Text(f"{_reflow(facts.idea)}\n"))
    table = definitions()
    for title, fact in (
        ("paper", facts.paper),
        ("needs", ", ".join(facts.needs)),
        ("without labels", _WITHOUT_LABELS[facts.unlabelled]),
        ("loss terms", ", ".join(facts.terms)),
    ):
        table.add_row(title, Text(fact))
    console.print(table)
    console.print(Text(f"\n{_reflow(doc)}\n"))
    if facts.arguments:
        described = {name: " ".join(text.split()) for name, text in _ARGUMENT.findall(rest)}
        arguments = columns("argument", "default", "what it is")
        for name, default in facts.arguments.items():
            arguments.add_row(Text(name), Text(default), Text(described.get(name, "")))
        console.print(arguments)
    if facts.settings:
        console.print(
            "\nPublished settings for different kinds of detectors. Suites take these names too:\n", highlight=False
        )
        settings = definitions()
        for name, doc in facts.settings.items():
            settings.add_row(Text(name), Text(_reflow(doc)))
        console.print(settings)


def embedded_suites() -> dict[str, Path]:
    """The suites that come with the package, by name."""
    return {path.stem: path for path in sorted(SUITES.glob("*.yaml"))}


def suite_path(name_or_path: str) -> Path:
    """The file of an embedded suite, or of a path. Raises KDError if there is none."""
    known = embedded_suites()
    path = known.get(name_or_path, Path(name_or_path))
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        raise KDError(f"there is no suite file {path}")
    raise KDError(
        f"unknown suite '{name_or_path}'{did_you_mean(name_or_path, known)}; the embedded ones are {', '.join(known)}. "
        "For a suite of your own, give the path of its .yaml file"
    )


def print_suites(console: Console) -> None:
    """Print each embedded suite's name, time, number of seeds and description."""
    table = columns("suite", "takes about", "seeds", "what it is")
    for name, path in embedded_suites().items():
        suite = yaml.safe_load(path.read_text("utf-8"))
        minutes, seeds = suite["expected_minutes"], suite["seeds"]
        table.add_row(name, f"{minutes:g} min", str(seeds), Text(suite["description"]))
    console.print(table)


def definitions() -> Table:
    """A table of names and texts without a header. The texts wrap."""
    table = Table(box=None, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def columns(*names: str) -> Table:
    """A table whose last column wraps. All other columns keep their width."""
    table = Table(box=None)
    for name in names[:-1]:
        table.add_column(name, no_wrap=True)
    table.add_column(names[-1], overflow="fold")
    return table


def _reflow(doc: str) -> str:
    """Join the lines of each paragraph, so that the terminal breaks them. Indented text stays as it is."""
    paragraphs = doc.split("\n\n")
    return "\n\n".join(p if "\n  " in p or p.startswith(" ") else " ".join(p.split()) for p in paragraphs)


# `    name: text`, and the lines indented deeper that continue it.
_ARGUMENT = re.compile(r"^    (\w+): (.*(?:\n {5,}.*)*)", re.MULTILINE)
