"""CachedView: what a teacher shows of images of which a cache knows some parts.

What methods take of the teacher's own pass is a number of parts: the map of a level, the predictions, a tensor of a
hidden state. Each part of each image is a tensor of its own. A part that is known of all images of a batch needs no
pass. A part that is not known of some images is computed for these alone. So what is known decides how much time a step
takes, and never what it computes.

Each of these images has a pass of its own. The last bits of a convolution may depend on the number of images in it, so
in a common pass they would depend on what else was not known. Alone they depend on the image only. Runs that share a
cache, and a run that was stopped and goes on, then have the same values to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from kdtoolkit.contract.adapter import DetectorAdapter
from kdtoolkit.contract.data import Batch, HeadOutputs, HeadTrace, Predictions, State
from kdtoolkit.contract.lazy import Lazy
from kdtoolkit.contract.view import View
from kdtoolkit.uncompiled import uncompiled

ImageParts = Mapping[str, Tensor]
"""Parts of a pass over one image, by name: tensors without the dimension of images."""

_GRID = "grid"  # the part that stays on the host


class BatchParts:
    """Parts of a teacher's pass over a batch. Those of an image are known, or else come from a pass over the image.

    It does not refer to the view that holds it: in a cycle, maps would stay in memory until Python's collector runs.

    Args:
        adapter: the teacher's adapter.
        batch: what the teacher is shown.
        known: the known parts of each image.
        stages: indices of the stages whose hidden states a pass keeps; None keeps all.
        dtype: the type that floats are kept in, if it is a narrower one. All floats are then rounded to it, those of a
            pass too, and come back as float32.

    Attributes:
        found: the parts that were asked for so far, of all images (N, ...), by name.
        computed: for each image the parts that were computed, because they were not known.
    """

    def __init__(
        self,
        adapter: DetectorAdapter,
        batch: Batch,
        known: Sequence[ImageParts],
        stages: frozenset[int] | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.found: dict[str, Tensor] = {}
        self.computed: list[dict[str, Tensor]] = [{} for _ in known]
        self._adapter = adapter
        self._batch = batch
        self._known = known
        self._stages = stages
        self._dtype = dtype
        self._format = _format_of(adapter.model)
        self._passes: dict[int, View] = {}
        device = batch.images.device.type
        # A part may be asked for where a method has switched autocast off for its own loss.
        self._autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

    def part(self, name: str, of: Callable[[View], Tensor], *, rounded: bool = True) -> Tensor:
        """The part of all images, (N, ...). `of` takes it from a pass over an image of which it is not known."""
        if name not in self.found:
            self._find(name, of, rounded)
        return self.found[name]

    def look_up(self, names: Collection[str]) -> None:
        """Take these parts at once, as far as they are known of all images."""
        for name in names:
            if all(name in known for known in self._known):
                self.found[name] = self._stacked(name, [known[name] for known in self._known])

    @uncompiled
    def _find(self, name: str, of: Callable[[View], Tensor], rounded: bool) -> None:
        device, dtype, enabled = self._autocast
        with torch.no_grad(), torch.autocast(device, dtype, enabled):
            parts = [self._of_image(i, name, of, rounded) for i in range(len(self._known))]
            self.found[name] = self._stacked(name, parts)

    def _of_image(self, image: int, name: str, of: Callable[[View], Tensor], rounded: bool) -> Tensor:
        """The part of one image, without the dimension of images."""
        if name in self._known[image]:
            return self._known[image][name]
        part = of(self._pass(image))[0]
        if rounded and self._dtype is not None and part.is_floating_point():
            part = part.to(self._dtype)
        self.computed[image][name] = part
        return part

    def _stacked(self, name: str, parts: list[Tensor]) -> Tensor:
        if name == _GRID:  # the host computes with it
            return torch.stack([part.cpu() for part in parts])
        widened = self._dtype is not None and parts[0].is_floating_point()
        device, on_host = self._batch.images.device, all(part.device.type == "cpu" for part in parts)
        if device.type == "cuda" and on_host:
            # One copy for all images, from pinned memory: the host does not wait for it.
            shape, dtype = (len(parts), *parts[0].shape), parts[0].dtype
            pinned = torch.empty(shape, dtype=dtype, pin_memory=True)
            whole = torch.stack(parts, out=pinned).to(device, non_blocking=True)
        else:
            parts = [part.to(device) for part in parts]
            # Autocast to float16 stacks no bfloat16.
            whole = torch.stack([part.float() for part in parts] if widened else parts)
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
        """The pass of a head that the adapter can rebuild. `maps` are all levels."""
        own = self._adapter.own_predictions
        quality = self.part("quality", lambda view: _quality(own(view.head)))
        grid = self.part(_GRID, lambda view: _grid(own(view.head).priors.grid, len(view.batch.sizes)))
        outputs = HeadOutputs(
            logits=self.part("logits", lambda view: own(view.head).logits),
            regression=self.part("regression", lambda view: own(view.head).regression),
            quality=quality if quality.shape[1] else None,
            grid=tuple((height, width) for height, width in grid[0].tolist()),
            states=Lazy(len(self._adapter.spec.stages), self.state),
            features=maps,
        )
        return self._adapter.rebuild(outputs, self._batch)


class CachedView(View):
    """The view of a teacher of which a cache knows some parts.

    Maps, predictions and hidden states are looked up or computed when they are first asked for, each on its own.

    Args:
        adapter: the teacher's adapter.
        batch: what the teacher is shown.
        keys: the key of each image in the cache.
        find: gives the parts that are known by a key: `parts.computed` of earlier views; empty if none are.
        stages: indices of the stages whose hidden states are kept; None keeps all.
        scale: size of the images on the teacher's canvas, relative to the student's.
        dtype: the type that floats are kept in, if it is a narrower one.
    """

    def __init__(
        self,
        adapter: DetectorAdapter,
        batch: Batch,
        keys: Sequence[str],
        find: Callable[[str], ImageParts],
        *,
        stages: frozenset[int] | None = None,
        scale: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.keys = keys
        self.parts = BatchParts(adapter, batch, [*map(find, keys)], stages, dtype)
        maps = Lazy(len(adapter.spec.strides), self.parts.level)
        super().__init__(adapter, batch, maps, stages=stages, frozen=True, scale=scale)

    def part(self, name: str, of: Callable[[View], Tensor]) -> Tensor:
        """What `of` computes of the whole view, of each image alone, with all its digits: (N, ...)."""
        return self.parts.part(name, of, rounded=False)

    @property
    def head(self) -> HeadTrace:
        """The head's own pass: rebuilt from its predictions if the adapter can do so, else run on the maps."""
        if not self._own and self.adapter.spec.rebuilds:
            self._own.append(self.parts.trace(self.maps))
        return super().head


def _quality(predictions: Predictions) -> Tensor:
    """The quality (N, A); (N, 0) if the head has none."""
    logits, quality = predictions.logits, predictions.quality
    return logits.new_empty(len(logits), 0) if quality is None else quality


def _grid(grid: tuple[tuple[int, int], ...], count: int) -> Tensor:
    """The (H, W) of each level once for each image, (N, L, 2), on the host."""
    return torch.tensor(grid).expand(count, -1, -1)


def _format_of(model: nn.Module) -> torch.memory_format:
    """The memory format of the maps that a model makes: that of its first kernel of more than one pixel."""
    kernel = next((p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1), None)
    turned = kernel is not None and not kernel.is_contiguous()
    return torch.channels_last if turned else torch.contiguous_format
