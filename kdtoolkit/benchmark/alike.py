"""What the cells of one board have in common. A board leaves out what differs, and a merge refuses it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from kdtoolkit.benchmark.keys import settings_of
from kdtoolkit.benchmark.store import CellResult
from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME, TEACHER, TWICE

# How a cell that does not share it is told, in the order in which it is checked.
SHARED = {
    "val_data": "evaluated on different images",
    "max_detections": "evaluated with a different max_detections",
    "train_data": "trained on different images",
    "student": "trained with different settings",
    "steps": "trained for a different number of steps",
    "unlabelled": "trained on different images without labels",
    "teaching": "taught in a different way",
    "teacher": "taught by a different teacher",
    "row": "trained with different settings than its row",
}

TOLD = 4  # settings that a message names, at most

_OF_ONE_CELL = {"seed", "teacher", "data"}  # the last two are compared by content
_OF_ONE_ROW = {"methods", "steps", "class_map", "unlabelled", "max_detections"}


def shared_by(
    cell: CellResult, teacher_of: Callable[[CellResult], str], *, any_precision: bool = False
) -> dict[str, str]:
    """What a cell must share with the students of its board, by the names of `SHARED`; empty values are unknown.

    A name that is missing says that the cell need not share it: the teacher shares how it was evaluated and who it is,
    rows without methods are not taught, and longer schedules have more steps. `row` is shared by the cells of a row
    alone. `teacher_of`: as `teachers` gives it. `any_precision`: whether the hardware chooses the precision.
    """
    chosen = settings_of(cell.key_parts, any_precision=any_precision)
    limit = chosen.get("max_detections", "as COCO has it")
    found = {"val_data": cell.fingerprints.get("val_data", ""), "max_detections": limit}
    if taught_by := teacher_of(cell):
        found["teacher"] = taught_by
    if cell.entry == TEACHER:
        return found
    own = {name: value for name, value in chosen.items() if name not in _OF_ONE_CELL}
    found["train_data"] = cell.fingerprints.get("train_data", "")
    found["student"] = _text({name: value for name, value in own.items() if name not in _OF_ONE_ROW})
    if cell.entry not in (EQUAL_TIME, TWICE):
        found["steps"] = chosen.get("steps", "")
    if cell.entry not in (BASELINE, EQUAL_TIME, TWICE):
        found["unlabelled"] = cell.fingerprints.get("unlabelled", "")
        scaled = chosen.get("teacher", "").partition(", ")[2]
        found["teaching"] = _text({"teacher": scaled, "class_map": chosen.get("class_map", "")})
    found["row"] = _text({name: value for name, value in own.items() if (cell.entry, name) != (EQUAL_TIME, "steps")})
    return found


def unlike(found: str, common: str) -> str:
    """In what a cell differs from the rest, in words. `found`, `common`: two values of `shared_by`."""
    one, two = _fields(found), _fields(common)
    names = [name for name in dict.fromkeys([*two, *one]) if one.get(name) != two.get(name)]
    told = [f"{name} {one.get(name) or 'unknown'} instead of {two.get(name) or 'unknown'}".strip() for name in names]
    more = [f"and {len(told) - TOLD} more"] if len(told) > TOLD else []
    return ", ".join(told[:TOLD] + more)


def teachers(cells: Sequence[CellResult]) -> Callable[[CellResult], str]:
    """A function that gives the identity of the teacher that a cell had or is; empty for a cell without teacher.

    It is the digest of the teacher's weights. Results of format 1 know the teacher's key alone: it stands for the
    weights of the cells with the same key, if they all have the same ones.
    """
    contents: dict[str, set[str]] = defaultdict(set)
    for cell in cells:
        if content := cell.fingerprints.get("teacher"):
            contents[cell.teacher_key].add(content)
    known: Mapping[str, str] = {key: next(iter(found)) for key, found in contents.items() if len(found) == 1}
    return lambda cell: cell.fingerprints.get("teacher") or known.get(cell.teacher_key, cell.teacher_key)


def _text(settings: Mapping[str, str]) -> str:
    return json.dumps(settings, sort_keys=True)


def _fields(value: str) -> dict[str, str]:
    """The settings in a value of `shared_by`, each by its place, such as `train.lr`; a plain value has no name."""
    try:
        settings = json.loads(value)
    except ValueError:
        return {"": value}
    return _flat(settings) if isinstance(settings, dict) else {"": value}


def _flat(settings: Mapping[str, object], above: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in settings.items():
        inner = value
        if name == "detector" and isinstance(value, str):
            try:
                inner = json.loads(value)
            except ValueError:
                inner = value
        place = "" if name == "detector" else f"{above}{name}."
        found |= _flat(inner, place) if isinstance(inner, dict) and inner else {above + name: str(inner)}
    return found
