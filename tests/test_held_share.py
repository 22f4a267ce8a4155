"""A method whose share of the gradient is held: `PKD().held_at(share=0.1)`."""

import copy
import math

import pytest
import torch

from kdtoolkit import Distiller, KDError
from kdtoolkit.contract import HeldShare
from kdtoolkit.data import ProceduralShapes
from kdtoolkit.engine.train import TrainConfig, train
from kdtoolkit.method_use import MethodUse
from kdtoolkit.methods import FGD, PKD, CrossKD, Mimic
from tests.conftest import tiny_gfl

METHODS = {"features": PKD, "several terms": FGD, "own head": Mimic, "the teacher's head": CrossKD}


def pair(*methods):
    torch.manual_seed(0)
    return Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), methods).train()


def loop_share(distiller, losses, name):
    """The share of a method, parameter by parameter."""
    parameters = list(distiller.student.parameters())

    def grads(belongs):
        loss = sum(loss for term, loss in losses.items() if belongs(term))
        return torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)

    own = task = 0.0
    for g, t in zip(
        grads(lambda term: term.startswith(f"{name}/")), grads(lambda term: term.startswith("task/")), strict=True
    ):
        if g is not None and t is not None:
            own += g.square().sum().item()
            task += t.square().sum().item()
    return math.sqrt(own) / (math.sqrt(own) + math.sqrt(task))


@pytest.mark.parametrize("kind", METHODS)
def test_the_first_step_has_the_share_already(batch, kind):
    distiller = pair(METHODS[kind]().held_at(share=0.2))
    name = METHODS[kind].__name__.lower()
    assert loop_share(distiller, distiller(*batch), name) == pytest.approx(0.2, rel=1e-4)


def test_the_weight_does_not_matter(batch):
    found = [pair(PKD(weight=weight).held_at(share=0.1))(*batch)["pkd/feature"].item() for weight in (0.1, 6.0)]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_several_methods_are_held_each_beside_the_task(batch):
    distiller = pair(PKD().held_at(share=0.1), CrossKD().held_at(share=0.3), FGD())
    losses = distiller(*batch)
    assert loop_share(distiller, losses, "pkd") == pytest.approx(0.1, rel=1e-4)
    assert loop_share(distiller, losses, "crosskd") == pytest.approx(0.3, rel=1e-4)
    torch.manual_seed(0)
    plain = Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [FGD()]).train()
    assert losses["fgd/foreground"].item() == pytest.approx(plain(*batch)["fgd/foreground"].item())


@pytest.mark.parametrize("weight", [6.0, 1e3])
def test_float16_holds_it_at_any_weight(batch, weight):
    """At the larger weight the gradient overflows if the loss is scaled up."""
    distiller = pair(PKD(weight=weight).held_at(share=0.1))
    with torch.autocast("cpu", torch.float16):
        losses = distiller(*batch)
    scaled = {name: 2.0**10 * loss for name, loss in losses.items()}  # as a float16 run does
    assert loop_share(distiller, scaled, "pkd") == pytest.approx(0.1, rel=0.05)


def test_a_share_that_cannot_be_measured_is_told_until_it_can():
    held = HeldShare(0.1)
    for step, own in enumerate((math.inf, 0.0, math.nan)):
        assert held.warning is None
        held.set(step, own, 1.0)
    assert "not held: in the last 3 measurements" in held.warning
    again = HeldShare(0.1)
    again.set_extra_state(held.get_extra_state())
    assert again.warning == held.warning
    again.set(4, 1.0, 1.0)
    assert again.warning is None


def test_a_schedule_multiplies_what_is_held(batch):
    distiller = pair(PKD().scheduled(warmup=1).held_at(share=0.2))
    distiller(*batch)
    held = distiller.held["pkd"].factor
    assert distiller(*batch)["pkd/feature"].item() == pytest.approx(
        held * pair(PKD())(*batch)["pkd/feature"].item(), rel=1e-3
    )
    assert pair(PKD().scheduled(warmup=1).held_at(share=0.2))(*batch)["pkd/feature"].item() == pytest.approx(
        held / 2 * pair(PKD())(*batch)["pkd/feature"].item(), rel=1e-3
    )


def test_it_is_measured_seldom_and_moves_a_part_of_the_way():
    held = HeldShare(0.5)
    assert held.factor == 1
    steps = []
    for step in range(100):
        if held.is_due(step):
            steps.append(step)
            held.set(step, own=1.0, task=4.0 if step else 2.0)
            if step == 0:
                assert held.factor == pytest.approx(2)
            if step == 1:
                assert held.factor == pytest.approx(2 * 2**0.5)
                assert held.measured == pytest.approx(2 / 6)
    assert steps == [0, 1, 3, 7, 15, 25, 35, 45, 55, 65, 75, 85, 95]
    assert held.factor == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize("norms", [(0.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.inf)])
def test_norms_that_say_nothing_leave_the_factor(norms):
    held = HeldShare(0.1)
    held.set(0, *norms)
    assert held.factor == 1
    held.set(1, 1.0, 9.0)
    assert held.factor == pytest.approx(1)


def test_the_factor_is_bounded():
    held = HeldShare(0.1)
    held.set(0, 1e-9, 1.0)
    assert held.factor == 1000
    held.restart()
    held.set(0, 1e9, 1.0)
    assert held.factor == pytest.approx(1e-6)


def test_steps_without_labels_and_evaluation_do_not_measure(batch):
    distiller = pair(PKD().held_at(share=0.1))
    distiller(batch[0], None)
    distiller.eval()(*batch)
    with torch.no_grad():
        distiller.train()(*batch)
    assert distiller.held["pkd"].factor == 1
    assert "pkd/share" not in distiller(batch[0], None).metrics
    distiller(*batch)
    factor = distiller.held["pkd"].factor
    assert factor != 1
    assert distiller(batch[0], None)["pkd/feature"].item() == pytest.approx(
        factor * pair(PKD())(*batch)["pkd/feature"].item(), rel=1e-3
    )


def test_a_step_is_measured_once_however_many_parts_it_has(batch):
    distiller = Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [PKD().held_at(share=0.1)], accumulation=2).train()
    factors = []
    for _ in range(4):
        distiller(*batch)
        factors.append(distiller.held["pkd"].factor)
    assert factors[0] == factors[1]
    assert factors[2] == factors[3]


def test_measuring_leaves_no_gradient_and_the_graph_whole(batch):
    distiller = pair(PKD().held_at(share=0.1), FGD().held_at(share=0.1))
    losses = distiller(*batch)
    assert all(p.grad is None for p in distiller.parameters())
    losses.total.backward()
    assert all(p.grad is not None for p in distiller.student.parameters())


def test_its_state_goes_with_the_methods(batch):
    first = pair(PKD().held_at(share=0.1))
    first(*batch)
    second = pair(PKD().held_at(share=0.1))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.held["pkd"].metrics == first.held["pkd"].metrics
    third = pair(PKD().held_at(share=0.1))
    third.methods.load_state_dict(first.methods.state_dict())
    assert third.held["pkd"].metrics == first.held["pkd"].metrics
    assert not [name for name in pair(PKD()).state_dict() if "held" in name]


@pytest.mark.parametrize(
    "changes", [{}, pytest.param({"accumulation": 2, "precision": "float16"}, marks=pytest.mark.slow)], ids=str
)
def test_training_holds_it_and_logs_it(changes):
    data = ProceduralShapes(8, image_size=64, seed=0)
    teacher, student = (tiny_gfl(seed=seed, num_classes=len(data.class_names)) for seed in (1, 2))
    distiller = Distiller(teacher, student, [PKD().held_at(share=0.2)])
    config = TrainConfig(steps=40, batch_size=4, warmup_steps=0, lr=1e-4, **changes)  # gradients change slowly
    result = train(distiller, data, config, seed=0)
    shares = [point["pkd/share"] for point in result.history[25:]]
    assert sum(shares) / len(shares) == pytest.approx(0.2, abs=0.08)
    assert len({point["pkd/factor"] for point in result.history}) >= 5
    first = result.history[0]["pkd/factor"]
    again = train(distiller, data, config.model_copy(update={"steps": 1}), seed=0)  # a new run measures anew
    assert again.history[0]["pkd/factor"] != first
    assert math.isfinite(again.history[0]["pkd/factor"])


def test_a_run_warns_of_a_share_that_is_not_held():
    data = ProceduralShapes(8, image_size=64, seed=0)
    teacher, student = (tiny_gfl(seed=seed, num_classes=len(data.class_names)) for seed in (1, 2))
    methods = [PKD(weight=0.0).held_at(share=0.2), CrossKD().held_at(share=0.2)]  # PKD has a gradient of zeros
    told = []
    config = TrainConfig(steps=4, batch_size=2, warmup_steps=0, lr=1e-3)
    result = train(Distiller(teacher, student, methods), data, config, seed=0, report=told.append)
    for warnings in (result.warnings, told[-1].warnings):
        assert [line for line in warnings if "share" in line] == [
            "pkd: its share is not held: in the last 3 measurements its gradient or the task's was 0 or not finite. If "
            "the run computes in float16, lower the method's weights or set precision to float32"
        ]


def test_a_compiled_step_is_refused():
    data = ProceduralShapes(8, image_size=64, seed=0)
    teacher, student = (tiny_gfl(seed=seed, num_classes=len(data.class_names)) for seed in (1, 2))
    distiller = Distiller(teacher, student, [PKD().held_at(share=0.2)])
    with pytest.raises(KDError, match="leave share or compile out"):
        train(distiller, data, TrainConfig(steps=1, compile=True), seed=0)


@pytest.mark.parametrize("share", [0, 1, -0.1, 10, "much", math.nan, True])
def test_a_wrong_share_is_one_sentence(share):
    with pytest.raises(KDError, match="share"):
        PKD().held_at(share=share)


def test_suites_and_commands_write_it_as_an_argument():
    use = MethodUse.model_validate("PKD?share=0.1&stop=9")
    method = use.build()
    assert (method.held.share, method.schedule.stop) == (0.1, 9)
    assert str(use) == "PKD?stop=9&share=0.1"
    assert MethodUse.model_validate({"PKD": {"share": 0.1, "stop": 9}}) == use
    assert MethodUse.model_validate("PKD").build().held is None
    with pytest.raises(ValueError, match="PKD: share = 2"):
        MethodUse.model_validate("PKD?share=2")
