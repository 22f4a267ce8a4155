"""Whether an adapter keeps nothing, and leaves its model as it was."""

from __future__ import annotations

from functools import partial

import torch

from kdtoolkit.contract import Capability, DetectorAdapter
from kdtoolkit.distiller import Distiller
from kdtoolkit.testing._batch import observe, without_objects
from kdtoolkit.testing._doubles import Probe
from kdtoolkit.testing._expect import expect, expect_backward, expect_same, outputs
from kdtoolkit.testing._snapshot import Snapshot, count_calls, interrupt
from kdtoolkit.testing.adapters._case import Case, mode
from kdtoolkit.testing.report import by_name


@torch.no_grad()
def _stateless(case: Case) -> None:
    """An adapter keeps nothing between steps: a different batch in between changes nothing."""
    adapter = case.fresh()
    first = case.show(adapter)
    once = outputs(first.head.predictions)
    adapter.detections(case.show(adapter, without_objects(case.targets, [0])).head, first.batch)
    observe(adapter, [case.images[0].flip(-1)])
    for i, state in enumerate(first.head.states):
        resumed = adapter.resume(state, i, first.head)
        expect_same(outputs(resumed), once, f"stage {i} resumed after another batch")
    expect_same(outputs(case.show(adapter).head.predictions), once, "the same batch after another one")


def _untouched(case: Case) -> None:
    """Nothing in the model is changed, added or left behind, also if an error ends the pass."""
    for train in (False, True):
        adapter = case.fresh(train=train)
        # The library's own forward may cache something in the model: it runs before the adapter is looked at.
        if not isinstance(case.own, str) and not train:
            case.own(adapter.model, case.images)
        if not isinstance(case.own_losses, str) and train:
            case.own_losses(adapter.model, case.images, case.targets)
        before = Snapshot.of(adapter.model)
        step = partial(_call_everything, case, adapter, train)
        step()
        # In train mode batch norm learns its statistics.
        before.expect_of(adapter.model, f"in {mode(train)}, after a pass,", values=not train)
        count = count_calls(adapter.model, step)
        for call in sorted({1, count // 2, count} - {0}):
            interrupt(adapter.model, step, call)
            before.expect_of(adapter.model, "after an error inside the model", values=not train)


def _call_everything(case: Case, adapter: DetectorAdapter, train: bool) -> None:
    with torch.set_grad_enabled(train):
        view = case.show(adapter)
        for i, state in enumerate(view.head.states):
            adapter.resume(state, i, view.head)
        if Capability.ASSIGNMENT in case.spec.capabilities:
            adapter.assign(view.head, view.batch)
        if train:
            adapter.task_losses(view.head, view.batch)
        else:
            adapter.detections(view.head, view.batch)


def _teacher(case: Case) -> None:
    """As a teacher the model is frozen and unchanged by a step, and its head lets gradients through to the student."""
    teacher, student = case.fresh(train=True), case.fresh(train=True)
    distiller = Distiller(teacher, student, [Probe(case.spec.capabilities)])
    before, keys = Snapshot.of(teacher.model), tuple(case.adapter.model.state_dict())
    losses = distiller.train()(case.images, case.targets)
    expect_backward(losses, student.model, "through the teacher's head", reaches=True)
    before.expect_of(teacher.model, "after a step as a teacher")
    saved = student.model.state_dict()
    expect(tuple(saved) == keys, f"the student's state dict has different keys: {set(saved) ^ set(keys)}")
    case.fresh().model.load_state_dict(saved)


CHECKS = by_name(_stateless, _untouched, _teacher)
