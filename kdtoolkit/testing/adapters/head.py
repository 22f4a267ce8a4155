"""Whether the head can be resumed from its states, and lets gradients through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit.contract import (
    Batch,
    CachedView,
    Capability,
    Exchange,
    HeadTrace,
    Predictions,
    PriorKind,
    View,
)
from kdtoolkit.contract.cached import ImageParts
from kdtoolkit.testing._expect import expect, expect_close, expect_finite, expect_float32, expect_same, outputs
from kdtoolkit.testing.adapters._case import Case
from kdtoolkit.testing.report import LeftOut, by_name


@torch.no_grad()
def _resume(case: Case) -> None:
    """Resumed from its own state, the head gives the same predictions to the bit; from another state, others."""
    if not case.spec.stages:
        raise LeftOut("the spec has no stages")
    adapter = case.fresh()
    trace = case.show(adapter).head
    once = outputs(trace.predictions)
    for i, (stage, state) in enumerate(zip(case.spec.stages, trace.states, strict=True)):
        what = f"resumed from stage {i} ({stage.name})"
        expect_same(outputs(adapter.resume(state, i, trace)), once, what)
        if stage.activation is not None:
            activated = {branch: tuple(map(stage.activation, tensors)) for branch, tensors in state.items()}
            expect_same(outputs(adapter.resume(activated, i, trace)), once, f"{what} after its activation")
        elif any(bool((x < 0).any()) for tensors in state.values() for x in tensors):
            cut = {branch: tuple(x.clamp(min=0) for x in tensors) for branch, tensors in state.items()}
            problem = "negative values change nothing, so the head applies an activation (ReLU) to the state"
            expect(_moved(adapter.resume(cut, i, trace), once), f"{what}: {problem}; the stage must declare it")
        for branch, tensors in state.items():
            other = {**state, branch: tuple(-tensor - 1 for tensor in tensors)}
            moved = _moved(adapter.resume(other, i, trace), once)
            expect(
                moved,
                f"{what}, the head gives the same predictions for a different state of branch {branch}: it ignores it",
            )


def _moved(predictions: Predictions, once: Mapping[str, Tensor]) -> bool:
    again = outputs(predictions)
    return any(not torch.equal(again[name], value) for name, value in once.items())


@torch.no_grad()
def _given_priors(case: Case) -> None:
    """Given its own proposals or queries, the head gives the same predictions to the bit, on a large canvas too."""
    if case.spec.priors.on_grid:
        raise LeftOut("the detector's priors lie on a grid: its head never gets another detector's")
    adapter = case.fresh()
    batch = adapter.prepare(case.images, case.targets)
    higher = F.pad(batch.images, (0, 0, 0, batch.images.shape[-2]))  # as a student's square canvas is for wide images
    like = adapter.prepare(case.images, case.targets, like=replace(batch, images=higher))
    for seen, where in ((batch, ""), (like, ", on a canvas of twice the height")):
        features = adapter.features(seen)
        own = adapter.head(features, seen)
        once = outputs(own.predictions)
        again = adapter.head(features, seen, own.predictions.priors)
        expect_same(outputs(again.predictions), once, f"with its own priors given{where}")
        for i, _ in enumerate(case.spec.stages):
            resumed = adapter.resume(again.states[i], i, again)
            expect_same(outputs(resumed), once, f"with given priors, resumed from stage {i}{where}")


@torch.no_grad()
def _alone(case: Case) -> None:
    """An image has the same predictions and states whatever lies beside it: what fills gaps between images is nothing.

    Images may have different numbers of predictions. So those of an image are compared as sums of probabilities.
    """
    if case.spec.priors is PriorKind.NONE:
        raise LeftOut("the detector shows no predictions")
    adapter = case.fresh()
    batch = adapter.prepare(case.images, case.targets)
    batches = [batch, *(batch.at_images([i]) for i in range(len(case.images)))]
    whole, *alone = (adapter.head(adapter.features(each), each) for each in batches)
    for i, trace in enumerate(alone):
        found, own = (each.probabilities.sum(1) for each in (whole.predictions, trace.predictions))
        off = (found[i] - own[0]).abs().max().item()
        expect(
            off <= 1e-3 * own.abs().max().item() + 1e-4,
            f"beside other images, the class probabilities of image {i} differ by up to {off:g} in sum: predictions "
            "that fill gaps between images must have the probability 0",
        )
    if case.spec.priors is not PriorKind.PROPOSALS:
        return
    for i, stage in enumerate(case.spec.stages):
        for branch, tensors in whole.states[i].items():
            counts = len(tensors[0]), sum(len(trace.states[i][branch][0]) for trace in alone)
            expect(
                counts[0] == counts[1],
                f"{stage.name} has {counts[0]} vectors of branch {branch} for a batch, and {counts[1]} for its images "
                "alone: states must have none for proposals that fill gaps",
            )


@torch.no_grad()
def _layers(case: Case) -> None:
    """There is a pass for each decoder layer. Its predictions have the head's shapes; the last is the head's own."""
    adapter = case.fresh()
    trace = case.show(adapter).head
    passes = adapter.layers(trace)
    if len(passes) == 1:
        raise LeftOut("the head has no decoder layers")
    depth = len(case.spec.stages) - 1
    expect(
        len(passes) == depth, f"`layers` gives {len(passes)} passes, and the spec has {depth} stages after the first"
    )
    once = outputs(trace.predictions)
    expect_same(outputs(passes[-1].predictions), once, "the pass of the last layer")
    for i, each in enumerate(passes):
        found = outputs(each.predictions)
        expect_float32(found, f"layer {i}")
        expect_finite(found, f"layer {i}")
        for name, value in once.items():
            shape = tuple(found[name].shape)
            expect(shape == tuple(value.shape), f"{name} of layer {i} is {shape}, of the head {tuple(value.shape)}")
        states = len(each.states)
        expect(states == i + 2, f"the pass of layer {i} has {states} states: it must end with the one after its layer")


@torch.no_grad()
def _cached(case: Case) -> None:
    """A pass from the parts that a cache kept equals the pass itself. If all parts were kept, no network runs."""
    if case.spec.priors is PriorKind.DETECTIONS:
        raise LeftOut("a file of detections has no pass to keep")
    adapter = case.fresh()
    batch = adapter.prepare(case.images, case.targets)
    live = View(adapter, batch, adapter.features(batch))
    names = [f"image {i}" for i in range(len(case.images))]
    kept = dict(zip(names, _with_all_asked(case, batch, names, {}).parts.computed, strict=True))
    again = _with_all_asked(case, batch, names, kept)
    computed = sorted({part for parts in again.parts.computed for part in parts})
    expect(not computed, f"{', '.join(computed)} is computed although it was kept")
    for view, what in (
        (again, "made again"),
        (_with_all_asked(case, batch, names, {names[0]: kept[names[0]]}), "made again of the first image alone"),
    ):
        levels = [{f"level {i}": x for i, x in enumerate(each.maps)} for each in (view, live)]
        expect_close(levels[0], levels[1], what)
        if case.spec.priors is not PriorKind.NONE:
            _expect_same_pass(case, view, live, what)


def _with_all_asked(case: Case, batch: Batch, names: Sequence[str], kept: Mapping[str, ImageParts]) -> CachedView:
    """The view of images of which some is kept, after every part has been asked for."""
    view = CachedView(case.fresh(), batch, names, lambda name: kept.get(name, {}))
    for level, _ in enumerate(view.maps):
        view.maps[level]
    if case.spec.priors is not PriorKind.NONE:
        for stage, _ in enumerate(view.head.states):
            view.head.states[stage]
    return view


def _expect_same_pass(case: Case, view: View, live: View, what: str) -> None:
    adapter, batch = live.adapter, live.batch

    def compare(shown: Callable[[HeadTrace], Mapping[str, Tensor]], of_it: str) -> None:
        expect_close(shown(view.head), shown(live.head), f"{what}, {of_it}")

    compare(lambda trace: outputs(trace.predictions), "its predictions")
    for i, stage in enumerate(case.spec.stages):
        compare(
            lambda trace, i=i: outputs(adapter.resume(trace.states[i], i, trace)),  # type: ignore[misc]
            f"resumed from stage {i} ({stage.name})",
        )
    if case.spec.assigns:
        compare(lambda trace: vars(adapter.assign(trace, batch)), "its assignment")
    # Boxes of equal scores may change places.
    compare(lambda trace: {str(i): x["scores"] for i, x in enumerate(adapter.detections(trace, batch))}, "its scores")


def _placed_queries(case: Case) -> None:
    """Queries can be made at given boxes. The head looks there: other boxes or content change what it says."""
    if not case.spec.places_queries:
        raise LeftOut("the adapter has no queries_at")
    adapter = case.fresh()
    batch = adapter.prepare(case.images, case.targets)
    features = adapter.features(batch)
    width = next(iter(case.spec.stages[0].channels.values()))[0]
    generator = torch.Generator().manual_seed(0)
    content = torch.randn(len(case.images), 3, width, generator=generator).to(batch.images.device)
    sizes = content.new_tensor([(w, h, w, h) for h, w in batch.sizes])[:, None]
    boxes = content.new_tensor([[0.1, 0.1, 0.4, 0.5], [0.3, 0.2, 0.9, 0.8], [0.0, 0.0, 1.0, 1.0]]) * sizes

    def said(content: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        priors = adapter.queries_at(content, boxes, batch)
        centres = [(each[..., :2] + each[..., 2:]) / 2 for each in (priors.boxes, boxes)]
        off = (centres[0] - centres[1]).abs().max().item()
        expect(off < 0.01, f"the priors of queries at given boxes lie {off:g} px away from them")
        return outputs(adapter.head(features, batch, priors).predictions)

    found = said(content, boxes)
    expect_finite(found, "queries at given boxes")
    expect(found["logits"].shape[1] == 3, f"3 queries at given boxes give {found['logits'].shape[1]} predictions")
    for what, other in (("boxes", said(content, boxes / 2)), ("content", said(-content, boxes))):
        expect(not torch.equal(other["logits"], found["logits"]), f"the head ignores the {what} of placed queries")
    expect(_reached([*found.values()], features), "no gradient flows from placed queries to the pyramid")


@torch.no_grad()
def _padding(case: Case) -> None:
    """If the detector masks padding, what its maps have beyond an image changes nothing of what its head says."""
    if not case.spec.masks_padding:
        raise LeftOut("the spec does not say that padding is masked")
    adapter = case.fresh()
    batch = adapter.prepare(case.images)
    # Padded to whole cells of all levels, and further: so there are cells beyond each image.
    coarsest = max(case.spec.strides)
    height, width = ((side // coarsest + 2) * coarsest for side in batch.images.shape[-2:])
    canvas = batch.images.new_zeros(len(case.images), 3, height, width)
    batch = adapter.prepare(case.images, like=replace(batch, images=canvas))
    features = adapter.features(batch)
    other = tuple(x.clone() for x in features)
    for maps, stride in zip(other, case.spec.strides, strict=True):
        for x, (height, width) in zip(maps, batch.sizes, strict=True):
            x[:, -(-height // stride) :] += 1
            x[:, :, -(-width // stride) :] += 1
    found, again = (outputs(adapter.head(maps, batch).predictions) for maps in (features, other))
    expect_same(again, found, "with different maps beyond the images")


def _shown(case: Case) -> None:
    """Gradients flow through all that methods are shown, and nothing of it is written to afterwards."""
    adapter = case.fresh(train=True)
    batch = adapter.prepare(case.images, case.targets)
    features = adapter.features(batch)
    seen = [(f"level {i}", x, x._version) for i, x in enumerate(features)]
    trace = adapter.head(features, batch)
    states = [
        (f"state {i} ({stage.name}), branch {branch}", x)
        for i, (stage, state) in enumerate(zip(case.spec.stages, trace.states, strict=True))
        # The first state of queries may be a constant.
        if i or case.spec.priors.on_grid
        for branch, tensors in state.items()
        for x in tensors
    ]
    shown = [*((f"level {i}", x) for i, x in enumerate(features)), *outputs(trace.predictions).items(), *states]
    for name, x in shown:
        expect(x.requires_grad, f"no gradient flows from {name} to the detector: it is detached")
    seen += [(name, x, x._version) for name, x in shown]
    if Capability.ASSIGNMENT in case.spec.capabilities:
        adapter.assign(trace, batch)
    adapter.task_losses(trace, batch)
    _expect_unwritten(seen)
    for what, said in (("predictions", [*outputs(trace.predictions).values()]), ("states", [x for _, x in states])):
        reached = not said or _reached(said, features)
        expect(reached, f"no gradient flows from {what} to the pyramid: the head detaches its inputs")
    adapter.model.requires_grad_(False)
    for i, (stage, state) in enumerate(zip(case.spec.stages, trace.states, strict=True)):
        leaves = {branch: tuple(x.detach().requires_grad_() for x in tensors) for branch, tensors in state.items()}
        predictions = adapter.resume(leaves, i, trace)
        for branch, tensors in leaves.items():
            reached = _reached([*outputs(predictions).values()], tensors)
            expect(reached, f"resumed from stage {i} ({stage.name}), no gradient flows back to branch {branch}")
    _expect_unwritten(seen)


def _crossing(case: Case) -> None:
    """Of what a student shows, only the state that crosses gets a gradient through a teacher's head.

    None flows through proposals or queries, which both heads share.
    """
    if not case.spec.stages:
        raise LeftOut("the spec has no stages")
    student, teacher = case.fresh(train=True), case.fresh()
    teacher.model.requires_grad_(False)
    batch = student.prepare(case.images, case.targets)
    views = [View(each, batch, each.features(batch), frozen=each is teacher) for each in (student, teacher)]
    pair = Exchange(*views).matched()
    learned = [(name, p) for name, p in student.model.named_parameters() if p.requires_grad]

    def expect_none(said: Sequence[Predictions], what: str) -> None:
        value = torch.stack([x.square().sum() for each in said for x in outputs(each).values()]).sum()
        gradients = torch.autograd.grad(value, [p for _, p in learned], retain_graph=True, allow_unused=True)
        reached = [name for (name, _), each in zip(learned, gradients, strict=True) if each is not None and each.any()]
        expect(
            not reached,
            f"{what}, a gradient also flows to {', '.join(reached[:3])} of the student: Priors.context must "
            "be a tensor or a dataclass of tensors, so that it can be detached",
        )

    for i, (stage, state) in enumerate(zip(case.spec.stages, pair.student.states, strict=True)):
        crossing = {branch: tuple(x.detach().requires_grad_() for x in tensors) for branch, tensors in state.items()}
        expect_none([pair.finish_with_teacher(crossing, i)], f"where the state of stage {i} ({stage.name}) crosses")
    if case.spec.priors is PriorKind.QUERIES:
        maps = [x.detach().requires_grad_() for x in views[0].maps]
        expect_none([each.predictions for each in pair.teacher_on(maps)], "where the memory crosses")


def _expect_unwritten(seen: Sequence[tuple[str, Tensor, int]]) -> None:
    written = sorted({name for name, x, version in seen if x._version != version})
    expect(not written, f"{', '.join(written)} is written to after it was shown, so methods see the changed values")


def _reached(said: Sequence[Tensor], wrt: Sequence[Tensor]) -> bool:
    """Whether a gradient flows from any tensor of `said` to any tensor of `wrt`."""
    value = torch.stack([x.square().sum() for x in said]).sum()
    if not value.requires_grad:
        return False
    gradients = torch.autograd.grad(value, wrt, retain_graph=True, allow_unused=True)
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)


CHECKS = by_name(_resume, _given_priors, _alone, _layers, _cached, _placed_queries, _padding, _shown, _crossing)
