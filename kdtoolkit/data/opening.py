"""Opens a data set in COCO's, YOLO's or VOC's format. The files in the folder show which format it is.

`layouts.py` has the table of what tools export.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from kdtoolkit.data import coco, voc, yolo
from kdtoolkit.data.holdout import with_val
from kdtoolkit.data.layouts import LAYOUTS, folder_of
from kdtoolkit.data.photos import MEMORY_BYTES, PhotoDataset
from kdtoolkit.data.records import Form, Progress, Reading, is_spare, telling_what_is_unreadable
from kdtoolkit.errors import KDError

FORMS = tuple(with_val(form) for form in (coco.FORM, yolo.FORM, voc.FORM))
SEEN = 8  # names of files in an error


@telling_what_is_unreadable()
def locate(path: str | Path) -> tuple[Form, Path]:
    """The format of a data set, and the place to read it from.

    Raises KDError if it has no known format or several, or cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise KDError(f"there is no file or folder {path}")
    found = _forms_of(path)
    if len(found) == 1:
        return found[0]
    if found:
        kinds = ", ".join(form.name for form, _ in found)
        raise KDError(
            f"{path} holds data of several formats: {kinds}. Name the one you mean: its folder of annotations, its "
            "YAML file, or a JSON file"
        )
    raise KDError(f"{path} is no data set that is known{_advice(path)}")


def name_of(path: Path) -> str:
    """What a data set is called: the name of its folder. Raises KDError as `locate` does."""
    _, place = locate(path.absolute())
    return folder_of(place).name


def class_names_of(path: Path) -> tuple[str, ...]:
    """The classes of a data set in the order of their labels. Raises KDError if it cannot be read."""
    return tuple(category.name for category in _some_split(path).categories)


def splits_of(path: Path) -> list[str]:
    """The splits that a data set has. Raises KDError if it cannot be read."""
    form, place = locate(path)
    return form.splits(place)


def categories_of(path: Path) -> dict[int, str] | None:
    """The classes of a data set by their ids; None if its format has no ids. Raises KDError if it cannot be read."""
    reading = _some_split(path)
    return {category.id: category.name for category in reading.categories} if reading.has_ids else None


def _some_split(path: Path) -> Reading:
    form, place = locate(path)
    splits = form.splits(place)
    return form.read(place, "val" if "val" in splits else splits[0], _no_progress)


def open_dataset(
    path: str | Path,
    split: str,
    *,
    max_size: int | None = None,
    class_names: Sequence[str] | None = None,
    on_bad: Literal["error", "skip"] = "error",
    memory_bytes: int = MEMORY_BYTES,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> PhotoDataset:
    """Open a split ("train", "val", "test") of a data set in COCO's, Ultralytics YOLO's or Pascal VOC's format.

    Exports of Roboflow, CVAT and Label Studio in these formats are read as they are.

    Args:
        path: the folder of the data set, a YOLO YAML file, a COCO JSON file, or a folder of annotations.
        split: which part. If the data come in one part, a fifth of the images is "val", the others are "train", and
            "all" is all of them.
        max_size: images with a longer side are scaled down to it, antialiased. No image is enlarged.
        class_names: use only these classes, labelled in this order.
        on_bad: `skip` leaves bad images and annotations out, and lists them in one warning.
        memory_bytes: `in_memory` keeps the decoded images in memory if they take at most this.
        cache: a folder. `in_memory` keeps the decoded images there instead, for all processes and later runs.
        progress: called with the number of images checked so far and the number of all images.

    Raises KDError that lists the first faults of the data and their number, or says what was looked for.
    """
    form, place = locate(path)
    return PhotoDataset(
        form.read(place, split, progress or _no_progress),
        max_size=max_size,
        class_names=class_names,
        on_bad=on_bad,
        memory_bytes=memory_bytes,
        cache=cache,
    )


def open_all(path: Path, without: Collection[str] = ()) -> dict[str, PhotoDataset]:
    """All splits of a data set but some, without their bad entries.

    A split that training does not open is left out if it cannot be read. Raises KDError as `open_dataset` does.
    """
    splits = splits_of(path)
    found: dict[str, PhotoDataset] = {}
    for split in splits:
        if split not in without:
            try:
                found[split] = open_dataset(path, split, on_bad="skip")
            except KDError:
                if not is_spare(split, splits):
                    raise
    return found


class CocoDetection(PhotoDataset):
    """A split of a folder in COCO's format; it takes the arguments of `open_dataset`, which opens it as well."""

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        max_size: int | None = None,
        class_names: Sequence[str] | None = None,
        on_bad: Literal["error", "skip"] = "error",
        memory_bytes: int = MEMORY_BYTES,
        cache: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(
            coco.read(Path(root), split, progress or _no_progress),
            max_size=max_size,
            class_names=class_names,
            on_bad=on_bad,
            memory_bytes=memory_bytes,
            cache=cache,
        )


def _forms_of(path: Path) -> list[tuple[Form, Path]]:
    return [(form, place) for form in FORMS if (place := form.locate(path)) is not None]


def _advice(path: Path) -> str:
    """What lies at a path that holds no data set, and what to name instead."""
    looked_for = f"Looked for {', '.join(map(str, LAYOUTS))}"
    if path.is_file():
        return ": unpack it, and name the folder" if path.suffix in (".zip", ".tar", ".gz") else f". {looked_for}"
    found = sorted(path.iterdir())
    if inside := [each for each in found if each.is_dir() and _is_one(each)]:
        return f", but {inside[0]} is one: name that"
    names = [each.name + "/" * each.is_dir() for each in found]
    seen = ", ".join(names[:SEEN]) + (f" and {len(names) - SEEN} more" if len(names) > SEEN else "")
    files = [each for each in found if each.suffix.lower() == ".json"]
    hint = f". If {files[0].name} is in COCO's format, name it: {files[0]}" if files else ""
    return f"; it holds {seen or 'nothing'}{hint}. {looked_for}"


def _is_one(path: Path) -> bool:
    """Whether a folder holds data; no if it cannot be looked into."""
    try:
        return bool(_forms_of(path))
    except (OSError, KDError):
        return False


def _no_progress(done: int, total: int) -> None:
    """Nothing to tell."""
