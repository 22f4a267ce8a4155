"""Where gains come from: AP by class, size and IoU, errors by kind, and what scores are worth.

The pictures show how far each row lies from the baseline, and the tables show the numbers themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kdtoolkit.benchmark.details import Curve
from kdtoolkit.benchmark.report.charts import Interval, lines, ruler, track
from kdtoolkit.benchmark.report.columns import table_rows
from kdtoolkit.benchmark.report.shapes import Figure, Line, Looks, Table, Tracks
from kdtoolkit.benchmark.report.svg import Scale, number
from kdtoolkit.benchmark.report.view import View
from kdtoolkit.benchmark.suite import BASELINE, TEACHER
from kdtoolkit.engine.breakdown import Breakdown

MOST_CLASSES = 20  # that are shown before a reader asks for all


def by_class(view: View, looks: Looks) -> Tracks | None:
    """AP of each class. With many classes, those in which the rows differ most come first."""
    return _breakdown(view, looks, lambda own: own.by_class, most=MOST_CLASSES)


def by_size(view: View, looks: Looks) -> Tracks | None:
    """AP of small, medium and large objects."""
    return _breakdown(view, looks, lambda own: own.by_size)


def errors(view: View, looks: Looks) -> Tracks | None:
    """What each kind of error costs."""
    return _breakdown(view, looks, lambda own: own.errors)


def _breakdown(
    view: View, looks: Looks, of: Callable[[Breakdown], Mapping[str, float | None]], *, most: int | None = None
) -> Tracks | None:
    """A line for each name: what each row's number is, and how far it lies from the baseline's."""
    order = [row.entry for row in table_rows(view.board) if row.entry in view.details.breakdown]
    numbers = {row: of(view.details.breakdown[row]) for row in order}
    names = list(dict.fromkeys(name for own in numbers.values() for name in own))
    gains = {name: _gains(name, numbers) for name in names}
    known = [gain for own in gains.values() for gain in own.values()]
    if not names:
        return None
    scale = Scale.over(known, zero=True)
    made = []
    for name in names:
        dots = [Interval(looks[row], gain) for row, gain in gains[name].items()]
        cells = tuple("-" if (value := own.get(name)) is None else f"{value:.1f}" for own in numbers.values())
        made.append(Line(name, track(dots, scale, zero=True), cells))
    more: list[Line] = []
    if most is not None and len(made) > most:
        made.sort(key=lambda line: -max(map(abs, gains[line.name].values()), default=0.0))
        made, more = made[:most], made[most:]
    students = tuple(looks[row] for row in order if row != TEACHER)
    return Tracks(ruler(scale, signed=True), tuple(order), tuple(made), students, tuple(more))


def _gains(name: str, numbers: Mapping[str, Mapping[str, float | None]]) -> dict[str, float]:
    """How far the students' numbers lie from the baseline's."""
    reference = numbers.get(BASELINE, {}).get(name)
    if reference is None:
        return {}
    students = {row: own.get(name) for row, own in numbers.items() if row not in (BASELINE, TEACHER)}
    return {row: value - reference for row, value in students.items() if value is not None}


def by_iou(view: View, looks: Looks) -> Figure | None:
    """How far AP lies from the baseline's, by the IoU that a detection needs."""
    found = {
        row.entry: {iou: ap for iou, ap in breakdown.by_iou.items() if ap is not None}
        for row in table_rows(view.board)
        if (breakdown := view.details.breakdown.get(row.entry))
    }
    reference = found.get(BASELINE, {})
    own = []
    for row, aps in found.items():
        if row != TEACHER and reference and aps.keys() == reference.keys():
            gains = tuple(ap - reference[iou] for iou, ap in aps.items())
            own.append((looks[row], Curve(steps=tuple(map(float, aps)), mean=gains, low=gains, high=gains)))
    if not own:
        return None
    label = "AP minus the baseline's, by the IoU that a detection needs: "
    label += "; ".join(f"{look.row} {curve.mean[0]:+.1f} to {curve.mean[-1]:+.1f}" for look, curve in own)
    cells = tuple((row, tuple(f"{ap:.1f}" for ap in aps.values())) for row, aps in found.items())
    table = Table(("row", *reference), cells)
    picture = lines(own, label, dots=True, zero=True, y_text=lambda value: f"{value:+.3g}" if value else "0")
    title = "AP by the IoU that a detection needs, minus the baseline's"
    return Figure(title, picture, table, tuple(look for look, _ in own), "IoU", "")


def calibration(view: View, looks: Looks) -> Figure | None:
    """The share of right detections by their score."""
    own, cells = [], []
    for row in table_rows(view.board):
        found = view.details.breakdown.get(row.entry)
        bins = [each for each in found.calibration if each.count and each.precision is not None] if found else []
        if found is None or not bins:
            continue
        steps = tuple(each.confidence or 0.0 for each in bins)
        values = tuple(each.precision or 0.0 for each in bins)
        own.append((looks[row.entry], Curve(steps=steps, mean=values, low=values, high=values)))
        error = found.calibration_error
        cells.append((row.entry, ("-" if error is None else f"{error:.3f}", number(sum(each.count for each in bins)))))
    if not own:
        return None
    label = "Share of right detections by score. Calibration error: "
    label += ", ".join(f"{name} {texts[0]}" for name, texts in cells)
    table = Table(("row", "calibration error", "detections"), tuple(cells))
    picture = lines(own, label, dots=True, diagonal=True)
    title = "Score and precision: on the straight line, of ten detections with a score of 0.7 seven are right"
    return Figure(title, picture, table, tuple(look for look, _ in own), "score", "right detections")
