"""Whether what a detector shows has the shapes and kinds that its spec declares."""

from __future__ import annotations

import torch

from kdtoolkit.contract import DetectorAdapter
from kdtoolkit.testing._expect import expect, expect_finite, expect_float32, outputs
from kdtoolkit.testing.adapters._case import Case
from kdtoolkit.testing.report import LeftOut, by_name


@torch.no_grad()
def _levels(case: Case) -> None:
    """Channels and strides of the spec equal the pyramid's."""
    view, spec = case.show(), case.spec
    channels = tuple(level.shape[1] for level in view.features)
    expect(channels == spec.channels, f"levels have {channels} channels, the spec says {spec.channels}")
    expect(len(spec.strides) == len(channels), f"{len(spec.strides)} strides, {len(channels)} levels")
    for stride, level in zip(spec.strides, view.features, strict=True):
        for cells, pixels in zip(level.shape[-2:], view.batch.images.shape[-2:], strict=True):
            # A level's size may be rounded up or down. A wrong stride is off by a factor.
            fits = (cells - 1) * stride <= pixels <= (cells + 1) * stride
            expect(fits, f"{pixels} pixels give {cells} cells, which does not fit the declared stride {stride}")


@torch.no_grad()
def _predictions(case: Case) -> None:
    """Predictions have the shapes, kinds and dtypes that the spec declares."""
    predictions, spec = case.show().head.predictions, case.spec
    size = len(case.images), predictions.priors.boxes.shape[-2]
    expected = {
        "logits": (*size, spec.num_classes + (spec.activation == "softmax")),
        "regression": (*size, 4, len(spec.bins)) if spec.bins else (*size, 4),
        "boxes": (*size, 4),
        "quality": size,
    }
    for name, tensor in outputs(predictions).items():
        shape = tuple(tensor.shape)
        expect(shape == expected[name], f"{name} is {shape}; by the spec it must be {expected[name]}")
    expect_float32(outputs(predictions), "head")
    for name in ("logits", "quality"):
        values = outputs(predictions).get(name, predictions.logits)
        low, high = values.min().item(), values.max().item()
        problem = f"{name} lie between {low:g} and {high:g}, as probabilities do; they must be logits"
        expect(low == high or low < 0 or high > 1, problem)
    kinds = predictions.activation, spec.activation
    expect(kinds[0] == kinds[1], f"activation is {kinds[0]} in predictions, {kinds[1]} in the spec")


@torch.no_grad()
def _priors(case: Case) -> None:
    """Priors lie on the declared grid with the declared strides; without a grid, the spec names their form."""
    view, spec = case.show(), case.spec
    priors = view.head.predictions.priors
    expect_finite({"boxes": priors.boxes}, "priors")
    if not spec.priors.on_grid:
        expect(spec.prior_form != "", f"{spec.priors} lie on no grid, so the spec must have a prior_form")
        expect(spec.priors_per_cell == (), "priors_per_cell is for priors on a grid")
        grid_free = priors.grid == () and priors.per_cell == () and priors.strides.numel() == 0
        expect(grid_free, f"{spec.priors} lie on no grid, but Priors has a grid, strides or per_cell")
        return
    expect(spec.prior_form == "", f"{spec.priors} lie on a grid, so prior_form must be empty")
    expect(priors.boxes.ndim == 2, f"priors on a grid are (A, 4), here {tuple(priors.boxes.shape)}")
    cells = tuple((level.shape[-2], level.shape[-1]) for level in view.features)
    expect(priors.grid == cells, f"Priors.grid is {priors.grid}, levels are {cells}")
    counts = tuple(h * w * each for (h, w), each in zip(priors.grid, spec.priors_per_cell, strict=True))
    expect(
        counts == priors.per_level, f"by the spec levels have {counts} priors, by Priors.per_level {priors.per_level}"
    )
    found = len(priors.boxes)
    expect(sum(counts) == found == len(priors.strides), f"{sum(counts)} priors on the levels, {found} in all")
    centres = (priors.boxes[:, :2] + priors.boxes[:, 2:]).double() / 2
    levels = zip(torch.split(priors.strides, [*counts]), torch.split(centres, [*counts]), strict=True)
    for stride, grid, (strides, points) in zip(spec.strides, priors.grid, levels, strict=True):
        where = f"priors of the level of stride {stride}"
        # Strides of the spec are whole numbers. Those of priors may be the canvas divided by the cells.
        off = (strides - stride).abs().max().item()
        expect(off <= 0.5, f"{where} have strides off by {off:g}")
        expect(bool((strides == strides[0]).all()), f"{where} have unequal strides")
        for axis, moved in ((0, (0.0, stride)), (1, (stride, 0.0))):
            steps = points.view(*grid, -1, 2).diff(dim=axis).reshape(-1, 2)
            off = (steps - steps.new_tensor(moved)).abs().max().item() if len(steps) else 0.0
            expect(off <= 0.5, f"{where} are not {stride} apart: off by {off:g}")


@torch.no_grad()
def _stages(case: Case) -> None:
    """States have the branches, channels and shapes of the declared stages."""
    spec = case.spec
    if not spec.stages:
        resumes = type(case.adapter).resume is not DetectorAdapter.resume
        expect(not resumes, "resume is implemented, but describe names no stages")
        raise LeftOut("the spec has no stages")
    states = case.show().head.states
    names = [stage.name for stage in spec.stages]
    expect(len(set(names)) == len(names), f"stages share a name: {names}")
    expect(len(states) == len(names), f"{len(states)} states for {len(names)} stages")
    for stage, state in zip(spec.stages, states, strict=True):
        channels = {branch: tuple(tensor.shape[1] for tensor in tensors) for branch, tensors in state.items()}
        declared = dict(stage.channels)
        expect(channels == declared, f"{stage.name} has channels {channels}, the spec says {declared}")
        for tensor in (tensor for tensors in state.values() for tensor in tensors):
            fits = tensor.ndim == 4 if stage.spatial else tensor.ndim in (2, 3)
            expect(fits, f"{stage.name} is {tuple(tensor.shape)}, but spatial is {stage.spatial}")
            if stage.activation is not None:
                once = stage.activation(tensor)
                expect(torch.equal(stage.activation(once), once), f"activation of {stage.name} is not idempotent")


CHECKS = by_name(_levels, _predictions, _priors, _stages)
