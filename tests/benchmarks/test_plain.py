"""The readings that the methods' speed is measured against, at small shapes: they must not drift from the methods."""

from dataclasses import replace

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks.speed.plain import CASES, Shapes, exchange, fgd_masks
from kdtoolkit.methods import all_methods
from kdtoolkit.methods.fgd import cells_of_content, region_masks

SMALL = Shapes(grid=((12, 16), (6, 8), (3, 4)), channels=8, boxes=5, classes=6, bins=5, positives=12)


def value_and_gradients(terms, wanted):
    total = sum(terms.values())
    return total, torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("shapes", [SMALL, replace(SMALL, images=3), replace(SMALL, grid=((9, 7),), boxes=4)])
@pytest.mark.parametrize("name", CASES)
def test_readings_equal_their_methods(name, shapes):
    build, reading = CASES[name]
    method = build()
    seen, wanted = exchange(method, shapes, seed=1)
    wanted = [*wanted, *method.parameters()]
    torch.manual_seed(0)  # of masks drawn at random
    ours = method(seen)
    torch.manual_seed(0)
    plain = reading(method, seen)
    assert set(ours) == set(plain)
    for term in ours:
        torch.testing.assert_close(ours[term], plain[term], rtol=1e-4, atol=1e-7)
        assert ours[term] > 0
    (_, found), (_, expected) = value_and_gradients(ours, wanted), value_and_gradients(plain, wanted)
    # Gradients that are 0 but for rounding (a softmax does not see its bias) are measured against the largest one.
    noise = 1e-6 * max(x.abs().max().item() for x in expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item() + noise)
    assert any(x.abs().max() > 0 for x in found)


def test_masks_by_a_loop_over_boxes_equal_those_without():
    boxes = [torch.tensor([[0.0, 0, 20, 30], [5, 5, 90, 60], [10, 10, 12, 12]]), torch.zeros(0, 4)]
    sizes, padded = ((64, 96), (50, 70)), pad_sequence(boxes, batch_first=True, padding_value=torch.nan)
    ours = region_masks(cells_of_content(padded, sizes, 8, 12), 8, 12)
    for a, b in zip(ours, fgd_masks(boxes, sizes, 8, 12), strict=True):
        torch.testing.assert_close(a, b)


def test_readings_are_of_methods():
    assert {type(build()).__name__ for build, _ in CASES.values()} <= set(all_methods())
