"""Boards for programs: their rows as CSV, and all of them as JSON. docs/board.md describes both."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from kdtoolkit.benchmark.across import Across
from kdtoolkit.benchmark.board import METRICS, Row
from kdtoolkit.benchmark.details import RowCost
from kdtoolkit.benchmark.report.columns import table_rows
from kdtoolkit.benchmark.report.view import View

FORMAT = 2  # of the JSON; a change that breaks a reader makes it higher
_LIST = re.compile(r"\[\s+((?:-?[\d.eE+-]+,\s+)*-?[\d.eE+-]+)\s+\]")  # of numbers, one a line


def to_json(views: Sequence[View], across: Across | None = None) -> str:
    """Everything that is known, as JSON: of one board its fields and `details`, of several a list `boards`."""
    boards = [{**asdict(view.board), "details": view.details.model_dump(mode="json")} for view in views]
    if len(boards) == 1 and across is None:
        fields: dict[str, Any] = {"format": FORMAT, **boards[0]}
    else:
        fields = {"format": FORMAT, "across": None if across is None else asdict(across), "boards": boards}
    text = json.dumps(_short(fields), indent=1, ensure_ascii=False, allow_nan=False)
    return _LIST.sub(lambda found: "[" + ", ".join(found[1].replace("\n", " ").replace(" ", "").split(",")) + "]", text)


def _short(value: Any) -> Any:
    """The value with seven digits of each number. JSON has no NaN and no infinity: they become None."""
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _short(each) for key, each in value.items()}
    return [_short(each) for each in value] if isinstance(value, list | tuple) else value


def to_csv(views: Sequence[View]) -> str:
    """The rows of one or more boards as CSV: one column for each number, empty if undefined."""
    buffer = io.StringIO()
    rows = [dict(_numbers(view, row)) for view in views for row in table_rows(view.board)]
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _numbers(view: View, row: Row) -> Iterator[tuple[str, object]]:
    def texts(prefix: str, source: object, *names: str) -> Iterator[tuple[str, str]]:
        for name in names:
            value = getattr(source, name, None)
            yield f"{prefix}{name}", f"{value:.6g}" if isinstance(value, float | int) else value or ""

    yield "entry", row.entry
    yield "board", view.board.title
    yield "methods", row.methods
    yield "init", row.init
    yield "seeds", len(row.seeds)
    yield from texts("rank_", row.rank, "low", "high")
    for metric in METRICS:
        yield from texts(f"{metric}_", row.metrics[metric], "mean", "std")
    for name in ("versus_baseline", "versus_equal_time"):
        yield from texts(f"{name}_", getattr(row, name), "mean", "low", "high", "p", "p_holm", "over")
    yield from texts("", row, "gap_recovered")
    low, high = row.gap_interval or ("", "")
    yield from (("gap_recovered_low", low), ("gap_recovered_high", high))
    yield from texts("p_improvement_", row.p_improvement, "value", "low", "high")
    yield from texts("", row, "steps", "step_ms", "train_seconds", "peak_memory_mb", "parameters")
    cost: RowCost | None = view.details.costs.get(row.entry)
    yield from texts("", cost, "latency_ms", "gflops")
