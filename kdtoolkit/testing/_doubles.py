"""Doubles: a method that uses everything, a view that notes what is taken, an adapter that shows changed tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit.contract import (
    Batch,
    Capability,
    DetectorAdapter,
    Exchange,
    HeadTrace,
    Method,
    Predictions,
    Priors,
    Target,
    View,
)
from kdtoolkit.contract.lazy import Lazy

T = TypeVar("T")


class Probe(Method):
    """Uses all that a detector shows, as a method might."""

    terms = ("probe",)
    paper = ""

    def __init__(self, needs: frozenset[Capability]) -> None:
        super().__init__()
        self.needs = needs

    def forward(self, exchange: Exchange) -> dict[str, Tensor]:
        """The mean of the student's features; with stages, also distances between predictions."""
        total = torch.stack([level.float().mean() for level in exchange.student.features]).sum()
        if Capability.STAGES in self.needs:
            pair = exchange.matched()
            for i, state in enumerate(pair.student.states):
                crossed = pair.finish_with_teacher(state, i)
                total = total + (crossed.logits - pair.teacher.predictions.logits).square().mean()
        return {"probe": total}


_TAKEN = {
    "head": Capability.PREDICTIONS,
    "assignment": Capability.ASSIGNMENT,
    "own_assignment": Capability.ASSIGNMENT,
}
_RUN = {
    "layers": Capability.PREDICTIONS,
    "resume": Capability.STAGES,
    "assign": Capability.ASSIGNMENT,
    "queries_at": Capability.PLACED_QUERIES,
}


class WatchedView(View):
    """A view that notes in `taken` what a method takes of it. The head has run, and the losses if it is a student's."""

    def __init__(self, adapter: DetectorAdapter, batch: Batch, *, frozen: bool) -> None:
        self.taken: set[Capability] = set()
        maps = adapter.features(batch)
        trace = adapter.head(maps, batch)
        assignment = None if frozen else adapter.task_losses(trace, batch)[1]
        super().__init__(self._watched(adapter), batch, maps, self._shown(trace), assignment, frozen=frozen)
        self.features = self._noting(Capability.FEATURES, maps)
        self.taken.clear()

    def __getattribute__(self, name: str) -> Any:
        if name in _TAKEN:
            self.taken.add(_TAKEN[name])
        return super().__getattribute__(name)

    def run_head(self, priors: Priors | None = None) -> HeadTrace:
        """Run the head once more."""
        self.taken.add(Capability.PREDICTIONS)
        return self._shown(super().run_head(priors))

    def _shown(self, trace: HeadTrace) -> HeadTrace:
        return replace(trace, states=self._noting(Capability.STAGES, trace.states))

    def _noting(self, capability: Capability, values: Sequence[T]) -> Sequence[T]:
        def value(i: int) -> T:
            self.taken.add(capability)
            return values[i]

        return Lazy(len(values), value)

    def _watched(self, adapter: DetectorAdapter) -> DetectorAdapter:
        """A second adapter of the same model, which notes what it is asked for."""

        def noting(name: str) -> Callable[..., object]:
            def run(*args: Any, **kwargs: Any) -> object:
                taken = self.taken | {_RUN[name]}
                result = getattr(adapter, name)(*args, **kwargs)
                self.taken.clear()  # what the adapter itself has looked at does not count
                self.taken.update(taken)
                return result

            return run

        second = copy.copy(adapter)
        vars(second).update({name: noting(name) for name in _RUN})
        return second


def transformed(
    adapter: DetectorAdapter,
    levels: Callable[[Tensor], Tensor] = lambda level: level,
    predictions: Callable[[Predictions], Predictions] = lambda predictions: predictions,
    note: Callable[[str], None] = lambda what: None,
    padding: int = 0,
    exact: bool = False,
) -> DetectorAdapter:
    """A second adapter of the same model, which changes what it shows.

    `levels`, `predictions`: functions that each level and all predictions go through. `note`: called with "features" or
    "head" at each pass. `padding`: how many pixels it pads the canvas further when it is prepared like another batch.
    `exact`: whether the model computes in float32 under autocast too.
    """
    cls: Any = type(adapter)
    device = next(adapter.model.parameters()).device.type
    precision = partial(torch.autocast, device, enabled=False) if exact else nullcontext

    class Transformed(cls):  # type: ignore[misc]
        def prepare(
            self, images: Sequence[Tensor], targets: Sequence[Target] | None = None, like: Batch | None = None
        ) -> Batch:
            if like is not None and padding:
                like = replace(like, images=F.pad(like.images, (0, padding, 0, padding)))
            prepared: Batch = super().prepare(images, targets, like)
            return prepared

        def features(self, batch: Batch) -> tuple[Tensor, ...]:
            note("features")
            with precision():
                return tuple(map(levels, super().features(batch)))

        def head(self, *args: Any, **kwargs: Any) -> HeadTrace:
            note("head")
            with precision():
                trace: HeadTrace = super().head(*args, **kwargs)
            return replace(trace, predictions=predictions(trace.predictions))

        def layers(self, trace: HeadTrace) -> tuple[HeadTrace, ...]:
            with precision():
                *inner, last = super().layers(trace)
            return (*(replace(each, predictions=predictions(each.predictions)) for each in inner), last)

        def resume(self, *args: Any, **kwargs: Any) -> Predictions:
            with precision():
                return predictions(super().resume(*args, **kwargs))

    second = copy.copy(adapter)
    second.__class__ = Transformed
    return second
