"""Method, a function of what both detectors show: what a method's author writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from kdtoolkit.contract.exchange import Exchange
from kdtoolkit.contract.schedule import Schedule
from kdtoolkit.contract.spec import Capability, DetectorSpec
from kdtoolkit.errors import KDError
from kdtoolkit.options import bound_options, check_options


class Method(nn.Module, ABC):
    """A distillation method. What it must learn is its own parameters: trained with it, then thrown away.

    `needs`: what both detectors must show; settings of an instance may ask for other things. `terms`: the names of its
    loss terms; `vanishing`: those of them that are zero where the student shows what the teacher shows. `paper`: where
    it comes from. `compares_classes`: whether, needing more than features, it needs detectors of the same classes.
    `stages`: the student's and the teacher's stage whose states it takes, once `setup` knows them; while it is None
    all are kept, and those of first stages, which costs memory.

    Arguments of `__init__` are checked by their type hints before it runs: see `kdtoolkit.options.check_options`.
    `in_use`: whether a Distiller has set it up; each wants one of its own.
    """

    needs: frozenset[Capability]
    terms: ClassVar[tuple[str, ...]]
    vanishing: tuple[str, ...] = ()
    paper: ClassVar[str]
    compares_classes: bool = True
    schedule: Schedule = Schedule()
    strides: tuple[int, ...] = ()
    stages: tuple[int, int] | None = None
    in_use: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _checking_options(cls.__init__)  # type: ignore[method-assign]

    def scheduled(self, *, warmup: int = 0, decay: int = 0, stop: int | None = None) -> Self:
        """Let the weights follow a `Schedule`; returns the method itself: `PKD().scheduled(stop=9000)`."""
        self.schedule = Schedule(warmup, decay, stop)
        return self

    def at_strides(self, *strides: int) -> Self:
        """Apply the method to the pyramid levels of these strides alone; returns the method itself.

        Raises KDError for methods that need more than features: they compare whole heads.
        """
        if self.needs != frozenset({Capability.FEATURES}):
            raise KDError(f"{type(self).__name__} compares heads: levels can be chosen for methods of features alone")
        if not all(isinstance(stride, int) for stride in strides):
            raise KDError(f"at_strides{strides}: strides are whole numbers of pixels, as in at_strides(8, 16)")
        self.strides = strides
        return self

    def refuses(self, student: DetectorSpec, teacher: DetectorSpec) -> str | None:
        """Why this pair cannot be distilled by this method, beyond `needs`; None if it can. Checked once."""
        return None

    def setup(self, student: DetectorSpec, teacher: DetectorSpec) -> None:
        """Build what must be learned for this pair (projections, context blocks). Called once, after `refuses`."""

    @abstractmethod
    def forward(self, exchange: Exchange) -> dict[str, Tensor]:
        """The weighted loss terms of one step, float32 scalars, by names of `terms`, of which some may be missing."""


def _checking_options(init: Callable[..., None]) -> Callable[..., None]:
    @wraps(init)
    def checked(self: Method, *args: Any, **kwargs: Any) -> None:
        own = {name: value for name, value in bound_options(init, (self, *args), kwargs).items() if value is not self}
        check_options(type(self).__name__, init, own)
        try:
            init(self, *args, **kwargs)
        except AttributeError:  # torch's, of parameters and modules that are assigned too early
            if "_modules" in vars(self):
                raise
        if "_modules" not in vars(self):
            raise TypeError(f"{type(self).__name__}.__init__ must call super().__init__() before anything else")

    return checked
