"""A method with its arguments, as suites, run files and the command line write it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import Field, ValidationError, model_serializer, model_validator

from kdtoolkit.contract import Method
from kdtoolkit.errors import KDError
from kdtoolkit.methods import all_methods, published_settings
from kdtoolkit.options import check_options, did_you_mean
from kdtoolkit.sections import Section, reason, unknown_key
from kdtoolkit.yaml_text import dump_arguments, load_arguments


class _Extras(Section):
    """The arguments that all methods have in common: the arguments of `scheduled`, `held_at` and `at_strides`."""

    warmup: int | float | None = Field(None, ge=0)
    decay: int | float | None = Field(None, ge=0)
    stop: int | float | None = Field(None, ge=0)
    start: int | float | None = Field(None, ge=0)
    every: int | None = Field(None, ge=1)
    share: float | None = Field(None, gt=0, lt=1)
    strides: tuple[int, ...] | None = None

    def extend(self, method: Method) -> Method:
        """Give a method its schedule, its share and its levels."""
        if schedule := self.model_dump(exclude={"share", "strides"}, exclude_none=True):
            method.scheduled(**schedule)
        if self.share is not None:
            method.held_at(share=self.share)
        return method.at_strides(*self.strides) if self.strides else method


class MethodUse(Section):
    """A method with its arguments: `CrossKD` or, with arguments, `PKD?weight=6` or `{PKD: {weight: 6}}`.

    Published settings for certain detectors have their own names, such as `CrossKD.for_fcos`. All methods also take
    `warmup`, `decay` and `stop`, in steps or shares of the run, `share`, the share of the gradient that is held, and
    `strides`, the levels that the method is applied to.
    """

    name: str
    args: dict[str, Any]

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> dict[str, Any]:
        if isinstance(value, str) and "?" in value:
            value = _from_words(value)
        name, args = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else (value, {})
        if not isinstance(name, str) or not isinstance(args, dict):
            raise ValueError("write a method as `CrossKD` or, with arguments, as `{FGD: {foreground_weight: 0.001}}`")
        methods = _factories()
        if name not in methods:
            raise ValueError(f"unknown method '{name}'{did_you_mean(name, methods)}; there are {', '.join(methods)}")
        own, extras = _split(args)
        allowed = [*inspect.signature(methods[name]).parameters, *_Extras.model_fields]
        if any(isinstance(key, bool) for key in own):
            raise ValueError(f"{name}: YAML reads the key `on` as true, and `off` as false. Write it in quotes: 'on'")
        if unknown := [unknown_key(str(key), allowed) for key in own if key not in allowed]:
            raise ValueError("; ".join(f"{name}: {problem}" for problem in unknown))
        try:
            own = check_options(name, methods[name], own)
            method = methods[name](**own)
        except KDError as error:
            raise ValueError(str(error)) from None
        try:
            checked = _Extras.model_validate(extras)
            checked.extend(method)
        except ValidationError as error:
            reasons = [f"{name}: {reason(_Extras, problem)}" for problem in error.errors()]
            raise ValueError("; ".join(reasons)) from None
        except KDError as error:
            raise ValueError(f"{name}: {error}") from None
        return {"name": name, "args": own | checked.model_dump(exclude_unset=True)}

    @model_serializer
    def _write(self) -> str | dict[str, Any]:
        return {self.name: self.args} if self.args else self.name

    def __str__(self) -> str:
        """As the command line takes it: `PKD?weight=6`."""
        return f"{self.name}?{dump_arguments(self.args)}" if self.args else self.name

    @property
    def method(self) -> type[Method]:
        """The method's class."""
        return all_methods()[self.name.partition(".")[0]]

    @property
    def factory(self) -> Callable[..., Method]:
        """What builds the method from its own arguments: its class, or its published settings."""
        return _factories()[self.name]

    def build(self) -> Method:
        """The method, ready for a Distiller."""
        own, extras = _split(self.args)
        return _Extras(**extras).extend(self.factory(**own))


def _factories() -> dict[str, Callable[..., Method]]:
    """Everything that builds a method, by name: the classes, and their published settings."""
    methods = all_methods()
    settings = [published_settings(method) for method in methods.values()]
    return {**methods, **{name: build for each in settings for name, build in each.items()}}


def _split(args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split arguments into the method's own and the fields of `_Extras`."""
    extras = {name: args[name] for name in _Extras.model_fields if name in args}
    return {name: value for name, value in args.items() if name not in extras}, extras


def _from_words(words: str) -> dict[str, dict[str, Any]]:
    """`{PKD: {weight: 6}}` from `PKD?weight=6`. Raises ValueError."""
    name, _, query = words.partition("?")
    try:
        return {name: load_arguments(query)}
    except ValueError as error:
        raise ValueError(f"method '{words}': {error}; write arguments as {name}?name=value&name=value") from None
