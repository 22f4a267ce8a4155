"""Runs checks one by one, and reports the outcome of each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from kdtoolkit.errors import KDError

SEED = 0

Check = Callable[[Any], None]
"""Checks one promise on a case. Raises AssertionError if it is broken, and LeftOut if it does not apply."""


class ConformanceError(AssertionError):
    """Promises of the contract are broken. The message names the checks, the adapter or method, and the numbers."""


class LeftOut(Exception):
    """The check does not apply; the message says why."""


@dataclass(frozen=True)
class Result:
    """The outcome of one check and, unless it passed, the reason."""

    outcome: Literal["passed", "known failure", "left out", "refused"]
    reason: str = ""


@dataclass(frozen=True)
class ConformanceReport:
    """The results of all checks of one adapter or method, by the checks' names. `print` shows them."""

    subject: str
    results: Mapping[str, Result]

    @property
    def refused(self) -> str | None:
        """Why the method refuses the pair; None if it does not."""
        return next((r.reason for r in self.results.values() if r.outcome == "refused"), None)

    def __str__(self) -> str:
        """One line a check."""
        lines = (
            f"  {name}: {result.outcome}" + (f" ({result.reason})" if result.reason else "")
            for name, result in self.results.items()
        )
        return "\n".join((self.subject, *lines))


def by_name(*checks: Check) -> dict[str, Check]:
    """The checks by name: the function's name without the underscore."""
    return {check.__name__.strip("_"): check for check in checks}


def run(
    subject: str, checks: Mapping[str, Check], case: object, known: Mapping[str, str], only: Collection[str] = ()
) -> ConformanceReport:
    """Run each check on the case, each with the same seed. `only`: the names of the checks to run; empty means all.

    Raises ConformanceError if checks fail, or if a check of `known` does not fail; checks that fail in the same way
    share a sentence. Raises KDError if `known` or `only` has a name that no check has.
    """
    for what, names in (("known", known), ("only", only)):
        if unknown := sorted(set(names) - checks.keys()):
            raise KDError(f"{what}: there is no check {', '.join(unknown)}; the checks are {', '.join(checks)}")
    results: dict[str, Result] = {}
    failures: dict[str, list[str]] = {}
    cause: Exception | None = None
    for name, check in checks.items():
        if only and name not in only:
            continue
        result, error = _run_one(check, case)
        if name not in known:
            results[name] = result
            if error is not None:
                message = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
                failures.setdefault(message, []).append(name)
                cause = cause or error
        elif error is not None:
            results[name] = Result("known failure", known[name])
        else:
            what = f"is left out ({result.reason})" if result.reason else "passes"
            message = f"{what}, so it is no known failure: remove its reason from `known` ({known[name]})"
            failures.setdefault(message, []).append(name)
    if failures:
        lines = "".join(f"\n  {', '.join(names)}: {message}" for message, names in failures.items())
        count = sum(map(len, failures.values()))
        raise ConformanceError(f"{subject}: {count} of {len(only or checks)} checks failed{lines}") from cause
    return ConformanceReport(subject, results)


def _run_one(check: Check, case: object) -> tuple[Result, Exception | None]:
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        try:
            check(case)
        except LeftOut as left_out:
            return Result("left out", str(left_out)), None
        except Exception as error:  # any error of the detector fails this check alone
            return Result("passed"), error
    return Result("passed"), None
