import pytest
import torch
from torch import nn

from kdtoolkit.engine.inputs import single_values_told
from kdtoolkit.errors import KDError


def test_batch_norm_of_a_single_value_is_one_sentence():
    norm = nn.BatchNorm2d(3)
    with pytest.raises(KDError, match=r"Use a larger batch_size, at least 2 images"), single_values_told():
        norm(torch.zeros(1, 3, 1, 1))
    with single_values_told():
        norm(torch.zeros(2, 3, 1, 1))
    with pytest.raises(ValueError, match="expected 4D input"), single_values_told():
        norm(torch.zeros(3))
