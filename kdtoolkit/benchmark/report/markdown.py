"""Boards as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from kdtoolkit.benchmark.across import Across
from kdtoolkit.benchmark.report.columns import FOOTNOTE, columns_of, table_rows
from kdtoolkit.benchmark.report.view import View


def to_markdown(views: Sequence[View], across: Across | None = None) -> str:
    """One or more boards as Markdown. `across`: the ranking over all of them."""
    parts = [] if across is None else [_across(across)]
    return "\n".join([*parts, *map(_board, views)])


def _across(across: Across) -> str:
    lines = ["# Over all data sets", ""]
    lines += [f"| entry | mean rank | {' | '.join(map(_cell, across.boards))} |"]
    lines += ["|---|---:|" + "---:|" * len(across.boards)]
    for row in across.rows:
        cells = (f"{ap:.1f} ({rank:g})" for ap, rank in zip(row.aps, row.ranks, strict=True))
        lines.append(f"| {_cell(row.entry)} | {row.mean_rank:.2f} | {' | '.join(cells)} |")
    lines += ["", "AP, and in brackets the rank on that data set.", ""]
    groups = [f"- cannot be told apart: {', '.join(group)}" for group in across.groups]
    return "\n".join([*lines, *groups, *(f"- {note}" for note in across.notes), ""])


def _board(view: View) -> str:
    board = view.board
    lines = [f"# {board.title}", "", board.description, ""]
    lines += [f"**{board.summary}**", ""] if board.summary else []
    lines += [f"> **Warning:** {warning}\n" for warning in board.warnings]
    columns = columns_of(board)
    lines += [f"| {' | '.join(column.name for column in columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    for row in table_rows(board):
        lines.append("| " + " | ".join(_cell(column.text(row)) for column in columns) + " |")
    lines += ["", FOOTNOTE, "", "## Claims", ""]
    lines += [f"- {claim.text}" for claim in board.claims] or ["None yet."]
    if view.details.limits:
        lines += ["", "## What this board does not show", "", *(f"- {limit}" for limit in view.details.limits)]
    lines += ["", "## Settings", "", *(f"- {name}: {value}" for name, value in board.facts.items())]
    methods = [f"- {row.entry}: {row.methods}" for row in board.rows if row.methods]
    return "\n".join([*lines, *(["", "## Entries", "", *methods] if methods else []), ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
