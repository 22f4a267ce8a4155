"""YAML as users write it: in suites and run files, and in the arguments of a name (`PKD?weight=1e-3`)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

import yaml

from kdtoolkit.errors import KDError

# YAML 1.1, which PyYAML reads, takes 1e-3 for text, since it has no point. For YAML 1.2 and for users it is a number.
_FLOAT = "tag:yaml.org,2002:float"
_EXPONENT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
_PLAIN = "[]{}(),:\"'/ "  # what stays as it is in arguments, because it separates none


class Loader(yaml.SafeLoader):
    """Reads YAML; `1e-3` is a number."""


class _Dumper(yaml.SafeDumper):
    """Writes YAML; the text `1e-3` is put in quotes."""


for _each in (Loader, _Dumper):
    _each.add_implicit_resolver(_FLOAT, _EXPONENT, list("-+.0123456789"))


def load(text: str) -> Any:
    """The value that YAML text holds. Raises yaml.YAMLError, or ValueError for a date that does not exist."""
    return yaml.load(text, Loader)


def dump(value: Any, *, width: int = 120) -> str:
    """The value as YAML text, in the order of its keys."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width)
    return text


def load_arguments(query: str) -> dict[str, Any]:
    """Arguments that are written as `name=value&name=value`, with values in YAML and escapes such as %26.

    Raises ValueError that says what is wrong: a part is no argument, it has no value, or a name is given twice.
    """
    found: dict[str, Any] = {}
    for part in query.split("&") if query else []:
        name, equals, value = (unquote(each) for each in part.partition("="))
        if not name or not equals:
            raise ValueError(f"{part!r} is no name=value")
        if not value.strip():
            raise ValueError(f"{name} has no value; for an empty text write {name}=''")
        if name in found:
            raise ValueError(f"{name} is given twice")
        try:
            found[name] = load(value)
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"{name}: {value!r} is not YAML ({getattr(error, 'problem', error)})") from error
    return found


def dump_arguments(args: Mapping[str, object]) -> str:
    """Arguments as `load_arguments` takes them."""
    return "&".join(f"{name}={quote(_word(value), safe=_PLAIN)}" for name, value in args.items())


def _word(value: object) -> str:
    if isinstance(value, str) and load(value) == value:
        return value
    if isinstance(value, float) and float(short := f"{value:g}") == value:  # 6, not 6.0
        return short
    return json.dumps(value)


def split_name(name: str, args: Mapping[str, object] | None = None) -> tuple[str, dict[str, object]]:
    """Split a model's name from its arguments. `args` override those in the name.

    Raises KDError if arguments are not written as `?name=value&name=value`.
    """
    path, _, query = name.partition("?")
    try:
        return path, {**load_arguments(query), **(args or {})}
    except ValueError as error:
        raise KDError(f"model {name!r}: {error}; write arguments as ?name=value&name=value") from error


def with_arguments(path: str, args: Mapping[str, object]) -> str:
    """Write a model's name with its arguments, as `build_model` takes it."""
    return f"{path}?{dump_arguments(args)}" if args else path
