import pytest
import torch

from kdtoolkit.tf32 import in_tf32, tensor_float32

MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn


def test_it_is_set_for_the_block_alone():
    before = MATMUL.allow_tf32, CUDNN.allow_tf32
    with tensor_float32("auto"):
        assert (MATMUL.allow_tf32, CUDNN.allow_tf32) == in_tf32() == before
    for choice in (True, False):
        with tensor_float32(choice):
            assert (MATMUL.allow_tf32, CUDNN.allow_tf32) == in_tf32() == (choice, choice)
        assert (MATMUL.allow_tf32, CUDNN.allow_tf32) == in_tf32() == before


@pytest.fixture
def newer():
    """Torch's newer switches, which have their values again at the end."""
    if not hasattr(MATMUL, "fp32_precision"):
        pytest.skip("this torch has the older switches alone")
    switches = MATMUL, CUDNN.conv, CUDNN.rnn
    before = [switch.fp32_precision for switch in switches]
    older = MATMUL.allow_tf32, CUDNN.allow_tf32
    yield switches
    for switch, value in zip(switches, before, strict=True):
        switch.fp32_precision = value
    MATMUL.allow_tf32, CUDNN.allow_tf32 = older  # torch refuses to read the older ones where the two kinds disagree


@pytest.mark.parametrize("value", ["tf32", "ieee"])
def test_torchs_newer_switches_are_read_and_given_back(newer, value):
    for switch in newer[:2]:
        switch.fp32_precision = value
    before = [switch.fp32_precision for switch in newer]
    assert in_tf32() == (value == "tf32",) * 2
    for choice in (True, False):
        with tensor_float32(choice):
            assert (MATMUL.allow_tf32, CUDNN.allow_tf32) == in_tf32() == (choice, choice)
        assert [switch.fp32_precision for switch in newer] == before
