"""How an adapter prepares images: where each image and each box goes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdtoolkit.canvas import scaled
from kdtoolkit.testing._expect import expect, expect_finite, outputs
from kdtoolkit.testing.adapters._case import PIXELS, Case
from kdtoolkit.testing.report import by_name


def _matches(case: Case) -> None:
    """`matches` is True for the adapter's model, and False for any other class."""
    expect(case.adapter.matches(case.adapter.model), "matches(model) is False for the adapter's own model")
    expect(not case.adapter.matches(nn.Identity()), "matches(nn.Identity()) is True")
    expect(case.adapter.spec == case.adapter.spec, "spec is different at each call")


def _batch(case: Case) -> None:
    """`prepare` says where each image and each box went."""
    adapter = case.fresh()

    def given() -> list[Tensor]:
        truth = [tensor for target in case.targets for tensor in (target["boxes"], target["labels"])]
        return [*case.images, *truth]

    before = [(x, x._version) for x in given()]
    batch = adapter.prepare(case.images, case.targets)
    kept = all(x is now and x._version == version for (x, version), now in zip(before, given(), strict=True))
    expect(kept, "prepare writes to the images or targets that it is given; it must copy them")
    count, colours, *canvas = batch.images.shape
    expect((count, colours) == (len(case.images), 3), f"images are {tuple(batch.images.shape)}")
    originals = tuple((image.shape[-2], image.shape[-1]) for image in case.images)
    expect(batch.original_sizes == originals, f"original_sizes {batch.original_sizes} of images {originals}")
    for size, padded in zip(batch.sizes, batch.padded_sizes, strict=True):
        fits = all(0 < s <= p <= c for s, p, c in zip(size, padded, canvas, strict=True))
        expect(fits, f"size {size}, padded {padded} and canvas {canvas} do not contain each other")
    expect(len(batch.boxes) == len(batch.labels) == count, "boxes and labels are not one tensor an image")
    for i, target in enumerate(case.targets):
        height, width = (size / original for size, original in zip(batch.sizes[i], originals[i], strict=True))
        expected = target["boxes"] * target["boxes"].new_tensor([width, height] * 2)
        expect(batch.boxes[i].shape == expected.shape, f"image {i} has boxes {tuple(batch.boxes[i].shape)}")
        distance = (batch.boxes[i] - expected).abs().max().item() if len(expected) else 0.0
        expect(distance <= max(PIXELS, 1e-4 * max(canvas)), f"boxes of image {i} are off by {distance:g} pixels")
        expect(torch.equal(batch.labels[i], target["labels"]), f"labels of image {i} are {batch.labels[i].tolist()}")
    # A smaller image is added: it is padded further if the adapter pads to the largest image of the batch.
    height, width = originals[-1]
    images = [*case.images, case.images[-1][:, : height // 2, : width // 2]]
    without = adapter.prepare(images)
    expect(without.boxes == () and without.labels == (), "without targets boxes and labels must be empty tuples")
    for i, (image, padded) in enumerate(zip(images, without.padded_sizes, strict=True)):
        alone = tuple(adapter.prepare([image]).images.shape[-2:])
        what = f"padded_sizes of image {i} is {padded}, but prepared alone it has a canvas of {alone}"
        expect(padded == alone, f"{what}: padded_sizes must not count the padding that the batch adds")


@torch.no_grad()
def _beside(case: Case) -> None:
    """With `like=` images have the same proportions as in the student's batch, on a canvas that is large enough."""
    like, sizes = case.like, case.like.sizes
    padded = like.images.shape[-2:]
    adapter = case.fresh()
    batch = adapter.prepare(case.images, case.targets, like=like)
    scale = [sum(size[i] for size in batch.sizes) / sum(size[i] for size in sizes) for i in range(2)]
    for ours, theirs in zip(batch.sizes, sizes, strict=True):
        off = max(abs(a - b * factor) for a, b, factor in zip(ours, theirs, scale, strict=True))
        expect(
            off <= 1, f"images of sizes {sizes} in the student's batch have sizes {batch.sizes}: different proportions"
        )
    canvas = tuple(batch.images.shape[-2:])
    missing = [side for side, other, factor in zip(canvas, padded, scale, strict=True) if side < other * factor - 1]
    expect(
        not missing, f"the canvas {canvas}, scaled by {scale}, is too small for the student's canvas of {tuple(padded)}"
    )
    for i, (own, seen) in enumerate(zip(batch.boxes, like.boxes, strict=True)):
        distance = (own - scaled(seen, batch.sizes[i], sizes[i])).abs()
        off = distance.max().item() if len(own) else 0.0
        expect(off <= PIXELS * max(canvas), f"boxes of image {i} are off by {off:g} pixels from where the image lies")
    predictions = adapter.head(adapter.features(batch), batch).predictions
    expect_finite(outputs(predictions), "beside a student's batch")


CHECKS = by_name(_matches, _batch, _beside)
