"""Sections of the page: what won, differences, costs, curves, and how to repeat a row. The templates lay them out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kdtoolkit.benchmark.board import Board, Row
from kdtoolkit.benchmark.details import Curve
from kdtoolkit.benchmark.report.charts import Interval, Point, lines, ruler, scatter, spans_decades, track
from kdtoolkit.benchmark.report.columns import difference_text, p_text, table_rows
from kdtoolkit.benchmark.report.shapes import Figure, Line, Looks, Table, Tracks
from kdtoolkit.benchmark.report.svg import Look, Scale, number
from kdtoolkit.benchmark.report.view import View
from kdtoolkit.benchmark.stats import Difference
from kdtoolkit.benchmark.suite import BASELINE
from kdtoolkit.words import counted

VERDICTS = {"holds": "helps", "not shown": "cannot be told apart", "hurts": "hurts"}
SIGNS = {"holds": "▲", "not shown": "≈", "hurts": "▼"}
PROBED = ("conflict/", "share/")  # what is measured of the methods' gradients
TERMS = {"eval/ap": "AP", "eval/ap50": "AP50"}
UNITS = (("h", 3600.0), ("min", 60.0), ("s", 1.0))


def tiles(board: Board) -> list[tuple[str, str, str]]:
    """What a reader wants first: a name, a number, and what is said below it."""
    found: list[tuple[str, str, str]] = []
    by_name = {row.entry: row for row in board.rows}
    if (teacher := board.teacher) and (ap := teacher.metrics["ap"]):
        found.append(("teacher", f"{ap.mean:.1f}", "AP"))
    if (baseline := by_name.get(BASELINE)) and (ap := baseline.metrics["ap"]):
        found.append(("baseline", f"{ap.mean:.1f}", "AP" if ap.std is None else f"AP, ± {ap.std:.1f} over seeds"))
    best = max((row for row in board.rows if row.methods and row.metrics["ap"]), key=lambda row: row.ap, default=None)
    if best is not None and (ap := best.metrics["ap"]):
        spread = "AP" if ap.std is None else f"AP, ± {ap.std:.1f} over seeds"
        found.append((f"highest: {best.entry}", f"{ap.mean:.1f}", spread))
        if own := best.versus_baseline:
            over = (
                f"AP, {counted(own.pairs, 'seed')}"
                if own.low is None
                else f"AP, 95 % interval {own.low:+.1f} to {own.high:+.1f}"
            )
            over += " over images, one seed" if own.over == "images" else ""
            found.append((f"{best.entry} vs baseline", f"{own.mean:+.1f}", over))
        if best.gap_recovered is not None:
            found.append(("gap to the teacher", f"{100 * best.gap_recovered:.0f} %", f"recovered by {best.entry}"))
    return found


def differences(board: Board, looks: Looks) -> list[tuple[str, Tracks]]:
    """Differences from the baselines as intervals on one scale: a title and lines for each of the two baselines."""
    references: dict[str, Callable[[Row], Difference | None]] = {
        "At equal steps, against the baseline": lambda row: row.versus_baseline,
        "At equal time, against the baseline that got as much time": lambda row: row.versus_equal_time,
    }
    shown = {
        title: [(row, own) for row in board.rows if (own := of(row)) is not None] for title, of in references.items()
    }
    known = [own for rows in shown.values() for _, own in rows]
    scale = Scale.over((end for own in known for end in (own.mean, own.low, own.high) if end is not None), zero=True)
    above = ruler(scale, signed=True)
    found = []
    for title, rows in shown.items():
        made = tuple(_difference(row, own, looks[row.entry], scale) for row, own in rows)
        if made:
            found.append((title, Tracks(above, ("difference in AP", "p", "verdict"), made)))
    return found


def _difference(row: Row, own: Difference, look: Look, scale: Scale) -> Line:
    picture = track([Interval(look, own.mean, own.low, own.high)], scale, zero=True)
    verdict, words = own.verdict, f"{SIGNS[own.verdict]} {VERDICTS[own.verdict]}"
    if not row.methods:  # a baseline with a longer schedule
        verdict, words = "not shown", "more steps"
    elif own.over == "images":
        words = "one seed, over images"
    elif own.low is None:
        words = "one seed"
    return Line(row.entry, picture, (difference_text(own), p_text(own), words), look, verdict)


def pairs(board: Board) -> list[tuple[str, list[Difference | None]]]:
    """Differences of all rows among each other: each row's name, and its differences from all."""
    names = [row.entry for row in board.rows if row.entry in board.pairs]
    return [(name, [board.pairs[name].get(other) for other in names]) for name in names]


def costs(view: View, looks: Looks) -> tuple[tuple[str, list[Figure]], ...]:
    """AP by the cost of training, and AP by the cost of an image: titles and figures."""
    seconds = [cost.train_seconds for cost in view.details.costs.values() if cost.train_seconds]
    unit, divisor = next((each for each in UNITS if max(seconds, default=0.0) >= 2 * each[1]), UNITS[-1])
    training = [
        _cost(view, looks, "train_seconds", f"training time of a seed, {unit}", divisor),
        _cost(view, looks, "step_ms", "cost of a training step, ms"),
    ]
    image = [
        _cost(view, looks, "latency_ms", "latency of one image, ms"),
        _cost(view, looks, "gflops", "arithmetic of one image, GFLOPs"),
        _cost(view, looks, "parameters", "parameters"),
    ]
    found = (("Training", training), ("One image", image))
    return tuple((title, kept) for title, own in found if (kept := [figure for figure in own if figure]))


def _cost(view: View, looks: Looks, name: str, title: str, divisor: float = 1.0) -> Figure | None:
    found = []
    for row in table_rows(view.board):
        cost, ap = view.details.costs.get(row.entry), row.metrics["ap"]
        value = None if cost is None else getattr(cost, name)
        if value and ap is not None:
            found.append((row, value / divisor, ap))
    if not found:
        return None
    points = [Point(looks[row.entry], value, ap.mean, ap.std) for row, value, ap in found]
    cells = tuple((row.entry, (number(value), f"{ap.mean:.1f}")) for row, value, ap in found)
    label = f"AP by {title}: " + "; ".join(f"{name} {ap} AP at {value}" for name, (value, ap) in cells)
    table = Table(("row", title, "AP"), cells)
    return Figure(title, scatter(points, label), table, tuple(point.look for point in points), title, "AP", name)


def curves(view: View, looks: Looks, *, probed: bool = False) -> list[Figure]:
    """Curves over training, a figure for each term. `probed`: those of gradients, else the rest."""
    order = [row.entry for row in table_rows(view.board)]
    found = view.details.curves
    terms = dict.fromkeys(term for row in order for term in found.get(row, {}))
    kept = [term for term in terms if term.startswith(PROBED) == probed and term not in ("lr", "step")]
    first = "conflict/" if probed else "eval/"
    kept.sort(key=lambda term: not term.startswith(first))  # the rest stays in its order
    return [
        _curve(term, [(looks[row], found[row][term]) for row in order if term in found.get(row, {})]) for term in kept
    ]


def _curve(term: str, own: Sequence[tuple[Look, Curve]]) -> Figure:
    log = not term.startswith((*PROBED, "eval/")) and spans_decades([curve for _, curve in own])
    cells = []
    for look, curve in own:
        places = (0, len(curve.steps) // 2, -1)
        cells.append((look.row, tuple(f"{curve.mean[place]:.3g} at {curve.steps[place]:.0f}" for place in places)))
    label = f"{term} over the steps of training. At the end: "
    label += ", ".join(f"{look.row} {curve.mean[-1]:.3g}" for look, curve in own)
    few = all(len(curve.steps) <= 12 for _, curve in own)
    picture = lines(own, label, log=log, dots=few, zero=term.startswith(PROBED[0]))
    table = Table(("row", "first", "middle", "last"), tuple(cells))
    title = f"{TERMS.get(term, term)}{', logarithmic' if log else ''}"
    return Figure(title, picture, table, tuple(look for look, _ in own), "step", "", term)


def repeats(view: View) -> list[tuple[str, str, str, str]]:
    """For each row its name, its methods, the command that repeats it, and its configuration."""
    details = view.details
    return [
        (row.entry, row.methods, details.commands.get(row.entry, ""), details.settings.get(row.entry, ""))
        for row in table_rows(view.board)
    ]
