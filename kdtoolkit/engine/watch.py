"""What a training run watches for: loss terms that teach nothing, and parts of the student that have died."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdtoolkit.distiller import Losses

FIRST_STEPS = 5  # a term that has said nothing in so many steps with boxes is reported while the run goes on


@dataclass
class _Term:
    """How often a term was there, how often above zero, and why it teaches nothing as far as is known."""

    steps: int = 0
    nonzero: int = 0
    reason: str = "is exactly zero"


class SilenceDetector:
    """Finds loss terms that teach the student nothing: they are exactly zero, or have no gradient to it.

    It goes by steps whose images have boxes, for many terms are zero without. `vanishing` are terms that may be zero
    for a good reason: the student agrees with the teacher, or no prior has been assigned yet. They are called zero only
    at the end of a run. The student's own terms never are: D-FINE, for one, compares its last layer with itself.
    """

    def __init__(self, student: nn.Module, vanishing: frozenset[str] = frozenset()) -> None:
        self._parameters = [p for p in student.parameters() if p.requires_grad]
        self._vanishing = vanishing
        self._terms: dict[str, _Term] = {}

    def observe(self, losses: Losses, values: Mapping[str, float]) -> None:
        """Look at the terms of a step with boxes, before `backward`; `values` are those of `losses`.

        Leaves their graph and all gradients as they are. A term is looked at until it has a gradient: in the first
        steps in which it is above zero, then less and less often.
        """
        for name, loss in losses.items():
            term = self._terms.setdefault(name, _Term())
            term.steps += 1
            term.nonzero += values[name] != 0
            seldom = term.nonzero > FIRST_STEPS and term.nonzero & (term.nonzero - 1)
            if values[name] != 0 and term.reason and not seldom:
                term.reason = self._without_gradient(loss)

    def _without_gradient(self, loss: Tensor) -> str:
        if not loss.requires_grad:
            return "has no gradient"
        gradients = torch.autograd.grad(loss, self._parameters, retain_graph=True, allow_unused=True)
        return "" if any(g is not None and bool(g.any()) for g in gradients) else "has no gradient to the student"

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


class DeadParts:
    """Finds parts of the student whose gradient has become exactly zero: whatever is shown, they learn no more.

    Boxes of which all sides are zero are the best known case: no small change of a weight gives them an area. A part is
    called dead if it has had a gradient, and none in the last `patience` steps with boxes. One of a list of parts whose
    others learn on is not: of heads that have a level each, some may get no object for long.
    """

    def __init__(self, student: nn.Module, names: Sequence[str], patience: int, device: torch.device) -> None:
        """`names` are of a Distiller's parameters; what methods learn is left out of the warnings."""
        self._names = names
        self._lists = {name for name, module in student.named_modules() if isinstance(module, nn.ModuleList)}
        self._patience = patience
        self._with_boxes = [0]  # the number of steps with boxes, after each step
        self._alive = torch.zeros(len(names), dtype=torch.int64, device=device)  # the last step with a gradient

    def observe(self, norms: Tensor, has_boxes: bool) -> None:
        """Take down which parameters have a gradient, by its norm; one a name. Waits for no result of the device."""
        step = len(self._with_boxes)
        self._with_boxes.append(self._with_boxes[-1] + has_boxes)
        self._alive = torch.where(norms > 0, step, self._alive)

    def warnings(self) -> list[str]:
        """One line for each part that is dead now: the largest modules all of whose parameters are."""
        dead: dict[str, int] = {}  # by module, the last step in which some parameter of it had a gradient
        alive: set[str] = set()
        for name, last in zip(self._names, self._alive.tolist(), strict=True):
            owner, *path, _ = name.split(".")
            if owner != "student":  # what a method learns
                continue
            modules = [".".join(path[:depth]) for depth in range(len(path) + 1)]
            if last and self._with_boxes[-1] - self._with_boxes[last] >= self._patience:
                dead.update({module: max(last, dead.get(module, 0)) for module in modules})
            elif last:
                alive.update(modules)
        whole = {module for module in dead if module not in alive}
        largest = [
            module
            for module in dead
            if module in whole and (not module or module.rpartition(".")[0] not in whole | self._lists)
        ]
        return [
            f"the gradient of the student's {module or 'every parameter'} has been exactly 0 since step "
            f"{dead[module] + 1}: it has died and learns no more. Lower lr or lengthen warmup_steps"
            for module in largest
        ]
