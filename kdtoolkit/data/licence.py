"""The licence of a data set, where its files state one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import yaml

from kdtoolkit.data.coco import label_files
from kdtoolkit.data.opening import locate
from kdtoolkit.errors import KDError

FILES = ("LICENSE", "LICENCE", "COPYING")  # with any ending, in upper or lower case


def licence_of(path: Path) -> str | None:
    """What the files of a data set say about its licence, in one line; None if they say nothing.

    Looked at are `licenses` of a COCO file, `license` of a YOLO YAML file, where Roboflow writes it too, and the first
    line of a file LICENSE in the data set's folder.
    """
    try:
        form, place = locate(path)
        root = place if place.is_dir() else place.parent
        stated = _of_coco(place) if form.name == "COCO" else _of_yaml(place) if form.name == "YOLO" else ()
        found = list(dict.fromkeys(text for text in (*stated, *_of_files(root)) if text))
    except (OSError, KDError):  # the data may be gone, or not be readable: no reason to stop after hours of training
        return None
    return "; ".join(found) or None


def _of_coco(place: Path) -> Iterator[str]:
    files = sorted(label_files(place), key=lambda file: file.stat().st_size)
    try:
        licences = [json.loads(file.read_bytes()).get("licenses") for file in files[:1]]
    except (OSError, ValueError, RecursionError, AttributeError):  # the reader of the data set tells of such files
        return
    for licence in (each for listed in licences if isinstance(listed, list) for each in listed):
        if isinstance(licence, dict):
            yield " ".join(str(licence[key]).strip() for key in ("name", "url") if licence.get(key))


def _of_yaml(place: Path) -> Iterator[str]:
    try:
        document = yaml.safe_load(place.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return
    for part in (document, document.get("roboflow") if isinstance(document, dict) else None):
        if isinstance(part, dict) and isinstance(part.get("license"), str):
            yield part["license"].strip()


def _of_files(root: Path) -> Iterator[str]:
    for file in sorted(root.iterdir()):
        if file.stem.upper() in FILES and file.is_file():
            lines = (line.strip(" #\t\r\n") for line in file.read_text("utf-8", errors="replace").splitlines())
            yield f"{next(filter(None, lines), 'see the file')} (file {file.name})"
