"""What a search found out: kept in tune.json while it works, and at the end also in tune.md."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdtoolkit.benchmark.stats import Difference, paired_difference, spread
from kdtoolkit.engine.evaluate import Evaluation
from kdtoolkit.errors import KDError, printable
from kdtoolkit.tuning.budget import Costs
from kdtoolkit.tuning.space import BASELINE, Candidate, Uses, in_words
from kdtoolkit.tuning.study import Trial, ranked
from kdtoolkit.words import counted, duration
from kdtoolkit.workflow.report import write_file

JSON, MARKDOWN, BEST = "tune.json", "tune.md", "best.yaml"
FIRST, NEXT = "best", "runner-up"  # rows of the confirmation
SHOWN = 10  # trials in the table


class Confirmation(BaseModel):
    """Whole trainings on all training images, with fresh seeds.

    `rows`: the methods by name: the best trial, the next one, and none. `ap`: by data set, by row and by seed.
    `seconds`: of each training, by row and by seed. `failed`: why a training has no result, by row and by seed.
    """

    rows: dict[str, Uses]
    seeds: tuple[int, ...]
    ap: dict[str, dict[str, dict[int, float]]] = {}
    seconds: dict[str, dict[int, float]] = {}
    failed: dict[str, dict[int, str]] = {}

    @property
    def complete(self) -> bool:
        """Whether all rows are trained with all seeds."""
        return all(self.ended(row, seed) for row in self.rows for seed in self.seeds)

    @property
    def trainings(self) -> int:
        """How many trainings have ended, with or without a result."""
        return sum(self.ended(row, seed) for row in self.rows for seed in self.seeds)

    @property
    def better_runner_up(self) -> Uses | None:
        """The methods of the next trial, if they are better than the best trial on one of the data sets; else None."""
        if NEXT not in self.rows:
            return None
        found = [self.difference(data, NEXT) for data in self.ap]
        return self.rows[NEXT] if any(each is not None and each.verdict == "hurts" for each in found) else None

    def ended(self, row: str, seed: int) -> bool:
        """Whether a training has ended, with or without a result."""
        return seed in self.seconds.get(row, {}) or seed in self.failed.get(row, {})

    def difference(self, data: str, reference: str, row: str = FIRST) -> Difference | None:
        """A row minus another one on a data set, paired by seeds."""
        return paired_difference(self.ap[data].get(row, {}), self.ap[data].get(reference, {}))

    def with_result(self, row: str, seed: int, ap: Mapping[str, float], seconds: float) -> Confirmation:
        """The same with the result of one more training: its AP by data set, and its time."""
        found = dict(self.ap)
        for data, value in ap.items():
            found[data] = _with(found.get(data, {}), row, seed, value)
        return self.model_copy(update={"ap": found, "seconds": _with(self.seconds, row, seed, seconds)})

    def with_failure(self, row: str, seed: int, reason: str) -> Confirmation:
        """The same with one more training that ended without a result."""
        return self.model_copy(update={"failed": _with(self.failed, row, seed, reason)})


class TuneReport(BaseModel):
    """The results of a search.

    Attributes:
        plan: what is done and why, by name.
        given: the options that the user gave.
        made_of: digests of the images and of the weights.
        candidates: the methods that are tried.
        steps: of a whole training.
        planned: the number of trials.
        val_images: how many validation images there are.
        costs: what was measured to plan by, if the time is bounded.
        teacher: its AP on the validation images.
        trials: all trials so far.
        searched: whether all trials are made.
        confirmation: the trainings with fresh seeds; None before the first one, and if there are none.
        seconds: the time so far, over all starts.
    """

    title: str
    folder: Path
    plan: dict[str, str]
    given: dict[str, Any]
    made_of: dict[str, str]
    candidates: tuple[Candidate, ...]
    steps: int
    planned: int
    val_images: int
    costs: Costs | None = None
    teacher: Evaluation | None = None
    trials: list[Trial] = []
    searched: bool = False
    confirmation: Confirmation | None = None
    seconds: float = 0.0
    finished: bool = False

    @property
    def best(self) -> Trial | None:
        """The best trial of the search, confirmed or not; None if none could be trained."""
        return next(iter(ranked(self.trials)), None)

    @property
    def winner(self) -> Uses | None:
        """The methods of the best trial if they are shown to be better than no teacher on all data sets; else None.

        They are no winner if the runner-up is better, or if a training of the two that are compared failed.
        """
        found = self.confirmation
        if found is None or not found.complete or not found.ap or found.better_runner_up is not None:
            return None
        if found.failed.get(FIRST) or found.failed.get(BASELINE):
            return None
        differences = [found.difference(data, BASELINE) for data in found.ap]
        if all(each is not None and each.verdict == "holds" for each in differences):
            return found.rows[FIRST]
        return None

    def changed(self, made_of: Mapping[str, str]) -> list[str]:
        """Which images or weights are different from those that the search began with."""
        return [what for what, digest in self.made_of.items() if made_of.get(what) != digest]

    def write(self) -> None:
        """Write it into its folder. Raises KDError."""
        fields = self.model_dump(mode="json", exclude={"folder"})
        fields["winner"] = None if self.winner is None else [str(use) for use in self.winner]
        content = TypeAdapter(dict[str, Any]).dump_json(fields, indent=2)
        write_file(self.folder / JSON, content + b"\n")
        if self.searched:
            write_file(self.folder / MARKDOWN, self.to_markdown().encode())

    @staticmethod
    def read(folder: Path) -> TuneReport | None:
        """The report that lies in a folder; None if there is none. Raises KDError if it is damaged."""
        path = folder / JSON
        if not path.exists():
            return None
        try:
            fields = TypeAdapter(dict[str, Any]).validate_json(path.read_bytes())
            fields.pop("winner", None)
            return TuneReport.model_validate({**fields, "folder": folder})
        except (OSError, ValidationError) as error:
            raise KDError(
                f"{path} cannot be read: put a copy of it back, or choose a new folder (--out {folder}-2)"
            ) from error

    def search_table(self) -> tuple[list[str], list[list[str]]]:
        """The best trials, as a head and rows: AP after each number of steps."""
        steps = sorted({step for trial in self.trials for step in trial.scores})
        head = ["trial", *(f"AP at {step}" for step in steps), "time"]
        rows = [
            [trial.name, *(_shown(trial.scores.get(step)) for step in steps), duration(trial.seconds)]
            for trial in ranked(self.trials)
        ]
        return head, rows

    def confirmation_table(self) -> tuple[list[str], list[list[str]]]:
        """The confirmation, as a head and rows: mean AP over seeds on each data set, and what the best row adds."""
        found = self.confirmation
        assert found is not None
        head = ["fresh seeds", *found.ap, "time of a training"]
        rows = []
        for row, uses in found.rows.items():
            means = [spread(found.ap[data].get(row, {}).values()) for data in found.ap]
            seconds = spread(found.seconds.get(row, {}).values())
            time = "-" if seconds is None else duration(seconds.mean)
            rows.append([in_words(uses), *(_shown(None if mean is None else mean.mean) for mean in means), time])
        return head, rows

    def sentences(self) -> Iterator[str]:
        """What the numbers mean."""
        best, found = self.best, self.confirmation
        if best is None:
            yield "No trial could be trained:"
            yield from (f"{trial.name}: {trial.reason}" for trial in self.trials)
            return
        if found is None:
            yield (
                f"{best.name} is the best of {counted(len(self.trials), 'trial')}. It is not confirmed: all trials "
                "have the same seed and images, and the best of many is good by luck as well."
            )
            return
        for data in found.ap:
            for row, uses in list(found.rows.items())[1:]:
                difference = found.difference(data, row)
                if difference is not None:
                    yield f"{_compared(best.name, in_words(uses), difference)} ({data})."
        for row, reasons in found.failed.items():
            for seed, reason in reasons.items():
                yield f"{in_words(found.rows[row])} could not be trained with seed {seed}: {reason}"
        if not found.complete:
            yield (
                f"The confirmation is not finished: {found.trainings} of {len(found.rows) * len(found.seeds)} "
                "trainings are done. The same command goes on with it."
            )
        elif self.winner is not None:
            yield (
                f"{best.name} is the winner: it is better than the training {BASELINE} with the same number of steps. "
                "The table shows the time of both."
            )
        elif (next_one := found.better_runner_up) is not None:
            for data in found.ap:
                difference = found.difference(data, BASELINE, NEXT)
                if difference is not None:
                    yield f"{_compared(in_words(next_one), BASELINE, difference)} ({data})."
            words = " ".join(f"--method {shlex.quote(str(use))}" for use in next_one)
            yield (
                f"There is no winner: {in_words(next_one)} is the runner-up of the search, and with fresh seeds it is "
                f"better than {best.name}. `kd distill {BEST} {words} --out NEW-FOLDER` trains with it. It is not "
                "confirmed either, as these seeds have chosen it."
            )
        elif found.failed.get(FIRST) or found.failed.get(BASELINE):
            yield (
                f"There is no winner: {best.name} and the same training {BASELINE} are compared only if all their "
                "trainings succeed. A lower --lr makes training steadier."
            )
        else:
            yield (
                f"There is no winner: {best.name} is the best of the search, and it is not shown to be better than the "
                f"same training {BASELINE}. More --seeds make the intervals narrower."
            )
        yield (
            f"Intervals are of 95 % over {counted(len(found.seeds), 'seed')} (Student's t, paired), none of which the "
            "search has used."
        )

    def to_markdown(self) -> str:
        """The report as Markdown."""
        lines = [f"# {self.title}", ""]
        lines += ["COCO's average precision in percent.", ""]
        if self.confirmation is not None:
            lines += [*_markdown(*self.confirmation_table()), ""]
        lines += [*(self.sentences()), ""]
        lines += ["## The search", "", "Evaluated on training images that were held out.", ""]
        lines += [*_markdown(*self.search_table()), ""]
        if failed := [trial for trial in self.trials if trial.state == "failed"]:
            lines += ["Not trained to a result:", "", *(f"- {trial.name}: {trial.reason}" for trial in failed), ""]
        lines += ["## What was done", "", *_markdown(["", ""], [[name, value] for name, value in self.plan.items()])]
        lines += ["", f"It took {duration(self.seconds)}. `kd distill {BEST} --out NEW-FOLDER` trains with the best."]
        return "\n".join(lines) + "\n"


def print_report(report: TuneReport, console: Console) -> None:
    """Print the results and where they lie."""
    head, rows = report.search_table()
    _print_table(head, rows[:SHOWN], console)
    if len(rows) > SHOWN:
        console.print(f" and {len(rows) - SHOWN} more in {MARKDOWN}", markup=False, highlight=False)
    if report.confirmation is not None:
        _print_table(*report.confirmation_table(), console)
    console.print()
    for sentence in report.sentences():
        console.print(printable(sentence), markup=False, highlight=False)
    console.print()
    places = {
        BEST: f"kd distill {report.folder / BEST} --out NEW-FOLDER trains with the best",
        MARKDOWN: "this report with all trials (also .json)",
    }
    for name, what in places.items():
        if (report.folder / name).exists():
            console.print(printable(f"{report.folder / name}  {what}"), markup=False, highlight=False, soft_wrap=True)


T = TypeVar("T")


def _with(rows: Mapping[str, Mapping[int, T]], row: str, seed: int, value: T) -> dict[str, dict[int, T]]:
    """The same table with one more value."""
    return {**{name: dict(each) for name, each in rows.items()}, row: {**rows.get(row, {}), seed: value}}


def _compared(best: str, other: str, difference: Difference) -> str:
    """`PKD has +1.2 [+0.3, +2.1] AP compared with CrossKD`, or that the two cannot be told apart."""
    other = f"the same training {BASELINE}" if other == BASELINE else other
    if difference.verdict == "not shown":
        return f"{best} cannot be told apart from {other}: {difference.text} AP"
    return f"{best} has {difference.text} AP compared with {other}"


def _print_table(head: list[str], rows: list[list[str]], console: Console) -> None:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 1))
    table.add_column(Text(printable(head[0])), overflow="fold")
    for name in head[1:]:
        table.add_column(Text(printable(name)), justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))  # words in brackets are no markup
    console.print()
    console.print(table)


def _markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    cells = [[cell.replace("|", r"\|") for cell in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], f"|---|{'---:|' * (len(head) - 1)}", *lines[1:]]


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
