"""Stored results on the terminal: lists of runs, records of cells, and two runs side by side."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdtoolkit.benchmark.record import cell_path, open_cell, record, settings_text, state
from kdtoolkit.benchmark.report.columns import difference_text, spread_text
from kdtoolkit.benchmark.run_pair import RunPair
from kdtoolkit.benchmark.runs import Run, find_runs, names_of_hardware, open_run
from kdtoolkit.benchmark.stats import Difference
from kdtoolkit.benchmark.suite import TEACHER
from kdtoolkit.errors import KDError
from kdtoolkit.words import size


def print_runs(folder: Path, console: Console) -> None:
    """Print all runs in a folder. Those that cannot be read are named below the table."""
    table = _table("run", "suite", "rows", "seeds done", "last cell", "size")
    notes: list[tuple[str, str]] = []
    for root in find_runs(folder):
        name = root.resolve().name if root == folder else str(root.relative_to(folder))
        try:
            run = open_run(root)
        except KDError as error:
            notes.append((name, str(error)))
            continue
        last = max((result.date for result in run.results), default="-")[:10]
        cells = (name, run.suite.name, str(len(run.rows)), run.seeds_done, last, size(run.size))
        table.add_row(*map(Text, cells))
        notes += [(name, words) for words in (*names_of_hardware(run.results), *run.cells.left_out)]
    console.print(table)
    for name, words in notes:
        console.print(Text(f"{name}: {words}"))


def print_states(run: Run, console: Console) -> None:
    """Print the state of each cell of a run: its AP, or why it has none."""
    console.print(Text(f"{run.root}: {run.suite.description}", style="bold"))
    seeds = range(run.suite.seeds)
    table = _table("AP of", *(f"seed {seed}" for seed in seeds))
    table.add_row(Text(TEACHER), Text(state(run, TEACHER, 0)))
    for row in run.rows:
        table.add_row(Text(row), *(Text(state(run, row, seed)) for seed in seeds))
    console.print(table)
    for words in run.cells.left_out:
        console.print(Text(f"WARNING  {words}", style="bold red"))
    console.print(Text(f"`kd benchmark show {run.root} ROW SEED` shows all that is stored about a cell"))


def print_records(run: Run, row: str, seed: int | None, console: Console) -> None:
    """Print what is stored about a cell, or about all cells of a row that have a result if `seed` is None.

    Raises KDError for a row that the run does not have, and for a cell without result.
    """
    seeds = [seed] if seed is not None else [s for s in range(run.suite.seeds) if cell_path(run, row, s).exists()]
    for number in [0] if row == TEACHER else seeds or [0]:
        path, result = cell_path(run, row, number), open_cell(run, row, number)
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in record(path, result).items():
            table.add_row(Text(name, style="bold"), Text(text))
        console.print(table)
        if settings := settings_text(result):
            console.print(Text("settings", style="bold"))
            console.print(Text(settings), soft_wrap=True)
        console.print()


def print_comparison(pair: RunPair, console: Console) -> None:
    """Print what differs between two runs, and the differences of their rows."""
    first, second = f"A = {pair.first}", f"B = {pair.second}"
    console.print(Text(f"{first}, {second}"), soft_wrap=True)
    table = _table("differs", "A", "B")
    for name, values in pair.differences.items():
        table.add_row(Text(name), *map(Text, values))
    console.print(table if pair.differences else Text("all settings, data, versions and hardware are equal"))
    rows = _table("AP", "A", "B", "B - A", "")
    for row in pair.rows:
        texts = (row.row, spread_text(row.first), spread_text(row.second), difference_text(row.difference))
        rows.add_row(*map(Text, texts), Text(_told(row.difference)))
    if pair.rows:
        console.print(rows)
    if pair.refusal:
        console.print(Text(f"WARNING  {pair.refusal}", style="bold red"))
    elif pair.rows:
        console.print(
            Text(
                "In brackets: the 95 % t-interval over the seeds that both runs have, each for itself. The words are "
                "corrected for the number of rows by Holm's procedure."
            )
        )


def _told(difference: Difference | None) -> str:
    if difference is None:
        return ""
    if difference.mean == 0 and not difference.low and not difference.high:
        return "equal"
    return {"holds": "B is higher", "hurts": "B is lower", "not shown": "cannot be told apart"}[difference.verdict]


def _table(first: str, *rest: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(first, overflow="fold")
    for name in rest:
        table.add_column(name, overflow="fold")
    return table
