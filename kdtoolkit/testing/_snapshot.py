"""Whether a model is left as it was, also if an error ends the pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdtoolkit.testing._expect import expect


@dataclass(frozen=True)
class Snapshot:
    """All that a pass must not change in a model: values, keys, submodules with their attributes, and flags."""

    values: Mapping[str, Tensor]
    keys: tuple[str, ...]
    modules: Mapping[str, Mapping[str, object]]
    flags: Mapping[str, tuple[bool, bool]]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        """The model as it is now."""
        values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return cls(
            {name: value.detach().clone() for name, value in values.items()},
            tuple(model.state_dict()),
            {name: _facts(module) for name, module in model.named_modules()},
            {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()},
        )

    def expect_of(self, model: nn.Module, when: str, *, values: bool = True) -> None:
        """Expect the model to be as it was. Without `values`, parameters and buffers may have new values."""
        now = Snapshot.of(model)
        expect(now.keys == self.keys, f"{when} the state dict has different keys: {set(now.keys) ^ set(self.keys)}")
        expect(now.modules.keys() == self.modules.keys(), f"{when} the model has different submodules")
        for name, facts in self.modules.items():
            changed = sorted({fact for fact, _ in facts.items() ^ now.modules[name].items()})
            where = name or "the model itself"
            expect(not changed, f"{when} something is changed, added or left behind in {where}: {', '.join(changed)}")
        for name, flags in self.flags.items():
            expect(now.flags[name] == flags, f"{when} requires_grad or grad of {name} is changed")
        for name, value in self.values.items() if values else ():
            expect(torch.equal(now.values[name], value), f"{when} the values of {name} are changed")


def _facts(module: nn.Module) -> dict[str, object]:
    """Attributes (with their values, if these are plain), hooks, and the forward of the class."""
    facts: dict[str, object] = {"forward of its class": type(module).forward}
    for name, value in vars(module).items():
        if "hooks" in name and isinstance(value, dict):
            facts[name] = tuple(value)
        else:
            facts[name] = value if isinstance(value, (bool, int, float, str, type(None))) else ...
    return facts


class _Interruption(Exception):
    """The error that the kit raises inside a model."""


def count_calls(model: nn.Module, step: Callable[[], object]) -> int:
    """How many calls of the model's layers `step` makes. The model must be a copy: it gets hooks."""
    return _run_hooked(model, step, 0)


def interrupt(model: nn.Module, step: Callable[[], object], call: int) -> None:
    """Raise an error inside the model during `step`, and expect that it ends the step.

    `call`: at which call of a layer, counted from 1. The model must be a copy: it gets hooks.
    """
    try:
        _run_hooked(model, step, call)
    except _Interruption:
        return
    raise AssertionError("an error raised inside the model is swallowed")


def _run_hooked(model: nn.Module, step: Callable[[], object], call: int) -> int:
    calls = 0

    def hook(module: nn.Module, args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise _Interruption

    handles = [m.register_forward_pre_hook(hook) for m in model.modules() if not any(True for _ in m.children())]
    try:
        step()
    finally:
        for handle in handles:
            handle.remove()
    return calls
