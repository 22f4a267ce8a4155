"""TeacherLookup: finds in a cache what a teacher computes for images, and puts into it what is missing.

The key of an image stands for its pixels, their place on the teacher's canvas, the teacher, and the arithmetic. So a
changed image, size or teacher has a different key. docs/teacher_cache.md says which changes of a teacher are noticed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from kdtoolkit.contract import Batch, CachedView, DetectorAdapter
from kdtoolkit.errors import KDError
from kdtoolkit.sources import digests_of, modules_of, source_files
from kdtoolkit.teacher_cache import TeacherCache, digest, digest_of
from kdtoolkit.tf32 import in_tf32
from kdtoolkit.uncompiled import uncompiled

_FORM = 2  # raise it when entries of older versions no longer fit


class TeacherLookup:
    """Makes the views of one teacher from what a cache knows of the images, and keeps what the teacher computes."""

    def __init__(self, teacher: DetectorAdapter) -> None:
        self._teacher = teacher
        self._digest = ""  # of the teacher, when its tensors had these versions
        self._versions: list[tuple[int, int]] | None = None
        self._parts: tuple[str, ...] = ()  # what the last step took

    # Uncompiled, as is `keep`: a compiler takes keys for constants, and would compile each step anew.
    @uncompiled
    def view(
        self,
        cache: TeacherCache,
        seen: DetectorAdapter,
        batch: Batch,
        images: Sequence[Tensor],
        keys: Sequence[str] | None,
        *,
        stages: frozenset[int] | None,
        scale: float,
    ) -> CachedView:
        """The teacher's view of a batch, with what the cache knows of its images.

        Args:
            cache: where to look.
            seen: the teacher as methods see it: the adapter itself, or a part of its classes.
            batch: what the teacher is shown.
            images: the images that the batch was made of.
            keys: the digest of each image; None computes them.
            stages: indices of the stages whose hidden states are kept; None keeps all.
            scale: size of the images on the teacher's canvas, relative to the student's.

        Raises KDError if the number of keys is not that of the images.
        """
        digests = [*map(digest, images)] if keys is None else keys
        if len(digests) != len(images):
            raise KDError(f"there are {len(images)} images and {len(digests)} keys: hand in one key for each image")
        found = _versions(self._teacher.model)
        if found != self._versions:
            self._versions, self._digest = found, teacher_digest(self._teacher)
        own = _view_keys(digests, batch, self._digest, cache.precision)
        view = CachedView(seen, batch, own, cache.find, stages=stages, scale=scale, dtype=cache.dtype)
        view.parts.look_up(self._parts)  # here and not where a method asks, which would interrupt a compiled step
        return view

    @uncompiled
    def keep(self, cache: TeacherCache, view: CachedView) -> None:
        """Put into the cache what was computed for a view, and count the images with and without a pass."""
        for key, parts in zip(view.keys, view.parts.computed, strict=True):
            if parts:
                cache.keep(key, parts)
                cache.misses += 1
            else:
                cache.hits += 1
        self._parts = tuple(view.parts.found)


def teacher_digest(adapter: DetectorAdapter) -> str:
    """The digest of a teacher: its adapter and facts, its layers and their settings, its weights and buffers.

    How it normalises images is part of it as well: what `prepare` makes of a fixed image. So is the source code of an
    adapter that is not kdtoolkit's, and of its model.
    """
    spec, model = adapter.spec, adapter.model
    layers = re.sub(r" at 0x[0-9a-f]+", "", repr(model))  # addresses differ in each process
    if modules := modules_of(type(adapter), DetectorAdapter):
        layers += _code_of(frozenset(modules | modules_of(type(model), nn.Module)))
    facts = type(adapter).__qualname__, spec.name, spec.num_classes, spec.strides, spec.channels, layers, _FORM
    tensors = [("prepared", _prepared(adapter)), *model.named_parameters(), *model.named_buffers()]
    return digest_of(repr(facts), tensors).hex()


@cache  # computed once: Python has imported the files as they were then
def _code_of(modules: frozenset[str]) -> str:
    """The digests of the source files of modules."""
    return repr(sorted(digests_of(source_files(sorted(modules))).items()))


def _prepared(adapter: DetectorAdapter) -> Tensor:
    """What the adapter makes of an image with values from 0 to 1."""
    device = next(adapter.model.parameters()).device
    image = torch.linspace(0, 1, 3 * 64 * 64, device=device).view(3, 64, 64)
    size = ((64, 64),)
    return adapter.prepare([image], like=Batch(image[None], size, size, size)).images


def _versions(model: nn.Module) -> list[tuple[int, int]]:
    """Of each weight and buffer, how often it was written to, and where it lies. If they change, so may the digest.

    A write through `.data` or a numpy view changes neither, nor does one to a tensor of `torch.inference_mode`, which
    torch does not count. Nor does a different setting of a layer, such as `eps`.
    """
    # Each step comes here, so it walks the tree itself: `named_parameters` and `named_buffers` take four times as long.
    modules: list[nn.Module | None] = [model]
    tensors: list[Tensor | None] = []
    for module in modules:
        if module is not None:
            tensors += module._parameters.values()
            tensors += module._buffers.values()
            modules += module._modules.values()
    return [(0 if x.is_inference() else x._version, x.data_ptr()) for x in tensors if x is not None]


def _view_keys(digests: Sequence[str], batch: Batch, teacher: str, precision: str) -> list[str]:
    """The key of each image of a teacher's batch.

    Args:
        digests: digests of the images.
        batch: what the teacher is shown: the canvas, and the sizes of the images on it.
        teacher: the teacher's digest.
        precision: how the cache keeps floats.
    """
    device, canvas = batch.images.device.type, tuple(batch.images.shape[-2:])
    shared = f"{teacher} {canvas} {_arithmetic(device)} {precision}"
    return [
        digest_of(f"{shared} {sizes} {image}").hex()
        for image, *sizes in zip(digests, batch.sizes, batch.padded_sizes, strict=True)
    ]


def _arithmetic(device: str) -> str:
    """What products are computed in, as far as it changes more than rounding of float32."""
    dtype = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "float32"
    if device != "cuda":
        return dtype
    matmul, convolutions = in_tf32()
    return f"{dtype} {matmul} {convolutions}"
