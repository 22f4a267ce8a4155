"""A suite says what is compared: a teacher, a student, and methods. The whole suite is checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from kdtoolkit.distiller import TEACHER_SCALES
from kdtoolkit.engine.config import TrainConfig
from kdtoolkit.engine.scoring import MAX_DETECTIONS
from kdtoolkit.errors import KDError
from kdtoolkit.method_use import MethodUse
from kdtoolkit.models import is_code
from kdtoolkit.sections import Section, Seed
from kdtoolkit.yaml_text import dump

BASELINE = "baseline"
EQUAL_TIME = "baseline (equal time)"
TWICE = "baseline (twice the steps)"
TEACHER = "teacher"
_FOLDER_NAME = r"^\w[\w+().,= -]*$"  # names become folders


class DataSection(Section):
    """Which images a suite uses.

    `root`: a data set in COCO's, YOLO's or VOC's format; None draws procedural images. `teacher_images`,
    `student_images`, `val_images`: how many images; None means all of them. `image_size`: in pixels, the side of a
    procedural image, or the longest side of a photo (larger photos are scaled down). `on_bad`: whether bad images and
    annotations are an error ("error") or are left out ("skip"). `unlabelled`: a folder of images without labels, from
    which rows with methods learn too. `max_detections`: how many detections of an image and class count for AP.
    """

    root: Path | None = None
    unlabelled: Path | None = None
    image_size: int = Field(96, ge=32)
    teacher_images: int | None = Field(None, gt=0)
    student_images: int | None = Field(None, gt=0)
    val_images: int | None = Field(None, gt=0)
    on_bad: Literal["error", "skip"] = "error"
    max_detections: int = Field(MAX_DETECTIONS, ge=1)
    seed: Seed = 0

    @model_validator(mode="after")
    def _procedural_is_endless(self) -> DataSection:
        if self.root is None:
            counts = ("teacher_images", "student_images", "val_images")
            if missing := [name for name in counts if getattr(self, name) is None]:
                raise ValueError(
                    f"procedural data needs {', '.join(missing)}: write how many images to draw, or name a `root`"
                )
        return self


class DetectorSection(Section):
    """A detector, given by what `open_detector` takes, and how it is trained.

    `train` may be missing for a teacher with weights: it is then used as it is.
    """

    model: str
    args: dict[str, Any] = Field({})
    weights: str | None = None
    train: TrainConfig | None = None


class StudentSection(DetectorSection):
    """A detector that is trained, perhaps from weights."""

    train: TrainConfig


class Suite(Section):
    """What is compared: one student, trained alone (the row `baseline`) and with the methods of each entry.

    `teacher_scale`: size of the images that the teacher sees while it teaches, relative to the student's. `init`:
    whether all students start from the teacher's weights, where these fit. `plateau`: whether to measure how much more
    steps would add to the baseline. `curve`: how often each student is evaluated, after equal shares of its steps; 0
    evaluates it at the end alone. `probe`: after how many equal shares of the steps the methods are probed
    (docs/probe.md); 0 probes nothing. `class_map`: the teacher's name for a class of the data, where the names differ;
    for a teacher that is not trained here.
    """

    name: str = Field(pattern=_FOLDER_NAME)
    description: str
    expected_minutes: float = Field(gt=0)
    seeds: int = Field(3, ge=1, lt=1_000_000)
    data: DataSection
    teacher: DetectorSection
    student: StudentSection
    teacher_scale: float = 1.0
    init: Literal["teacher"] | None = None
    plateau: bool = False
    curve: int = Field(0, ge=0)
    probe: int = Field(0, ge=0)
    class_map: dict[str, str] = Field({})
    entries: dict[Annotated[str, Field(pattern=_FOLDER_NAME)], tuple[MethodUse, ...]]

    @field_validator("teacher_scale")
    @classmethod
    def _check_scale(cls, scale: float) -> float:
        if scale not in TEACHER_SCALES:
            raise ValueError(f"teacher_scale is {scale}: it must be 1, 0.5 or 0.25")
        return scale

    @field_validator("entries")
    @classmethod
    def _check_entries(
        cls, entries: dict[str, tuple[MethodUse, ...]], info: ValidationInfo
    ) -> dict[str, tuple[MethodUse, ...]]:
        student: StudentSection | None = info.data.get("student")  # None if it has a fault of its own
        names = [BASELINE, EQUAL_TIME, TWICE, TEACHER]
        for name, methods in entries.items():
            if name.lower() in names:  # some systems take names of folders that differ in case for the same
                raise ValueError(f"entry '{name}' has the same name as another row: rename it")
            if not methods:
                raise ValueError(f"entry '{name}' has no methods: delete it (the baseline is always run), or name some")
            names.append(name.lower())
            for use in methods:
                if student and (reason := use.build().schedule.why_too_long(student.train.steps)):
                    raise ValueError(f"entry '{name}': {use.name}: {reason}")
        return entries

    @model_validator(mode="after")
    def _check_together(self) -> Suite:
        if self.class_map and self.teacher.train is not None:
            raise ValueError(
                "class_map is for a teacher that keeps the classes of its weights, and this one is trained on the "
                "data's: delete class_map, or the teacher's `train`"
            )
        if self.teacher.train is not None and self.teacher.train.unlabelled_share is not None:
            raise ValueError("the teacher is trained on labels alone: delete its unlabelled_share")
        if self.teacher.train is not None and self.teacher.train.teacher_cache != "off":
            raise ValueError(
                "teacher_cache: only a student with a teacher has one: delete it in the teacher's `train`, or move it "
                "to the student's"
            )
        if self.student.train.unlabelled_share is not None and self.data.unlabelled is None:
            raise ValueError("unlabelled_share needs images without labels: name their folder, `unlabelled`, in `data`")
        return self

    def methods(self, row: str) -> tuple[MethodUse, ...]:
        """The methods of a row. The two baselines and the teacher have none."""
        return self.entries.get(row, ())

    def to_yaml(self) -> str:
        """The suite as YAML, which `load_suite` can read."""
        fields = self.model_dump(mode="json", exclude_unset=True)
        return dump(fields)


def change(suite: Suite, data: Mapping[str, Any] | None = None, **fields: Any) -> Suite:
    """A copy of the suite with some fields changed, checked again. `data`: fields to change in the data section."""
    raw = suite.model_dump(exclude_unset=True)
    raw["data"].update(data or {})
    return Suite.model_validate({**raw, **fields})


def check_runs_no_code(suite: Suite) -> None:
    """Raises KDError if the suite names a module to import as a model, which would run whatever the module contains."""
    for role, section in (("teacher", suite.teacher), ("student", suite.student)):
        if is_code(section.model):
            raise KDError(
                f"the {role} of suite {suite.name!r} is {section.model!r}, which imports a Python module and so runs "
                "its code: read the module, then run the same command with --allow-code"
            )
