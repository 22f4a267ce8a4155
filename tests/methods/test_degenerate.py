"""Features that say nothing (all zero, constant, a single cell, after a ReLU) through every method of features."""

import pytest
import torch

from kdtoolkit.contract import Capability
from kdtoolkit.methods import all_methods
from tests.methods._views import GRID, batch, exchange, maps, spec

METHODS = {name: cls for name, cls in all_methods().items() if cls.needs == {Capability.FEATURES}}
BATCH = batch([[4, 4, 30, 40]], [[2, 2, 20, 18]])
STEEP = 1e3  # times the largest gradient of plain features


def gradients(name, student, teacher):
    """The terms' gradient with respect to each of the student's maps that the method takes; all must be finite."""
    torch.manual_seed(0)
    method = METHODS[name]()
    method.setup(spec(), spec())
    student = [x.detach().clone().requires_grad_() for x in student]
    torch.manual_seed(0)
    terms = method(exchange(BATCH, features=(tuple(student), tuple(teacher))))
    assert all(torch.isfinite(loss) for loss in terms.values())
    sum(terms.values()).backward()
    found = [x.grad for x in student if x.grad is not None]
    assert all(torch.isfinite(x).all() for x in found)
    return found


def after_relu(x):
    x = x.detach().relu()
    x[:, 0, : x.shape[2] // 2] = 0  # in all images
    return x


def dead_channel(value):
    def change(x):
        x = x.detach().clone()
        x[:, 1] = value
        return x

    return change


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "change",
    [torch.zeros_like, after_relu, dead_channel(0.0), dead_channel(0.7), dead_channel(1e3)],
    ids=["zero", "after ReLU", "a channel of 0", "a channel of 0.7", "a channel of 1000"],
)
@pytest.mark.parametrize("whose", ["student", "both"])
def test_gradients_are_not_steep(name, change, whose):
    student, teacher = maps(2, seed=1), maps(2, seed=2)
    plain = gradients(name, student, teacher)
    changed = [change(x) for x in student], [change(x) for x in teacher] if whose == "both" else teacher
    for steep, level in zip(gradients(name, *changed), plain, strict=True):
        assert steep.abs().max() < STEEP * level.abs().max()


@pytest.mark.parametrize("name", METHODS)
def test_levels_of_one_cell(name):
    gradients(name, *([torch.randn(2, 4, 1, 1) for _ in GRID] for _ in range(2)))
