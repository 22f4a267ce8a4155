"""DetectorAdapter, which shows one detector as a pipeline: what an adapter's author writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from torch import Tensor, nn

from kdtoolkit.contract.data import Assignment, Batch, Detections, HeadTrace, Predictions, Priors, State, Target
from kdtoolkit.contract.spec import DetectorSpec
from kdtoolkit.errors import KDError


class DetectorAdapter(ABC):
    """Shows one detector as a pipeline with joints. Holds the model, adds nothing to it and patches nothing.

    Every method works under autocast and returns predictions in float32. Raises KDError for a model whose parameters
    are in another precision.
    """

    def __init__(self, model: nn.Module) -> None:
        check_precision(model)
        self.model = model

    @property
    @abstractmethod
    def spec(self) -> DetectorSpec:
        """The detector's facts; the same at every call."""

    @property
    def assigner(self) -> object:
        """Detectors whose assigners compare equal assign alike on the same priors, so that one of them will do."""
        return self

    @property
    def first_stage(self) -> DetectorAdapter | None:
        """What proposes, as a detector of one class that takes the same batch and features; None in one-stage kinds."""
        return None

    @classmethod
    def examples(cls) -> Mapping[str, Callable[[int], nn.Module]]:
        """Tiny detectors with random weights, by family: each is built for a number of classes, without a network.

        What `kd adapters --matrix` and the conformance kit (kdtoolkit/testing) run on; any image of 64 px will do.
        """
        return {}

    @classmethod
    @abstractmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether this adapter is for `model`, by its class."""

    @abstractmethod
    def prepare(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None, like: Batch | None = None
    ) -> Batch:
        """Do what the detector does to images (3, H, W) in [0, 1] before its backbone: resize, normalise, pad.

        `like` is what a student made of the same images. Then images get the sizes that they have there and lie on a
        canvas of that size; it is padded further, at the right and bottom, where the detector cannot run otherwise. A
        detector built for one size scales that canvas as a whole. `kdtoolkit.canvas` has the code for both.
        """

    @abstractmethod
    def features(self, batch: Batch) -> tuple[Tensor, ...]:
        """Run backbone and neck: one (N, C, H, W) a level, finest first; of DETR kin what the decoder takes."""

    @abstractmethod
    def head(
        self,
        features: tuple[Tensor, ...],
        batch: Batch,
        priors: Priors | None = None,
        stages: Collection[int] | None = None,
    ) -> HeadTrace:
        """Run the head on its own features, whole as `features` gave them.

        With `priors`, of an equal `prior_form`, it runs for those instead of its own; grids ignore it. `stages`: of
        which states are kept (`keep_states`); all of them if None.
        """

    def resume(self, state: State, stage: int, trace: HeadTrace) -> Predictions:
        """Run the head from `state` at `stage` to its end, for the priors and context of `trace`.

        With the state that `trace` has at that stage it gives the predictions of `trace` bit for bit.
        """
        raise NotImplementedError(f"{self.spec.name} declares no stages")

    @abstractmethod
    def task_losses(self, trace: HeadTrace, batch: Batch) -> tuple[dict[str, Tensor], Assignment | None]:
        """The detector's own loss terms, weighted, as its training forward sums them; and the assignment they used.

        The assignment is None where the library does not hand it out.
        """

    def assign(self, trace: HeadTrace, batch: Batch) -> Assignment:
        """Assign the batch's ground truth to the priors of `trace`."""
        raise NotImplementedError(f"{self.spec.name} declares no assignment")

    @abstractmethod
    def detections(self, trace: HeadTrace, batch: Batch) -> list[Detections]:
        """Score filter, NMS and all, in pixels of the original images."""


def keep_states(states: Iterable[State], stages: Collection[int] | None) -> tuple[tuple[State, ...], State]:
    """The states of a head, of which those of other `stages` are empty (None keeps all), and the last one.

    Given a generator, it lets go of what nobody asked for while the head runs.
    """
    kept: list[State] = []
    last: State = {}
    for i, last in enumerate(states):
        kept.append(last if stages is None or i in stages else {})
    return tuple(kept), last


def check_precision(model: nn.Module) -> None:
    """Raise KDError for a model whose parameters are in another precision than float32."""
    dtypes = {str(p.dtype) for p in model.parameters() if p.is_floating_point()}
    if other := sorted(dtypes - {"torch.float32"}):
        raise KDError(
            f"{type(model).__name__} has parameters of {', '.join(other)}: call model.float() (from_pretrained of "
            "transformers takes dtype=torch.float32). To compute in half precision, train under torch.autocast"
        )
