"""What a training run watches for: loss terms that teach nothing, and parts of the student that have died."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdtoolkit import processes
from kdtoolkit.distiller import Losses

FIRST_STEPS = 5  # a term that taught nothing in this number of steps with boxes is reported during the run


@dataclass
class _Term:
    """In how many steps a term was there, in how many it was not zero, and why it teaches nothing, as far as known."""

    steps: int = 0
    nonzero: int = 0
    reason: str = "is exactly zero"


class SilenceDetector:
    """Finds loss terms that teach the student nothing: they are exactly zero, or have no gradient to the student.

    Only steps whose images have boxes count, because many terms are zero without boxes. The terms in `vanishing` may be
    zero for a good reason: the student agrees with the teacher, or no prior is assigned yet. They are called zero only
    at the end of a run. The student's own terms are never called zero: D-FINE, for one, compares its last layer with
    itself.
    """

    def __init__(
        self, student: nn.Module, vanishing: frozenset[str] = frozenset(), *, with_gradients: bool = True
    ) -> None:
        """With `with_gradients` False it asks for no gradients of single terms: torch.compile does not give them."""
        self._parameters = [p for p in student.parameters() if p.requires_grad]
        self._vanishing = vanishing
        self._with_gradients = with_gradients
        self._terms: dict[str, _Term] = {}

    def observe(self, losses: Losses, values: Mapping[str, float]) -> None:
        """Look at the terms of a step with boxes, before `backward`; `values` are the values of `losses`.

        The graph and all gradients stay as they are. A term is looked at until it has a gradient: in the first steps in
        which it is not zero, then less and less often. Where several processes train together, `values` must be the
        same in all of them, so that all look at the same terms.
        """
        for name, loss in losses.items():
            term = self._terms.setdefault(name, _Term())
            term.steps += 1
            term.nonzero += values[name] != 0
            seldom = term.nonzero > FIRST_STEPS and term.nonzero & (term.nonzero - 1)
            if values[name] != 0 and term.reason and not seldom:
                term.reason = self._without_gradient(loss) if self._with_gradients else ""

    def _without_gradient(self, loss: Tensor) -> str:
        if not _in_any_process(loss.requires_grad, loss.device):
            return "has no gradient"
        found = False
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, self._parameters, retain_graph=True, allow_unused=True)
            found = any(g is not None and bool(g.any()) for g in gradients)
        return "" if _in_any_process(found, loss.device) else "has no gradient to the student"

    def warnings(self, *, final: bool = False) -> list[str]:
        """One line for each term that has taught nothing so far; `final`: the run is over."""
        found = []
        for name, term in self._terms.items():
            steps = term.nonzero or term.steps
            too_early = not final and (steps < FIRST_STEPS or (not term.nonzero and name in self._vanishing))
            own_and_zero = not term.nonzero and name.startswith("task/")
            if term.reason and not too_early and not own_and_zero:
                which = "in which it is above zero" if term.nonzero else "with boxes"
                found.append(
                    f"loss term {name} {term.reason} in each of the first {min(steps, FIRST_STEPS)} steps {which}, "
                    "and never since: this term teaches the student nothing"
                )
        return found

    def state(self) -> dict[str, Any]:
        """What it has seen, for JSON."""
        return {name: asdict(term) for name, term in self._terms.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self._terms = {name: _Term(**term) for name, term in state.items()}


class DeadParts:
    """Finds parts of the student whose gradient has become exactly zero: they learn nothing more, whatever they see.

    The best known case is a box head whose sides are all zero: no small change of a weight gives such boxes an area. A
    part is called dead if it once had a gradient and had none in the last `patience` steps with boxes. In a list of
    parts, nothing of one part is called dead while the same place in another part of the list learns: if each level has
    its own head, some heads may see no object for a long time.
    """

    def __init__(self, student: nn.Module, names: Sequence[str], patience: int, device: torch.device) -> None:
        """`names`: the names of a Distiller's parameters. Warnings are only about the student's parameters."""
        self._names = names
        self._lists = {name: len(part) for name, part in student.named_modules() if isinstance(part, nn.ModuleList)}
        self._patience = patience
        self._steps = 0
        self._with_boxes = 0  # steps with boxes
        # Of each parameter, the last step with a gradient, counted from 1, and the steps with boxes up to that one.
        self._alive = torch.zeros(2, len(names), dtype=torch.int64, device=device)

    def observe(self, norms: Tensor, has_boxes: bool) -> None:
        """Note which parameters have a gradient, by its norm (P,), one a name. Does not wait for the device."""
        self._steps += 1
        self._with_boxes += has_boxes
        for row, value in zip(self._alive, (self._steps, self._with_boxes), strict=True):
            row.masked_fill_(norms > 0, value)

    def warnings(self) -> list[str]:
        """One line for each dead part. A part is named by the largest module whose parameters are all dead."""
        dead: dict[str, int] = {}  # by module, the last step in which some parameter of it had a gradient
        alive: set[str] = set()
        for name, last, boxes in zip(self._names, *self._alive.tolist(), strict=True):
            owner, *path, _ = name.split(".")
            if owner != "student":  # what a method learns
                continue
            modules = [".".join(path[:depth]) for depth in range(len(path) + 1)]
            if last and self._with_boxes - boxes >= self._patience:
                dead.update({module: max(last, dead.get(module, 0)) for module in modules})
            elif last:
                alive.update(modules)
        whole = {module for module in dead if module not in alive}
        largest = [
            module
            for module in dead
            if module in whole
            and (not module or module.rpartition(".")[0] not in whole | self._lists.keys())
            and not self._learns_in_another_part(module, alive)
        ]
        return [
            f"the gradient of the student's {module or 'every parameter'} has been exactly 0 since step "
            f"{dead[module] + 1}: it has died and learns no more. Lower lr or lengthen warmup_steps"
            for module in largest
        ]

    def _learns_in_another_part(self, module: str, alive: set[str]) -> bool:
        """Whether the same place in another part of a list is alive: `heads.1.conv` for `heads.0.conv`."""
        path = module.split(".")
        return any(
            ".".join([*path[:depth], str(index), *path[depth + 1 :]]) in alive
            for depth in range(1, len(path))
            for index in range(self._lists.get(".".join(path[:depth]), 0))
        )

    def state(self) -> tuple[dict[str, int], Tensor]:
        """What it has seen: counts for JSON, and a tensor."""
        return {"steps": self._steps, "with_boxes": self._with_boxes}, self._alive

    def load(self, counts: Mapping[str, int], alive: Tensor) -> None:
        """Go on from a `state`."""
        self._steps, self._with_boxes = counts["steps"], counts["with_boxes"]
        self._alive.copy_(alive)


def _in_any_process(flag: bool, device: torch.device) -> bool:
    """Whether it is so in one of the processes that train together."""
    if processes.count() == 1:
        return flag
    return bool(processes.total(torch.tensor(float(flag), device=device)))
