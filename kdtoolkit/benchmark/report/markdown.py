"""The board as Markdown."""

from __future__ import annotations

from kdtoolkit.benchmark.board import Board
from kdtoolkit.benchmark.report.columns import FOOTNOTE, columns_of, table_rows


def to_markdown(board: Board) -> str:
    """The board as Markdown."""
    lines = [f"# {board.title}", "", board.description, ""]
    lines += [f"> **Warning:** {warning}\n" for warning in board.warnings]
    columns = columns_of(board)
    lines += [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    for row in table_rows(board):
        lines.append("| " + " | ".join(text(row).replace("|", "\\|") for text in columns.values()) + " |")
    lines += ["", FOOTNOTE, "", "## Claims", ""]
    lines += [f"- {claim.text}" for claim in board.claims] or ["None yet."]
    lines += ["", "## Settings", "", *(f"- {name}: {value}" for name, value in board.facts.items())]
    methods = [f"- {row.entry}: {row.methods}" for row in board.rows if row.methods]
    return "\n".join([*lines, *(["", "## Entries", "", *methods] if methods else []), ""])
