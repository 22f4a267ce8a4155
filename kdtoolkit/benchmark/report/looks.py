"""How each row is drawn: in the same colour, mark and dashes on the whole page."""

from __future__ import annotations

from collections.abc import Iterable

from kdtoolkit.benchmark.board import Board
from kdtoolkit.benchmark.report.svg import Look
from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME, TEACHER, TWICE

COLOURS = 7  # colours of the page's style, which colour-blind readers can tell apart
_MARKS = ("circle", "triangle", "square", "diamond", "down", "plus")
_DASHES = ("solid", "long", "short", "mixed")
_PLAIN = {
    TEACHER: Look(TEACHER, "teacher", "bar", "short"),
    BASELINE: Look(BASELINE, "plain", "circle", "solid"),
    EQUAL_TIME: Look(EQUAL_TIME, "plain", "square", "long"),
    TWICE: Look(TWICE, "plain", "triangle", "short"),
}


def looks_of(boards: Iterable[Board]) -> dict[str, Look]:
    """A look for each row of some boards. Rows with methods differ in colour, and in mark and dashes too."""
    names = {row.entry for board in boards for row in board.rows} - _PLAIN.keys()
    found = dict(_PLAIN)
    for place, name in enumerate(sorted(names)):
        mark, dash = _MARKS[place % len(_MARKS)], _DASHES[place % len(_DASHES)]
        found[name] = Look(name, f"c{place % COLOURS}", mark, dash)
    return found
