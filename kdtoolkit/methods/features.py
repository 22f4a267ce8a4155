"""The base of methods that compare pyramids. Such a method is one function of two maps.

    class SquaredDifference(FeatureMethod):
        paper = "none"

        def loss(self, student: Tensor, teacher: Tensor, level: Level) -> Tensor:
            return (student - teacher).square().mean()

`FeatureMethod` pairs the levels, projects, adds up and weighs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor, nn

from kdtoolkit.compatibility import shared_levels, why_no_shared_level
from kdtoolkit.contract import Capability, DetectorSpec, Exchange, Method, Unlabelled
from kdtoolkit.methods.common import resize_like


@dataclass(frozen=True)
class Level:
    """Which pair of levels `FeatureMethod.loss` is asked for.

    `index` counts the levels that both pyramids have, from 0 at the finest. `region` is what `FeatureMethod.regions`
    gave for this pair; None if the method has no regions.
    """

    index: int
    region: Tensor | None = None


class FeatureMethod(Method):
    """A method that compares two pyramids, level by level. A subclass writes `loss`; the rest is done here.

    Pairs without a common stride are refused. If the channels of a level differ, a learned 1x1 convolution projects the
    student's map to the teacher's channels. The losses of all common levels are added up and weighted.

    Args:
        weight: factor of the loss, for a method with a single term.

    Attributes:
        resize_student: if the two maps differ in size, resize the student's bilinearly before `loss`.
        mean_over_levels: divide the sum over levels by their number.
        weights: one for each of `terms`. A method with several terms assigns them in its `__init__`.
        levels: pairs (student level, teacher level) of equal stride, finest first.
        align: the projection of each pair.
    """

    needs = frozenset({Capability.FEATURES})
    unlabelled: Unlabelled = "images"
    terms: ClassVar[tuple[str, ...]] = ("feature",)
    resize_student: ClassVar[bool] = True
    mean_over_levels: ClassVar[bool] = False
    weights: tuple[float, ...]
    levels: list[tuple[int, int]]
    align: nn.ModuleList

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        self.weights = (weight,)

    @abstractmethod
    def loss(self, student: Tensor, teacher: Tensor, level: Level) -> Tensor:
        """The unweighted loss of one pair of maps: a scalar, or (T,) if the method has T terms.

        Args:
            student: (N, C, H, W) float32, projected to the teacher's channels.
            teacher: (N, C, H, W) float32; no gradient reaches it.
            level: which pair of levels it is.
        """

    def refuses(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> str | None:
        """Refuse pairs without a common stride."""
        return why_no_shared_level(student_spec, teacher_spec)

    def setup(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        """Pair the levels of equal stride, and build a projection for each pair.

        If a method learns more than projections, it extends `setup` and keeps one module for each pair. `loss` finds
        the module of its pair by `level.index`.
        """
        self.levels = shared_levels(student_spec, teacher_spec)
        channels = ((student_spec.channels[s], teacher_spec.channels[t]) for s, t in self.levels)
        self.align = nn.ModuleList(self.projection(ours, theirs) for ours, theirs in channels)

    def projection(self, student_channels: int, teacher_channels: int) -> nn.Module:
        """The module that a student's map goes through first: a 1x1 convolution; the identity if channels are equal."""
        if student_channels == teacher_channels:
            return nn.Identity()
        return nn.Conv2d(student_channels, teacher_channels, 1)

    def pyramids(self, exchange: Exchange) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The maps (N, C, H, W) of all levels, of the student and of the teacher."""
        return exchange.student.features, exchange.teacher.features

    def regions(self, exchange: Exchange) -> Sequence[Tensor] | None:
        """A tensor for each pair of levels, which `loss` gets as `Level.region`: which cells matter, and how much."""
        return None

    def forward(self, exchange: Exchange) -> dict[str, Tensor]:
        """The weighted terms of one step."""
        self._check_set_up()
        students, teachers = self.pyramids(exchange)
        regions = self.regions(exchange)
        losses = []
        with torch.autocast(students[0].device.type, enabled=False):  # sums over whole maps overflow in half precision
            for index, ((s, t), align) in enumerate(zip(self.levels, self.align, strict=True)):
                student, teacher = align(students[s].float()), teachers[t].detach().float()
                if self.resize_student:
                    student = resize_like(student, teacher)
                losses.append(self.loss(student, teacher, Level(index, None if regions is None else regions[index])))
        total = reduce(torch.add, losses)
        if total.numel() != len(self.terms):
            raise TypeError(
                f"{type(self).__name__}.loss must return one number for each of its terms {self.terms}; it returned a "
                f"tensor of shape {tuple(total.shape)}"
            )
        if self.mean_over_levels:
            total = total / len(losses)
        return {name: w * loss for name, w, loss in zip(self.terms, self.weights, total.reshape(-1), strict=True)}

    def _check_set_up(self) -> None:
        """Raise TypeError if a subclass has left out its weights, or the setup of this class."""
        name = type(self).__name__
        if len(self.weights) != len(self.terms):
            raise TypeError(
                f"{name} has {len(self.terms)} terms {self.terms} and {len(self.weights)} weights: in its __init__ "
                "assign self.weights, one for each of terms"
            )
        if not hasattr(self, "levels") or not hasattr(self, "align"):
            raise TypeError(f"{name}.setup must call super().setup(student_spec, teacher_spec), which pairs the levels")
