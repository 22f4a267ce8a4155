"""Passes of heads that are computed again in the backward pass: equal values, less memory."""

import pytest
import torch

from kdtoolkit import Distiller, adapt
from kdtoolkit.contract.recompute import recomputed
from kdtoolkit.methods import CrossKD
from kdtoolkit.testing.memory import peak_bytes
from kdtoolkit.winograd import CHANNELS, FastConvolutions, gains
from tests.conftest import tiny_gfl, tiny_of

large = pytest.mark.skipif(
    not gains(torch.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)),
    reason="this processor or torch has no such algorithm",
)


def test_allocations_add_up():
    def run():
        first = torch.zeros(1000, 250)  # 1 MB
        second = first + 1
        del first
        return second * 2

    assert peak_bytes(run) == pytest.approx(2_000_000, abs=100)  # scalars besides


def of(family, methods, *, recompute):
    """A Distiller of two examples, after a step with gradients."""
    teacher, student = tiny_of(family, seed=1), tiny_of(family, seed=2)
    torch.manual_seed(3)
    return Distiller(teacher, student, methods, recompute=recompute).train()


@pytest.mark.parametrize(
    "family",
    [
        "GFL",
        "YOLO11",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("RT-DETR", "torchvision Faster R-CNN")),
    ],
)
def test_losses_gradients_and_buffers_are_equal(family, batch):
    found = []
    for recompute in (False, True):
        # To hold a share, the step measures gradients: it goes back through the same graph several times.
        distiller = of(family, [CrossKD().held_at(share=0.1)], recompute=recompute)
        torch.manual_seed(4)
        losses = distiller(*batch)
        losses.total.backward()
        gradients = {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}
        found.append((dict(losses), gradients, dict(distiller.student.named_buffers())))
    for plain, again in zip(*found, strict=True):
        assert plain.keys() == again.keys()
        for name, value in plain.items():
            torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@large
def test_convolutions_by_winograd_are_computed_again_in_the_same_way():
    x, found = torch.randn(2, 64, 20, 20, generator=torch.Generator().manual_seed(0)), []
    torch.manual_seed(0)
    head = torch.nn.Sequential(*(torch.nn.Conv2d(64, 64, 3, padding=1) for _ in range(2))).requires_grad_(False)
    for recompute in (False, True):
        state = x.clone().requires_grad_()
        with FastConvolutions():
            y = recomputed(lambda state=state: head(state).relu(), head) if recompute else head(state).relu()
        y.sum().backward()
        found.append(state.grad)
    assert torch.equal(*found)


@pytest.fixture(scope="module")
def steps():
    """Two detectors whose heads are large, as published ones are, and the peaks of their steps in bytes."""
    wide = {"neck_channels": 64, "head_channels": 64, "head_blocks": 4}
    teacher, student = tiny_gfl(seed=1, **wide), tiny_gfl(seed=2, **wide)
    images = [torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    targets = [{"boxes": torch.tensor([[10.0, 10.0, 60.0, 70.0]]), "labels": torch.tensor([1])}] * 2

    def peak(distiller):
        def step():
            distiller(images, targets).total.backward()

        step()  # what is kept for later steps, such as priors
        distiller.zero_grad()
        return peak_bytes(step)

    plain = peak(Distiller(None, student).train())
    crossed = {
        recompute: peak(Distiller(teacher, student, [CrossKD()], recompute=recompute).train())
        for recompute in (False, True)
    }
    weights = [sum(p.nbytes for p in model.parameters()) for model in (teacher, student)]
    adapter = adapt(teacher)
    seen = adapter.prepare(images, targets)
    with torch.no_grad():
        states = adapter.head(adapter.features(seen), seen).states
    state = sum(x.nbytes for maps in states[-2].values() for x in maps)
    return plain, crossed, weights, state


def test_a_step_needs_the_plain_step_the_teacher_and_one_state(steps):
    plain, crossed, weights, state = steps
    assert crossed[True] + sum(weights) <= 1.1 * (plain + sum(weights) + state)
    assert crossed[True] < 0.9 * crossed[False]


@pytest.mark.slow
def test_it_works_in_a_compiled_step(batch):
    found = []
    for recompute in (False, True):
        distiller = of("GFL", [CrossKD()], recompute=recompute)
        losses = torch.compile(distiller, backend="eager")(*batch)
        losses.total.backward()
        found.append((losses.total, next(p.grad for p in distiller.student.parameters())))
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)
