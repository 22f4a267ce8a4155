"""What a cell needs besides its task: the files and folders that the task names, to be sent to a different machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from kdtoolkit.benchmark.cell import Task
from kdtoolkit.benchmark.datasets import DataSets
from kdtoolkit.benchmark.parcels import Parcel
from kdtoolkit.benchmark.suite import DataSection, DetectorSection
from kdtoolkit.data import ProceduralShapes
from kdtoolkit.data.opening import locate
from kdtoolkit.data.photos import PhotoDataset
from kdtoolkit.data.yolo import document_of, find_label
from kdtoolkit.errors import KDError
from kdtoolkit.files import walk
from kdtoolkit.models import FILES

TRACKED = "tracked"
# What the readers of data sets read besides images.
_LABELS = (".json", ".txt", ".xml", ".yaml", ".yml", ".data", ".names")


@dataclass(frozen=True)
class Place:
    """A file or folder that a task names, and the parcel of what a cell reads there.

    `inside`: where the parcel has it; empty if the parcel is this folder.
    """

    path: Path
    parcel: Parcel
    inside: str = ""


def places_of_data(data: DataSection, sets: DataSets, pictures: Path) -> Iterator[Place]:
    """The places that all tasks of a suite name for their data. Pictures are drawn into the folder `pictures` first.

    Raises KDError if a file cannot be read, or lies where its copy could not be found.
    """
    if data.root is None:
        shapes = [split for split in sets.splits if isinstance(split, ProceduralShapes)]
        _ = [split[0] for split in shapes]
        drawn = [split.drawn for split in shapes]
        yield Place(pictures, Parcel.of({path.name: path for path in drawn if path is not None}))
    else:
        yield _place_of_photos(data.root, [split for split in sets.splits if isinstance(split, PhotoDataset)])
    if data.unlabelled is not None and sets.unlabelled is not None:
        root = data.unlabelled if data.unlabelled.is_dir() else data.unlabelled.parent
        images = Parcel.of(dict(_named(map(Path, sets.unlabelled.files()), Path(os.path.abspath(root)))))
        yield Place(data.unlabelled, images, "" if data.unlabelled.is_dir() else data.unlabelled.name)


def paths_of(task: Task) -> Iterator[Path]:
    """The files and folders that a task's detectors are opened from."""
    for section in (task.detector, task.teacher_detector):
        if section is not None:
            for name in (section.model, section.weights, section.args.get("pretrained")):
                if isinstance(name, str) and Path(name).is_absolute() and Path(name).exists():
                    yield Path(name)
    if task.teacher_weights is not None:
        yield task.teacher_weights


def place_of(path: Path) -> Place:
    """The place of a file, or of a folder with a detector. Raises KDError if it cannot be read."""
    if path.is_file():
        return Place(path, Parcel.of({path.name: path}), path.name)
    files = (each for each in walk(path) if each.suffix in FILES and each.is_file())
    return Place(path, Parcel.of(dict(_named(files, path))))


def moved(task: Task, here: Mapping[Path, Path], *, pictures: Path, results: Path) -> Task:
    """The task with the places that it names where they lie on this machine, by where they lie on its own.

    `pictures`: the folder of decoded photos here. `results`: the folder for what it writes; curves for TensorBoard go
    into its subfolder TRACKED.
    """

    def name(value: object) -> object:
        return str(here.get(Path(value), value)) if isinstance(value, str) else value

    def section(told: DetectorSection) -> DetectorSection:
        args = {key: name(value) if key == "pretrained" else value for key, value in told.args.items()}
        return told.model_copy(update={"model": name(told.model), "weights": name(told.weights), "args": args})

    def place(path: Path | None) -> Path | None:
        return None if path is None else here.get(path, path)

    return replace(
        task,
        detector=section(task.detector),
        teacher_detector=None if task.teacher_detector is None else section(task.teacher_detector),
        teacher_weights=place(task.teacher_weights),
        data=task.data.model_copy(update={"root": place(task.data.root), "unlabelled": place(task.data.unlabelled)}),
        pictures=here.get(task.pictures, pictures),
        teacher_cache=place(task.teacher_cache),
        result=results / task.result.name,
        tracked_in=None if task.tracked_in is None else results / TRACKED,
        original=task,
    )


def _place_of_photos(root: Path, splits: list[PhotoDataset]) -> Place:
    """A data set: its images, and all files of labels in its folder."""
    form, place = locate(root)
    folder = Path(os.path.abspath(splits[0].root))
    named = Path(os.path.abspath(root))
    images = [Path(file) for split in splits for file in split.files()]
    # Each subfolder is walked alone, because readers open a linked one by the link's name, and `walk` by one name.
    below = (file for each in sorted(folder.iterdir()) for file in (walk(each) if each.is_dir() else [each]))
    labels = [file for file in below if file.name.endswith(_LABELS)]
    if form.name == "YOLO":
        labels += [label for image in images if (label := find_label(image, folder)) is not None]
    files = dict(_named(iter([*images, *labels]), folder))
    if form.name != "YOLO":
        return Place(root, Parcel.of(files), named.relative_to(folder).as_posix())
    # The YAML file finds the folder by `path`, relative to itself. If it is absolute, there is no such folder on a
    # different machine, and the reader takes the file's own folder in its place.
    file = Path(os.path.abspath(place))
    base = folder
    inside = Path(file.name)
    if not Path(document_of(file).get("path") or "").is_absolute():
        base = Path(os.path.commonpath([folder, file.parent]))
        inside = file.relative_to(base)
    files = {(folder / name).relative_to(base).as_posix(): path for name, path in files.items()}
    files[inside.as_posix()] = file
    return Place(root, Parcel.of(files), (inside if named == file else inside.parent).as_posix())


def _named(files: Iterator[Path], folder: Path) -> Iterator[tuple[str, Path]]:
    """The files by their paths relative to a folder. Raises KDError for one that does not lie in it."""
    for file in files:
        if not file.is_relative_to(folder):
            raise KDError(
                f"{file} lies outside of {folder}, so it cannot be sent to different machines: copy the data into one "
                "folder, without links"
            )
        yield file.relative_to(folder).as_posix(), file
