"""How tools lay out what they export: one table, by which the readers find labels and images.

YOLO's files name their images themselves, so `yolo.py` alone knows what stands in them.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from kdtoolkit.data.pictures import PictureError
from kdtoolkit.data.records import ALL, ENDINGS, SPLITS, Files, shown
from kdtoolkit.errors import KDError
from kdtoolkit.files import walk_visible

# What tools call a split, perhaps with a year behind it, as in train2017. CVAT calls images of no split `default`.
NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
NAMES |= {"testing": "test", "default": ALL}


@dataclass(frozen=True)
class Part:
    """Where the images of one split lie, and their labels.

    `labels`: a file, or the folder of all label files. `images`: folders, in the order in which they are looked into.
    `is_export`: whether a tool chose the names of the images, so that they need not be paths in these folders.
    """

    labels: Path
    images: tuple[Path, ...]
    is_export: bool


@dataclass(frozen=True)
class Layout:
    """One way to lay out a data set.

    `form`: its format, as in `Form.name`. `tools`: who writes it. `labels`: its files of labels, relative to the data
    set's folder; {} stands for the name of the split, without which there is one part of no split. `images`: the
    folders of the images. `is_export`: as in `Part`.
    """

    form: str
    tools: str
    labels: str
    images: tuple[str, ...] = ()
    is_export: bool = True

    def __str__(self) -> str:
        return f"{self.labels.format('train')} ({self.tools})"

    def parts(self, root: Path) -> dict[str, Part]:
        """The parts of a data set that lies in `root`, by split; empty if it is laid out in a different way.

        Raises KDError if two parts are of one split.
        """
        found: dict[str, Part] = {}
        for name, split in self._names(root):
            labels = next(root.glob(self.labels.format(name)), None)
            folders = tuple(root / folder.format(name) for folder in self.images)
            if labels is None or (not name and not any(folder.is_dir() for folder in folders)):
                continue
            part = Part(labels.parent if "*" in self.labels else labels, folders, self.is_export)
            if (other := found.setdefault(split, part)) != part:
                raise KDError(
                    f"{root} has two parts that are {split}, {other.labels.relative_to(root)} and "
                    f"{part.labels.relative_to(root)}; move one of them to a different folder"
                )
        return found

    def _names(self, root: Path) -> list[tuple[str, str]]:
        """What stands in place of {} there, and the split that it means: one name of each that is exact, or all."""
        before, gap, after = self.labels.partition("{}")
        if not gap:
            return [("", ALL)]
        inside, _, start = before.rpartition("/")
        end = after.partition("/")[0]
        listed = sorted(each.name for each in (root / inside).iterdir()) if (root / inside).is_dir() else []
        names = [each.removeprefix(start).removesuffix(end) for each in listed if each[: len(start)] == start]
        exact = set(names) & set(SPLITS)  # train.json, whatever train_2.json is
        found = [(name, split) for name in names if (split := split_of(name)) is not None]
        return [(name, split) for name, split in found if name == split or split not in exact]


LAYOUTS = (
    Layout("COCO", "COCO", "annotations/{}.json", ("images",), is_export=False),
    Layout("COCO", "COCO's own names, CVAT", "annotations/instances_{}.json", ("images/{}", "{}", "images")),
    Layout("COCO", "Roboflow", "{}/_annotations.coco.json", ("{}",)),
    Layout("COCO", "Label Studio", "result.json", (".", "images")),
    Layout("YOLO", "Ultralytics YOLO", "data.yaml"),
    Layout("YOLO", "CVAT", "obj.data"),
    Layout("YOLO", "Label Studio", "classes.txt with images and labels"),
    Layout("VOC", "Pascal VOC", "ImageSets/Main/{}.txt", ("JPEGImages",), is_export=False),
    Layout("VOC", "Roboflow", "{}/*.xml", ("{}",)),
    Layout("VOC", "Label Studio", "Annotations/*.xml", ("images",)),
)


def parts_of(form: str, place: Path) -> dict[str, Part]:
    """The parts of a data set by split. `place`: its folder, or one file of labels.

    One file is a part of no split, unless it is called val or test. Raises KDError if two parts are of one split.
    """
    layouts = [layout for layout in LAYOUTS if layout.form == form]
    if not place.is_file():
        return next((found for layout in layouts if (found := layout.parts(place))), {})
    for layout in layouts:
        if len(place.parents) > (depth := layout.labels.count("/")):
            for split, part in layout.parts(place.parents[depth]).items():
                if part.labels == place:
                    return {ALL if split == "train" else split: part}
    folders = (place.parent, place.parent / "images", place.parent.parent / "images")
    return {ALL: Part(place, folders, is_export=True)}


def splits_of(form: str, place: Path) -> list[str]:
    """The splits of a data set, in their usual order. Raises KDError if two parts are of one split."""
    parts = parts_of(form, place)
    return [split for split in (*SPLITS, ALL) if split in parts]


def folder_of(place: Path) -> Path:
    """The folder of a data set, also if its place is one file, perhaps in `annotations`."""
    if place.is_dir():
        return place
    return place.parent.parent if place.parent.name == "annotations" else place.parent


def split_of(name: str) -> str | None:
    """The split that a name means; None if it means none."""
    return NAMES.get(re.sub(r"[-_]?\d+$", "", name.casefold()))


class ExportedFiles:
    """The images of an export, by the names that its labels give them.

    Tools write paths of their own server, other folders, or put a digest before the name. So the path counts first,
    and if it leads nowhere, the name alone.
    """

    def __init__(self, folders: tuple[Path, ...], rule: str) -> None:
        self._folders = tuple(folder for folder in folders if folder.is_dir())
        self._files = [Files(folder, rule) for folder in self._folders]
        self._by_name: dict[str, list[Path]] | None = None

    def find(self, name: str) -> Path:
        """The file of an image. Raises PictureError if there is none, or several that it may be."""
        for files in self._files:
            with suppress(PictureError):
                return files.find(name)
        if self._by_name is None:
            self._by_name = self._listed()
        # The last part of a path, or of an address such as ...?d=photos/a%20b.jpg
        last = [re.split(r"[/\\=]", text)[-1] for text in (name, unquote(name))]
        for wanted in dict.fromkeys((*last, *(re.sub(r"^[0-9a-f]{8}-", "", each) for each in last))):
            found = self._by_name.get(wanted, [])
            if len(found) > 1:
                raise PictureError(
                    f"there are {len(found)} files called {wanted}, such as {found[0]} and {found[1]}; rename them, "
                    "there and in the labels, or delete all but one"
                )
            if found:
                return found[0]
        folders = " or ".join(str(folder) for folder in self._folders)
        raise PictureError(
            f"there is no file {shown(last[0])} in {folders}; export the data with images, or put it there"
        )

    def _listed(self) -> dict[str, list[Path]]:
        files = (file for folder in self._folders for file in walk_visible(folder) if file.suffix.lower() in ENDINGS)
        listed: dict[str, list[Path]] = {}
        for file in dict.fromkeys(files):  # a folder may lie in another one
            listed.setdefault(file.name, []).append(file)
        return listed
