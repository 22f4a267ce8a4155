"""The page: one HTML file with all of its pictures, which loads nothing from elsewhere."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from kdtoolkit.benchmark.across import Across
from kdtoolkit.benchmark.board import Row
from kdtoolkit.benchmark.report import breakdowns, sections
from kdtoolkit.benchmark.report.charts import critical_difference
from kdtoolkit.benchmark.report.columns import FOOTNOTE, Column, columns_of, table_rows
from kdtoolkit.benchmark.report.looks import looks_of
from kdtoolkit.benchmark.report.shapes import Figure, Looks, Tracks
from kdtoolkit.benchmark.report.svg import Look
from kdtoolkit.benchmark.report.view import View
from kdtoolkit.benchmark.stats import Difference


@dataclass(frozen=True)
class Part:
    """One board on the page, section by section. Sections without content are empty or None."""

    number: int
    view: View
    columns: tuple[Column, ...]
    rows: list[Row]
    looks: list[Look]
    tiles: list[tuple[str, str, str]]
    differences: list[tuple[str, Tracks]]
    pairs: list[tuple[str, list[Difference | None]]]
    costs: tuple[tuple[str, list[Figure]], ...]
    curves: list[Figure]
    probed: list[Figure]
    classes: Tracks | None
    sizes: Tracks | None
    errors: Tracks | None
    figures: list[Figure]
    repeats: list[tuple[str, str, str, str]]

    @classmethod
    def of(cls, view: View, looks: Looks, number: int) -> Part:
        """The sections of a board, which is the `number`-th of the page."""
        return cls(
            number=number,
            view=view,
            columns=columns_of(view.board),
            rows=table_rows(view.board),
            looks=[looks[row.entry] for row in table_rows(view.board)],
            tiles=sections.tiles(view.board),
            differences=sections.differences(view.board, looks),
            pairs=sections.pairs(view.board),
            costs=sections.costs(view, looks),
            curves=sections.curves(view, looks),
            probed=sections.curves(view, looks, probed=True),
            classes=breakdowns.by_class(view, looks),
            sizes=breakdowns.by_size(view, looks),
            errors=breakdowns.errors(view, looks),
            figures=[each for each in (breakdowns.by_iou(view, looks), breakdowns.calibration(view, looks)) if each],
            repeats=sections.repeats(view),
        )

    @property
    def links(self) -> list[tuple[str, str]]:
        """The sections that it has: their names in the page, and their titles."""
        gallery = self.view.gallery
        found: tuple[tuple[str, str, object], ...] = (
            ("board", "Board", True),
            ("differences", "Differences", True),
            ("costs", "Costs", self.costs),
            ("curves", "Curves", self.curves),
            ("conflict", "Conflict", self.probed),
            ("sources", "Where gains come from", self.classes or self.errors),
            ("pictures", "Pictures", gallery and (gallery.items or gallery.note)),
            ("repeat", "Repeat", True),
            ("limits", "Limits", self.view.details.limits),
            ("settings", "Settings", True),
        )
        return [(f"{name}{self.number}", title) for name, title, content in found if content]


def to_html(views: Sequence[View], across: Across | None = None) -> str:
    """The page of one or more boards. `across`: the ranking over all of them."""
    environment = Environment(
        loader=PackageLoader("kdtoolkit.benchmark.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(data_uri=_data_uri, coded=_coded)
    looks = looks_of([view.board for view in views])
    ranks = None
    if across is not None:
        means = {row.entry: row.mean_rank for row in across.rows}
        ranks = critical_difference(means, across.groups, across.critical_difference, looks)
    return environment.get_template("page.html").render(
        parts=[Part.of(view, looks, number) for number, view in enumerate(views, 1)],
        across=across,
        ranks=ranks,
        looks=looks,
        footnote=FOOTNOTE,
        version=version("kdtoolkit"),
        date=datetime.now().astimezone().date().isoformat(),
        style=_file(environment, "page.css"),
        script=_file(environment, "page.js"),
    )


def _file(environment: Environment, name: str) -> Markup:
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0])


def _coded(text: str) -> Markup:
    """The text, with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _data_uri(image: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(image).decode()}"
