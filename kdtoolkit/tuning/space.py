"""What a search tries: methods alone and together, their weights or shares of the gradient, and where they end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from kdtoolkit.contract import DetectorSpec
from kdtoolkit.errors import KDError
from kdtoolkit.method_use import MethodUse
from kdtoolkit.verdicts import judge_pair
from kdtoolkit.workflow.auto import choose, scaled

Uses = tuple[MethodUse, ...]
Params = dict[str, str | float]
"""A setting as Optuna keeps it: `methods`, `share` and `stop`."""

BASELINE = "without teacher"
OWN, WHOLE = "own weights", "whole run"
_SCHEDULE = {"start", "warmup", "decay", "stop", "every"}


class Candidate(BaseModel):
    """Methods that are tried together.

    `uses`: as they were given. `own`: the same with the weights that they have if no share is held; None if the
    student's library needs different weights, and these cannot be given.
    """

    model_config = ConfigDict(frozen=True)

    uses: Uses
    own: Uses | None

    @property
    def name(self) -> str:
        """`CrossKD + PKD`."""
        return in_words(self.uses)


def in_words(uses: Sequence[MethodUse]) -> str:
    """Methods as the plan and tables show them; the training without teacher has none."""
    return " + ".join(map(str, uses)) or BASELINE


def given_candidates(uses: Uses) -> list[Candidate]:
    """The methods that the user named: each alone, and all together if they are different methods."""
    sets: list[Uses] = [(use,) for use in _different(uses)]
    if len(uses) > 1 and len({use.method for use in uses}) == len(uses):
        sets.append(uses)
    return [Candidate(uses=each, own=each) for each in sets]


def candidates(student_spec: DetectorSpec, teacher_spec: DetectorSpec, library: str, factor: float) -> list[Candidate]:
    """All methods that work for a pair, those first that `auto` chooses, and these also together.

    `factor`: what the student's library multiplies its own loss by. Raises IncompatibleError if no method works.
    """
    first = choose(student_spec, teacher_spec, library).methods
    verdicts = judge_pair(student_spec, teacher_spec)
    rest = [
        MethodUse.model_validate(verdict.settings or name)
        for name, verdict in verdicts.items()
        if verdict.reason is None
    ]
    sets = [first, *((use,) for use in _different([*first, *rest]) if (use,) != first)]
    return [Candidate(uses=each, own=_own(each, factor)) for each in sets]


def _different(uses: Sequence[MethodUse]) -> list[MethodUse]:
    return list({str(use): use for use in uses}.values())


def _own(uses: Uses, factor: float) -> Uses | None:
    if factor == 1:
        return uses
    try:
        return tuple(scaled(use, factor) for use in uses)
    except KDError:
        return None


@dataclass(frozen=True)
class Space:
    """All settings of a search: each candidate with each share and each end. The user's own arguments stay."""

    candidates: tuple[Candidate, ...]
    shares: tuple[float, ...]
    stops: tuple[float, ...]

    @property
    def choices(self) -> dict[str, tuple[str | float, ...]]:
        """The values of each part of a setting."""
        return {
            "methods": tuple(candidate.name for candidate in self.candidates),
            "share": (OWN, *self.shares),
            "stop": (WHOLE, *self.stops),
        }

    @property
    def size(self) -> int:
        """How many different settings there are."""
        return len({in_words(self.uses(params)) for params in self.settings()})

    def uses(self, params: Mapping[str, Any]) -> Uses:
        """The methods of a setting."""
        candidate = next(each for each in self.candidates if each.name == params["methods"])
        share, stop = params["share"], params["stop"]
        if share == OWN and candidate.own is None:
            share = self.shares[0]
        uses = candidate.uses if share != OWN or candidate.own is None else candidate.own
        # The additions are valid for all methods, and a check of each setting would take seconds in all.
        return tuple(
            use.model_copy(update={"args": use.args | _ended(given, stop) | _held(given, share)})
            for use, given in zip(uses, candidate.uses, strict=True)
        )

    def first(self) -> list[Params]:
        """What is tried first: each candidate as it is."""
        return [{"methods": candidate.name, "share": OWN, "stop": WHOLE} for candidate in self.candidates]

    def settings(self) -> Iterator[Params]:
        """All settings, in a fixed order. Some of them may be of the same methods, if the user's arguments stay."""
        choices = self.choices
        for methods in choices["methods"]:
            for share in choices["share"]:
                for stop in choices["stop"]:
                    yield {"methods": methods, "share": share, "stop": stop}


def _held(given: MethodUse, share: str | float) -> dict[str, Any]:
    fixed = "share" in given.args or any(name.endswith("weight") for name in given.args)
    return {} if share == OWN or fixed else {"share": share}


def _ended(given: MethodUse, stop: str | float) -> dict[str, Any]:
    return {} if stop == WHOLE or _SCHEDULE & given.args.keys() else {"stop": stop}
