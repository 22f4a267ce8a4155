"""SVG elements that are built as a tree, so that every text is escaped.

Places are percent of the picture's width and height, and sizes of text and marks are pixels. So a picture fills the
width of its column, and its text can be read on a phone too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, tostring

from markupsafe import Markup

MARKS = {
    "circle": "M-4.5,0a4.5,4.5 0 1 0 9,0a4.5,4.5 0 1 0 -9,0Z",
    "triangle": "M0,-5.4L5.2,4.2H-5.2Z",
    "square": "M-4.1,-4.1H4.1V4.1H-4.1Z",
    "diamond": "M0,-6L6,0L0,6L-6,0Z",
    "down": "M0,5.4L5.2,-4.2H-5.2Z",
    "plus": "M-1.7,-5.2H1.7V-1.7H5.2V1.7H1.7V5.2H-1.7V1.7H-5.2V-1.7H-1.7Z",
    "bar": "M-1.9,-6H1.9V6H-1.9Z",
}


def add(parent: Element, tag: str, text: str = "", **attributes: str | float) -> Element:
    """Add an element. `attributes`: `_` stands for `-`, and `class_` for `class`; numbers are rounded."""
    own = SubElement(parent, tag, {_name(name): _value(value) for name, value in attributes.items()})
    own.text = text or None
    return own


def _name(name: str) -> str:
    return name.rstrip("_").replace("_", "-")


def _value(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


def percent(value: float) -> str:
    """`12.34%`."""
    return f"{value:.2f}%"


def picture(height: int, label: str, class_: str = "plot") -> Element:
    """A picture that fills the width of its column. `label`: what it shows, for readers who do not see it."""
    return Element("svg", {"class": class_, "height": str(height), "width": "100%", "role": "img", "aria-label": label})


def markup(element: Element) -> Markup:
    """The element as text for a page."""
    return Markup(tostring(element, encoding="unicode"))


def mark(parent: Element, x: float, y: float, look: Look, title: str = "", *, hollow: bool = False) -> None:
    """Add a row's mark at a place in percent. `title`: what a pointer over it shows."""
    place = add(parent, "svg", x=percent(x), y=percent(y), overflow="visible", data_row=look.row)
    shape = add(place, "path", d=MARKS[look.mark], class_=f"mark {look.colour}{' hollow' if hollow else ''}")
    if title:
        add(shape, "title", title)


@dataclass(frozen=True)
class Look:
    """How a row is drawn. `colour`, `dash`: classes of the page's style. `mark`: a name in `MARKS`."""

    row: str
    colour: str
    mark: str
    dash: str

    @property
    def swatch(self) -> Markup:
        """A short line with the row's mark, for legends."""
        own = Element("svg", {"class": "swatch", "width": "26", "height": "14", "aria-hidden": "true"})
        add(own, "line", x1=0, x2=26, y1=7, y2=7, class_=f"line {self.colour} {self.dash}")
        add(own, "path", d=MARKS[self.mark], class_=f"mark {self.colour}", transform="translate(13 7)")
        return markup(own)


@dataclass(frozen=True)
class Scale:
    """From numbers to places in percent: `low` is at 0, `high` at 100."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def over(cls, values: Iterable[float], *, log: bool = False, margin: float = 0.06, zero: bool = False) -> Scale:
        """The scale of some numbers, with a margin on both sides. `zero`: the scale contains 0."""
        found = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
        if zero:
            found.append(0.0)
        low, high = (min(found), max(found)) if found else (1.0, 2.0)
        if log:
            low, high = math.log10(low), math.log10(high)
        if high - low < 1e-9:
            spare = 0.15 if log else max(abs(high) * 0.1, 0.5)
            low, high = low - spare, high + spare
        low, high = low - margin * (high - low), high + margin * (high - low)
        return cls(10**low, 10**high, True) if log else cls(low, high)

    def __call__(self, value: float) -> float:
        """The place of a number in percent."""
        if not self.log:
            return 100 * (value - self.low) / (self.high - self.low)
        if value <= 0:
            return 0.0
        low, high = math.log10(self.low), math.log10(self.high)
        return 100 * (math.log10(value) - low) / (high - low)

    def ticks(self, count: int = 6) -> list[float]:
        """Round numbers within the scale, at most about `count`."""
        if self.log:
            tens = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits, every in (((1, 2, 5), 1), ((1, 3), 1), ((1,), 1), ((1,), 2), ((1,), 3), ((1,), 5)):
                found = [digit * 10.0**ten for ten in tens if ten % every == 0 for digit in digits]
                found = [value for value in found if self.low <= value <= self.high]
                if len(found) <= count + 1:
                    break
            if len(found) >= 2:
                return found
        power = 10.0 ** math.floor(math.log10((self.high - self.low) / count))
        steps = (factor * power for factor in (1, 2, 5, 10, 20))
        step = next(step for step in steps if self.high // step - math.ceil(self.low / step) < count)
        first = math.ceil(self.low / step - 1e-9)
        found = [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [value for value in found if value > 0] if self.log else found


def number(value: float) -> str:
    """A number at a tick: `0.05`, `12`, `1,500`, `3.3 M`."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g} M"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def axes(
    own: Element,
    x: Scale,
    y: Scale,
    *,
    x_text: Callable[[float], str] = number,
    y_text: Callable[[float], str] = number,
) -> None:
    """Add grid lines with numbers: at the left and below, outside of the picture's own area."""
    for tick in y.ticks():
        place = percent(100 - y(tick))
        add(own, "line", x1="0", x2="100%", y1=place, y2=place, class_="grid")
        add(own, "text", y_text(tick), x=-8, y=place, dy="0.32em", class_="tick end")
    for tick in x.ticks():
        place = percent(x(tick))
        add(own, "line", x1=place, x2=place, y1="100%", y2="100%", class_="grid")
        add(own, "text", x_text(tick), x=place, y="100%", dy="1.5em", class_="tick middle")
    add(own, "line", x1="0", x2="100%", y1="100%", y2="100%", class_="axis")


def path(points: Sequence[tuple[float, float]]) -> str:
    """Points in percent as a path within a `stretched` picture of 1000 by 1000 units."""
    return "M" + "L".join(f"{10 * x:.0f},{1000 - 10 * y:.0f}" for x, y in points)


def stretched(own: Element) -> Element:
    """A layer of 1000 by 1000 units that fills the picture, for lines: points in percent are no part of SVG."""
    return add(own, "svg", viewBox="0 0 1000 1000", preserveAspectRatio="none", width="100%", height="100%")
