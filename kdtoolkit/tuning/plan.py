"""What a search will do, before its first trial: what is tried, what a step costs here, the plan with its reasons."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

import torch

from kdtoolkit.engine.train import train
from kdtoolkit.errors import KDError
from kdtoolkit.libraries import library_of_name
from kdtoolkit.tuning.budget import Costs, Wanted
from kdtoolkit.tuning.halving import Halving
from kdtoolkit.tuning.space import Candidate, candidates, given_candidates
from kdtoolkit.words import counted
from kdtoolkit.workflow.defaults import Choice
from kdtoolkit.workflow.display import Display
from kdtoolkit.workflow.measuring import evaluated
from kdtoolkit.workflow.options import TuneOptions
from kdtoolkit.workflow.prepare import Prepared, specs_of, with_methods

MEASURED_STEPS = 12  # from which the pace is estimated


def candidates_of(options: TuneOptions, base: Prepared) -> tuple[tuple[Candidate, ...], list[str]]:
    """What is tried, and a note for each candidate that is left out. Raises KDError if none is left."""
    if options.method != "auto":
        found = given_candidates(options.method)
        for candidate in found:
            with_methods(base, candidate.uses)  # raises KDError for what training would refuse
        return tuple(found), []
    library = library_of_name(options.student)
    found, notes, kept = candidates(*specs_of(base), library.prefix if library else "", base.factor), [], []
    for candidate in found:
        try:
            with_methods(base, candidate.uses)
        except KDError as error:
            notes.append(f"{candidate.name} is not tried: {error}")
            continue
        if candidate.own is None and not shares_of(options):
            notes.append(f"{candidate.name} is not tried: its weights cannot be given, and no share is tried")
            continue
        kept.append(candidate)
    if not kept:
        raise KDError("none of the methods can be tried: " + "; ".join(notes))
    return tuple(kept), notes


def shares_of(options: TuneOptions) -> tuple[float, ...]:
    """The shares that are tried; none with `compile`, which cannot hold them."""
    return () if options.train.get("compile") else options.share


def measured(base: Prepared, candidate: Candidate, device: torch.device, display: Display) -> Costs:
    """Train a few steps that are thrown away, and evaluate once."""
    student, distiller = with_methods(base, candidate.uses)
    steps = min(MEASURED_STEPS, base.config.steps)
    result = train(
        distiller,
        base.images.train,
        base.config,
        seed=base.options.seed,
        device=device,
        unlabelled=base.images.unlabelled,
        report=display.part("measuring the pace", steps),
        until=steps,
    )
    begun = time.monotonic()
    found = evaluated(base, student, device, display, "the student, to measure the pace")
    costs = Costs(step=result.step_ms / 1000, image=(time.monotonic() - begun) / found.images)
    display.line(
        f"a step takes about {1000 * costs.step:.3g} ms, the evaluation of an image {1000 * costs.image:.3g} ms"
    )
    return costs


def plan_of(
    base: Prepared, further: Iterable[str], halving: Halving, tried: tuple[Candidate, ...], wanted: Wanted
) -> dict[str, Choice]:
    """What the search does, and why, after what each of its trainings does.

    `further`: the names of the data sets that the confirmation evaluates on besides.
    """
    options = base.options
    assert isinstance(options, TuneOptions)
    plan = {name: choice for name, choice in base.plan.items() if name != "evaluation"}
    run_file = base.run_file
    assert isinstance(run_file, TuneOptions)
    chosen = "all that work for the pair" if run_file.method == "auto" else "you chose them"
    names = ", ".join(candidate.name for candidate in tried)
    plan["method"] = Choice(names, chosen)
    shares, stops = (", ".join(f"{each:g}" for each in values) for values in (shares_of(options), options.stop))
    plan["weights"] = Choice(
        f"own, or a share of {shares}" if shares else "own", "a share of the gradient means the same for all methods"
    )
    plan["end"] = Choice(
        f"of the run, or at {stops} of it" if stops else "of the run", "some methods help at first only"
    )
    rungs = " and ".join(map(str, halving.rungs[:-1]))
    held_out = f"{wanted.held_out} training images are held out to evaluate on"
    plan["search"] = Choice(
        f"{counted(halving.trials, 'trial')}; one of {options.reduction} goes on after {rungs} steps",
        f"{held_out}; the search sees no validation or test image",
    )
    whole = halving.cost / halving.steps
    plan["confirmation"] = Choice("none", "the seeds to confirm with are 0")
    if options.seeds:
        further = "".join(f", and {name}" for name in further)
        plan["confirmation"] = Choice(
            f"the best, the next one and no teacher: {counted(options.seeds, 'fresh seed')} each, on "
            f"{counted(len(base.images.val), 'validation image')}{further}",
            "the best of many trials is good by luck as well",
        )
    to_confirm = f"{whole:.1f} for the search, {wanted.whole} to confirm it"
    plan["cost"] = Choice(
        f"about {whole + wanted.whole:.1f} trainings", to_confirm if wanted.whole else "all of it for the search"
    )
    if options.budget is not None:
        plan["schedule"] = replace(plan["schedule"], why="as many steps as the budget allows")
        plan["budget"] = Choice(options.budget, "it decides the steps of a training, and how many trials there are")
    return plan
