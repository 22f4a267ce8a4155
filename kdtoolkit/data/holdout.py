"""Holds images out of a data set that comes in one part, as tools export it: the same ones each time."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from kdtoolkit.data.records import ALL, OPENED, Choose, Form, Progress, Reading, everything
from kdtoolkit.errors import KDError

SHARE = 0.2


def with_val(form: Form) -> Form:
    """The form, whose data sets of one part have the splits train and val: a fifth of the images is val.

    The split ALL still reads all of them.
    """

    def is_one_part(place: Path, found: list[str]) -> bool:
        if ALL not in found:
            return False
        if clash := [split for split in found if split in OPENED]:
            raise KDError(
                f"{place} has the split {clash[0]}, and images of no split beside it; give those a split in the tool "
                "that exports them, or move their labels to a different folder"
            )
        return True

    def splits(place: Path) -> list[str]:
        found = form.splits(place)
        return [*OPENED, *(split for split in found if split != ALL)] if is_one_part(place, found) else found

    def read(place: Path, split: str, progress: Progress, choose: Choose = everything) -> Reading:
        if split not in OPENED or split in (found := form.splits(place)) or not is_one_part(place, found):
            return form.read(place, split, progress, choose)
        reading = form.read(place, ALL, progress, held_out if split == "val" else left)
        reading.held_out = "a fifth of the images, held out by their names, as the data come in one part"
        if split == "val":
            reading.remarks.append(
                f"these are {reading.held_out}. If images resemble each other, such as frames of a video, scores on "
                "them are too good: make a val of your own then"
            )
        return reading

    return replace(form, splits=splits, read=read)


def held_out(names: Sequence[str]) -> Collection[str]:
    """A fifth of the images, at least one, chosen by digests of their names.

    Copies of one image that Roboflow made (a.jpg.rf.1.jpg, a.jpg.rf.2.jpg) stay together, so a few more may be chosen.
    An image that is added later changes little. Raises KDError if there is only one image.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split(".rf.")[0], []).append(name)
    if len(groups) < 2:
        raise KDError(
            f"the data come in one part of {len(names)} images, of which none can be held out for val; add images, or "
            "name the split all"
        )
    chosen: list[str] = []
    order = sorted(groups, key=lambda group: hashlib.sha256(group.encode("utf-8", "surrogatepass")).digest())
    for group in order[:-1]:
        if chosen and len(chosen) >= round(SHARE * len(names)):
            break
        chosen += groups[group]
    return set(chosen)


def left(names: Sequence[str]) -> Collection[str]:
    """The other images."""
    return set(names) - set(held_out(names))
