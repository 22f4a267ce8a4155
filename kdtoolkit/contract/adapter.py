"""DetectorAdapter: shows one detector as a pipeline with joints. The author of an adapter writes a subclass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from torch import Tensor, nn

from kdtoolkit.contract.data import (
    Assignment,
    Batch,
    Detections,
    HeadOutputs,
    HeadTrace,
    Predictions,
    Priors,
    State,
    Target,
)
from kdtoolkit.contract.spec import ClassRows, DetectorSpec
from kdtoolkit.errors import KDError


class DetectorAdapter(ABC):
    """Shows one detector as a pipeline with joints.

    An adapter holds the model. It adds nothing to the model and patches nothing. Every method works under autocast and
    returns predictions in float32. Raises KDError if the model's parameters are not float32.
    """

    def __init__(self, model: nn.Module) -> None:
        check_precision(model)
        self.model = model

    @abstractmethod
    def describe(self) -> DetectorSpec:
        """The detector's facts: all fields of the spec that `spec` does not fill in."""

    @cached_property
    def spec(self) -> DetectorSpec:
        """The detector's facts: what `describe` says, and what follows from the adapter itself."""
        first = self.first_stage
        return replace(
            self.describe(),
            assigns=type(self).assign is not DetectorAdapter.assign,
            places_queries=type(self).queries_at is not DetectorAdapter.queries_at,
            rebuilds=type(self).rebuild is not DetectorAdapter.rebuild,
            first_stage=None if first is None else first.spec,
        )

    @property
    def assigner(self) -> object:
        """Identifies the rule of `assign`.

        If the assigners of two detectors are equal (`==`), both assign the same boxes to the same priors. Then one
        assignment serves both.
        """
        return self

    @property
    def first_stage(self) -> DetectorAdapter | None:
        """The region proposal network, as a detector of one class with the same batch and features; None if none."""
        return None

    @property
    def backbone(self) -> tuple[str, ...]:
        """The names of the modules that are the backbone, as in "backbone.body". All other parts are neck and head."""
        return ("backbone",)

    @property
    def class_layers(self) -> Mapping[str, ClassRows] | None:
        """The names of the modules whose weights have rows for classes, and how their rows count them.

        None if the adapter does not say. Then no other detector's class rows can be taken over (`kdtoolkit.inherit`).
        """
        return None

    @classmethod
    def examples(cls) -> Mapping[str, Callable[[int], nn.Module]]:
        """Tiny detectors with random weights: for each family, a function that builds one for a number of classes.

        It needs no network, and the detector takes images of 64 px. `kd adapters --matrix` and the conformance kit
        (kdtoolkit/testing) run on them.
        """
        return {}

    @classmethod
    @abstractmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether this adapter knows the class of `model`."""

    @abstractmethod
    def prepare(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None, like: Batch | None = None
    ) -> Batch:
        """Do what the detector does to images (3, H, W) in [0, 1] before its backbone: resize, normalise, pad.

        With `like`, the detector is a teacher, and `like` is the student's batch of the same images. Then each image
        gets the same size as in `like`, and the canvas the same size as the canvas of `like`. The canvas is padded
        further, at the right and bottom, only if the detector cannot run otherwise. A detector built for one size
        scales the whole canvas. `kdtoolkit.canvas` has the code for both.
        """

    @abstractmethod
    def features(self, batch: Batch) -> tuple[Tensor, ...]:
        """Run backbone and neck.

        Returns one map (N, C, H, W) per level, finest level first. For DETR and its relatives these are the maps that
        the decoder takes.
        """

    @abstractmethod
    def head(
        self,
        features: tuple[Tensor, ...],
        batch: Batch,
        priors: Priors | None = None,
        stages: Collection[int] | None = None,
    ) -> HeadTrace:
        """Run the head.

        Args:
            features: exactly what `features` returned.
            batch: what `prepare` returned.
            priors: proposals or queries of another detector with the same `prior_form`, to use instead of the
                detector's own. Detectors on a grid ignore them.
            stages: indices of the stages whose states are kept (`keep_states`); None keeps all.
        """

    def resume(self, state: State, stage: int, trace: HeadTrace) -> Predictions:
        """Run the head from `state` at `stage` to its end, with the priors and context of `trace`.

        With the state that `trace` itself has at that stage, the result equals the predictions of `trace` bit for bit.
        """
        raise NotImplementedError(f"{type(self).__name__} declares no stages")

    def rebuild(self, outputs: HeadOutputs, batch: Batch) -> HeadTrace:
        """Make a pass of the head again from its predictions, without running it: for a head on a grid.

        `resume`, `assign` and `detections` must do with the result what they do with the pass itself. Without
        `rebuild` the values are the same: a teacher's head then runs on the maps that a cache knows.
        """
        raise NotImplementedError(f"{type(self).__name__} has no rebuild")

    def own_predictions(self, trace: HeadTrace) -> Predictions:
        """The predictions as the detector's own head made them, from which `rebuild` makes a pass again.

        They are those of `trace`, unless the adapter shows methods different ones: `SharedClasses` shows fewer classes.
        """
        return trace.predictions

    def layers(self, trace: HeadTrace) -> tuple[HeadTrace, ...]:
        """The pass as it would be if the decoder ended after its first layer, its second and so on.

        The predictions of the last one are those of `trace`. The last state of each is that after its layer. A head
        without decoder layers has one entry.
        """
        return (trace,)

    def queries_at(self, content: Tensor, boxes: Tensor, batch: Batch) -> Priors:
        """Make queries that look at given boxes.

        Args:
            content: (N, Q, C) what each query asks for; C is the width of the head's first stage.
            boxes: (N, Q, 4) in pixels of the batch's canvas.
            batch: what `prepare` returned.
        """
        raise NotImplementedError(f"{type(self).__name__} has no queries_at")

    @abstractmethod
    def task_losses(self, trace: HeadTrace, batch: Batch) -> tuple[dict[str, Tensor], Assignment | None]:
        """The detector's own loss terms, and the assignment that they used.

        Each term has its weight applied, so that their sum is the loss of the library's own training step. The
        assignment is None if the library does not return it.
        """

    def assign(self, trace: HeadTrace, batch: Batch) -> Assignment:
        """Assign the batch's ground truth to the priors of `trace`."""
        raise NotImplementedError(f"{type(self).__name__} has no assign")

    def graph(self) -> nn.Module:
        """The whole detector as one module of tensors, from images to final detections: see `kdtoolkit.graph`.

        `kd export` writes it. Raises KDError if there is none.
        """
        raise KDError(f"{type(self).__name__} has no `graph`, so its detectors cannot be exported: write one")

    @abstractmethod
    def detections(self, trace: HeadTrace, batch: Batch) -> list[Detections]:
        """Final detections by the library's own post-processing, in pixels of the original images."""


def keep_states(states: Iterable[State], stages: Collection[int] | None) -> tuple[tuple[State, ...], State]:
    """Collect the states of a head. Returns one entry per state, and the last state.

    Only the states of `stages` are kept; the entries of all others are empty. None keeps all states. If `states` is a
    generator, a state that is not kept is freed while the head runs. One generator serves `head` and `resume`:

        def walk(self, state: State, start: int = 0) -> Iterator[State]:
            yield state  # stage `start`, before its activation
            for stage, conv in enumerate(self.model.tower[start:], start):  # conv i leads from stage i to stage i + 1
                state = {"cls": tuple(conv(x.relu() if stage else x) for x in state["cls"])}
                yield state

        states, last = keep_states(self.walk({"cls": features}), stages)  # in `head`
        _, last = keep_states(self.walk(state, stage), ())  # in `resume`

    Both then apply the last activation and the predictors to `last`. Stage 0, the pyramid, has no activation here.
    """
    kept: list[State] = []
    last: State = {}
    for i, last in enumerate(states):
        kept.append(last if stages is None or i in stages else {})
    return tuple(kept), last


def check_precision(model: nn.Module) -> None:
    """Raise KDError if parameters of the model are not float32."""
    dtypes = {str(p.dtype) for p in model.parameters() if p.is_floating_point()}
    if wrong := sorted(dtypes - {"torch.float32"}):
        raise KDError(
            f"{type(model).__name__} has parameters of {', '.join(wrong)}, and they must be float32: call "
            "model.float() (from_pretrained of transformers takes dtype=torch.float32). To compute in half precision, "
            "train under torch.autocast"
        )
