"""Successive halving: many trials train for a few steps, and the best of them go on. Pure numbers.

Source: Jamieson and Talwalkar 2016, https://arxiv.org/abs/1502.07943. Several rounds (brackets) follow each other, so
that later trials can learn from earlier ones.
"""

from __future__ import annotations

from dataclasses import dataclass

ROUNDS = 3  # of a bracket: shorter ones than a ninth of a training would end in its warm-up


@dataclass(frozen=True)
class Halving:
    """The plan of a search.

    Attributes:
        steps: how many steps a whole training has.
        trials: how many settings are tried in all.
        reduction: one of so many trials goes on in each round.
    """

    steps: int
    trials: int
    reduction: int

    @property
    def rungs(self) -> tuple[int, ...]:
        """The steps after which trials are compared; the last one is the end of the training."""
        return tuple(sorted({max(1, round(self.steps * float(self.reduction) ** -k)) for k in range(ROUNDS)}))

    @property
    def brackets(self) -> tuple[int, ...]:
        """How many trials begin in each bracket."""
        full = int(self.reduction ** (ROUNDS - 1))
        whole, rest = divmod(self.trials, full)
        return (full,) * whole + ((rest,) if rest else ())

    def kept(self, count: int) -> int:
        """How many of `count` trials go on."""
        return max(1, count // self.reduction)

    @property
    def counts(self) -> tuple[int, ...]:
        """How many trials reach each rung, over all brackets."""
        found = [0] * len(self.rungs)
        for count in self.brackets:
            for rung in range(len(found)):
                found[rung] += count
                count = self.kept(count)
        return tuple(found)

    @property
    def cost(self) -> int:
        """Steps of all trials together; a trial that goes on does not begin again."""
        parts = zip(self.counts, self.rungs, (0, *self.rungs[:-1]), strict=True)
        return sum(count * (rung - before) for count, rung, before in parts)

    @property
    def evaluations(self) -> int:
        """How often a trial is evaluated, over all trials."""
        return sum(self.counts)
