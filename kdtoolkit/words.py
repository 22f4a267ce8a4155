"""Numbers in words."""

from __future__ import annotations

import re

_UNITS = {"h": 3600.0, "m": 60.0, "min": 60.0, "s": 1.0}
_SPAN = re.compile(r"(?:\d+(?:\.\d+)?\s*(?:h|min|m|s)\s*)+")


def counted(count: int, noun: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def duration(seconds: float) -> str:
    """A time in words, rounded for a reader: `45 s`, `2.5 min`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 570:
        return f"{seconds / 60:.1f} min"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def size(count: int) -> str:
    """A number of bytes in words: `312 kB`, `4.5 MB`, `2.0 GB`."""
    if count < 1e6:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def seconds_of(text: str) -> float:
    """The seconds of a time such as `4h`, `90m`, `1h30m` or `45s`. Raises ValueError if it is none, or 0."""
    if not _SPAN.fullmatch(text.strip()):
        raise ValueError(f"{text!r} is no time: write it as 4h, 90m, 1h30m or 45s")
    found = sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"(\d+(?:\.\d+)?)\s*(h|min|m|s)", text))
    if found <= 0:
        raise ValueError(f"{text!r} is no time at all: it must be above 0")
    return found
