"""What a run found out: kept in report.json while it works, and at the end also in report.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from kdtoolkit.build import is_code
from kdtoolkit.data.detections import is_detection_file
from kdtoolkit.engine.evaluate import Evaluation
from kdtoolkit.engine.result import CacheUse
from kdtoolkit.errors import KDError, printable
from kdtoolkit.files import write_atomic
from kdtoolkit.words import duration, size

JSON, MARKDOWN = "report.json", "report.md"


class Trained(BaseModel):
    """One training: the AP of the weights that were kept, the step that they are of, and what it cost.

    `metrics`: what the methods reported besides losses, as means of a step. `cache`: how the teacher cache was used, if
    there was one.
    """

    model_config = ConfigDict(frozen=True)

    evaluation: Evaluation
    best_step: int
    steps: int
    seconds: float
    warnings: tuple[str, ...] = ()
    metrics: dict[str, float] = {}
    cache: CacheUse | None = None


class Report(BaseModel):
    """The results of a run. What is None was not measured, or not yet.

    `teacher`, `before`: the AP of the teacher at the size that the student sees, and of the student before training.
    `student`, `baseline`: the training itself, and the same student's training without teacher. `model`: the folder of
    the trained detector. `plan`: what was done and why, by name. `given`: the options that the user gave. `made_of`:
    digests of the images and of the weights that it began with.
    """

    command: str
    title: str
    folder: Path
    plan: dict[str, str]
    given: dict[str, Any]
    made_of: dict[str, str]
    teacher: Evaluation | None = None
    before: Evaluation | None = None
    student: Trained | None = None
    baseline: Trained | None = None
    model: Path | None = None
    how_to_open: str = ""
    finished: bool = False

    @property
    def repeat(self) -> str:
        """The command that does the run again, in the folder of its run file."""
        names = map(str, (self.given.get(role, "") for role in ("model", "teacher", "student")))
        return f"kd {self.command} run.yaml --out NEW-FOLDER{' --allow-code' if any(map(is_code, names)) else ''}"

    @property
    def ap(self) -> float | None:
        """The trained detector's AP on the validation images, in percent."""
        return self.student.evaluation.ap if self.student else None

    @property
    def added(self) -> float | None:
        """What distillation added to the AP, compared with the same training without teacher."""
        if self.ap is None or self.baseline is None or self.baseline.evaluation.ap is None:
            return None
        return self.ap - self.baseline.evaluation.ap

    def changed(self, made_of: Mapping[str, str]) -> list[str]:
        """Which images or weights are different from those that the run began with."""
        return [what for what, digest in self.made_of.items() if made_of.get(what) != digest]

    def write(self) -> None:
        """Write it into its folder. Raises KDError."""
        fields = self.model_dump(mode="json", exclude={"folder"})
        fields["model"] = None if self.model is None else self.model.name
        fields["added"] = self.added
        content = TypeAdapter(dict[str, Any]).dump_json(fields, indent=2)
        write_file(self.folder / JSON, content + b"\n")
        if self.finished:
            write_file(self.folder / MARKDOWN, self.to_markdown().encode())

    @staticmethod
    def read(folder: Path) -> Report | None:
        """The report that lies in a folder; None if there is none. Raises KDError if it is damaged."""
        path = folder / JSON
        if not path.exists():
            return None
        try:
            fields = TypeAdapter(dict[str, Any]).validate_json(path.read_bytes())
            fields.pop("added", None)
            model = fields.pop("model", None)
            return Report.model_validate({**fields, "folder": folder, "model": folder / model if model else None})
        except (OSError, ValidationError) as error:
            raise KDError(
                f"{path} cannot be read: put a copy of it back, or choose a new folder (--out {folder}-2)"
            ) from error

    def rows(self) -> Iterator[tuple[str, Evaluation]]:
        """What was measured, in the order of reading."""
        for what, found in (
            ("teacher", self.teacher),
            ("before training", self.before),
            ("student" if self.command == "distill" else "trained", self.student and self.student.evaluation),
            ("the same without teacher", self.baseline and self.baseline.evaluation),
        ):
            if found:
                yield what, found

    def to_markdown(self) -> str:
        """The report as Markdown."""
        lines = [f"# {self.title}", ""]
        lines += ["COCO's average precision in percent, on the validation images.", ""]
        lines += ["| | AP | AP50 | AP75 |", "|---|---:|---:|---:|"]
        lines += [f"| {what} | {_shown(e.ap)} | {_shown(e.ap50)} | {_shown(e.ap75)} |" for what, e in self.rows()]
        lines += ["", *(f"{sentence}" for sentence in self.sentences()), ""]
        lines += ["## What was done", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {_cell(value)} |" for name, value in self.plan.items()]
        if self.student and self.student.metrics:
            lines += ["", "## What the methods reported", "", "| | mean of a step |", "|---|---:|"]
            lines += [f"| {name} | {value:.4g} |" for name, value in self.student.metrics.items()]
        if self.how_to_open:
            lines += ["", "## How to open it", "", "```python", self.how_to_open.strip(), "```"]
        if self.student and self.student.warnings:
            lines += ["", "## Warnings", "", *(f"- {warning}" for warning in self.student.warnings)]
        return "\n".join(lines) + "\n"

    def sentences(self) -> Iterator[str]:
        """What the numbers mean."""
        if self.teacher and not is_detection_file(self.given.get("teacher")):
            yield "The teacher was measured at the size at which the student sees the images."
        elif self.command == "distill" and self.student and not self.teacher:
            yield "The teacher was not measured: it shows features alone, or has no detections on these images."
        if self.added is not None:
            yield (
                f"Distillation added {self.added:+.1f} AP at equal steps. This is one seed: differences below about 1 "
                "AP may be chance."
            )
        if self.student and (cache := self.student.cache):
            yield (
                f"The teacher was asked about {cache.misses:,} of {cache.hits + cache.misses:,} images shown; the rest "
                f"was found in its cache of {size(cache.bytes)}."
            )
        for name, trained in (("Training", self.student), ("Without teacher it", self.baseline)):
            if trained:
                yield (
                    f"{name} took {duration(trained.seconds)}; the weights are of step {trained.best_step} of "
                    f"{trained.steps}, the best evaluation."
                )


def write_file(path: Path, content: bytes) -> None:
    """Write a file of a run's folder. Raises KDError."""
    try:
        write_atomic(path, content)
    except OSError as error:
        raise KDError(
            f"cannot write {path}: {error.strerror or error}. Correct that and give the same command again: it goes on"
        ) from error


def print_report(report: Report, console: Console) -> None:
    """Print the results and where they lie."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 1))
    table.add_column("on the validation images")
    for name in ("AP", "AP50", "AP75"):
        table.add_column(name, justify="right")
    for what, found in report.rows():
        table.add_row(what, _shown(found.ap), _shown(found.ap50), _shown(found.ap75))
    console.print()
    console.print(table)
    console.print()
    for sentence in report.sentences():
        console.print(sentence, markup=False, highlight=False)
    console.print()
    places = {
        "model": "the detector: README.md says how to open it",
        MARKDOWN: "this report (also .json)",
        "run.yaml": f"{report.repeat} does the same again",
        "training/log.jsonl": "each step's losses",
    }
    for name, what in places.items():
        place = report.folder / name
        if place.exists():  # users may move or delete them
            console.print(printable(f"{place}  {what}"), markup=False, highlight=False, soft_wrap=True)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")
