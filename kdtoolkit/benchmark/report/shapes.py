"""What the sections of the page are made of: pictures, and tables of texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from markupsafe import Markup

from kdtoolkit.benchmark.report.svg import Look

Looks = Mapping[str, Look]


@dataclass(frozen=True)
class Table:
    """A table of texts, beside a picture or in its place. `rows`: the name of each row, and its cells."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Figure:
    """A picture with its numbers. `looks`: the rows in it, for the legend. `x`, `y`: what the axes show."""

    title: str
    picture: Markup
    table: Table
    looks: tuple[Look, ...]
    x: str = ""
    y: str = ""
    term: str = ""


@dataclass(frozen=True)
class Line:
    """One line of a table with a picture. `look`: of the row, if the line is of one row. `verdict`: of a difference."""

    name: str
    picture: Markup
    cells: tuple[str, ...]
    look: Look | None = None
    verdict: str = ""


@dataclass(frozen=True)
class Tracks:
    """A table in which each line has a picture, on one scale. `head`: the names of the cells."""

    ruler: Markup
    head: tuple[str, ...]
    lines: tuple[Line, ...]
    looks: tuple[Look, ...] = ()
    more: tuple[Line, ...] = ()
