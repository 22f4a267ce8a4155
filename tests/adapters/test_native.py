import pickle

import pytest
import torch

from kdtoolkit.adapters.native import DenseAdapter
from kdtoolkit.contract import Capability, PriorKind
from kdtoolkit.libraries import adapt
from tests._traced import traced
from tests.conftest import DENSE, tiny_atss, tiny_gfl

EACH = pytest.mark.parametrize("make", DENSE)


@EACH
def test_adapt_finds_it(make):
    model = make(seed=0)
    adapter = adapt(model)
    assert isinstance(adapter, DenseAdapter)
    assert adapter.model is model
    assert not DenseAdapter.matches(torch.nn.Linear(1, 1))


@EACH
def test_losses_and_detections_are_the_models_own(make, batch):
    images, targets = batch
    model = make(seed=0, score_threshold=0.0)
    adapter = adapt(model)
    model.train()
    expected = model(images, targets)
    prepared, _, trace = traced(adapter, batch)
    losses, assignment = adapter.task_losses(trace, prepared)
    assert {k: v.item() for k, v in losses.items()} == {k: v.item() for k, v in expected.items()}
    assert torch.equal(assignment.labels, adapter.assign(trace, prepared).labels)
    model.eval()
    prepared, _, trace = traced(adapter, batch)
    for ours, own in zip(adapter.detections(trace, prepared), model(images), strict=True):
        assert all(torch.equal(ours[key], own[key]) for key in ("boxes", "scores", "labels"))


@EACH
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("activated", [False, True])
def test_resumed_from_any_stage_the_head_repeats_itself_to_the_bit(make, precision, activated, batch):
    adapter = adapt(make(seed=0, head_blocks=3))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        _, _, trace = traced(adapter, batch)
        for i, stage in enumerate(adapter.spec.stages):
            state = trace.states[i]
            if activated and stage.activation is not None:
                state = {branch: tuple(map(stage.activation, maps)) for branch, maps in state.items()}
            again, once = adapter.resume(state, i, trace), trace.predictions
            for name in ("logits", "regression", "boxes", "quality"):
                if getattr(once, name) is not None:
                    assert torch.equal(getattr(again, name), getattr(once, name)), (i, name)
                    assert getattr(again, name).dtype == torch.float32


@EACH
def test_resume_depends_on_both_branches(make, batch):
    adapter = adapt(make(seed=0))
    _, _, trace = traced(adapter, batch)
    for stage, state in enumerate(trace.states):
        for branch, output in (("cls", "logits"), ("reg", "regression")):
            changed = {b: tuple(-x for x in maps) if b == branch else maps for b, maps in state.items()}
            again = adapter.resume(changed, stage, trace)
            other = "regression" if output == "logits" else "logits"
            assert not torch.equal(getattr(again, output), getattr(trace.predictions, output))
            assert torch.equal(getattr(again, other), getattr(trace.predictions, other))


@EACH
def test_the_spec_tells_the_truth(make, batch):
    adapter = adapt(make(seed=0, head_channels=24))
    _, features, trace = traced(adapter, batch)
    spec = adapter.spec
    assert [level.shape[1] for level in features] == list(spec.channels) == [16] * 3
    assert [64 // level.shape[2] for level in features] == list(spec.strides)
    assert len(trace.states) == len(spec.stages) == 3
    for stage, state in zip(spec.stages, trace.states, strict=True):
        assert {branch: tuple(m.shape[1] for m in maps) for branch, maps in state.items()} == dict(stage.channels)
        if stage.activation is not None:  # taken before it
            assert any((x < 0).any() for maps in state.values() for x in maps)
    assert all(a is b for a, b in zip(trace.states[0]["cls"], trace.states[0]["reg"], strict=True))
    assert all(a is b for a, b in zip(trace.states[0]["cls"], features, strict=True))
    assert spec.priors is (PriorKind.POINTS if spec.name == "FCOS" else PriorKind.ANCHORS)
    assert trace.predictions.logits.shape == (2, 84 * spec.priors_per_cell[0], spec.num_classes)
    assert sum(trace.predictions.priors.per_level) == 84 * spec.priors_per_cell[0]
    assert (
        (Capability.DISTRIBUTIONS in spec.capabilities)
        == (len(spec.bins) > 0)
        == (trace.predictions.regression.ndim == 4)
    )
    assert (trace.predictions.quality is not None) == (spec.name in ("ATSS", "FCOS"))
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_detectors_of_one_rule_share_an_assigner():
    assert adapt(tiny_gfl(seed=0)).assigner == adapt(tiny_atss(seed=1, head_blocks=1)).assigner


def test_gradient_reaches_the_state_through_a_frozen_head(batch):
    adapter = adapt(tiny_gfl(seed=0).eval().requires_grad_(False))
    _, _, trace = traced(adapter, batch)
    state = {branch: tuple(x.clone().requires_grad_() for x in maps) for branch, maps in trace.states[1].items()}
    adapter.resume(state, 1, trace).boxes.sum().backward()
    assert all(x.grad is not None and x.grad.any() for x in state["reg"])
    assert all(x.grad is None for x in state["cls"])
    assert all(p.grad is None for p in adapter.model.parameters())
