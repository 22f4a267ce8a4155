"""Method: a function of what both detectors show. The author of a method writes a subclass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Set
from functools import wraps
from typing import Any, ClassVar, Literal, Self, get_args

from torch import Tensor, nn

from kdtoolkit.contract.exchange import Exchange
from kdtoolkit.contract.held import HeldShare
from kdtoolkit.contract.schedule import Schedule
from kdtoolkit.contract.spec import Capability, DetectorSpec
from kdtoolkit.errors import KDError
from kdtoolkit.options import bound_options, check_options

Unlabelled = Literal["images", "detections", "skips"]


class Method(nn.Module, ABC):
    """A distillation method: loss terms computed from what both detectors show.

    Anything that the method must learn is a parameter of its own, trained with the student and thrown away afterwards.
    Arguments of `__init__` are checked against their type hints before it runs: see `kdtoolkit.options.check_options`.

    Attributes:
        needs: what both detectors must show. An instance may need different things than the class, by its settings.
        terms: the names of the loss terms.
        metrics: the names of numbers that are no losses. They are logged, and nothing is trained by them. Like loss
            terms they are averaged over processes, so a count must be multiplied by `kdtoolkit.processes.count()`.
        vanishing: the terms that are zero if the student shows exactly what the teacher shows.
        paper: where the method comes from.
        compares_classes: False if the two detectors may have different classes although the method needs more than
            features.
        unlabelled: what the method does with images that have no labels. "images": it needs no objects. "detections":
            the teacher's detections stand for the objects. "skips": it is not run on such images.
        schedule: the factor of the weights over training; see `scheduled`.
        held: what holds the method's share of the gradient; see `held_at`. None: its weights stay as they are.
        strides: the levels that the method works on; empty means all. See `at_strides`.
        stages: the stage of the student and the stage of the teacher whose states the method takes. `setup` assigns it.
            While it is None, the states of all stages are kept, which costs memory.
        in_use: whether a Distiller has set the method up. Each Distiller needs an instance of its own.
    """

    needs: frozenset[Capability]
    terms: ClassVar[tuple[str, ...]]
    metrics: ClassVar[tuple[str, ...]] = ()
    vanishing: tuple[str, ...] = ()
    paper: ClassVar[str]
    compares_classes: bool = True
    unlabelled: Unlabelled = "detections"
    schedule: Schedule = Schedule()
    strides: tuple[int, ...] = ()
    stages: tuple[int, int] | None = None
    in_use: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.held: HeldShare | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _checking_options(cls.__init__)  # type: ignore[method-assign]

    def scheduled(
        self,
        *,
        warmup: int | float = 0,
        decay: int | float = 0,
        stop: int | float | None = None,
        start: int | float = 0,
        every: int = 1,
    ) -> Self:
        """Let the weights follow a `Schedule`, in steps or in shares of the run. Returns the method itself.

        `PKD().scheduled(stop=9000)`, `PKD().scheduled(stop=0.9)`.
        """
        self.schedule = Schedule(warmup, decay, stop, start, every)
        return self

    def held_at(self, *, share: float) -> Self:
        """Hold the method's share of the gradient in training. Returns the method itself: `PKD().held_at(share=0.1)`.

        A factor multiplies the method's weights, so only their proportions count. `HeldShare` says what the share is
        and how it is held. A measurement costs a backward pass of the student's own loss and one of the method's loss.

        Raises KDError if the share is not between 0 and 1.
        """
        self.held = HeldShare(share)
        return self

    def at_strides(self, *strides: int) -> Self:
        """Apply the method only to the pyramid levels with these strides. Returns the method itself.

        Raises KDError if the method needs more than features, for then it uses the detectors' heads.
        """
        if self.needs != frozenset({Capability.FEATURES}):
            raise KDError(
                f"{type(self).__name__} uses the detectors' heads, so it cannot be kept to some levels: leave "
                "at_strides out. It is for methods that need features alone"
            )
        if not all(isinstance(stride, int) for stride in strides):
            raise KDError(f"at_strides{strides}: strides must be whole numbers of pixels, as in at_strides(8, 16)")
        self.strides = strides
        return self

    def refuses(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> str | None:
        """Why this method cannot distil this pair, in a sentence that says what to use instead; None if it can.

        `needs` and class counts have been checked before.
        """
        return None

    def setup(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        """Build what must be learned for this pair (projections, context blocks). Called once, after `refuses`."""

    @abstractmethod
    def forward(self, exchange: Exchange) -> dict[str, Tensor]:
        """The loss terms and metrics of one step by name, as scalars. Terms are float32, with their weights applied.

        The names are from `terms` and `metrics`. Any of them may be missing, in all processes or in none. A metric that
        is not finite is left out of logs and means.
        """


def check_facts(method: Method | type[Method]) -> None:
    """Raise KDError if `needs`, `terms`, `metrics`, `vanishing` or `unlabelled` are not what `Method` says."""
    name = method.__name__ if isinstance(method, type) else type(method).__name__
    needs: object = getattr(method, "needs", None)
    if not isinstance(needs, Set) or not needs <= set(Capability):
        raise KDError(
            f"{name}.needs is {'missing' if needs is None else repr(needs)}: write what both detectors must show, as "
            "in needs = frozenset({Capability.FEATURES})"
        )
    for fact in ("terms", "metrics", "vanishing"):
        names: object = getattr(method, fact, None)
        if not isinstance(names, tuple) or not all(isinstance(each, str) for each in names):
            raise KDError(
                f"{name}.{fact} is {'missing' if names is None else repr(names)}: write a tuple of names, as in "
                f'{fact} = ("cls",)'
            )
    named = method.terms + method.metrics
    if twice := sorted({each for each in named if named.count(each) > 1}):
        raise KDError(f"{name} has the name {twice[0]!r} twice in its terms and metrics: each needs a name of its own")
    if method.unlabelled not in get_args(Unlabelled):
        known = ", ".join(map(repr, get_args(Unlabelled)))
        raise KDError(f"{name}.unlabelled is {method.unlabelled!r}: it must be one of {known}")


def checked_terms(method: Method, found: object) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The terms and metrics that a method's forward returned. Raises TypeError that says how it breaks the contract."""
    name = type(method).__name__
    if not isinstance(found, dict):
        raise TypeError(f"{name}.forward must return a dict of loss terms; it returned a {type(found).__name__}")
    terms: dict[str, Tensor] = {}
    metrics: dict[str, Tensor] = {}
    for term, value in found.items():
        if term not in method.terms + method.metrics:
            metrics_too = f", {name}.metrics {method.metrics}" if method.metrics else ""
            raise TypeError(
                f"{name}.forward returned the term {term!r}, and {name}.terms declares {method.terms}{metrics_too}"
            )
        if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
            what = f"a {value.dtype} tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise TypeError(f"{name}.forward returned {what} as {term!r}: it must be a scalar float tensor")
        if term in method.terms:
            terms[term] = value
        else:
            metrics[term] = value.detach()
    return terms, metrics


def _checking_options(init: Callable[..., None]) -> Callable[..., None]:
    @wraps(init)
    def checked(self: Method, *args: Any, **kwargs: Any) -> None:
        own = {name: value for name, value in bound_options(init, (self, *args), kwargs).items() if value is not self}
        check_options(type(self).__name__, init, own)
        try:
            init(self, *args, **kwargs)
        except AttributeError:  # raised by torch if parameters or modules are assigned before super().__init__()
            if "_modules" in vars(self):
                raise
        if "_modules" not in vars(self):
            raise TypeError(f"{type(self).__name__}.__init__ must call super().__init__() before anything else")

    return checked
