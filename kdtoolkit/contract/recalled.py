"""RecalledView: what a teacher shows of images, taken from earlier passes where these are known.

What methods take of the teacher's own pass is a number of parts: the map of a level, the predictions, a tensor of a
hidden state. Of each image each part is a tensor of its own. A part that is known of all images of a batch needs no
pass. A part that is not known of some images is computed for these alone. So what is kept decides how much time a step
takes, and never what it computes.

Each of these images has a pass of its own. The last bits of a convolution may depend on the number of images in it, so
in a common pass they would depend on what else was not known. Alone they depend on the image only. A run that was
stopped and goes on, and runs that share a cache, then have the same values to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from kdtoolkit.contract.adapter import DetectorAdapter
from kdtoolkit.contract.data import Batch, HeadTrace, Predictions, Said, State
from kdtoolkit.contract.lazy import Lazy
from kdtoolkit.contract.view import View
from kdtoolkit.uncompiled import uncompiled

Parts = Mapping[str, Tensor]
"""What is known of one image: tensors without the dimension of images, by the name of the part."""

_GRID = "grid"  # the part that stays on the host


class Recall:
    """Parts of a teacher's pass over a batch, from what is known of each image, or else from a pass.

    Args:
        adapter: the teacher's adapter.
        batch: what the teacher is shown.
        known: for each image what is known of it; empty where nothing is.
        stages: indices of the stages whose hidden states a pass keeps; None keeps all.
        dtype: the type that floats are kept in, if it is a narrower one. All floats are then rounded to it, those of a
            pass too, and come back as float32.

    Attributes:
        parts: what was asked for so far, of all images, by name.
        fresh: for each image the parts that were asked for and not known.
    """

    def __init__(
        self,
        adapter: DetectorAdapter,
        batch: Batch,
        known: Sequence[Parts],
        stages: frozenset[int] | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.fresh: list[dict[str, Tensor]] = [{} for _ in known]
        self._adapter = adapter
        self._batch = batch
        self._known = known
        self._stages = stages
        self._dtype = dtype
        self._format = _format_of(adapter.model)
        self.parts: dict[str, Tensor] = {}
        self._passes: dict[int, View] = {}
        device = batch.images.device.type
        # A part may be asked for where a method has switched autocast off for its own loss.
        self._autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

    def part(self, name: str, of: Callable[[View], Tensor], *, rounded: bool = True) -> Tensor:
        """The part of all images, (N, ...). `of` takes it from a pass over an image of which it is not known."""
        if name not in self.parts:
            self._take(name, of, rounded)
        return self.parts[name]

    def look_up(self, names: Collection[str]) -> None:
        """Take these parts at once, as far as they are known of all images."""
        for name in names:
            if all(name in known for known in self._known):
                self.parts[name] = self._stacked(name, [known[name] for known in self._known])

    @uncompiled
    def _take(self, name: str, of: Callable[[View], Tensor], rounded: bool) -> None:
        device, dtype, enabled = self._autocast
        with torch.no_grad(), torch.autocast(device, dtype, enabled):
            self.parts[name] = self._stacked(name, [self._found(i, name, of, rounded) for i in range(len(self._known))])

    def _found(self, image: int, name: str, of: Callable[[View], Tensor], rounded: bool) -> Tensor:
        """The part of one image, without the dimension of images."""
        if name in self._known[image]:
            return self._known[image][name]
        found = of(self._pass(image))[0]
        if rounded and self._dtype is not None and found.is_floating_point():
            found = found.to(self._dtype)
        self.fresh[image][name] = found
        return found

    def _stacked(self, name: str, tensors: list[Tensor]) -> Tensor:
        if name == _GRID:  # the host computes with it
            return torch.stack([x.cpu() for x in tensors])
        widened = self._dtype is not None and tensors[0].is_floating_point()
        device, on_host = self._batch.images.device, all(x.device.type == "cpu" for x in tensors)
        if device.type == "cuda" and on_host:
            # One copy for all images, from pinned memory: the host does not wait for it.
            shape, dtype = (len(tensors), *tensors[0].shape), tensors[0].dtype
            pinned = torch.empty(shape, dtype=dtype, pin_memory=True)
            whole = torch.stack(tensors, out=pinned).to(device, non_blocking=True)
        else:
            kept = [x.to(device) for x in tensors]
            # Autocast to float16 stacks no bfloat16.
            whole = torch.stack([x.float() for x in kept] if widened else kept)
        return whole.float() if widened else whole

    def _pass(self, image: int) -> View:
        """The teacher's pass over one of the images."""
        if image not in self._passes:
            batch = self._batch.at_images([image])
            maps = self._adapter.features(batch)
            self._passes[image] = View(self._adapter, batch, maps, stages=self._stages, frozen=True)
        return self._passes[image]

    def _map(self, name: str, of: Callable[[View], Tensor]) -> Tensor:
        """A part that is a map, or vectors: a map has the memory format in which the teacher makes it."""
        x = self.part(name, of)
        return x.contiguous(memory_format=self._format) if x.ndim == 4 else x

    def level(self, index: int) -> Tensor:
        """The map (N, C, H, W) of a level."""
        return self._map(f"level {index}", lambda view: view.maps[index])

    def state(self, index: int) -> State:
        """The hidden state at a stage; empty if it is not one of `stages`."""
        if self._stages is not None and index not in self._stages:
            return {}

        def tensor(branch: str, i: int) -> Tensor:
            return self._map(f"state {index} {branch} {i}", lambda view: view.head.states[index][branch][i])

        channels = self._adapter.spec.stages[index].channels
        return {branch: tuple(tensor(branch, i) for i in range(len(each))) for branch, each in channels.items()}

    def trace(self, maps: Sequence[Tensor]) -> HeadTrace:
        """The pass of a head that the adapter can restore."""
        adapter = self._adapter
        quality = self.part("quality", lambda view: _quality(adapter.said(view.head)))
        grid = self.part(_GRID, lambda view: _each(adapter.said(view.head).priors.grid, len(view.batch.sizes)))
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
        dtype: the type that floats are kept in, if it is a narrower one.
    """

    def __init__(
        self,
        adapter: DetectorAdapter,
        batch: Batch,
        keys: Sequence[str],
        find: Callable[[str], Parts],
        *,
        stages: frozenset[int] | None = None,
        scale: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.keys = keys
        self.recall = Recall(adapter, batch, [*map(find, keys)], stages, dtype)
        maps = Lazy(len(adapter.spec.strides), self.recall.level)
        super().__init__(adapter, batch, maps, stages=stages, frozen=True, scale=scale)

    def kept(self, name: str, of: Callable[[View], Tensor]) -> Tensor:
        """What `of` computes of the whole view, of each image alone, with all its digits: (N, ...)."""
        return self.recall.part(name, of, rounded=False)

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


def _format_of(model: nn.Module) -> torch.memory_format:
    """The memory format of the maps that a model makes: that of its first kernel of more than one pixel."""
    kernel = next((p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1), None)
    turned = kernel is not None and not kernel.is_contiguous()
    return torch.channels_last if turned else torch.contiguous_format
