"""The check of options against type hints. Methods, schedules, suites and other packages all use it."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal

from kdtoolkit.errors import KDError


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns ` (did you mean 'x'?)` if a known word is similar, else an empty string."""
    lower = {name.lower(): name for name in known}
    close = get_close_matches(word.lower(), lower, 1)
    return f" (did you mean '{lower[close[0]]}'?)" if close else ""


def check_options(owner: str, function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Check options against the type hints of the function or class that takes them.

    Returns the options, with whole numbers turned into floats where the hint is `float`. It checks the hints
    `Literal`, `float` (which must be finite), `int`, `bool`, `str` and unions of them; a value with any other hint
    passes. Some names imply a range: a weight (`weight`, `box_weight`) must be 0 or more, a temperature above 0.

    Raises KDError that names the owner, the option, its value and what is allowed.
    """
    if isinstance(function, partial):
        function = function.func
    try:
        hints = typing.get_type_hints(getattr(function, "__init__") if isinstance(function, type) else function)  # noqa: B009
    except (NameError, TypeError):  # hints that are only imported for type checkers; an object that can be called
        hints = {}
    checked = {}
    for name, value in options.items():
        if problem := _problem(hints.get(name), name, value):
            raise KDError(f"{owner}({name}={value!r}): {problem}")
        checked[name] = float(value) if hints.get(name) is float else value
    return checked


def bound_options(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a call by name. Raises Python's own TypeError if they do not fit the signature."""
    signature = inspect.signature(function)
    bound = signature.bind(*args, **kwargs).arguments
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: value for name, value in bound.items() if signature.parameters[name].kind in plain}


def _problem(hint: Any, name: str, value: Any) -> str | None:
    """What is wrong with a value, as the end of a sentence; None if it is right."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        # The types must be equal too, because True == 1.
        if any(type(value) is type(each) and value == each for each in inner):
            return None
        return f"must be {' or '.join(map(repr, inner))}{did_you_mean(str(value), map(str, inner))}"
    if origin in (typing.Union, types.UnionType):
        problems = [_problem(each, name, value) for each in inner if each is not type(None)]
        if None in problems or (value is None and type(None) in inner):
            return None
        return " or ".join(filter(None, problems)).replace(" or must be", " or")
    if hint is float:
        return _number_problem(name, value)
    if hint is int and (not isinstance(value, Integral) or isinstance(value, bool)):
        return "must be a whole number"
    if hint is bool and not isinstance(value, bool):
        return "must be True or False"
    if hint is str and not isinstance(value, str):
        return "must be a string"
    return None


def _number_problem(name: str, value: Any) -> str | None:
    if not isinstance(value, Real) or isinstance(value, bool):
        return "must be a number"
    if not math.isfinite(value):
        return "must be finite"
    if value < 0 and name.endswith("weight"):
        return "must be 0 or more"
    if value <= 0 and name.endswith("temperature"):
        return "must be above 0"
    return None
