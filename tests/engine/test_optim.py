"""Parameter groups, frozen parts and learning rates."""

import pytest
import torch
from torch import nn

from kdtoolkit import Distiller, KDError
from kdtoolkit.engine.config import TrainConfig
from kdtoolkit.engine.optim import build_optimizer, frozen, lr_factor, set_rates
from kdtoolkit.methods import FBKD
from tests.conftest import tiny_gfl


@pytest.fixture
def distiller():
    return Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [FBKD()])


def config(**changes):
    return TrainConfig(**{"steps": 10, "lr": 1.0, "weight_decay": 0.5, "warmup_steps": 0, **changes})


def groups(distiller, **changes):
    """The rate and decay of each parameter, by name."""
    optimizer = build_optimizer(distiller, config(**changes))
    names = {id(p): name for name, p in distiller.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


def test_without_parts_there_is_one_group(distiller):
    assert len(build_optimizer(distiller, config()).param_groups) == 1
    assert set(groups(distiller).values()) == {(1.0, 0.5)}


def test_parts_have_rates_and_decays_of_their_own(distiller):
    found = groups(
        distiller, lr_factors={"backbone": 0.1, "biases": 2.0}, no_decay=("backbone norms", "predictors.cls biases")
    )
    assert found["student.backbone.conv1.0.weight"] == (pytest.approx(0.1), 0.5)
    assert found["student.backbone.bn1.bias"] == (pytest.approx(0.1), 0.0)  # of a norm, so not among the biases
    assert found["student.predictors.cls.bias"] == (2.0, 0.0)
    assert found["student.predictors.reg.bias"] == (2.0, 0.5)
    assert {value for name, value in found.items() if name.startswith("methods.")} == {(1.0, 0.5)}


@pytest.mark.parametrize("changes", [{"frozen": ("backbon",)}, {"frozen_statistics": ("bckbone",)}])
def test_a_part_that_is_not_there_is_named(distiller, changes):
    message = r"the student \(GFL\) has no (parameters|batch norms) in the part '.*'. Its parts are backbone, neck"
    with pytest.raises(KDError, match=message), frozen(distiller.student, config(**changes)):
        pass
    with pytest.raises(KDError, match=message):
        build_optimizer(distiller, config(lr_factors={"bone": 0.1}))


def modes(student):
    return {name: m.training for name, m in student.named_modules() if isinstance(m, nn.BatchNorm2d)}


def test_frozen_parts_are_not_trained_and_thaw_afterwards(distiller):
    student = distiller.student
    with frozen(student, config(frozen=("backbone.conv1", "backbone.layer1"))) as set_training:
        set_training(distiller)
        assert not any("layer1" in name for name in groups(distiller))
        assert all(training != ("conv1" in name or "layer1" in name) for name, training in modes(student).items())
        assert modes(student)["backbone.bn1"]
    assert all(p.requires_grad for p in student.parameters())


def test_statistics_may_stay_while_weights_are_trained(distiller):
    for part in ("backbone", "norms", "backbone norms"):
        with frozen(distiller.student, config(frozen_statistics=(part,))) as set_training:
            set_training(distiller)
            assert not any(modes(distiller.student).values())
            assert "student.backbone.bn1.weight" in groups(distiller)
            distiller.train()
            assert all(modes(distiller.student).values())


@pytest.mark.parametrize("part", ["neck", "biases", ""])
def test_statistics_of_a_part_without_batch_norms_are_refused(distiller, part):
    message = rf"the student \(GFL\) has no batch norms in the part '{part}'"
    with pytest.raises(KDError, match=message), frozen(distiller.student, config(frozen_statistics=(part,))):
        pass


def test_a_batch_norm_without_parameters_is_frozen_with_the_module_around_it_alone(distiller):
    student = distiller.student
    student.backbone.bn1 = nn.BatchNorm2d(student.backbone.bn1.num_features, affine=False)
    for parts, still in ((("neck",), False), (("backbone",), True), (("norms",), True)):
        with frozen(student, config(frozen=parts)) as set_training:
            set_training(distiller)
            assert modes(student)["backbone.bn1"] != still
        student.train()


def test_biases_of_attention_are_biases(distiller):
    distiller.student.neck.attention = nn.MultiheadAttention(8, 2)
    found = groups(distiller, no_decay=("biases",))
    assert found["student.neck.attention.in_proj_bias"] == (1.0, 0.0)
    assert found["student.neck.attention.in_proj_weight"] == (1.0, 0.5)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"warmup": "constant", "warmup_factor": 1 / 3}, [1 / 3, 1 / 3, 1 / 3, 1]),
        ({"warmup_factor": 0.2}, [0.4, 0.6, 0.8, 1]),
        ({}, [0.25, 0.5, 0.75, 1]),
    ],
)
def test_warmups(changes, expected):
    settings = config(schedule="constant", warmup_steps=3, **changes)
    assert [lr_factor(step, settings) for step in range(4)] == pytest.approx(expected)


def test_rates_of_a_step_go_by_the_step_alone(distiller):
    settings = config(lr_factors={"backbone": 0.1}, schedule="step", milestones=(0.5,))
    optimizer = build_optimizer(distiller, settings)
    assert [set_rates(optimizer, step, settings) for step in (7, 2, 5)] == pytest.approx([0.1, 1.0, 0.1])
    assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx([0.01, 0.1])
    assert isinstance(optimizer, torch.optim.AdamW)


def test_a_batch_has_a_whole_number_of_parts():
    with pytest.raises(ValueError, match=r"batch_size \(16\) must be a multiple of accumulation \(3\)"):
        config(accumulation=3)
