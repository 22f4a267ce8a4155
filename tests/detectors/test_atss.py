import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdtoolkit.detectors.atss import STDS, centerness, decode_offsets

sides = st.floats(0.5, 100)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4))
def test_offsets_move_and_scale_the_anchor(offsets):
    anchor = torch.tensor([[10.0, 20.0, 42.0, 52.0]])
    box = decode_offsets(torch.tensor([offsets]), anchor, STDS)[0]
    dx, dy, dw, dh = (value * std for value, std in zip(offsets, STDS, strict=True))
    x, y, width, height = 26 + 32 * dx, 36 + 32 * dy, 32 * math.exp(dw), 32 * math.exp(dh)
    expected = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    assert box.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_log_sizes_are_clipped_at_both_ends():
    anchor = torch.tensor([[0.0, 0.0, 64.0, 64.0]])
    box = decode_offsets(torch.tensor([[0.0, 0.0, 1000.0, -1000.0]]), anchor, STDS)[0]
    assert (box[2] - box[0]).item() == pytest.approx(64 * 1000 / 16)
    assert (box[3] - box[1]).item() == pytest.approx(64 * 16 / 1000, rel=1e-3)


@settings(deadline=None, max_examples=30)
@given(sides, sides, sides, sides)
def test_centerness(left, top, right, bottom):
    expected = math.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))
    assert centerness(torch.tensor([left, top, right, bottom])).item() == pytest.approx(expected, rel=1e-4)
