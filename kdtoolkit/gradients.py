"""Gradients of single losses at the student's parameters. The graph and all `grad` attributes stay as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdtoolkit import processes

# Losses are multiplied by one of these, tried in turn until the gradients are finite. A large scale keeps gradients of
# float16 above zero, a small one keeps large ones from overflowing.
_SCALES = (2.0**10, 2.0**5, 1.0)


@dataclass(frozen=True, eq=False)
class Gradient:
    """A loss's gradient at P parameters.

    Attributes:
        parts: the gradient at each parameter; zeros where the loss does not reach.
        reached: (P,) bool, whether the loss depends on the parameter at all. A gradient may be zero although it does.
    """

    parts: list[Tensor]
    reached: Tensor

    @staticmethod
    def of(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Gradient:
        """The gradient of a loss. If several processes train together, all call it, and it is the sum over them."""
        found: Sequence[Tensor | None] = [None] * len(parameters)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        reached = torch.tensor([g is not None for g in found], device=loss.device)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        if processes.count() == 1:
            return Gradient(parts, reached)
        flat = processes.total(torch.cat([reached.float(), *(part.flatten() for part in parts)]))
        sizes = [p.numel() for p in parameters]
        summed = torch.split(flat[len(sizes) :], sizes)
        return Gradient([x.view_as(p) for x, p in zip(summed, parameters, strict=True)], flat[: len(sizes)] > 0)

    def __add__(self, other: Gradient) -> Gradient:
        """The gradient of the sum of both losses."""
        return Gradient(list(torch._foreach_add(self.parts, other.parts)), self.reached | other.reached)

    def dot(self, other: Gradient) -> Tensor:
        """The product of both gradients at each parameter (P,), float32."""
        return torch.stack([(a * b).sum() for a, b in zip(self.parts, other.parts, strict=True)]).float()

    def squares(self) -> Tensor:
        """The squared norm of each part (P,), float32."""
        return torch.stack(torch._foreach_norm(self.parts)).float().square()


def _norms(gradient: Gradient, task: Gradient) -> tuple[Tensor, Tensor]:
    """The norms of a gradient and of the task's, both at the parameters that both losses reach."""
    both = gradient.reached & task.reached
    own, its = (torch.where(both, each.squares(), 0.0).sum().sqrt() for each in (gradient, task))
    return own, its


def scaled_norms(
    losses: Sequence[Tensor], task: Tensor, parameters: Sequence[nn.Parameter]
) -> list[tuple[float, float]]:
    """For each loss the norms of its gradient and of the task's, at the parameters that both reach.

    Both norms of a pair are multiplied by the same scale, so their ratio is that of the gradients.
    """
    tasks: dict[float, Gradient] = {}
    found = []
    for loss in losses:
        for scale in _SCALES:
            if scale not in tasks:
                tasks[scale] = Gradient.of(scale * task, parameters)
            own, its = torch.stack(_norms(Gradient.of(scale * loss, parameters), tasks[scale])).tolist()
            if math.isfinite(own) and math.isfinite(its):
                break
        found.append((own, its))
    return found
