"""Detectors whose queries start at the encoder's best boxes: what RT-DETR, D-FINE, LW-DETR and similar ones share.

These detectors do not know padding. Boxes are relative to the canvas, and padding is treated like any part of an image.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from kdtoolkit.adapters.transformers.base import (
    Queries,
    TransformersAdapter,
    from_state,
    level_layout,
    to_state,
    to_tokens,
)
from kdtoolkit.contract import Batch, Detections, HeadTrace, Predictions, Priors, State, keep_states
from kdtoolkit.errors import KDError

Held = TypeVar("Held", "Queries", "Progress")


@dataclass(frozen=True)
class Memory:
    """What a decoder looks at: the `tokens` (N, S, C) of all levels, and the (H, W) of each level."""

    tokens: Tensor
    shapes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, features: tuple[Tensor, ...]) -> Memory:
        """Join the levels one after the other."""
        return cls(
            torch.cat([*map(to_tokens, features)], 1), tuple((level.shape[-2], level.shape[-1]) for level in features)
        )

    @cached_property
    def layout(self) -> dict[str, Any]:
        """How the levels lie one after the other, as deformable attention takes it."""
        return level_layout(self.shapes, self.tokens.device)


@dataclass(frozen=True)
class Selection:
    """What enters the decoder: `queries`. The `shown` queries detect; the others are for training only.

    `logits` (N, Q, K) and `boxes` (N, Q, 4) are the encoder's predictions for the selected queries, None for queries of
    another detector. `mask` (Q, Q) is added to the scores of self-attention. `denoising` is what the library's loss
    needs to know about the noisy queries.
    """

    queries: Queries
    shown: slice
    logits: Tensor | None = None
    boxes: Tensor | None = None
    mask: Tensor | None = None
    denoising: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Progress:
    """What goes from one decoder layer to the next: the state (N, Q, C), and boxes (N, Q, 4) in the library's format.

    At stage 0 the boxes are the references. After a layer they are its refined boxes, with their gradient.
    """

    hidden: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class Pass:
    """The context of a trace: memory, selection, the progress of all queries at each stage, and the batch."""

    memory: Memory
    selection: Selection
    progress: tuple[Progress, ...]
    batch: Batch

    def shown(self, stage: int) -> Progress:
        """The progress at a stage, for the queries that detect."""
        return over_queries(self.progress[stage], lambda x: x[:, self.selection.shown])


def over_queries(held: Held, change: Callable[[Tensor], Tensor]) -> Held:
    """Return `held` with `change` applied to all its tensors (N, Q, C)."""
    values = {field.name: getattr(held, field.name) for field in fields(held)}
    return replace(held, **{k: change(x) for k, x in values.items() if isinstance(x, Tensor) and x.ndim == 3})


class SelectingAdapter(TransformersAdapter):
    """Base of the adapters of detectors whose queries start at the encoder's best boxes."""

    masked: ClassVar[bool] = False

    @property
    def depth(self) -> int:
        """The number of decoder layers."""
        return int(self.model.config.decoder_layers)

    @property
    def groups(self) -> int:
        """The number of groups of queries, blind to each other, that the library's self-attention expects."""
        return 1

    @abstractmethod
    def select(self, memory: Memory, batch: Batch) -> Selection:
        """Select the detector's own queries. In train mode, add the queries that the library uses in training only."""

    @abstractmethod
    def layer(self, i: int, progress: Progress, memory: Memory, mask: Tensor | None) -> Tensor:
        """Run decoder layer `i`; returns the state after it."""

    @abstractmethod
    def refine(self, i: int, hidden: Tensor, progress: Progress) -> Progress:
        """The progress after layer `i`, from the state after it and the progress that entered it."""

    @abstractmethod
    def predict(self, i: int, progress: Progress, priors: Priors, batch: Batch) -> Predictions:
        """Predict by the heads of layer `i`, from the progress after it."""

    def start(self, queries: Queries) -> Progress:
        """The progress at stage 0."""
        assert queries.references is not None
        return Progress(queries.content, queries.references)

    def head(
        self,
        features: tuple[Tensor, ...],
        batch: Batch,
        priors: Priors | None = None,
        stages: Collection[int] | None = None,
    ) -> HeadTrace:
        """Select queries and decode them. With `priors`, decode the queries of `priors` instead.

        Raises KDError if images have fewer cells than queries to select.
        """
        memory = Memory.of(features)
        if priors is None:
            self.check_cells(self.model.config.num_queries, memory.tokens.shape[1], "num_queries")
        selection = self.select(memory, batch) if priors is None else self._given(priors, batch)
        progress = self._decode(self.start(selection.queries), 0, memory, selection.mask)
        past = Pass(memory, selection, tuple(progress), batch)
        shown = [past.shown(stage) for stage in range(len(progress))]
        if priors is None:
            priors = self.priors(over_queries(selection.queries, lambda x: x[:, selection.shown]), batch)
        predictions = self.predict(self.depth - 1, shown[-1], priors, batch)
        states, _ = keep_states((to_state(at.hidden) for at in shown), stages)
        return HeadTrace(states, predictions, past)

    def queries_at(self, content: Tensor, boxes: Tensor, batch: Batch) -> Priors:
        """Make queries of any content with references at given boxes."""
        return self.priors(Queries(content, references=self.references_at(boxes, batch)), batch)

    def _given(self, priors: Priors, batch: Batch) -> Selection:
        queries = self.given_queries(priors, batch)
        if queries.references is None:
            raise KDError(
                "these queries have no reference boxes: pass the priors of a detector with the same spec.prior_form"
            )
        return Selection(self._as_groups(queries), slice(0, queries.content.shape[1]))

    def _as_groups(self, held: Held) -> Held:
        """Repeat queries for each group that self-attention expects."""
        return over_queries(held, lambda x: x.repeat(1, self.groups, 1)) if self.groups > 1 else held

    def _decode(self, progress: Progress, start: int, memory: Memory, mask: Tensor | None) -> list[Progress]:
        """The progress from stage `start` on."""
        passed = [progress]
        for i in range(start, self.depth):
            hidden = self.layer(i, passed[-1], memory, mask)
            passed.append(self.refine(i, hidden, passed[-1]))
        return passed

    def resume(self, state: State, stage: int, trace: HeadTrace) -> Predictions:
        """Run the layers after `stage` on the memory of `trace`, from the boxes that it has at that stage."""
        past: Any = trace.context
        hidden = from_state(state)
        if stage == self.depth:
            progress = self.refine(stage - 1, hidden, past.shown(stage - 1))
        else:
            entering = self._as_groups(replace(past.shown(stage), hidden=hidden))
            final = self._decode(entering, stage, past.memory, None)[-1]
            progress = over_queries(final, lambda x: x[:, : hidden.shape[1]])
        return self.predict(self.depth - 1, progress, trace.predictions.priors, past.batch)

    def layers(self, trace: HeadTrace) -> tuple[HeadTrace, ...]:
        """What the heads say after each layer."""
        past: Any = trace.context
        priors, inner = trace.predictions.priors, range(self.depth - 1)
        predictions = [self.predict(i, past.shown(i + 1), priors, past.batch) for i in inner]
        passes = [replace(trace, states=trace.states[: i + 2], predictions=each) for i, each in enumerate(predictions)]
        return (*passes, trace)

    def detections(self, trace: HeadTrace, batch: Batch) -> list[Detections]:
        """Run the library's own postprocessing without a score threshold; sorted by falling score.

        The library does not know padding here. Boxes whose centre lies in padding are left out.
        """
        canvas = batch.images.shape[-2], batch.images.shape[-1]
        found = super().detections(trace, batch)
        sizes = zip(batch.sizes, batch.original_sizes, strict=True)
        return [
            each if size == canvas else _within(each, original)
            for each, (size, original) in zip(found, sizes, strict=True)
        ]

    def encoder_outputs(self, trace: HeadTrace) -> tuple[Pass, Tensor, Tensor]:
        """The pass of a trace, and the encoder's logits and boxes for its queries, in float32.

        Raises KDError for queries of another detector, because the detector's own encoder did not select them.
        """
        past: Any = trace.context
        if past.selection.logits is None or past.selection.boxes is None:
            raise KDError("the library's losses are for a detector's own queries: take them from a pass without priors")
        return past, past.selection.logits.float(), past.selection.boxes.float()


def _within(found: Detections, size: tuple[int, int]) -> Detections:
    """Choose the detections whose centre lies in an image of (height, width)."""
    doubled = found["boxes"][:, :2] + found["boxes"][:, 2:]
    keep = (doubled <= 2 * doubled.new_tensor([size[1], size[0]])).all(1)
    return Detections(boxes=found["boxes"][keep], scores=found["scores"][keep], labels=found["labels"][keep])
