"""The pictures of the page, from numbers to SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from kdtoolkit.benchmark.details import Curve
from kdtoolkit.benchmark.report.svg import (
    Look,
    Scale,
    add,
    axes,
    mark,
    markup,
    number,
    path,
    percent,
    picture,
    stretched,
)

HEIGHT = 250  # of a chart in pixels
TRACK = 26  # of a row in a table
NAME = 40  # characters of a row's name in a picture; its title has all


@dataclass(frozen=True)
class Point:
    """A row in a scatter picture. `half`: half of the bar that shows the spread of `y`."""

    look: Look
    x: float
    y: float
    half: float | None = None


def scatter(points: Sequence[Point], label: str, x_text: Callable[[float], str] = number, unit: str = "") -> Markup:
    """Rows by what they cost (to the right) and their AP (upwards)."""
    xs = [point.x for point in points]
    log = min(xs) > 0 and max(xs) > 4 * min(xs)
    x = Scale.over(xs, log=log, margin=0.08)
    y = Scale.over((point.y + sign * (point.half or 0) for point in points for sign in (-1, 1)), margin=0.1)
    own = picture(HEIGHT, label)
    axes(own, x, y, x_text=x_text)
    for point in points:
        if point.half:
            place = percent(x(point.x))
            ends = {"y1": percent(100 - y(point.y - point.half)), "y2": percent(100 - y(point.y + point.half))}
            add(own, "line", x1=place, x2=place, **ends, class_=f"line {point.look.colour}", data_row=point.look.row)
    for point in points:
        spread = f" ± {point.half:.1f}" if point.half else ""
        title = f"{point.look.row}: {point.y:.1f}{spread} AP, {x_text(point.x)}{unit}"
        mark(own, x(point.x), 100 - y(point.y), point.look, title)
    return markup(own)


def lines(
    curves: Sequence[tuple[Look, Curve]],
    label: str,
    *,
    log: bool = False,
    dots: bool = False,
    zero: bool = False,
    x_text: Callable[[float], str] = number,
    y_text: Callable[[float], str] = number,
    diagonal: bool = False,
) -> Markup:
    """Curves with a band from the smallest to the largest seed.

    `log`: whether numbers are on a logarithmic scale. `dots`: whether points have marks. `zero`: whether
    0 is shown, with a strong line. `diagonal`: whether both axes
    go from 0 to 1, with a line where they are equal.
    """
    y = _height_of([curve for _, curve in curves], log, zero)
    x = Scale.over((step for _, curve in curves for step in curve.steps), margin=0.01)
    if diagonal:
        x = y = Scale(0.0, 1.0)
    own = picture(HEIGHT, label)
    axes(own, x, y, x_text=x_text, y_text=y_text)
    if zero:
        place = percent(100 - y(0.0))
        add(own, "line", x1="0", x2="100%", y1=place, y2=place, class_="zero")
    layer = stretched(own)
    if diagonal:
        add(layer, "path", d=path([(0, 0), (100, 100)]), class_="grid")
    for look, curve in curves:
        if curve.low != curve.high:
            outline = [
                *zip(curve.steps, curve.high, strict=True),
                *reversed([*zip(curve.steps, curve.low, strict=True)]),
            ]
            points = [(x(step), _within(y(value))) for step, value in outline]
            add(layer, "path", d=path(points) + "Z", class_=f"band {look.colour}", data_row=look.row)
    for look, curve in curves:
        points = [(x(step), _within(y(value))) for step, value in zip(curve.steps, curve.mean, strict=True)]
        drawn = add(layer, "path", d=path(points), class_=f"line {look.colour} {look.dash}", data_row=look.row)
        add(drawn, "title", look.row)
    for look, curve in curves if dots else ():
        for step, value in zip(curve.steps, curve.mean, strict=True):
            mark(own, x(step), 100 - y(value), look, f"{look.row}: {y_text(value)} at {x_text(step)}")
    return markup(own)


def spans_decades(curves: Sequence[Curve]) -> bool:
    """Whether curves need a logarithmic scale: all are above 0, and the highest number is 12 times the lowest."""
    means = [value for curve in curves for value in curve.mean]
    lows = [value for curve in curves for value in curve.low]
    return bool(lows) and min(lows) > 0 and max(means) > 12 * min(means)


def _height_of(curves: Sequence[Curve], log: bool, zero: bool) -> Scale:
    means = [value for curve in curves for value in curve.mean]
    ends = [value for curve in curves for value in (*curve.low, *curve.high)]
    if log:
        return Scale.over([*means, *ends], log=True)
    reach = 0.6 * (max(means) - min(means))  # one wild seed does not flatten the rest
    near = [value for value in ends if min(means) - reach <= value <= max(means) + reach]
    return Scale.over([*means, *near], zero=zero)


def _within(place: float) -> float:
    return min(max(place, 0.0), 100.0)


@dataclass(frozen=True)
class Interval:
    """A number with an interval, in one line of a table. Without an interval `low` and `high` are None."""

    look: Look
    value: float
    low: float | None = None
    high: float | None = None
    hollow: bool = False


def track(items: Sequence[Interval], scale: Scale, *, zero: bool = False, text: str = "") -> Markup:
    """Numbers on a line, for one row of a table. `zero`: whether 0 has a strong line. `text`: the numbers in words."""
    own = picture(TRACK, text, "track")
    if not text:
        del own.attrib["role"], own.attrib["aria-label"]
        own.set("aria-hidden", "true")
    for tick in scale.ticks(5):
        place = percent(scale(tick))
        add(own, "line", x1=place, x2=place, y1="0", y2="100%", class_="grid")
    if zero:
        place = percent(scale(0.0))
        add(own, "line", x1=place, x2=place, y1="0", y2="100%", class_="zero")
    for item in items:
        if item.low is not None and item.high is not None:
            ends = {"x1": percent(_within(scale(item.low))), "x2": percent(_within(scale(item.high)))}
            add(own, "line", **ends, y1="50%", y2="50%", class_=f"bar {item.look.colour}", data_row=item.look.row)
    for item in items:
        if math.isfinite(item.value):
            mark(own, scale(item.value), 50, item.look, f"{item.look.row}: {item.value:.1f}", hollow=item.hollow)
    return markup(own)


def ruler(scale: Scale, *, signed: bool = False) -> Markup:
    """The numbers above a column of tracks."""
    own = picture(16, "", "track ruler")
    del own.attrib["role"], own.attrib["aria-label"]
    own.set("aria-hidden", "true")
    for tick in scale.ticks(5):
        text = f"{tick:+.3g}" if signed and tick else number(tick)
        add(own, "text", text, x=percent(scale(tick)), y=12, class_="tick middle")
    return markup(own)


def critical_difference(
    ranks: Mapping[str, float], groups: Sequence[Sequence[str]], distance: float | None, looks: Mapping[str, Look]
) -> Markup:
    """Mean ranks on an axis, best at the left. A thick bar joins rows that cannot be told apart (Demsar 2006).

    `distance`: how far two mean ranks must lie apart; None if it is not known.
    """
    order = sorted(ranks, key=lambda row: ranks[row])
    scale = Scale(0.5, len(order) + 0.5)
    top, bar, line = 46, 12, 26
    height = top + bar * len(groups) + line * len(order) + 8
    label = "Mean ranks, best first: " + ", ".join(f"{row} {ranks[row]:.2f}" for row in order)
    own = picture(height, label, "plot ranks")
    for rank in range(1, len(order) + 1):
        place = percent(scale(rank))
        add(own, "text", str(rank), x=place, y=top - 12, class_="tick middle")
        add(own, "line", x1=place, x2=place, y1=top - 6, y2=top, class_="axis")
    add(own, "line", x1=percent(scale(1)), x2=percent(scale(len(order))), y1=top, y2=top, class_="axis")
    if distance is not None and distance < len(order):
        ends = {"x1": percent(scale(1)), "x2": percent(scale(1 + distance))}
        add(own, "line", **ends, y1=14, y2=14, class_="zero")
        add(own, "text", f"critical difference {distance:.2f}", x=percent(scale(1)), y=9, class_="tick")
    for place_, group in enumerate(groups):
        y = top + bar * (place_ + 1) - 2
        ends = {f"x{end}": percent(scale(pick(ranks[row] for row in group))) for end, pick in ((1, min), (2, max))}
        add(own, "line", **ends, y1=y, y2=y, class_="group")
    for place_, row in enumerate(order):
        y = top + bar * len(groups) + line * (place_ + 1) - 4
        x = scale(ranks[row])
        add(own, "line", x1=percent(x), x2=percent(x), y1=top, y2=y, class_="stem", data_row=row)
        mark(own, x, 100 * y / height, looks[row], f"{row}: mean rank {ranks[row]:.2f}")
        right = x < 60
        add(
            own,
            "text",
            f"{row if len(row) <= NAME else row[: NAME - 1] + '…'}  {ranks[row]:.2f}",
            x=percent(x),
            dx=12 if right else -12,
            y=y,
            dy="0.35em",
            class_=f"name {'' if right else 'end'}",
            data_row=row,
        )
    return markup(own)
