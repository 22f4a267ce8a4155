"""`kd distill --budget`: a part of the time is spent on a search, the rest on training with the best that it found."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from kdtoolkit.data.opening import name_of
from kdtoolkit.errors import KDError, printable
from kdtoolkit.tuning.budget import SEARCH, rest
from kdtoolkit.tuning.report import TuneReport
from kdtoolkit.tuning.runs import run as tune
from kdtoolkit.words import counted, duration, seconds_of
from kdtoolkit.workflow.folder import RUN_FILE, hold_folder
from kdtoolkit.workflow.options import DistillOptions, TuneOptions
from kdtoolkit.workflow.report import Report
from kdtoolkit.workflow.runs import run

EVALUATIONS = 13  # of the student in a training, before and after it, and of the teacher


def spend(options: DistillOptions) -> Report:
    """Distil in a budget of time: search first, in a folder beside the run's.

    The same options go on where it was stopped, in the search or after it. Raises KDError.
    """
    assert options.budget is not None
    folder = options.out or Path("runs", f"distill-{name_of(options.data)}").absolute()
    budget = seconds_of(options.budget)
    search = folder.with_name(f"{folder.name}-search")
    with ExitStack() as held:
        hold_folder(held, folder)  # raises KDError before any time is spent
    if (folder / RUN_FILE).exists() and not (search / RUN_FILE).exists():
        raise KDError(f"{folder} holds a run that no search belongs to: choose a new folder (--out {folder}-2)")
    console = Console(quiet=options.quiet)
    console.print(
        printable(
            f"budget {options.budget}: about {duration(SEARCH * budget)} for a search in {search}, the rest to "
            "train with the best that it finds"
        ),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    found = tune(_search_options(options, search, SEARCH * budget))
    trained, why, note = _training_options(options, folder, budget, found)
    console.print(printable(note), markup=False, highlight=False, soft_wrap=True)
    return run(trained, {"method": "the search chose it", "schedule": why})


def _search_options(options: DistillOptions, folder: Path, seconds: float) -> TuneOptions:
    kept = options.model_dump(exclude_unset=True, exclude={"out", "budget", "compare_baseline"})
    return TuneOptions.model_validate({**kept, "out": folder, "budget": f"{seconds:.0f}s", "seeds": 0})


def _training_options(
    options: DistillOptions, folder: Path, budget: float, found: TuneReport
) -> tuple[DistillOptions, str, str]:
    """The run that uses what is left, the reason of its length for the plan, and a sentence about it.

    It has at least the steps of a training in the search, which the best trial was chosen for: if the time is too short
    for them, the budget is exceeded, and the sentence says so. All depend on the finished search alone, so that the
    run can go on.
    """
    best = found.best
    if best is None:
        raise KDError(
            f"no trial of the search could be trained, so there is nothing to train with; {found.folder} says why. "
            "Name a --method, or leave budget out"
        )
    assert found.costs is not None  # a search with a budget has measured them
    step = best.seconds / best.step  # of these methods, and with the reading of images
    left = budget - found.seconds
    evaluating = EVALUATIONS * found.val_images * found.costs.image
    trainings = 1 + options.compare_baseline
    steps = rest(left, step, evaluating, trainings)
    taken = f"the search took {duration(found.seconds)} of {options.budget}"
    each = "" if trainings == 1 else " each with and without teacher"
    if steps >= found.steps:
        why = "as many steps as the search left time for"
        note = f"{taken}; in the rest {best.name} is trained for {counted(steps, 'step')}{each}"
    else:
        steps, why = found.steps, "as many steps as a training of the search"
        needed = trainings * (steps * step + evaluating)
        note = (
            f"note: {taken}, and {duration(max(0.0, left))} are left. {best.name} is trained for "
            f"{counted(steps, 'step')}{each} all the same, as many as a training of the search has. That takes about "
            f"{duration(needed)}, {duration(trainings * evaluating)} of it for evaluations, so the budget is exceeded"
        )
    kept = options.model_dump(exclude_unset=True, exclude={"budget"})
    fields = {**kept, "method": list(best.methods), "steps": steps, "out": folder}
    return DistillOptions.model_validate(fields), why, note
