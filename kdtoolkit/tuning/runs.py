"""`kd tune`: which methods suit a pair and its data, in a folder from which a stopped search goes on."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kdtoolkit.data.opening import name_of
from kdtoolkit.engine import group
from kdtoolkit.engine.folder import TEACHER_CACHE
from kdtoolkit.errors import KDError, printable
from kdtoolkit.tuning.budget import Wanted, fit
from kdtoolkit.tuning.confirm import Confirming, begin_confirmation, further_data
from kdtoolkit.tuning.halving import Halving
from kdtoolkit.tuning.plan import candidates_of, measured, plan_of, shares_of
from kdtoolkit.tuning.report import BEST, Confirmation, TuneReport, print_report
from kdtoolkit.tuning.search import Search, split
from kdtoolkit.tuning.space import Space
from kdtoolkit.tuning.study import Study, Trial, imported
from kdtoolkit.tuning.trainer import Pace
from kdtoolkit.words import counted, duration, seconds_of
from kdtoolkit.workflow.batch import with_memory
from kdtoolkit.workflow.detecting import found_device
from kdtoolkit.workflow.display import Display
from kdtoolkit.workflow.folder import RUN_FILE, given, going_on, hold_folder, made_of
from kdtoolkit.workflow.measuring import check_teacher, measured_teacher
from kdtoolkit.workflow.options import DistillOptions, RunOptions, TrainOptions, TuneOptions, read_options
from kdtoolkit.workflow.prepare import Prepared, prepare
from kdtoolkit.workflow.report import write_file
from kdtoolkit.workflow.runs import interruptible, print_plan

STUDY = "study.jsonl"
FEWEST_TRIALS = 9  # a whole bracket
ROWS = 3  # of the confirmation


def run(options: TuneOptions) -> TuneReport:
    """Search as the options say, in the folder that they name, confirm what was found, and return all of it.

    The same options go on with a search that was stopped, and show the results of one that is finished.

    Raises KDError if something in the options or the data is wrong, if the folder holds a different run, if the teacher
    is bad on this data, if the budget is too short, or if Optuna is missing.
    """
    begun = time.monotonic()
    imported()
    if group.started() > 1:
        raise KDError("a search runs in one process: start it without torchrun")
    device = found_device(options.device)
    folder = options.out or Path("runs", f"tune-{name_of(options.data)}").absolute()
    options = options.model_copy(update={"out": folder})
    console, loud = Console(quiet=options.quiet), Console()
    with (
        interruptible(folder, lambda: (folder / STUDY).exists()),
        with_memory(),
        ExitStack() as held,
        Display(console, loud) as display,
    ):
        words = given(options)
        options, report = _enter(held, options)
        if report is not None and report.finished:
            loud.print(f"{folder} holds this search, finished. Its results:", markup=False, highlight=False)
            print_report(report, loud)
            return report
        if report is None:
            title = f"kd tune: {options.student} learns from {options.teacher}"
            console.print(printable(title), style="bold", markup=False, highlight=False, soft_wrap=True)
            session, report = _begin(options, words, title, device, display, begun)
        else:
            session = _again(options, report, device, display, begun)
        report = session.search(report)
        report = session.confirm(report)
        report = session.finish(report)
    print_report(report, loud)
    return report


class _Session:
    """One start of a search. `base`: the run on all its training images. `begun`: when it began, by the clock."""

    def __init__(self, base: Prepared, device: torch.device, display: Display, begun: float) -> None:
        options = base.options
        assert isinstance(options, TuneOptions)
        self.options = options
        self.base = base
        self._device = device
        self._display = display
        self._pace = Pace()
        self._begun = begun
        size = int(options.image_size or 0)  # chosen by now
        self.further = further_data(options, base.images, size, display.counting)

    def search(self, report: TuneReport) -> TuneReport:
        """Try settings until all trials are made, or the time is used up; write the run file of the best trial.

        Its results are in the folder before the confirmation begins.
        """
        self._pace = Pace()
        if report.searched:
            return report
        halving = self._halving(report)
        space = Space(report.candidates, shares_of(self.options), self.options.stop)
        study = Study(report.folder / STUDY, space, self.options.seed)
        before, deadline = report.seconds, self._deadline(report)

        def spent() -> float:
            return before + time.monotonic() - self._begun

        def told(trial: Trial, steps: int) -> None:
            self._pace.add(steps)
            step = trial.step if trial.state != "failed" else trial.step + steps
            made = report.model_copy(update={"trials": study.trials(), "seconds": spent()})
            made.write()
            place = next(place for place, each in enumerate(made.trials, 1) if each.number == trial.number)
            found = f"not trained: {trial.reason}" if trial.state == "failed" else f"{trial.ap:.1f} AP"
            self._display.line(
                f"trial {place} of {report.planned}, to step {step} of {halving.steps}: "
                f"{trial.name}: {found}{self._left(made)}"
            )

        Search(
            prepared=replace(self.base, images=split(self.base.images, self.options.holdout)),
            study=study,
            halving=halving,
            folder=report.folder,
            device=self._device,
            display=self._display,
            over=lambda: spent() > deadline,
            told=told,
        ).run()
        report = report.model_copy(update={"trials": study.trials(), "seconds": spent(), "searched": True})
        if report.best is not None:
            best = best_options(self.base.run_file, report)
            write_file(report.folder / BEST, best.to_yaml().encode())
        report.write()
        return report

    def confirm(self, report: TuneReport) -> TuneReport:
        """Train the best trial, the next one and no teacher with fresh seeds."""
        options = self.options
        found = report.confirmation or begin_confirmation(report.trials, options.seed, options.seeds)
        if found is None or not options.seeds:
            return report
        before, begun = report.seconds, time.monotonic()

        def told(found: Confirmation, row: str, seed: int) -> None:
            nonlocal report
            self._pace.add(report.steps)
            seconds = before + time.monotonic() - begun
            report = report.model_copy(update={"confirmation": found, "seconds": seconds})
            report.write()
            if reason := found.failed.get(row, {}).get(seed):
                scores = f"not trained: {reason}"
            else:
                scores = ", ".join(f"{rows[row][seed]:.1f} AP ({data})" for data, rows in found.ap.items())
            self._display.line(f"confirmation, {row}, seed {seed}: {scores}{self._left(report)}")

        Confirming(options, self.base, self.further, report.folder, self._device, self._display, told).run(found)
        return report

    def finish(self, report: TuneReport) -> TuneReport:
        """Note that all is done, and delete the teacher cache."""
        report = report.model_copy(update={"finished": True})
        report.write()
        shutil.rmtree(report.folder / TEACHER_CACHE, ignore_errors=True)
        return report

    def _halving(self, report: TuneReport) -> Halving:
        return Halving(report.steps, report.planned, self.options.reduction)

    def _deadline(self, report: TuneReport) -> float:
        """Seconds after which no further trial begins: the budget without what the confirmation takes."""
        if self.options.budget is None:
            return float("inf")
        search, after = self._halving(report).cost, self._whole * report.steps
        return seconds_of(self.options.budget) * search / (search + after)

    @property
    def _whole(self) -> int:
        return ROWS * self.options.seeds

    def _left(self, report: TuneReport) -> str:
        """`; about 12 min left`: the trials, which end when their time is over, and the confirmation."""
        trials, whole = 0.0, self._whole
        if not report.searched:
            steps = self._halving(report).cost - sum(trial.step for trial in report.trials)
            trials = max(0.0, min(self._pace.left(steps) or 0.0, self._deadline(report) - report.seconds))
        if report.confirmation is not None:
            whole -= report.confirmation.trainings
        left = trials + (self._pace.left(whole * report.steps) or 0.0)
        return f"; about {duration(left)} left" if left else ""


def _begin(
    options: TuneOptions, words: dict[str, Any], title: str, device: torch.device, display: Display, begun: float
) -> tuple[_Session, TuneReport]:
    """Choose what is tried and for how long, print the plan, and measure the teacher."""
    assert options.out is not None
    base = prepare(options, device, display.counting)
    tried, notes = candidates_of(options, base)
    space = Space(tried, shares_of(options), options.stop)
    wanted = Wanted(
        trials=options.trials or max(FEWEST_TRIALS, 2 * len(tried)),
        most_trials=space.size,
        most_steps=base.config.steps,
        reduction=options.reduction,
        held_out=len(split(base.images, options.holdout).val),
        whole=ROWS * options.seeds,
        evaluated=base.evaluations * len(base.images.val),
    )
    costs = None
    if options.budget is None:
        halving = Halving(wanted.most_steps, min(wanted.trials, wanted.most_trials), wanted.reduction)
    else:
        costs = measured(base, tried[0], device, display)
        halving = fit(seconds_of(options.budget) - (time.monotonic() - begun), costs, wanted)
    base = _of_length(options, base, halving.steps, device, display)
    session = _Session(base, device, display, begun)
    plan = plan_of(base, session.further, halving, tried, wanted)
    print_plan(plan, display.console)
    first, warmup = halving.rungs[0], base.config.warmup_steps
    if first < 2 * warmup:
        notes.append(
            f"trials are compared first after {counted(first, 'step')}, and the warm-up takes {warmup}, so that says "
            "little about them: train longer, give more time, or use `kd tune --reduction 2`, which lets more go on"
        )
    if _trained_on(options.teacher, options.data):
        notes.append(
            "the teacher was trained on this data set, so it is better on the held-out images than on new ones. The "
            "search prefers what copies it more than new images would"
            f"{'; the confirmation is not affected' if options.seeds else ''}"
        )
    for note in (*base.notes, *notes):
        display.line(f"note: {note}")
    report = TuneReport(
        title=title,
        folder=options.out,
        plan={name: f"{choice.value} ({choice.why})" for name, choice in plan.items()},
        given=words,
        made_of=made_of(base),
        candidates=tried,
        steps=halving.steps,
        planned=halving.trials,
        val_images=len(base.images.val),
        costs=costs,
        teacher=_teacher(base, device, display),
    )
    write_file(options.out / RUN_FILE, base.run_file.to_yaml().encode())
    report.write()
    return session, report


def _trained_on(teacher: str, data: Path) -> bool:
    """Whether a teacher is the folder of a run that trained on a data set."""
    path = Path(teacher, RUN_FILE)
    if not path.is_file():
        return False
    text = path.read_text("utf-8", errors="replace")
    kinds: tuple[type[RunOptions], ...] = (TrainOptions, DistillOptions)
    return any(
        text.startswith(kind.heading()) and read_options(kind, path).data.resolve() == data.resolve() for kind in kinds
    )


def _again(options: TuneOptions, report: TuneReport, device: torch.device, display: Display, begun: float) -> _Session:
    """Go on with a search that was stopped. Raises KDError if it was of different data or weights."""
    base = prepare(_with_steps(options, report.steps), device, display.counting)
    if changed := report.changed(made_of(base)):
        raise KDError(
            f"{' and '.join(changed)} changed since the search in {report.folder} began: put back what was there, or "
            f"choose a new folder (--out {report.folder}-2)"
        )
    display.line(f"{report.folder} holds this search, and it goes on")
    return _Session(base, device, display, begun)


def _of_length(options: TuneOptions, base: Prepared, steps: int, device: torch.device, display: Display) -> Prepared:
    """The run with so many steps, and all that depends on their number."""
    if steps == base.config.steps:
        return base
    found = prepare(_with_steps(options, steps), device, display.counting, base.images)
    return replace(found, run_file=base.run_file)


def _with_steps(options: TuneOptions, steps: int) -> TuneOptions:
    return options.model_copy(update={"steps": steps, "epochs": None})


def best_options(run_file: Any, report: TuneReport) -> DistillOptions:
    """The options of `kd distill` that train with the best trial. `run_file`: the options of the search."""
    own = DistillOptions.model_fields.keys() - {"out", "budget", "compare_baseline", "quiet"}
    kept = {name: value for name, value in run_file.model_dump(exclude_unset=True).items() if name in own}
    assert report.best is not None
    return DistillOptions.model_validate({**kept, "method": list(report.best.methods)})


def _enter(held: ExitStack, options: TuneOptions) -> tuple[TuneOptions, TuneReport | None]:
    """Hold the search's folder; the options with what it has settled, and its report."""
    folder = options.out
    assert folder is not None
    hold_folder(held, folder)
    report = TuneReport.read(folder)
    if report is None or not (folder / RUN_FILE).exists():
        return options, None  # it was stopped before the first trial: nothing is lost
    return going_on(options, report.given, read_options(TuneOptions, folder / RUN_FILE)), report


def _teacher(base: Prepared, device: torch.device, display: Display) -> Any:
    found = measured_teacher(base, device, display)
    if found is not None:
        check_teacher(base, found, None, device, display)
    return found
