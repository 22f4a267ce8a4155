"""Each check of the conformance kit can fail: one fault each, caught by the check that is there for it."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kdtoolkit import processes
from kdtoolkit.adapters.native import DenseAdapter
from kdtoolkit.contract import Capability, HeadTrace, Method, PriorKind, Priors
from kdtoolkit.errors import KDError
from kdtoolkit.methods import LD, PKD, CrossKD
from kdtoolkit.testing import ADAPTER_CHECKS, METHOD_CHECKS, ConformanceError, check_adapter, check_method
from tests.conftest import tiny_atss, tiny_fcos, tiny_gfl, tiny_retinanet


def gfl():
    return tiny_gfl(seed=0, score_threshold=0.0)


def own(model, images):
    return model(images)


def own_losses(model, images, targets):
    return model(images, targets)


def sides(boxes):
    return boxes[..., 2:] - boxes[..., :2]


# Adapters.


class WrongStride(DenseAdapter):
    """levels, priors"""

    def describe(self):
        return replace(super().describe(), strides=(4, 16, 32))


class WrongChannels(DenseAdapter):
    """levels"""

    def describe(self):
        return replace(super().describe(), channels=(16, 16, 8))


class TooFewClasses(DenseAdapter):
    """predictions"""

    def describe(self):
        return replace(super().describe(), num_classes=2)


class WrongActivation(DenseAdapter):
    """predictions"""

    def describe(self):
        return replace(super().describe(), activation="softmax")


class TooManyBins(DenseAdapter):
    """predictions"""

    def describe(self):
        return replace(super().describe(), bins=tuple(map(float, range(9))))


class HalfPrecision(DenseAdapter):
    """predictions"""

    def head(self, features, batch, priors=None, stages=None):
        trace = super().head(features, batch)
        return replace(trace, predictions=replace(trace.predictions, logits=trace.predictions.logits.double()))


class WrongPriorsPerCell(DenseAdapter):
    """priors"""

    def describe(self):
        return replace(super().describe(), priors_per_cell=(2, 2, 2))


class PriorFormOnAGrid(DenseAdapter):
    """priors"""

    def describe(self):
        return replace(super().describe(), prior_form="boxes")


class NoPriorForm(DenseAdapter):
    """priors"""

    def describe(self):
        return replace(super().describe(), priors=PriorKind.PROPOSALS)


class TransposedPriors(DenseAdapter):
    """priors"""

    def head(self, features, batch, priors=None, stages=None):
        trace = super().head(features, batch)
        own = trace.predictions.priors
        moved = replace(own, boxes=own.boxes[..., [1, 0, 3, 2]])
        return replace(trace, predictions=replace(trace.predictions, priors=moved))


class WrongStageChannels(DenseAdapter):
    """stages"""

    def describe(self):
        first, *rest = super().describe().stages
        return replace(super().describe(), stages=(replace(first, channels={"cls": (16,) * 3}), *rest))


class NotSpatial(DenseAdapter):
    """stages"""

    def describe(self):
        return replace(
            super().describe(), stages=tuple(replace(stage, spatial=False) for stage in super().describe().stages)
        )


class ActivationNotIdempotent(DenseAdapter):
    """stages"""

    def describe(self):
        *rest, last = super().describe().stages
        return replace(super().describe(), stages=(*rest, replace(last, activation=torch.sigmoid)))


class PositivesWithoutLabels(DenseAdapter):
    """assignment"""

    def assign(self, trace, batch):
        found = super().assign(trace, batch)
        return replace(found, positive=torch.ones_like(found.positive))


class NoStages(DenseAdapter):
    """stages"""

    def describe(self):
        return replace(super().describe(), stages=())


class DistributionsWithoutBins(DenseAdapter):
    """predictions"""

    def describe(self):
        return replace(super().describe(), bins=())


class SkipsALayer(DenseAdapter):
    """resume"""

    def resume(self, state, stage, trace):
        return self.model.predict([*self.model.walk_towers(state, min(stage + 1, 2))][-1])


class RepeatsItsTrace(DenseAdapter):
    """resume"""

    def resume(self, state, stage, trace):
        return trace.predictions


class LabelShift(DenseAdapter):
    """detections, own_detections"""

    def detections(self, trace, batch):
        return [{**found, "labels": found["labels"] + 1} for found in super().detections(trace, batch)]


class CanvasPixels(DenseAdapter):
    """detections, own_detections"""

    def detections(self, trace, batch):
        return [{**found, "boxes": found["boxes"] * 2} for found in super().detections(trace, batch)]


class RisingScores(DenseAdapter):
    """detections"""

    def detections(self, trace, batch):
        return [{key: value.flip(0) for key, value in found.items()} for found in super().detections(trace, batch)]


class DropsDetections(DenseAdapter):
    """own_detections"""

    def detections(self, trace, batch):
        return [{key: value[1:] for key, value in found.items()} for found in super().detections(trace, batch)]


class ScaledLosses(DenseAdapter):
    """own_task_losses"""

    def task_losses(self, trace, batch):
        losses, assignment = super().task_losses(trace, batch)
        return {name: loss * (1 + 1e-6) for name, loss in losses.items()}, assignment


class DetachedLosses(DenseAdapter):
    """task_losses"""

    def task_losses(self, trace, batch):
        losses, assignment = super().task_losses(trace, batch)
        return {name: loss.detach() for name, loss in losses.items()}, assignment


class LossesPerImage(DenseAdapter):
    """task_losses"""

    def task_losses(self, trace, batch):
        losses, assignment = super().task_losses(trace, batch)
        return {name: loss.expand(2) for name, loss in losses.items()}, assignment


class NaNWithoutObjects(DenseAdapter):
    """empty_targets"""

    def task_losses(self, trace, batch):
        losses, assignment = super().task_losses(trace, batch)
        objects = sum(len(labels) for labels in batch.labels)
        return {name: loss * objects / torch.tensor(objects) for name, loss in losses.items()}, assignment


class NeedsObjectsInEachImage(DenseAdapter):
    """one_empty_image"""

    def task_losses(self, trace, batch):
        if any(len(labels) for labels in batch.labels):
            _ = [labels.max() for labels in batch.labels]
        return super().task_losses(trace, batch)


class BackgroundIsZero(DenseAdapter):
    """assignment"""

    def assign(self, trace, batch):
        found = super().assign(trace, batch)
        return replace(found, labels=(found.labels + 1) % (self.model.num_classes + 1))


class BoxesOfTheOtherImage(DenseAdapter):
    """assignment"""

    def assign(self, trace, batch):
        found = super().assign(trace, batch)
        return replace(found, boxes=found.boxes.flip(0))


class NegativeWeights(DenseAdapter):
    """assignment"""

    def assign(self, trace, batch):
        found = super().assign(trace, batch)
        return replace(found, weights=found.weights - 2)


class NormaliserZero(DenseAdapter):
    """assignment"""

    def assign(self, trace, batch):
        found = super().assign(trace, batch)
        return replace(found, normaliser=found.normaliser * 0)


class AutocastLeaks(DenseAdapter):
    """bfloat16"""

    def head(self, features, batch, priors=None, stages=None):
        trace = super().head(features, batch)
        dtype = trace.states[-1]["cls"][0].to(features[0].dtype).dtype
        logits = trace.predictions.logits.to(dtype)
        return replace(trace, predictions=replace(trace.predictions, logits=logits))


class ProbabilitiesInsteadOfLogits(DenseAdapter):
    """predictions"""

    def head(self, features, batch, *args, **kwargs):
        trace = super().head(features, batch, *args, **kwargs)
        return replace(trace, predictions=replace(trace.predictions, logits=trace.predictions.logits.sigmoid()))


class StridesInAnotherOrder(DenseAdapter):
    """levels"""

    def describe(self):
        return replace(super().describe(), strides=super().describe().strides[::-1])


class NamesNoActivation(DenseAdapter):
    """resume"""

    def describe(self):
        return replace(
            super().describe(), stages=tuple(replace(stage, activation=None) for stage in super().describe().stages)
        )


class ResumesOneBranch(DenseAdapter):
    """resume"""

    def resume(self, state, stage, trace):
        return super().resume({**trace.states[stage], "cls": state["cls"]}, stage, trace)


class BoxesByCornerAndSize(DenseAdapter):
    """own_detections, sources"""

    def detections(self, trace, batch):
        found = super().detections(trace, batch)
        return [{**each, "boxes": torch.cat([each["boxes"][:, :2], sides(each["boxes"])], 1)} for each in found]


class DecodesCornerAndSize(DenseAdapter):
    """sources"""

    def head(self, features, batch, *args, **kwargs):
        trace = super().head(features, batch, *args, **kwargs)
        decode = trace.predictions.decode

        def decoded(regression, priors):
            boxes = decode(regression, priors)
            return torch.cat([boxes[..., :2], sides(boxes)], -1)

        return replace(trace, predictions=replace(trace.predictions, decode=decoded))

    def detections(self, trace, batch):
        return super().detections(super().head(self.features(batch), batch), batch)


class BackgroundFirst(DenseAdapter):
    """sources"""

    def head(self, features, batch, *args, **kwargs):
        trace = super().head(features, batch, *args, **kwargs)
        logits = trace.predictions.logits.roll(1, -1)
        return replace(trace, predictions=replace(trace.predictions, logits=logits))

    def detections(self, trace, batch):
        logits = trace.predictions.logits.roll(-1, -1)
        return super().detections(replace(trace, predictions=replace(trace.predictions, logits=logits)), batch)


class DetachedStates(DenseAdapter):
    """shown"""

    def head(self, features, batch, *args, **kwargs):
        trace = super().head(features, batch, *args, **kwargs)
        states = tuple({b: tuple(x.detach() for x in maps) for b, maps in state.items()} for state in trace.states)
        return replace(trace, states=states)


class DetachedFeatures(DenseAdapter):
    """shown"""

    def head(self, features, batch, *args, **kwargs):
        return super().head(tuple(level.detach() for level in features), batch, *args, **kwargs)


class ResumesWithoutGradient(DenseAdapter):
    """shown"""

    @torch.no_grad()
    def resume(self, state, stage, trace):
        return super().resume(state, stage, trace)


class ChangesFeaturesInPlace(DenseAdapter):
    """shown"""

    def head(self, features, batch, *args, **kwargs):
        for level in features:
            level.mul_(1.0)
        return super().head(features, batch, *args, **kwargs)


class ChangesTargetsInPlace(DenseAdapter):
    """batch"""

    def prepare(self, images, targets=None, *args, **kwargs):
        for target in targets or ():
            target["boxes"].mul_(1.0)
        return super().prepare(images, targets, *args, **kwargs)


class PaddedSizesOfTheContent(DenseAdapter):
    """batch"""

    def prepare(self, images, targets=None, *args, **kwargs):
        batch = super().prepare(images, targets, *args, **kwargs)
        return replace(batch, padded_sizes=batch.sizes)


class PaddedSizesOfTheCanvas(DenseAdapter):
    """batch"""

    def prepare(self, images, targets=None, *args, **kwargs):
        batch = super().prepare(images, targets, *args, **kwargs)
        return replace(batch, padded_sizes=(tuple(batch.images.shape[-2:]),) * len(images))


class UnweightedLosses(DenseAdapter):
    """own_task_losses"""

    def task_losses(self, trace, batch):
        losses, assignment = super().task_losses(trace, batch)
        return {**losses, "box": losses["box"] / 2}, assignment


class NothingCounts(DenseAdapter):
    """assignment"""

    def assign(self, trace, batch):
        found = super().assign(trace, batch)
        return replace(found, weights=found.weights * 0)


class PositivesDoNotCount(DenseAdapter):
    """assignment"""

    def assign(self, trace, batch):
        found = super().assign(trace, batch)
        return replace(found, weights=found.weights * (found.labels == self.model.num_classes))


class NobodyAnswers(DenseAdapter):
    """assignment"""

    def assign(self, trace, batch):
        found = super().assign(trace, batch)
        return replace(found, labels=torch.full_like(found.labels, self.model.num_classes))


class NormaliserTooLarge(DenseAdapter):
    """assignment"""

    def assign(self, trace, batch):
        found = super().assign(trace, batch)
        return replace(found, normaliser=found.normaliser * 100)

    def task_losses(self, trace, batch):
        return self.model.losses(trace.predictions, super().assign(trace, batch)), None


class NormaliserTooSmall(DenseAdapter):
    """task_losses"""

    def assign(self, trace, batch):
        found = super().assign(trace, batch)
        return replace(found, normaliser=found.normaliser / 1000)

    def task_losses(self, trace, batch):
        return self.model.losses(trace.predictions, super().assign(trace, batch)), None


class CountsItsOwnImages(DenseAdapter):
    """two_processes"""

    def assign(self, trace, batch):
        found = super().assign(trace, batch)
        return replace(found, normaliser=found.positive.sum().clamp(min=1).float())


class AssignsOtherwiseWhenEvaluated(DenseAdapter):
    """task_losses"""

    def assign(self, trace, batch):
        found = super().assign(trace, batch)
        return found if self.model.training else replace(found, normaliser=found.normaliser * 2)


class AssignsOtherwiseThanItsLosses(DenseAdapter):
    """task_losses"""

    def task_losses(self, trace, batch):
        losses, assignment = super().task_losses(trace, batch)
        return losses, replace(assignment, labels=assignment.labels.flip(0))


class NonDeterministic(DenseAdapter):
    """deterministic"""

    calls = 0

    def features(self, batch):
        NonDeterministic.calls += 1
        return tuple(level + 1e-3 * NonDeterministic.calls for level in super().features(batch))


class HoldsState(DenseAdapter):
    """stateless"""

    def features(self, batch):
        self.batch = batch
        return super().features(batch)

    def resume(self, state, stage, trace):
        predictions = super().resume(state, stage, trace)
        if self.batch.images.shape[0] == len(predictions.logits):
            return predictions
        return replace(predictions, logits=predictions.logits + 1)


class LeavesAHook(DenseAdapter):
    """untouched"""

    def features(self, batch):
        self.model.neck.register_forward_hook(lambda module, args, output: None)
        return super().features(batch)


class LeavesAHookAfterAnError(DenseAdapter):
    """untouched"""

    def features(self, batch):
        handle = self.model.neck.register_forward_hook(lambda module, args, output: None)
        found = super().features(batch)
        handle.remove()
        return found


class AddsAnAttribute(DenseAdapter):
    """untouched"""

    def features(self, batch):
        self.model.neck.last_batch = batch
        return super().features(batch)


class ChangesABuffer(DenseAdapter):
    """untouched"""

    def features(self, batch):
        self.model.image_mean += 1e-6
        return super().features(batch)


class ChangesTheMode(DenseAdapter):
    """untouched"""

    def features(self, batch):
        self.model.backbone.eval()
        return super().features(batch)


class ThawsTheTeacher(DenseAdapter):
    """teacher"""

    def features(self, batch):
        self.model.requires_grad_(True)
        return super().features(batch)


class LearnsAsATeacher(DenseAdapter):
    """teacher"""

    def features(self, batch):
        self.model.train()
        return super().features(batch)


class NoGradientThroughTheHead(DenseAdapter):
    """teacher"""

    def resume(self, state, stage, trace):
        predictions = super().resume(state, stage, trace)
        if self.model.scales.requires_grad:
            return predictions
        raise RuntimeError("a frozen head cannot be resumed")


class FirstStageOfThreeClasses(DenseAdapter):
    """first_stage"""

    @property
    def first_stage(self):
        return DenseAdapter(self.model)


class SaysOneClass(DenseAdapter):
    def describe(self):
        return replace(super().describe(), num_classes=1)


class FirstStageBreaksAPromise(DenseAdapter):
    @property
    def first_stage(self):
        return SaysOneClass(self.model)


class UnscaledTargets(DenseAdapter):
    """batch"""

    def prepare(self, images, targets=None, like=None):
        batch = super().prepare(images, targets, like)
        return replace(batch, boxes=tuple(boxes / 2 for boxes in batch.boxes))


class SizesOfItsOwn(DenseAdapter):
    """beside"""

    def prepare(self, images, targets=None, like=None):
        return super().prepare(images, targets)


class SizesOfTheCanvas(DenseAdapter):
    """batch"""

    def prepare(self, images, targets=None, like=None):
        batch = super().prepare(images, targets, like)
        return replace(batch, original_sizes=((64, 64), (64, 64)))


class MatchesAnything(DenseAdapter):
    """matches"""

    @classmethod
    def matches(cls, model):
        return True


class HeadOnAGridTakesNoPriors(DenseAdapter):
    """given_priors"""

    def describe(self):
        return replace(super().describe(), priors=PriorKind.QUERIES, prior_form="points")

    def head(self, features, batch, priors=None, stages=None):
        trace = super().head(features, batch)
        if priors is None:
            return trace
        return HeadTrace(trace.states, replace(trace.predictions, logits=trace.predictions.logits + 1))


class TellsImagesBesideEachOther(DenseAdapter):
    """alone"""

    def head(self, features, batch, priors=None, stages=None):
        trace = super().head(features, batch)
        logits = trace.predictions.logits
        return replace(trace, predictions=replace(trace.predictions, logits=logits + len(logits)))


class EndsAfterNoLayer(DenseAdapter):
    """layers"""

    def layers(self, trace):
        return trace, replace(trace, states=trace.states[:-1])


class MakesPriorsAgainElsewhere(DenseAdapter):
    """cached"""

    def rebuild(self, outputs, batch):
        trace = super().rebuild(outputs, batch)
        priors = replace(trace.predictions.priors, boxes=trace.predictions.priors.boxes + 1)
        return replace(trace, predictions=replace(trace.predictions, priors=priors))


class ForgetsStates(DenseAdapter):
    """cached"""

    def rebuild(self, outputs, batch):
        return replace(super().rebuild(outputs, batch), states=())


class HidesTensorsInPriors(DenseAdapter):
    """crossing"""

    def describe(self):
        return replace(super().describe(), priors=PriorKind.QUERIES, prior_form="points")

    def head(self, features, batch, priors=None, stages=None):
        trace = super().head(features, batch)
        context = {"content": features[0].mean()} if priors is None else priors.context
        priors = replace(trace.predictions.priors, context=context)
        return replace(trace, predictions=replace(trace.predictions, priors=priors))

    def resume(self, state, stage, trace):
        found = super().resume(state, stage, trace)
        return replace(found, logits=found.logits + trace.predictions.priors.context["content"])


class HeadOnAGridTakesNoQueries(DenseAdapter):
    """placed_queries"""

    def queries_at(self, content, boxes, batch):
        return Priors(boxes, boxes.new_zeros(0), context=content)


class ReadsPadding(DenseAdapter):
    """padding"""

    def describe(self):
        return replace(super().describe(), masks_padding=True)


BROKEN_ADAPTERS = [
    cls for cls in list(globals().values()) if isinstance(cls, type) and issubclass(cls, DenseAdapter) and cls.__doc__
]
BROKEN_ADAPTERS.remove(DenseAdapter)


@pytest.mark.parametrize("broken", BROKEN_ADAPTERS, ids=lambda cls: cls.__name__)
def test_a_broken_adapter_is_caught_by_the_check_for_it(broken):
    names = broken.__doc__.split(", ")
    with pytest.raises(ConformanceError, match="adapter of GFL") as error:
        check_adapter(broken(gfl()), own=own, own_losses=own_losses, only=names)
    failed = [name for line in str(error.value).splitlines()[1:] for name in line.split(": ")[0].strip().split(", ")]
    assert sorted(failed) == sorted(names)


def test_there_is_a_broken_adapter_for_every_check():
    assert {name for cls in BROKEN_ADAPTERS for name in cls.__doc__.split(", ")} == set(ADAPTER_CHECKS)


def test_a_good_adapter_passes_and_stays_as_it_is():
    model = gfl()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.random.get_rng_state()
    report = check_adapter(model, own=own, own_losses=own_losses)
    left_out = {name for name, result in report.results.items() if result.outcome != "passed"}
    assert left_out == {"given_priors", "layers", "placed_queries", "padding", "first_stage"}
    assert "resume: passed" in str(report)
    assert "first_stage: left out (the adapter has no first stage)" in str(report)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)


def test_what_cannot_be_checked_is_left_out_with_the_reason():
    reason = "it has no losses of its own"
    report = check_adapter(tiny_gfl(seed=0), own=own, own_losses=reason, only=["own_detections", "own_task_losses"])
    assert "score threshold" in report.results["own_detections"].reason
    assert report.results["own_task_losses"].reason == reason


def test_what_is_compared_with_the_library_is_left_out_with_a_reason_only():
    with pytest.raises(TypeError, match="'own' and 'own_losses'"):
        check_adapter(gfl())
    with pytest.raises(KDError, match="own_losses must be a function, or the reason"):
        check_adapter(gfl(), own=own, own_losses=None)
    with pytest.raises(KDError, match="own must be a function, or the reason"):
        check_adapter(gfl(), own=" ", own_losses=own_losses)


def test_images_and_targets_can_be_ones_own():
    images = [torch.rand(3, 40, 72), torch.rand(3, 72, 40)]
    targets = [{"boxes": torch.tensor([[2.0, 2.0, 30.0, 30.0]]), "labels": torch.tensor([1])}] * 2
    check_adapter(gfl(), own=own, own_losses=own_losses, images=images, targets=targets)


def test_a_known_failure_needs_to_fail():
    broken = LabelShift(gfl())
    known = {"detections": "labels of this library start at one", "own_detections": "likewise"}
    report = check_adapter(broken, own=own, own_losses=own_losses, known=known, only=known)
    assert "detections: known failure (labels of this library start at one)" in str(report)
    with pytest.raises(ConformanceError, match=r"resume: passes.*remove its reason from `known` \(no head\)"):
        check_adapter(gfl(), own=own, own_losses=own_losses, known={"resume": "no head"}, only=["resume"])
    with pytest.raises(ConformanceError, match="first_stage: is left out"):
        check_adapter(gfl(), own=own, own_losses=own_losses, known={"first_stage": "none"}, only=["first_stage"])
    for wrong in ({"known": {"resumes": "a typing error"}}, {"only": ["resumes"]}):
        with pytest.raises(KDError, match="no check resumes; the checks are matches, batch"):
            check_adapter(gfl(), own=own, own_losses=own_losses, **wrong)


def test_a_forgotten_init_is_one_sentence():
    class Forgets(DenseAdapter):
        def __init__(self, model):
            self.net = model

    with pytest.raises(ConformanceError, match=r"^Forgets.__init__ must call super\(\).__init__\(model\)$"):
        check_adapter(Forgets(gfl()), own=own, own_losses=own_losses)


def test_faults_of_one_cause_are_one_sentence():
    class NoFeatures(DenseAdapter):
        def features(self, batch):
            raise RuntimeError("no weights")

    with pytest.raises(ConformanceError, match=r"levels, predictions, priors.*: RuntimeError: no weights") as error:
        check_adapter(NoFeatures(gfl()), own=own, own_losses=own_losses, only=["levels", "predictions", "priors"])
    assert len(str(error.value).splitlines()) == 2


def test_what_a_first_stage_breaks_is_named_in_the_message():
    with pytest.raises(ConformanceError, match=r"logits is .* by the spec it must be"):
        check_adapter(FirstStageBreaksAPromise(gfl()), own=own, own_losses=own_losses, only=["first_stage"])


class ListsInTheSpec(DenseAdapter):
    """A spec of lists says the same as one of tuples."""

    def describe(self):
        spec = super().describe()
        stages = [replace(each, channels={k: [*v] for k, v in each.channels.items()}) for each in spec.stages]
        lists = {name: [*getattr(spec, name)] for name in ("strides", "channels", "priors_per_cell", "bins")}
        return replace(spec, stages=stages, **lists)


def test_a_spec_may_be_of_lists():
    assert ListsInTheSpec(gfl()).spec == DenseAdapter(gfl()).spec
    check_adapter(ListsInTheSpec(gfl()), own=own, own_losses=own_losses, only=["levels", "priors", "stages"])


# Methods.


class Squares(Method):
    """Mean squared difference of the finest levels: a method without a fault."""

    needs = frozenset({Capability.FEATURES})
    terms = ("feature", "other")
    vanishing = ("feature",)
    paper = "none"

    def setup(self, student, teacher):
        self.project = torch.nn.Conv2d(student.channels[0], teacher.channels[0], 1)
        torch.nn.init.dirac_(self.project.weight)
        torch.nn.init.zeros_(self.project.bias)

    def loss(self, exchange):
        student, teacher = exchange.student.features[0], exchange.teacher.features[0]
        return (self.project(student).float() - teacher.float()).square().mean()

    def forward(self, exchange):
        return {"feature": self.loss(exchange)}


class UndeclaredTerm(Squares):
    """terms"""

    def forward(self, exchange):
        return {"features": self.loss(exchange)}


class TakesLogits(Squares):
    """needs"""

    def loss(self, exchange):
        pair = exchange.matched()
        return (pair.student.predictions.logits - pair.teacher.predictions.logits).square().mean()


class ResumesTheTeachersHead(Squares):
    """needs"""

    needs = frozenset({Capability.FEATURES, Capability.PREDICTIONS})

    def loss(self, exchange):
        pyramid = exchange.student.features
        crossed = exchange.matched().finish_with_teacher({"cls": pyramid, "reg": pyramid}, 0)
        return super().loss(exchange) + crossed.logits.square().mean()


class TakesTheAssignment(Squares):
    """needs"""

    needs = frozenset({Capability.FEATURES, Capability.PREDICTIONS})

    def loss(self, exchange):
        return super().loss(exchange) / exchange.student.own_assignment.normaliser


class UndeclaredVanishing(Squares):
    """terms"""

    vanishing = ("features",)


class NotAScalar(Squares):
    """terms"""

    def forward(self, exchange):
        return {"feature": self.loss(exchange)[None]}


class NoGradientToTheStudent(Squares):
    """student_gradient"""

    def loss(self, exchange):
        student, teacher = exchange.student.features[0].detach(), exchange.teacher.features[0]
        return (self.project(student) - teacher).square().mean()


class UnusedParameters(Squares):
    """own_parameters"""

    def loss(self, exchange):
        return (exchange.student.features[0] - exchange.teacher.features[0]).square().mean()


class GradientToTheTeacher(Squares):
    """frozen_teacher"""

    def forward(self, exchange):
        model = exchange.teacher.adapter.model.requires_grad_(True)
        return {"feature": self.loss(exchange) + next(model.parameters()).square().sum()}


class ChangesTheTeacher(Squares):
    """frozen_teacher"""

    def forward(self, exchange):
        with torch.no_grad():
            next(exchange.teacher.adapter.model.parameters()).mul_(1.001)
        return {"feature": self.loss(exchange)}


class WritesToWhatIsShown(Squares):
    """shown_untouched"""

    def loss(self, exchange):
        exchange.teacher.features[-1].mul_(2)
        return super().loss(exchange)


class MinimumAboveZero(Squares):
    """vanishing"""

    def forward(self, exchange):
        return {"feature": self.loss(exchange) + 1}


class CosineOfDeadChannels(Squares):
    """vanishing"""

    def loss(self, exchange):
        student, teacher = exchange.student.features[0], exchange.teacher.features[0]
        maps = self.project(student).float().flatten(2), teacher.float().flatten(2)
        return 1 - torch.nn.functional.cosine_similarity(*maps, dim=-1).mean()


class ZeroIsNoMinimum(Squares):
    """vanishing"""

    def forward(self, exchange):
        return {"feature": -self.loss(exchange)}


class InfiniteGradientAtTheMinimum(Squares):
    """vanishing"""

    def forward(self, exchange):
        return {"feature": self.loss(exchange).sqrt()}


class DividesByObjects(Squares):
    """no_objects"""

    def forward(self, exchange):
        objects = sum(len(labels) for labels in exchange.student.batch.labels)
        return {"feature": self.loss(exchange) / objects if objects else self.loss(exchange) * float("nan")}


class DividesByObjectsOfEachImage(Squares):
    """one_image_without"""

    def forward(self, exchange):
        per_image = torch.tensor([float(len(labels)) for labels in exchange.student.batch.labels])
        return {"feature": self.loss(exchange) * (1 / per_image).sum()}


class StandardisesByHand(Squares):
    """constant_images"""

    def loss(self, exchange):
        images = exchange.student.batch.images[:, 0, :40, :40]
        return super().loss(exchange) / (images.amax() - images.amin())


class UnbiasedStdOfOneCell(Squares):
    """small_images"""

    def loss(self, exchange):
        coarsest = exchange.student.features[-1][:1]
        return super().loss(exchange) + 0 * coarsest.std((0, 2, 3)).sum()


class HalfPrecisionTerm(Squares):
    """mixed_precision"""

    def loss(self, exchange):
        return (
            (self.project(exchange.student.features[0]) - exchange.teacher.features[0])
            .square()
            .mean()
            .to(self.project(exchange.student.features[0]).dtype)
        )


class OverflowsInHalfPrecision(Squares):
    """mixed_precision"""

    def loss(self, exchange):
        level = self.project(exchange.student.features[0])
        return super().loss(exchange) * (1 if level.dtype == torch.float32 else 2)


class RoundsItsProducts(Squares):
    """own_precision"""

    def loss(self, exchange):
        level = exchange.student.features[0].float().flatten(2)
        product = (level @ level.mT).float()
        exact = (level[:, :, None] * level[:, None]).sum(-1)
        return super().loss(exchange) + 1000 * (product - exact).abs().mean() / exact.abs().mean()


class Random(Squares):
    """repeatable"""

    calls = 0

    def forward(self, exchange):
        Random.calls += 1
        return {"feature": self.loss(exchange) * Random.calls}


class AddsAHook(Squares):
    """student_untouched"""

    def forward(self, exchange):
        exchange.student.adapter.model.register_forward_hook(lambda module, args, output: None)
        return {"feature": self.loss(exchange)}


class TakesTheStudentOutOfTraining(Squares):
    """student_untouched"""

    def forward(self, exchange):
        exchange.student.adapter.model.eval()
        return {"feature": self.loss(exchange)}


class RunsTheStudentTwice(Squares):
    """student_untouched"""

    def forward(self, exchange):
        student = exchange.student
        student.adapter.features(student.batch)  # batch norm counts it
        return {"feature": self.loss(exchange)}


class ForgetsTheModeAfterAnError(Squares):
    """student_untouched"""

    def forward(self, exchange):
        model = exchange.student.adapter.model.eval()
        loss = self.loss(exchange)
        model.train()
        return {"feature": loss}


class NotAllIsSaved(Squares):
    """round_trip"""

    def setup(self, student, teacher):
        super().setup(student, teacher)
        self.factor = torch.rand(()) + 0.5

    def forward(self, exchange):
        return {"feature": self.loss(exchange) * self.factor}


class CannotBePickled(Squares):
    """copies"""

    def setup(self, student, teacher):
        super().setup(student, teacher)
        self.act = lambda x: F.relu(x)


class UntypedOption(Squares):
    """options"""

    def __init__(self, mode="soft"):
        super().__init__()


class NegativeWeight(Squares):
    """options"""

    def __init__(self, box_weight: object = 1.0):
        super().__init__()
        self.box_weight = abs(box_weight)


class WeightsOfZeroAreDividedBy(Squares):
    """weights_of_zero"""

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.weight = weight

    def forward(self, exchange):
        return {"feature": self.loss(exchange) * self.weight / torch.tensor(self.weight)}


class WeightIsForgotten(Squares):
    """weights_of_zero"""

    def __init__(self, weight: float = 1.0):
        super().__init__()


class OneTermWithoutGradient(Squares):
    """student_gradient"""

    def forward(self, exchange):
        loss = self.loss(exchange)
        return {"feature": loss, "other": loss.detach()}


class WritesToBoxes(Squares):
    """shown_untouched"""

    def loss(self, exchange):
        for boxes in exchange.teacher.batch.boxes:
            boxes.div_(8)
        return super().loss(exchange)


class PutsTheTeacherInTrainMode(Squares):
    """frozen_teacher"""

    def forward(self, exchange):
        exchange.teacher.adapter.model.train()
        return {"feature": self.loss(exchange)}


class RunsTheTeachersHeadAgain(Squares):
    """passes"""

    def forward(self, exchange):
        view = exchange.teacher
        view.adapter.head(view.maps, view.batch)
        view.adapter.head(view.maps, view.batch)
        return {"feature": self.loss(exchange)}


class ComparesWholeCanvases(Squares):
    """unequal_padding"""

    def loss(self, exchange):
        student, teacher = exchange.student.maps[0], exchange.teacher.maps[0]
        return (self.project(student) - teacher).square().mean()


class DividesByTheNorm(Squares):
    """no_signal"""

    def loss(self, exchange):
        student, teacher = self.project(exchange.student.features[0]), exchange.teacher.features[0]
        return (student / student.norm() - teacher / teacher.norm()).square().sum()


class TooSmallToCount(Squares):
    """magnitude"""

    def loss(self, exchange):
        return super().loss(exchange) / 1e5


class SumInsteadOfMean(Squares):
    """magnitude"""

    def loss(self, exchange):
        student, teacher = self.project(exchange.student.features[0]), exchange.teacher.features[0]
        return (student - teacher).square().sum() * 100


class ComparesImagesOfTheBatch(Squares):
    """one_image"""

    def loss(self, exchange):
        student, teacher = self.project(exchange.student.features[0]), exchange.teacher.features[0]
        return (student.std(0) - teacher.std(0)).square().mean()


class NeedsMapsInOneOrder(Squares):
    """channels_last"""

    def loss(self, exchange):
        student, teacher = self.project(exchange.student.features[0]), exchange.teacher.features[0]
        return (student.view(len(student), -1) - teacher.view(len(teacher), -1)).square().mean()


class KeepsWhatItSawFirst(Squares):
    """repeatable"""

    first = None

    def loss(self, exchange):
        if self.first is None:
            self.first = exchange.teacher.features[0]
        return (self.project(exchange.student.features[0]) - self.first).square().mean()


class TakesFeaturesAsATuple(Squares):
    """warm_cache"""

    def loss(self, exchange):
        return super().loss(exchange) + torch._foreach_norm(exchange.teacher.features)[0]


class TakesASumOverTheTeachersImages(Squares):
    """warm_cache"""

    def loss(self, exchange):
        def of(trace):
            logits = trace.predictions.logits
            return logits.abs().sum().expand(len(logits))

        return super().loss(exchange) * exchange.matched().of_teacher("a sum over the batch", of).mean()


class CountsItsOwnObjects(Squares):
    """two_processes"""

    def forward(self, exchange):
        return {"feature": self.loss(exchange) / sum(map(len, exchange.student.batch.boxes))}


class SumsOverProcessesForManyObjects(Squares):
    """two_processes"""

    def forward(self, exchange):
        count = torch.tensor(float(sum(map(len, exchange.student.batch.boxes))))
        return {"feature": self.loss(exchange) * (processes.share(count) if count > 1 else 1.0)}


class TakesTheAssignmentOfTheTaskLoss(Squares):
    """no_labels"""

    def forward(self, exchange):
        assignment = exchange.student.assignment  # of the task's own losses, which such a step does not have
        return {"feature": self.loss(exchange) / (torch.tensor(0.0) if assignment is None else assignment.normaliser)}


BROKEN_METHODS = [
    cls for cls in list(globals().values()) if isinstance(cls, type) and issubclass(cls, Squares) and cls is not Squares
]


@pytest.mark.parametrize("broken", BROKEN_METHODS, ids=lambda cls: cls.__name__)
def test_a_broken_method_is_caught_by_the_check_for_it(broken):
    with pytest.raises(ConformanceError, match=f"{broken.__name__} from ATSS to GFL") as error:
        check_method(broken, tiny_gfl(seed=0), tiny_atss(seed=1), only=[broken.__doc__])
    assert f"\n  {broken.__doc__}: " in str(error.value)


class Thousandth(CrossKD):
    """CrossKD whose sums are divided by too much."""

    def forward(self, exchange):
        return {name: loss / 1000 for name, loss in super().forward(exchange).items()}


def test_a_normaliser_that_is_too_large_is_caught_in_a_method():
    with pytest.raises(ConformanceError, match=r"magnitude: terms are .* in sum .* Look at what sums are divided by"):
        check_method(Thousandth, tiny_gfl(seed=0), tiny_gfl(seed=1), only=["magnitude"])


class PerObject(Squares):
    """Divided by the objects of all processes."""

    def forward(self, exchange):
        batch, features = exchange.student.batch, exchange.student.features
        count = torch.tensor(float(sum(map(len, batch.boxes))))
        return {"feature": self.loss(exchange) * len(features[0]) / processes.share(count, at_least=1)}


@pytest.mark.parametrize("method", [PKD, CrossKD, LD, PerObject])
def test_sums_over_two_processes_pass(method):
    report = check_method(method, tiny_gfl(seed=0), tiny_gfl(seed=1), only=["two_processes"])
    assert report.results["two_processes"].outcome == "passed"


class ForgetsInit(Squares):
    """Has no modules."""

    def __init__(self):
        self.factor = 1.0


class PythonNumber(Squares):
    """Its term is no tensor."""

    def forward(self, exchange):
        return {"feature": 1.0}


class WrongName(Squares):
    """Its term is not declared."""

    def forward(self, exchange):
        return {"featur": self.loss(exchange)}


class NeedsNothing(Method):
    terms = ("x",)

    def forward(self, exchange):
        return {}


class TermsInBrackets(Squares):
    terms = "feature"


class ListOfNeeds(Squares):
    needs = [Capability.FEATURES]  # noqa: RUF012


class HasNoForward(Method):
    needs = frozenset({Capability.FEATURES})
    terms = ("x",)


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (NeedsNothing, r"NeedsNothing.needs is missing: .* needs = frozenset\(\{Capability.FEATURES\}\)"),
        (TermsInBrackets, r"TermsInBrackets.terms is 'feature': write a tuple of names"),
        (ListOfNeeds, r"ListOfNeeds.needs is \[<Capability.FEATURES"),
        (HasNoForward, "HasNoForward cannot be built without arguments: TypeError: .*abstract"),
        (dict, "dict builds a dict, which is no subclass of Method"),
        (ForgetsInit, r"ForgetsInit.__init__ must call super\(\).__init__\(\)"),
        (PythonNumber, "PythonNumber.forward returned 1.0 as 'feature'"),
        (WrongName, "WrongName.forward returned the term 'featur'"),
    ],
)
def test_gross_mistakes_are_one_sentence(broken, sentence):
    with pytest.raises(ConformanceError, match=sentence) as error:
        check_method(broken, tiny_gfl(seed=0), tiny_atss(seed=1))
    assert len(str(error.value).splitlines()) <= 2


def test_there_is_a_broken_method_for_every_check():
    assert {cls.__doc__ for cls in BROKEN_METHODS} == set(METHOD_CHECKS)


def test_a_good_method_passes_and_the_models_stay_as_they_are():
    student, teacher = tiny_gfl(seed=0), tiny_atss(seed=1)
    copies = copy.deepcopy((student, teacher))
    report = check_method(Squares, student, teacher)
    left_out = {name for name, result in report.results.items() if result.outcome != "passed"}
    assert left_out == {"options", "weights_of_zero"}
    assert report.refused is None
    for model, before in zip((student, teacher), copies, strict=True):
        assert model.training
        assert all(p.requires_grad for p in model.parameters())
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
        )


def test_a_refusal_is_reported_and_no_failure():
    report = check_method(LD, tiny_fcos(seed=0), tiny_retinanet(seed=1))
    assert "needs distributions" in report.refused
    assert "refused (it needs distributions" in str(report)


def test_a_factory_may_be_any_function():
    report = check_method(
        lambda: CrossKD(stage=1, tap="before"), tiny_gfl(seed=0), tiny_gfl(seed=1), only=["vanishing"]
    )
    assert report.subject == "CrossKD from GFL to GFL"
    assert report.results["vanishing"].outcome == "passed"


def test_a_method_of_some_levels_is_checked_on_those():
    report = check_method(lambda: PKD().at_strides(16), gfl(), gfl(), only=["vanishing"])
    assert report.refused is None
    assert report.results["vanishing"].outcome == "passed"


def test_known_failures_of_methods_need_a_reason_and_to_fail():
    pair, known = (tiny_gfl(seed=0), tiny_gfl(seed=1)), {"round_trip": "its factor is drawn anew"}
    report = check_method(NotAllIsSaved, *pair, known=known, only=known)
    assert "round_trip: known failure (its factor is drawn anew)" in str(report)
    with pytest.raises(ConformanceError, match="copies: passes"):
        check_method(PKD, *pair, known={"copies": "no"}, only=["copies"])
