"""View: what one detector shows in a step, and the part of it that another detector's canvas has too."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from kdtoolkit.contract.adapter import DetectorAdapter
from kdtoolkit.contract.data import Assignment, Batch, HeadTrace, Predictions, Priors, State
from kdtoolkit.contract.lazy import Lazy
from kdtoolkit.contract.recompute import recomputed
from kdtoolkit.contract.spec import DetectorSpec

T = TypeVar("T")


class View:
    """What one detector shows in a step. Its head runs when it is first asked for, and only once.

    `maps` is the pyramid as the detector made it, and its head takes all of it. `features` is what methods compare: the
    maps of some levels, or maps cut to the part of the canvas that the other detector has too.

    Args:
        adapter: the detector's adapter.
        batch: what the detector was shown.
        maps: the detector's pyramid for this batch.
        trace: the head's own pass, if it has been run already.
        assignment: the assignment that the detector's losses used, if they returned one.
        stages: indices of the stages whose hidden states are kept; None keeps all.
        frozen: run the head without gradient, as for a teacher.
        scale: size of the images on this detector's canvas, relative to the student's.
    """

    recompute = False  # whether passes of the head are computed again in the backward pass, to save memory

    def __init__(
        self,
        adapter: DetectorAdapter,
        batch: Batch,
        maps: Sequence[Tensor],
        trace: HeadTrace | None = None,
        assignment: Assignment | None = None,
        *,
        stages: frozenset[int] | None = None,
        frozen: bool = False,
        scale: float = 1.0,
    ) -> None:
        self.adapter = adapter
        self.batch = batch
        self.maps = maps
        self.features = maps
        self.assignment = assignment
        self.spec = adapter.spec
        self.shown: tuple[int, int] | None = None
        self.frozen = frozen
        self.scale = scale
        self._stages = stages
        self._own = [] if trace is None else [trace]  # a list, for parts of the view share it

    @property
    def trace(self) -> HeadTrace | None:
        """The head's own pass; None if it has not run yet."""
        return self._own[0] if self._own else None

    @property
    def head(self) -> HeadTrace:
        """The head's own pass; runs the head if it has not run yet."""
        if not self._own:
            self._own.append(self.run_head())
        return self._own[0]

    def part(self, name: str, of: Callable[[View], Tensor]) -> Tensor:
        """What `of` computes of the whole view, of each image alone: (N, ...). A cache keeps it under `name`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return of(self)

    def run_head(self, priors: Priors | None = None) -> HeadTrace:
        """Run the head once more, with `priors` instead of its own.

        A frozen view detaches them. The head may be resumed with gradient, which would else flow to whose they are.
        """
        if priors is not None and self.frozen:
            priors = priors.detached()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.computed(lambda: self.adapter.head(tuple(self.maps), self.batch, priors, self._stages))

    def layers(self, trace: HeadTrace) -> tuple[HeadTrace, ...]:
        """The pass as it would be if the decoder ended after each of its layers; the last is the pass itself."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.adapter.layers(trace)

    def computed(self, run: Callable[[], T]) -> T:
        """The result of `run`, a pass of the head; computed again in the backward pass if `recompute` is set."""
        return recomputed(run, self.adapter.model) if self.recompute else run()

    @property
    def own_assignment(self) -> Assignment:
        """Ground truth assigned to the priors of the head's own pass, by the detector's own rule."""
        if self.assignment is None:
            with torch.no_grad():
                self.assignment = self.adapter.assign(self.head, self.batch)
        return self.assignment

    @property
    def spec_in_student_pixels(self) -> DetectorSpec:
        """The detector's spec with strides in pixels of the student's images."""
        return self.spec if self.scale == 1 else self.spec.on_images_scaled_by(self.scale)

    def at_strides(self, strides: tuple[int, ...]) -> View:
        """The view of the levels with these strides, in pixels of the student; the whole view if `strides` is empty."""
        if not strides:
            return self
        part = copy.copy(self)
        levels = [i for i, stride in enumerate(self.spec_in_student_pixels.strides) if stride in strides]
        part.features = Lazy(len(levels), lambda i: self.features[levels[i]])
        part.spec = self.spec.at_levels(levels)
        return part

    def beside(self, batch: Batch) -> View:
        """The view of the part of the canvas that another detector's `batch` has too.

        `shown` of the result is the size of that part, (height, width) in pixels of this detector's own canvas; None if
        it is the whole canvas.
        """
        if self.batch is batch:
            return self
        canvases = self.batch.images.shape[-2:], batch.images.shape[-2:]
        if self.scale != 1:
            height, width = (min(own, math.ceil(its * self.scale)) for own, its in zip(*canvases, strict=True))
        else:
            # The sizes of single images are rounded, so the scale is that of all images together.
            own_sums, its_sums = (map(sum, zip(*each.sizes, strict=True)) for each in (self.batch, batch))
            sides = zip(*canvases, own_sums, its_sums, strict=True)
            height, width = (min(own, round(its * own_sum / its_sum)) for own, its, own_sum, its_sum in sides)
        if (height, width) == canvases[0]:
            return self
        shown = copy.copy(self)
        shown.shown = height, width
        part = copy.copy(shown)  # `part` itself in its maps would be a cycle, which stays in memory for some time
        part.features = Lazy(len(self.features), lambda i: shown.cut(self.features[i], i))
        return part

    def cut(self, x: Tensor, level: int) -> Tensor:
        """Cut a map (N, C, H, W) of a level to the part that is `shown`."""
        height, width = self.shown_cells(level, (x.shape[2], x.shape[3]))
        return x[:, :, :height, :width]

    def shown_cells(self, level: int, size: tuple[int, int]) -> tuple[int, int]:
        """How many of the (H, W) cells of a level are `shown`: those that begin in that part."""
        if self.shown is None:
            return size
        stride = self.spec.strides[level]
        height, width = (min(cells, -(-side // stride)) for cells, side in zip(size, self.shown, strict=True))
        return height, width

    def shown_rows(self, priors: Priors) -> Tensor | None:
        """Indices (A',) of the priors in the cells that are shown; None if all are, or if there is no grid."""
        if self.shown is None or not priors.grid:
            return None
        rows, start = [], 0
        for i, (size, count) in enumerate(zip(priors.grid, priors.per_level, strict=True)):
            cells = torch.arange(start, start + count, device=priors.boxes.device).view(1, *size, -1)
            rows.append(self.cut(cells.permute(0, 3, 1, 2), i).permute(0, 2, 3, 1).flatten())
            start += count
        found = torch.cat(rows)
        return None if len(found) == start else found

    def cut_predictions(self, predictions: Predictions, rows: Tensor | None) -> Predictions:
        """The predictions at `rows`, the `shown_rows` of their priors; all predictions if `rows` is None."""
        if rows is None:
            return predictions
        priors, quality = predictions.priors, predictions.quality
        kept = replace(
            priors,
            boxes=priors.boxes[..., rows, :],
            strides=priors.strides[rows],
            grid=tuple(self.shown_cells(i, size) for i, size in enumerate(priors.grid)),
        )
        return replace(
            predictions,
            logits=predictions.logits[:, rows],
            regression=predictions.regression[:, rows],
            quality=None if quality is None else quality[:, rows],
            priors=kept,
        )

    def cut_trace(self, trace: HeadTrace, rows: Tensor | None) -> HeadTrace:
        """The states of the cells that are shown, and the predictions at `rows`; the whole trace if `rows` is None."""
        if rows is None:
            return trace

        def state(stage: int) -> State:
            own = trace.states[stage]
            return {branch: tuple(self.cut(x, i) for i, x in enumerate(maps)) for branch, maps in own.items()}

        states = Lazy(len(trace.states), state)
        return replace(trace, states=states, predictions=self.cut_predictions(trace.predictions, rows))
