"""Boards as one HTML file: no script, nothing loaded from elsewhere, light or dark as the reader's system is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from kdtoolkit.benchmark.board import Board

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #16794a; --open: #8a6100; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --good: #6fd19d; --open: #e2b93d; --bad: #ff8a80; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 110rem; margin: 2rem auto; padding: 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.plain { opacity: .75; }
.warning { border-left: .3rem solid var(--bad); padding: .2rem .8rem; }
.holds { color: var(--good); } .not-shown { color: var(--open); } .hurts { color: var(--bad); }
dt { font-weight: 600; } dd { margin: 0 0 .4rem 1rem; }
small { display: block; max-width: 60rem; opacity: .8; }
""".strip()


def to_html(board: Board, columns: Sequence[str], cells: Sequence[Sequence[str]], footnote: str) -> str:
    """The board as a page; `cells` are the table's texts, a row each, its first column the entry."""
    title = escape(board.title)
    methods = {row.entry: row.methods for row in board.rows if row.methods}
    body = [f"<h1>{title}</h1>", f"<p>{escape(board.description)}</p>"]
    body += [f'<p class="warning" role="alert">{escape(warning)}</p>' for warning in board.warnings]
    body += ['<div class="scroll"><table>', _row("th", columns, ' scope="col"'), "<tbody>"]
    for row in cells:
        start = "<tr>" if row[0] in methods else '<tr class="plain">'
        head = f'<th scope="row" title="{escape(methods.get(row[0], ""))}">{escape(row[0])}</th>'
        body.append(start + head + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>")
    body += ["</tbody></table></div>", f"<small>{escape(footnote)}</small>", "<h2>Claims</h2>", "<ul>"]
    body += [f'<li class="{claim.verdict.replace(" ", "-")}">{escape(claim.text)}</li>' for claim in board.claims] or [
        "<li>None yet.</li>"
    ]
    body += ["</ul>", "<h2>Settings</h2>", *_definitions(board.facts.items())]
    if methods:
        body += ["<h2>Entries</h2>", *_definitions(methods.items())]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}<title>{title}</title>\n<style>\n{_STYLE}\n</style></head>\n'
        "<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _row(tag: str, cells: Iterable[str], attribute: str) -> str:
    return "<thead><tr>" + "".join(f"<{tag}{attribute}>{escape(cell)}</{tag}>" for cell in cells) + "</tr></thead>"


def _definitions(items: Iterable[tuple[str, str]]) -> list[str]:
    return ["<dl>", *(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in items), "</dl>"]
