"""The board for programs: its rows as CSV, and all of it as JSON."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict

from kdtoolkit.benchmark.board import METRICS, Board
from kdtoolkit.benchmark.report.columns import INIT, columns_of, table_rows


def to_json(board: Board) -> str:
    """The whole board as JSON. Rows have `init` only where students start from the teacher's weights."""
    fields = asdict(board)
    if INIT not in columns_of(board):
        for row in filter(None, (fields["teacher"], *fields["rows"])):
            del row["init"]
    return json.dumps(fields, indent=1, ensure_ascii=False)


def to_csv(board: Board) -> str:
    """The board's rows as CSV: one column for each number, empty if undefined."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    differences = ("versus_baseline", "versus_equal_time")
    scalars = ("gap_recovered", "steps", "step_ms", "train_seconds", "peak_memory_mb", "parameters")
    header = ["entry", "methods", "seeds", *(f"{name}_{part}" for name in METRICS for part in ("mean", "std"))]
    inits = [INIT] if INIT in columns_of(board) else []
    header += [f"{name}_{part}" for name in differences for part in ("mean", "low", "high")]
    writer.writerow([*header, *scalars, *inits])
    for row in table_rows(board):
        spreads = [row.metrics[name] for name in METRICS]
        values = [value for spread in spreads for value in ((spread.mean, spread.std) if spread else (None, None))]
        for difference in (row.versus_baseline, row.versus_equal_time):
            values += (difference.mean, difference.low, difference.high) if difference else (None, None, None)
        values += [getattr(row, name) for name in scalars]
        cells = ("" if value is None else f"{value:.6g}" for value in values)
        writer.writerow([row.entry, row.methods, len(row.seeds), *cells, *(row.init for _ in inits)])
    return buffer.getvalue()
