"""`kd data check`: every fault of a data set, what training does with it, statistics, and what is worth a warning."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdtoolkit.data.opening import locate
from kdtoolkit.data.photos import SCORED_DETECTIONS
from kdtoolkit.data.pictures import check_whole
from kdtoolkit.data.records import OPENED, Fault, Photo, Progress, Reading, is_spare, naming
from kdtoolkit.errors import KDError, printable
from kdtoolkit.words import counted

SMALL, MEDIUM = 32**2, 96**2  # square pixels: the bounds of COCO's sizes
NAMED = 3  # examples in a warning


@dataclass(frozen=True)
class SplitReport:
    """What a split holds. `error` says why it cannot be read at all; then there is nothing else.

    `boxes` are targets of training, `crowds` are not. `sides` are the 10 %, 50 % and 90 % quantile of the square roots
    of the boxes' areas, in pixels. `boxes_an_image` are the median and the maximum.
    """

    source: str
    error: str = ""
    images: int = 0
    images_without_boxes: int = 0
    image_sizes: tuple[str, str] = ("", "")
    boxes: int = 0
    crowds: int = 0
    per_class: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    sides: tuple[float, ...] = ()
    boxes_an_image: tuple[float, int] = (0, 0)
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True)
class Report:
    """What `check` found: the format and each split.

    `refusals` are sentences about why training refuses the set, apart from faults of single files; `warnings` about
    what may go wrong in training.
    """

    path: str
    format: str
    splits: dict[str, SplitReport]
    refusals: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def is_good(self) -> bool:
        """Whether training takes the data as they are. Splits that it does not open do not count."""
        return not self.refusals and not any(
            split.faults or split.error for name, split in self.splits.items() if not is_spare(name, self.splits)
        )

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values; `loses` says what --skip-bad leaves out for a fault."""
        found = asdict(self) | {"is_good": self.is_good}
        for split in found["splits"].values():
            split["faults"] = [{**fault, "file": str(fault["file"])} for fault in split["faults"]]
        return found


def check(path: Path, *, image_size: int, stride: int, queries: int, progress: Progress) -> Report:
    """Read all splits, decode all images, and report.

    `image_size`: the longer side that images are scaled to in training; `stride`: the finest of the detector;
    `queries`: how many objects a DETR-like detector finds in an image. Raises KDError if the path holds no data set,
    or none of its splits.
    """
    form, place = locate(path)
    splits: dict[str, SplitReport] = {}
    readings: dict[str, Reading] = {}
    for split in form.splits(place):
        try:
            reading = form.read(place, split, progress)
        except KDError as error:
            splits[split] = SplitReport(str(place), error=str(error))
            continue
        _decode(reading, progress)
        readings[split] = reading
        splits[split] = _summary(reading)
    refused = list(_refusals(readings))
    warnings = [
        *_of_splits(splits),
        *(f"{split}, which training does not open: {text}" for split, text in refused if is_spare(split, splits)),
        *_of_classes(readings),
        *(
            each
            for split, reading in readings.items()
            for each in _of_boxes(split, reading, image_size, stride, queries)
        ),
        *_of_duplicates(readings),
        *(f"{split}: {remark}" for split, reading in readings.items() for remark in reading.remarks),
    ]
    refusals = tuple(text for split, text in refused if not is_spare(split, splits))
    return Report(str(path), form.name, splits, refusals, tuple(warnings))


def print_report(report: Report, console: Console) -> None:
    """Print a report for people."""

    def line(text: str, style: str = "") -> None:
        console.print(Text(printable(text), style), soft_wrap=True)

    line(f"{report.path}: {report.format}")
    readable = {name: split for name, split in report.splits.items() if not split.error}
    if readable:
        console.print(_table_of_splits(readable))
        console.print(_table_of_classes(readable))
    for warning in report.warnings:
        line(f"warning: {warning}", "yellow")
    decisive = {name: split for name, split in report.splits.items() if not is_spare(name, report.splits)}
    for name, split in report.splits.items():
        if split.error and name in decisive:
            line(f"{name}: cannot be read: {split.error}", "red")
        for fault in split.faults:
            line(f"{name}: {fault.text}", "red" if name in decisive else "yellow")
    for refusal in report.refusals:
        line(f"training refuses this: {refusal}", "red")
    lost = Counter(fault.loses for split in decisive.values() for fault in split.faults)
    if lost:
        line(
            f"{lost.total()} faults. Training stops at them; with --skip-bad it leaves out {lost['image']} images with "
            f"their boxes, and {lost['box']} single boxes.",
            "bold red",
        )
    elif report.is_good:
        spoilt = [name for name, split in report.splits.items() if split.error or split.faults]
        line(f"No faults but those of {', '.join(spoilt)}." if spoilt else "No faults.", "green")


def _decode(reading: Reading, progress: Progress) -> None:
    """Decode all images, and make faults of those that cannot be."""
    good = []
    for done, photo in enumerate(reading.photos, 1):
        with reading.noting(photo.path, "image"), naming(photo.title):
            check_whole(photo.path)
            good.append(photo)
        progress(done, len(reading.photos))
    reading.photos = good


def _summary(reading: Reading) -> SplitReport:
    photos = reading.photos
    targets = [box for photo in photos for box in photo.boxes if not box.crowd]
    per_class = Counter(box.label for box in targets)
    sizes = Counter("small" if b.area < SMALL else "medium" if b.area < MEDIUM else "large" for b in targets)
    sides = sorted((box.xywh[2] * box.xywh[3]) ** 0.5 for box in targets)
    counts = [len(photo.boxes) for photo in photos]
    by_size = sorted(photos, key=lambda photo: photo.width * photo.height)
    return SplitReport(
        source=str(reading.source),
        images=len(photos),
        images_without_boxes=sum(not count for count in counts),
        image_sizes=(_size(by_size[0]), _size(by_size[-1])) if photos else ("", ""),
        boxes=len(targets),
        crowds=sum(counts) - len(targets),
        per_class={category.name: per_class[label] for label, category in enumerate(reading.categories)},
        sizes={name: sizes[name] for name in ("small", "medium", "large")},
        sides=tuple(round(sides[int(share * (len(sides) - 1))], 1) for share in (0.1, 0.5, 0.9)) if sides else (),
        boxes_an_image=(median(counts), max(counts)) if counts else (0, 0),
        faults=tuple(reading.faults),
    )


def _size(photo: Photo) -> str:
    return f"{photo.width}x{photo.height}"


def _of_splits(splits: dict[str, SplitReport]) -> Iterator[str]:
    for needed in OPENED:
        if needed not in splits:
            yield f"there is no split {needed}; `kd benchmark run` needs train and val"
    for name, split in splits.items():
        if is_spare(name, splits) and split.error:
            yield f"{name}, which training does not open, cannot be read: {split.error}"
        if is_spare(name, splits) and split.faults:
            yield f"{name}, which training does not open, has {counted(len(split.faults), 'fault')}"


def _refusals(readings: dict[str, Reading]) -> Iterator[tuple[str, str]]:
    """Splits that cannot be used, and why."""
    names = {split: _class_names(reading) for split, reading in readings.items()}
    first = next(iter(names), "")
    for split, reading in readings.items():
        if names[split] != names[first]:
            yield (
                split,
                f"the classes of {first} and {split} differ: {', '.join(names[first])}; {', '.join(names[split])}. "
                "Give all splits the same ones, in the same order",
            )
        if all(box.crowd for photo in reading.photos for box in photo.boxes):
            yield (
                split,
                f"{split} has no usable box, so nothing can be trained or scored on it. Add boxes, or move images with "
                "boxes into it",
            )


def _class_names(reading: Reading) -> list[str]:
    return [category.name for category in reading.categories]


def _of_classes(readings: dict[str, Reading]) -> Iterator[str]:
    for split, reading in readings.items():
        there = {box.label for photo in reading.photos for box in photo.boxes if not box.crowd}
        if missing := [name for label, name in enumerate(_class_names(reading)) if label not in there]:
            what = "cannot be learnt" if split == "train" else "gets no AP"
            yield f"{split}: no box of {', '.join(missing)}: what has no box {what}"


def _of_boxes(split: str, reading: Reading, image_size: int, stride: int, queries: int) -> Iterator[str]:
    photos = reading.photos
    for limit, who in ((SCORED_DETECTIONS, "COCO scores at most"), (queries, "a detector with queries finds at most")):
        if full := sorted((p for p in photos if len(p.boxes) > limit), key=lambda p: -len(p.boxes)):
            yield (
                f"{split}: {len(full)} images have more than {limit} boxes (up to {len(full[0].boxes)}, in {full[0]}), "
                f"and {who} {limit} objects an image: cut them into tiles"
            )
    tiny = total = 0
    for photo in photos:
        scale = min(1, image_size / max(photo.width, photo.height))
        total += len(photo.boxes)
        tiny += sum(min(box.xywh[2:]) * scale < stride for box in photo.boxes)
    if tiny:
        yield (
            f"{split}: {tiny} of {total} boxes have a side below {stride} px, the detector's finest stride, in images "
            f"of at most {image_size} px: train on larger images, or on tiles"
        )
    repeated = [photo for photo in photos if len({(b.label, b.xywh) for b in photo.boxes}) < len(photo.boxes)]
    if repeated:
        yield f"{split}: {len(repeated)} images have the same box twice ({_examples(map(str, repeated))})"
    if reading.cut:
        yield f"{split}: {reading.cut} boxes reach up to 1 px beyond their image, and are cut at its edge"
    for what, count in reading.unread.items():
        if count:
            yield f"{split}: {count} {what} are not used"


def _of_duplicates(readings: dict[str, Reading]) -> Iterator[str]:
    """Images of equal bytes, by what is wrong with that."""
    places: dict[str, list[tuple[str, str]]] = {}
    for split, reading in readings.items():
        for photo in reading.photos:
            with photo.path.open("rb") as file:
                places.setdefault(hashlib.file_digest(file, "sha256").hexdigest(), []).append((split, photo.name))
    several = [found for found in places.values() if len({split for split, _ in found}) > 1]
    if several:
        pairs = (" = ".join(f"{split}: {name}" for split, name in found) for found in several)
        yield f"{len(several)} images are in several splits ({_examples(pairs)}): scores on them are too good"
    twice = [found for found in places.values() if len({split for split, _ in found}) < len(found)]
    if twice:
        pairs = (" = ".join(f"{split}: {name}" for split, name in found) for found in twice)
        yield f"{len(twice)} images are there twice in a split ({_examples(pairs)})"


def _examples(found: Iterator[str]) -> str:
    listed = list(found)
    return "; ".join(listed[:NAMED]) + (f"; and {len(listed) - NAMED} more" if len(listed) > NAMED else "")


def _table_of_splits(splits: dict[str, SplitReport]) -> Table:
    rows: dict[str, Callable[[SplitReport], str]] = {
        "images": lambda split: str(split.images),
        "without boxes": lambda split: str(split.images_without_boxes),
        "sizes of images": lambda split: " to ".join(dict.fromkeys(split.image_sizes)),
        "boxes": lambda split: str(split.boxes),
        "crowds, difficult": lambda split: str(split.crowds),
        "small, medium, large": lambda split: ", ".join(map(str, split.sizes.values())),
        "side: 10, 50, 90 %": lambda split: ", ".join(f"{side:g}" for side in split.sides),
        "boxes an image: median, most": lambda split: ", ".join(f"{count:g}" for count in split.boxes_an_image),
    }
    table = Table(box=None, pad_edge=False)
    for head in ("", *splits):
        table.add_column(head, justify="right" if head else "left")
    for name, fact in rows.items():
        table.add_row(name, *(fact(split) for split in splits.values()))
    return table


def _table_of_classes(splits: dict[str, SplitReport]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("boxes of class", overflow="fold")
    for split in splits:
        table.add_column(split, justify="right")
    for name in dict.fromkeys(name for split in splits.values() for name in split.per_class):
        table.add_row(Text(name), *(str(split.per_class.get(name, "")) for split in splits.values()))
    return table
