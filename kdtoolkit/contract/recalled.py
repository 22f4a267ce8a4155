"""RecalledView: what a teacher shows of images, taken from earlier passes where these are known.

What methods take of the teacher's own pass is a number of parts: the map of a level, the predictions, a tensor of a
hidden state. Of each image each part is a tensor of its own. A part that is known of all images of a batch needs no
pass. A part that is not known of some images is computed for these alone. So what is kept decides how much time a step
takes, and never what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kdtoolkit.contract.adapter import DetectorAdapter
from kdtoolkit.contract.data import Batch, HeadTrace, Predictions, Said, State
from kdtoolkit.contract.lazy import Lazy
from kdtoolkit.contract.view import View

Parts = Mapping[str, Tensor]
"""What is known of one image: tensors without the dimension of images, by the name of the part."""


class Recall:
    """Parts of a teacher's pass over a batch, from what is known of each image, or else from a pass.

    Args:
        adapter: the teacher's adapter.
        batch: what the teacher is shown.
        known: for each image what is known of it; empty where nothing is.
        stages: indices of the stages whose hidden states a pass keeps; None keeps all.

    Attributes:
        fresh: for each image the parts that were asked for and not known.
    """

    def __init__(
        self, adapter: DetectorAdapter, batch: Batch, known: Sequence[Parts], stages: frozenset[int] | None
    ) -> None:
        self.fresh: list[dict[str, Tensor]] = [{} for _ in known]
        self._adapter = adapter
        self._batch = batch
        self._known = known
        self._stages = stages
        self._parts: dict[str, Tensor] = {}
        self._passes: dict[tuple[int, ...], View] = {}
        device = batch.images.device.type
        # A part may be asked for where a method has switched autocast off for its own loss.
        self._autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

    def part(self, name: str, of: Callable[[View], Tensor]) -> Tensor:
        """The part of all images, (N, ...). `of` takes it from a pass over those images of which it is not known."""
        if name not in self._parts:
            missing = tuple(i for i, known in enumerate(self._known) if name not in known)
            device, dtype, enabled = self._autocast
            with torch.no_grad(), torch.autocast(device, dtype, enabled):
                self._parts[name] = self._found(name, missing, of)
        return self._parts[name]

    def _found(self, name: str, missing: tuple[int, ...], of: Callable[[View], Tensor]) -> Tensor:
        if not missing:
            return self._stacked([known[name] for known in self._known])
        fresh = of(self._pass(missing))
        for i, own in zip(missing, fresh, strict=True):
            self.fresh[i][name] = own
        if len(missing) == len(self._known):
            return fresh
        rows = [i for i in range(len(self._known)) if i not in missing]
        whole = fresh.new_empty(len(self._known), *fresh.shape[1:])
        whole[list(missing)] = fresh
        whole[rows] = self._stacked([self._known[i][name] for i in rows]).to(fresh)
        return whole

    def _stacked(self, tensors: list[Tensor]) -> Tensor:
        whole = torch.stack(tensors)
        return whole.to(self._batch.images.device, non_blocking=True) if whole.is_floating_point() else whole

    def _pass(self, images: tuple[int, ...]) -> View:
        """The teacher's pass over some of the images."""
        if images not in self._passes:
            batch = self._batch.at_images(images)
            maps = self._adapter.features(batch)
            self._passes[images] = View(self._adapter, batch, maps, stages=self._stages, frozen=True)
        return self._passes[images]

    def level(self, index: int) -> Tensor:
        """The map (N, C, H, W) of a level."""
        return self.part(f"level {index}", lambda view: view.maps[index])

    def state(self, index: int) -> State:
        """The hidden state at a stage; empty if it is not one of `stages`."""
        if self._stages is not None and index not in self._stages:
            return {}

        def tensor(branch: str, i: int) -> Tensor:
            return self.part(f"state {index} {branch} {i}", lambda view: view.head.states[index][branch][i])

        channels = self._adapter.spec.stages[index].channels
        return {branch: tuple(tensor(branch, i) for i in range(len(each))) for branch, each in channels.items()}

    def trace(self, maps: Sequence[Tensor]) -> HeadTrace:
        """The pass of a head that the adapter can restore."""
        adapter = self._adapter
        quality = self.part("quality", lambda view: _quality(adapter.said(view.head)))
        grid = self.part("grid", lambda view: _each(adapter.said(view.head).priors.grid, len(view.batch.sizes)))
        said = Said(
            logits=self.part("logits", lambda view: adapter.said(view.head).logits),
            regression=self.part("regression", lambda view: adapter.said(view.head).regression),
            quality=quality if quality.shape[1] else None,
            grid=tuple((height, width) for height, width in grid[0].tolist()),
            states=Lazy(len(adapter.spec.stages), self.state),
            features=maps,
        )
        return adapter.restored(said, self._batch)


class RecalledView(View):
    """The view of a teacher of which some is known from earlier passes.

    Maps, predictions and hidden states are looked up or computed when they are first asked for, each on its own.

    Args:
        adapter: the teacher's adapter.
        batch: what the teacher is shown.
        keys: what stands for each image in this view.
        find: what is known by a key, as `recall.fresh` of an earlier view had it; empty if nothing is.
        stages: indices of the stages whose hidden states are kept; None keeps all.
        scale: size of the images on the teacher's canvas, relative to the student's.
    """

    _sequence = Lazy

    def __init__(
        self,
        adapter: DetectorAdapter,
        batch: Batch,
        keys: Sequence[str],
        find: Callable[[str], Parts],
        *,
        stages: frozenset[int] | None = None,
        scale: float = 1.0,
    ) -> None:
        self.keys = keys
        self.recall = Recall(adapter, batch, [*map(find, keys)], stages)
        maps = Lazy(len(adapter.spec.strides), self.recall.level)
        super().__init__(adapter, batch, maps, stages=stages, frozen=True, scale=scale)

    @property
    def head(self) -> HeadTrace:
        """The head's own pass: restored from its predictions if the adapter can do so, else run on the maps."""
        if not self._own and self.adapter.spec.restores:
            self._own.append(self.recall.trace(self.maps))
        return super().head


def _quality(predictions: Predictions) -> Tensor:
    """The quality (N, A); (N, 0) if the head has none."""
    logits, quality = predictions.logits, predictions.quality
    return logits.new_empty(len(logits), 0) if quality is None else quality


def _each(grid: tuple[tuple[int, int], ...], count: int) -> Tensor:
    """The (H, W) of each level once for each image, (N, L, 2), on the host."""
    return torch.tensor(grid).expand(count, -1, -1)
