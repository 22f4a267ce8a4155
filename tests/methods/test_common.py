"""What methods share that has no tests of its own: padding, and statistics of the cells that count."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kdtoolkit.contract import Exchange, View
from kdtoolkit.libraries import adapt
from kdtoolkit.methods import CLoCKDistill, CrossKD, DETRDistill
from kdtoolkit.methods.common import cells_with_meaning, channel_statistics, on_images, statistics_where
from tests.conftest import tiny_of

METHODS = [CLoCKDistill(queries=5), DETRDistill(), CrossKD(state="memory")]


def test_statistics_are_those_of_the_cells_that_count():
    generator = torch.Generator().manual_seed(0)
    x, counts = torch.randn(2, 3, 4, 5, generator=generator), torch.rand(2, 4, 5, generator=generator) < 0.5
    chosen = x.movedim(1, -1)[counts]
    for found, expected in zip(statistics_where(x, counts), (chosen.mean(0), chosen.std(0)), strict=True):
        torch.testing.assert_close(found.flatten(), expected)
    for found, expected in zip(statistics_where(x, torch.ones_like(counts)), channel_statistics(x), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("masks", [(False, False), (True, False), (False, True), (True, True)])
def test_cells_that_begin_beyond_an_image_mean_nothing_if_a_detector_masks_them(masks, batch):
    adapter = adapt(tiny_of("GFL", seed=0))
    shown = adapter.prepare(*batch)
    views = [View(adapter, shown, adapter.features(shown)) for _ in masks]
    for view, masked in zip(views, masks, strict=True):
        view.spec = replace(view.spec, masks_padding=masked)
    for level, stride in enumerate(adapter.spec.strides):
        found = cells_with_meaning(*views, level)
        for i, (height, width) in enumerate(shown.sizes):
            for y in range(found.shape[1]):
                for x in range(found.shape[2]):
                    assert found[i, y, x] == (not any(masks) or (y * stride < height and x * stride < width))


def decoder(family, seed):
    """A detector that masks padding. Its queries are its own: which cells the encoder's best are depends on padding."""
    from kdtoolkit.adapters.transformers.deformable_detr import DeformableDetrAdapter
    from kdtoolkit.adapters.transformers.detr_base import tiny_backbone, tiny_detr

    if family != "Deformable DETR":
        return tiny_of(family, seed=seed).eval()
    torch.manual_seed(seed)
    kind = DeformableDetrAdapter.kind
    return tiny_detr(kind, 3, backbone_config=tiny_backbone(2, 3, 4), d_model=64, with_box_refine=True).eval()


def view_on(canvas, detector, images, targets, frozen):
    """What a detector shows on a square canvas of this side. Beyond the images its maps are noise."""
    adapter = adapt(detector)
    small = adapter.prepare(images, targets)
    with torch.no_grad():
        maps = adapter.features(small)
    further = canvas - small.images.shape[-1]
    shown = replace(small, images=F.pad(small.images, (0, further, 0, further)))
    generator = torch.Generator().manual_seed(canvas)
    laid = []
    for x, stride in zip(maps, adapter.spec.strides, strict=True):
        wider = F.pad(x, (0, further // stride, 0, further // stride))
        inside = on_images(shown, stride, wider.shape[2], wider.shape[3], at=0)[:, None]
        laid.append(torch.where(inside, wider, 5 * torch.randn(wider.shape, generator=generator)))
    return View(adapter, shown, tuple(laid), adapter.head(tuple(laid), shown), frozen=frozen)


@pytest.mark.parametrize("family", ["DAB-DETR", "Deformable DETR"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_how_much_padding_a_batch_has_changes_nothing(method, family, batch):
    """Student and teacher mask padding. On equal canvases, on larger ones, and where the teacher's alone is larger."""
    pytest.importorskip("transformers")
    student, teacher = (decoder(family, seed) for seed in (1, 2))
    method.setup(adapt(student).spec, adapt(teacher).spec)
    first, *others = (
        method(Exchange(view_on(ours, student, *batch, False), view_on(theirs, teacher, *batch, True)))
        for ours, theirs in ((64, 64), (128, 128), (64, 128))
    )
    for again in others:
        assert {name: term.item() for name, term in again.items()} == pytest.approx(
            {name: term.item() for name, term in first.items()}, rel=1e-4, abs=1e-6
        )
