"""Tables of the matrix, for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kdtoolkit.errors import KDError
from kdtoolkit.matrix import Cell, Matrix, Outcome

MARKS: Mapping[Outcome, str] = {
    Outcome.WORKS: "✓",
    Outcome.REFUSED: "·",
    Outcome.REFUSED_LATE: "~",
    Outcome.FAILED: "✗",
}
_COLOURS: Mapping[Outcome, str] = {
    Outcome.WORKS: "green",
    Outcome.REFUSED: "dim",
    Outcome.REFUSED_LATE: "yellow",
    Outcome.FAILED: "bold red",
}


def print_matrix(matrix: Matrix, console: Console, method: str | None = None) -> None:
    """Print how many methods work for each pair. For one `method`, print a mark for each pair, and the reasons below.

    Raises KDError if there is no such method.
    """
    if method is None:
        _print_whole(_overview(matrix), console)
        console.print(_by_method(matrix))
        console.print(_summary(matrix))
        return
    if method not in matrix.methods:
        raise KDError(f"no method {method!r}; there are {', '.join(matrix.methods)}")
    _print_whole(_grid(matrix, method), console)
    for number, reason in enumerate(matrix.reasons(method), 1):
        console.print(f"{number:>3}  {escape(reason)}")
    console.print(_summary(matrix, method))


def _print_whole(table: Table, console: Console) -> None:
    """Print all columns. On a narrow terminal rich would leave some out, so lines may be longer than it is wide."""
    needed = console.measure(table, options=console.options.update(width=1000)).maximum
    wide = Console(file=console.file, width=max(needed, console.width), force_terminal=console.is_terminal)
    wide.print(table)


def _numbered(matrix: Matrix, title: str) -> Table:
    """A table of students (rows) by teachers (columns). Columns are named by the rows' numbers, for lack of space."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("student \\ teacher", no_wrap=True)
    for i, _ in enumerate(matrix.families, 1):
        table.add_column(str(i), justify="right", no_wrap=True)
    return table


def _overview(matrix: Matrix) -> Table:
    table = _numbered(matrix, f"methods that work of {len(matrix.methods)}")
    for i, student in enumerate(matrix.families, 1):
        row = []
        for teacher in matrix.families:
            outcomes = [matrix.cells[name, student, teacher].outcome for name in matrix.methods]
            works = outcomes.count(Outcome.WORKS)
            colour = _COLOURS[Outcome.FAILED] if Outcome.FAILED in outcomes else ("green" if works else "dim")
            row.append(f"[{colour}]{works}[/]")
        table.add_row(f"{i} {escape(student)}", *row)
    return table


def _by_method(matrix: Matrix) -> Table:
    table = Table(title=f"pairs of {len(matrix.families)} x {len(matrix.families)} families")
    table.add_column("method")
    for outcome in Outcome:
        table.add_column(outcome.value, justify="right")
    for name in matrix.methods:
        table.add_row(name, *(str(matrix.count(outcome, name)) for outcome in Outcome))
    return table


def _grid(matrix: Matrix, method: str) -> Table:
    numbers = {reason: i for i, reason in enumerate(matrix.reasons(method), 1)}
    table = _numbered(matrix, method)
    for i, student in enumerate(matrix.families, 1):
        row = []
        for teacher in matrix.families:
            cell = matrix.cells[method, student, teacher]
            row.append(f"[{_COLOURS[cell.outcome]}]{MARKS[cell.outcome]}{numbers.get(cell.reason, '')}[/]")
        table.add_row(f"{i} {escape(student)}", *row)
    return table


def _summary(matrix: Matrix, method: str | None = None) -> str:
    counts = ", ".join(f"{matrix.count(outcome, method)} {outcome} {MARKS[outcome]}" for outcome in Outcome)
    return f"{matrix.share(method):.0%} work ({counts})"


def to_markdown(matrix: Matrix) -> str:
    """A page of tables, students by teachers. Methods with equal outcomes share a table. Each reason is listed once."""
    every = dict.fromkeys(reason for method in matrix.methods for reason in matrix.reasons(method))
    numbers = {reason: i for i, reason in enumerate(every, 1)}
    pairs = [(student, teacher) for student in matrix.families for teacher in matrix.families]
    alike: dict[tuple[Cell, ...], list[str]] = {}
    for method in matrix.methods:
        alike.setdefault(tuple(matrix.cells[method, *pair] for pair in pairs), []).append(method)
    head = "| student \\ teacher | " + " | ".join(map(str, range(1, len(matrix.families) + 1))) + " |"
    rule = "|---|" + ":-:|" * len(matrix.families)
    lines = [
        "# Every method on every pair of detector families",
        "",
        "Made by `kd adapters --matrix --markdown FILE`, with tiny detectors of random weights: ✓ finite losses and "
        "gradient to the student; · refused at construction; ~ refused at the first step; ✗ failed. Columns are "
        "teachers, in the order of the rows. Small numbers are reasons, listed at the end.",
        "",
        f"{len(matrix.methods)} methods on {len(pairs)} pairs of {len(matrix.families)} families: {_summary(matrix)}.",
        "",
        "| method | " + " | ".join(f"{outcome} {MARKS[outcome]}" for outcome in Outcome) + " |",
        "|---|" + "--:|" * len(Outcome),
    ]
    lines += [
        f"| {name} | {' | '.join(str(matrix.count(outcome, name)) for outcome in Outcome)} |" for name in matrix.methods
    ]
    for methods in alike.values():
        lines += ["", f"## {', '.join(methods)}", "", f"{_summary(matrix, methods[0])}", "", head, rule]
        for i, student in enumerate(matrix.families, 1):
            cells = (matrix.cells[methods[0], student, teacher] for teacher in matrix.families)
            marks = (
                MARKS[cell.outcome] + (f"<sup>{numbers[cell.reason]}</sup>" if cell.reason else "") for cell in cells
            )
            lines.append(f"| {i} {student} | {' | '.join(marks)} |")
    if numbers:
        lines += ["", "## Reasons", ""]
        lines += [f"{i}. {reason}" for reason, i in numbers.items()]
    return "\n".join(lines) + "\n"
