"""What checks of adapters and of methods share: example images, expectations of tensors, and of models left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtoolkit.contract import (
    Batch,
    Capability,
    DetectorAdapter,
    Exchange,
    HeadTrace,
    Method,
    Predictions,
    Target,
    View,
)
from kdtoolkit.testing.report import SEED


def example_batch(
    num_classes: int,
    device: torch.device | str = "cpu",
    sizes: tuple[tuple[int, int], tuple[int, int]] = ((64, 64), (50, 60)),
) -> tuple[list[Tensor], list[Target]]:
    """Two random images of (height, width) about 64 px, with small and large boxes in both."""
    generator = torch.Generator().manual_seed(SEED)
    images = [torch.rand(3, *size, generator=generator).to(device) for size in sizes]
    boxes = [
        [[4.0, 6.0, 30.0, 40.0], [20.0, 20.0, 60.0, 60.0], [40.0, 2.0, 56.0, 18.0]],
        [[10.0, 10.0, 40.0, 45.0], [2.0, 3.0, 58.0, 48.0]],
    ]
    labels = [torch.arange(i, i + len(each), device=device) % num_classes for i, each in enumerate(boxes)]
    return images, [{"boxes": torch.tensor(b, device=device), "labels": k} for b, k in zip(boxes, labels, strict=True)]


def observe(adapter: DetectorAdapter, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> View:
    """What a detector shows of a batch, head and all, in the mode it is in; without an assignment."""
    batch = adapter.prepare(images, targets)
    features = adapter.features(batch)
    return View(adapter, batch, features, adapter.head(features, batch))


def without_objects(targets: Sequence[Target], images: Sequence[int]) -> list[Target]:
    """The targets, with no object in some images."""
    return [
        {"boxes": target["boxes"][:0], "labels": target["labels"][:0]} if i in images else target
        for i, target in enumerate(targets)
    ]


class Probe(Method):
    """Uses all that a detector shows, as any method might."""

    terms = ("probe",)
    paper = ""

    def __init__(self, needs: frozenset[Capability]) -> None:
        super().__init__()
        self.needs = needs

    def forward(self, exchange: Exchange) -> dict[str, Tensor]:
        """The mean of the student's pyramid and, through stages, distances of predictions."""
        total = torch.stack([level.float().mean() for level in exchange.student.features]).sum()
        if Capability.STAGES in self.needs:
            pair = exchange.matched()
            for i, state in enumerate(pair.student.states):
                crossed = pair.finish_with_teacher(state, i)
                total = total + (crossed.logits - pair.teacher.predictions.logits).square().mean()
        return {"probe": total}


def transformed(
    adapter: DetectorAdapter,
    levels: Callable[[Tensor], Tensor] = lambda level: level,
    predictions: Callable[[Predictions], Predictions] = lambda predictions: predictions,
    note: Callable[[str], None] = lambda what: None,
    padding: int = 0,
) -> DetectorAdapter:
    """A second adapter of the same model, whose levels and predictions go through these functions.

    `note` is told of each pass; beside a student it pads the canvas by so many pixels of `padding` more.
    """
    cls: Any = type(adapter)

    class Transformed(cls):  # type: ignore[misc]
        def prepare(
            self, images: Sequence[Tensor], targets: Sequence[Target] | None = None, like: Batch | None = None
        ) -> Batch:
            if like is not None and padding:
                like = replace(like, images=F.pad(like.images, (0, padding, 0, padding)))
            prepared: Batch = super().prepare(images, targets, like)
            return prepared

        def features(self, batch: Batch) -> tuple[Tensor, ...]:
            note("features")
            return tuple(map(levels, super().features(batch)))

        def head(self, *args: Any, **kwargs: Any) -> HeadTrace:
            note("head")
            trace: HeadTrace = super().head(*args, **kwargs)
            return replace(trace, predictions=predictions(trace.predictions))

        def resume(self, *args: Any, **kwargs: Any) -> Predictions:
            return predictions(super().resume(*args, **kwargs))

    second = copy.copy(adapter)
    second.__class__ = Transformed
    return second


# Tensors.


def expect(condition: bool, message: str) -> None:
    """Raise AssertionError unless the condition holds."""
    if not condition:
        raise AssertionError(message)


def outputs(predictions: Predictions) -> dict[str, Tensor]:
    """All that predictions say, by name."""
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
    """Run backward, and expect the model's gradients to be finite; where it `reaches` the model, not all zero."""
    torch.autograd.backward(total(losses))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expect_finite(gradients, f"{what}: gradients")
    expect(not reaches or any(bool(g.any()) for g in gradients.values()), f"{what}: no gradient reaches the model")


@contextmanager
def without_onednn() -> Iterator[None]:
    """For bfloat16 on small images, whose coarse levels are single cells.

    oneDNN's bfloat16 gradient of a convolution's weight holds uninitialised memory where stride, padding and a single
    cell leave part of the kernel unused (torch 2.14 with AVX-512). Neither adapters nor methods have a part in it.
    """
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


# Models.


@dataclass(frozen=True)
class Snapshot:
    """All that nobody may change in a model."""

    values: Mapping[str, Tensor]
    keys: tuple[str, ...]
    modules: Mapping[str, Mapping[str, object]]
    flags: Mapping[str, tuple[bool, bool]]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        """The model as it is now."""
        values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return cls(
            {name: value.detach().clone() for name, value in values.items()},
            tuple(model.state_dict()),
            {name: _facts(module) for name, module in model.named_modules()},
            {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()},
        )

    def expect_of(self, model: nn.Module, when: str, *, values: bool = True) -> None:
        """Expect the model to be as it was; without `values`, those of parameters and buffers may differ."""
        now = Snapshot.of(model)
        expect(now.keys == self.keys, f"{when} the state dict has other keys: {set(now.keys) ^ set(self.keys)}")
        expect(now.modules.keys() == self.modules.keys(), f"{when} the model has other submodules")
        for name, facts in self.modules.items():
            changed = sorted({fact for fact, _ in facts.items() ^ now.modules[name].items()})
            where = name or "the model itself"
            expect(not changed, f"{when} something is changed, added or left behind in {where}: {', '.join(changed)}")
        for name, flags in self.flags.items():
            expect(now.flags[name] == flags, f"{when} requires_grad or grad of {name} is changed")
        for name, value in self.values.items() if values else ():
            expect(torch.equal(now.values[name], value), f"{when} the values of {name} are changed")


def _facts(module: nn.Module) -> dict[str, object]:
    """Attributes with their values where these are plain, hooks, and the class's forward."""
    facts: dict[str, object] = {"forward of its class": type(module).forward}
    for name, value in vars(module).items():
        if "hooks" in name and isinstance(value, dict):
            facts[name] = tuple(value)
        else:
            facts[name] = value if isinstance(value, (bool, int, float, str, type(None))) else ...
    return facts


class _Interruption(Exception):
    """What the kit raises inside a model."""


def count_calls(model: nn.Module, step: Callable[[], object]) -> int:
    """How many calls of the model's layers `step` makes."""
    return _run_hooked(model, step, 0)


def interrupt(model: nn.Module, step: Callable[[], object], call: int) -> None:
    """Let the model raise at the given call of one of its layers in `step`, counted from 1; expect that it ends it."""
    try:
        _run_hooked(model, step, call)
    except _Interruption:
        return
    raise AssertionError("an error raised inside the model is swallowed")


def _run_hooked(model: nn.Module, step: Callable[[], object], call: int) -> int:
    """Only for copies, since it hooks them."""
    calls = 0

    def hook(module: nn.Module, args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise _Interruption

    handles = [m.register_forward_pre_hook(hook) for m in model.modules() if not any(True for _ in m.children())]
    try:
        step()
    finally:
        for handle in handles:
            handle.remove()
    return calls
