"""The model card: what a detector is, what it was trained on and with, how good it is, and how to open it."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from kdtoolkit.data import DetectionDataset
from kdtoolkit.data.detections import is_detection_file
from kdtoolkit.data.licence import licence_of
from kdtoolkit.engine.evaluate import Evaluation

COLUMNS = {"AP": "ap", "AP50": "ap50", "AP75": "ap75", "small": "ap_small", "medium": "ap_medium", "large": "ap_large"}


@dataclass(frozen=True)
class _Library:
    """A library of detectors: its package on PyPI, and the licence of its code."""

    package: str
    licence: str


LIBRARIES = {  # by the first part of a detector's name
    "kdtoolkit": _Library("kdtoolkit", "Apache-2.0"),
    "torchvision": _Library("torchvision", "BSD-3-Clause"),
    "timm": _Library("timm", "Apache-2.0"),
    "hf": _Library("transformers", "Apache-2.0"),
    "ultralytics": _Library("ultralytics", "AGPL-3.0"),
}


def card(
    *,
    title: str,
    student: str,
    class_names: Sequence[str],
    data: Path,
    datasets: Mapping[str, DetectionDataset],
    scores: Mapping[str, Evaluation | None],
    student_weights: str = "",
    teacher: str | None = None,
    teacher_weights: str = "",
    methods: Sequence[str] = (),
    schedule: Mapping[str, object] | None = None,
    how_to_open: str = "",
    command: str = "",
) -> str:
    """Write the model card of a trained detector in Markdown.

    Args:
        title: what the model is called.
        student: the detector's name, as `open_detector` takes it.
        class_names: the names of the classes in the order of labels.
        data: where the data set lies. If its files state a licence, the card repeats it.
        datasets: the images by their use, such as "training", "validation" and "training without labels".
        scores: AP on the validation images, by what was measured: "teacher", "student before training", "student".
            A detector that was trained alone is no student. None where it was not measured.
        student_weights: where the student's first weights came from, in words; empty if they were random.
        teacher: the teacher's name; None for a detector that was trained alone.
        teacher_weights: where the teacher's weights came from, in words.
        methods: the distillation methods with their arguments, such as "CrossKD()".
        schedule: what else decides the training, by name, such as steps, batch size, image size and seed.
        how_to_open: Python code that opens the model without kdtoolkit.
        command: the command that trains it again.
    """
    classes = _count(len(class_names), "class", "classes")
    by = f", distilled from `{teacher}`" if teacher else ""
    lines = [
        f"# {_plain(title)}",
        "",
        f"An object detector for {classes}: `{student}`{by}, trained with kdtoolkit.",
        "",
        f"Classes in the order of their labels: {', '.join(map(_plain, class_names))}.",
        "",
    ]
    if how_to_open:
        lines += ["## How to open it", "", "```python", how_to_open.strip(), "```", ""]
    lines += ["## How good it is", "", *_table_of_scores(scores, class_names), ""]
    role = "Student" if teacher else "Detector"
    lines += ["## How it was made", "", f"- {role}: `{student}`. Its first weights: {student_weights or 'random'}."]
    if teacher:
        what = "A file" if is_detection_file(teacher) else "Its weights"
        lines += [f"- Teacher: `{teacher}`. {what}: {teacher_weights or 'unknown'}."]
        lines += [f"- Methods: {', '.join(f'`{each}`' for each in methods) or 'none'}."]
    counts = ", ".join(f"{_count(len(images), 'image', 'images')} for {use}" for use, images in datasets.items())
    lines += [f"- Data: {_plain(data.stem if data.suffix else data.name)}, {counts}."]
    lines += [f"- {name[:1].upper()}{name[1:]}: {value}." for name, value in (schedule or {}).items()]
    lines += [f"- Versions: {', '.join(_versions(student, teacher))}."]
    if command:
        lines += ["", "This command makes it again:", "", "```", command.strip(), "```"]
    return "\n".join([*lines, "", "## Licences", "", *_licences(student, student_weights, teacher, data), ""])


def _table_of_scores(scores: Mapping[str, Evaluation | None], class_names: Sequence[str]) -> Iterator[str]:
    measured = {what: found for what, found in scores.items() if found is not None}
    if not measured:
        yield "Its AP was not measured."
        return
    images = max(found.images for found in measured.values())
    yield (
        f"COCO's average precision in percent, on {_count(images, 'validation image', 'validation images')}. small, "
        "medium and large are AP of objects up to 32^2, up to 96^2, and of more pixels."
    )
    yield ""
    yield _row("", *COLUMNS)
    yield _row("---", *["---:"] * len(COLUMNS))
    for what, found in measured.items():
        yield _row(what, *(_percent(getattr(found, name)) for name in COLUMNS.values()))
    yield ""
    yield _row("AP of class", *measured)
    yield _row("---", *["---:"] * len(measured))
    for name in class_names:
        yield _row(_plain(name), *(_percent(found.per_class.get(name)) for found in measured.values()))


def _licences(student: str, student_weights: str, teacher: str | None, data: Path) -> Iterator[str]:
    used = {name: _library_of(name) for name in (student, teacher) if name}
    for library in dict.fromkeys(filter(None, used.values())):
        yield f"- Code of {library.package}: {library.licence}."
    if any(library is LIBRARIES["ultralytics"] for library in used.values()):
        yield (
            "- Ultralytics publishes its code and its weights under AGPL-3.0, and says that this binds models trained "
            "with them too. If you give this model to others, or offer it over a network, read their terms first."
        )
    if student_weights and _library_of(student) is not LIBRARIES["ultralytics"]:
        yield f"- The detector's first weights ({_plain(student_weights)}): licence unknown. Ask who published them."
    if teacher and is_detection_file(teacher):
        yield "- The teacher's detections: licence unknown. Ask who wrote the file."
    stated = licence_of(data)
    yield f"- Data: {_plain(stated)}." if stated else "- Data: licence unknown. The data set's files state none."


def _versions(*names: str | None) -> Iterator[str]:
    """The versions of what trained the detector."""
    packages = [library.package for name in names if name and (library := _library_of(name))]
    for package in dict.fromkeys(["kdtoolkit", "torch", *packages]):
        yield f"{package} {version(package)}"
    yield f"Python {platform.python_version()}"


def _library_of(name: str) -> _Library | None:
    """The library of a detector's name; None if it is a class of somebody's own."""
    return LIBRARIES.get(name.partition("/")[0])


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _plain(text: str) -> str:
    """Text of users that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(text.split()))
