"""What checks expect of tensors and losses; each function raises AssertionError with the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kdtoolkit.contract import Predictions


def expect(condition: bool, message: str) -> None:
    """Raise AssertionError unless the condition holds."""
    if not condition:
        raise AssertionError(message)


def outputs(predictions: Predictions) -> dict[str, Tensor]:
    """The tensors of predictions, by name."""
    found = {"logits": predictions.logits, "regression": predictions.regression, "boxes": predictions.boxes}
    return found if predictions.quality is None else found | {"quality": predictions.quality}


def expect_same(again: Mapping[str, Tensor], once: Mapping[str, Tensor], what: str) -> None:
    """Expect equality to the bit."""
    expect(again.keys() == once.keys(), f"{what}: {sorted(again)} instead of {sorted(once)}")
    for name, expected in once.items():
        actual = again[name]
        expect(actual.shape == expected.shape, f"{what}: {name} is {tuple(actual.shape)}, not {tuple(expected.shape)}")
        if not torch.equal(actual, expected):
            distance = (actual.double() - expected.double()).abs().max().item()
            raise AssertionError(f"{what}: {name} is off by up to {distance:g}; it must be equal to the bit")


def expect_close(again: Mapping[str, Tensor], once: Mapping[str, Tensor], what: str) -> None:
    """Expect equality within rounding: to 1e-4 of each tensor's largest value."""
    expect(again.keys() == once.keys(), f"{what}: {sorted(again)} instead of {sorted(once)}")
    for name, expected in once.items():
        actual = again[name]
        expect(actual.shape == expected.shape, f"{what}: {name} is {tuple(actual.shape)}, not {tuple(expected.shape)}")
        if expected.numel():
            distance = (actual.double() - expected.double()).abs().max().item()
            largest = expected.double().abs().max().item()
            expect(distance <= 1e-4 * largest, f"{what}: {name} is off by up to {distance:g} of {largest:g}")


def expect_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Expect no NaN and no infinity."""
    for name, tensor in tensors.items():
        bad = int((~torch.isfinite(tensor)).sum())
        expect(bad == 0, f"{what}: {name} has {bad} of {tensor.numel()} values that are not finite")


def expect_float32(tensors: Mapping[str, Tensor], what: str) -> None:
    """Expect finite values in float32."""
    for name, tensor in tensors.items():
        expect(tensor.dtype == torch.float32, f"{what}: {name} is {tensor.dtype}, not torch.float32")
    expect_finite(tensors, what)


def expect_losses(losses: Mapping[str, Tensor], what: str) -> None:
    """Expect finite float32 scalars, at least one."""
    expect(len(losses) > 0, f"{what}: no loss at all")
    for name, loss in losses.items():
        expect(loss.shape == (), f"{what}: {name} has the shape {tuple(loss.shape)}, not ()")
    expect_float32(losses, what)


def total(losses: Mapping[str, Tensor]) -> Tensor:
    """Sum of the losses."""
    return torch.stack([*losses.values()]).sum()


def expect_backward(losses: Mapping[str, Tensor], model: nn.Module, what: str, *, reaches: bool = False) -> None:
    """Run backward, and expect finite gradients in the model; with `reaches`, also that not all of them are 0."""
    torch.autograd.backward(total(losses))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expect_finite(gradients, f"{what}: gradients")
    expect(not reaches or any(bool(g.any()) for g in gradients.values()), f"{what}: no gradient reaches the model")


@contextmanager
def without_onednn() -> Iterator[None]:
    """A context without oneDNN, for bfloat16 on small images, whose coarse levels have a single cell.

    There oneDNN leaves part of the gradient of a convolution's weight uninitialised in bfloat16: the part of the kernel
    that stride and padding leave unused (torch 2.14 with AVX-512). No adapter and no method causes it.
    """
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before
