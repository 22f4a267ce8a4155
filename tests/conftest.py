"""Tiny detectors and batches: a step takes milliseconds."""

import pytest
import torch

from kdtoolkit.detectors import ATSS, GFL

torch.set_num_threads(1)

TINY = {
    "backbone": "resnet10t",
    "strides": (8, 16, 32),
    "neck_channels": 16,
    "head_blocks": 2,
    "head_groups": 4,
}


def tiny_gfl(*, seed, num_classes=3, head_channels=16, bins=5, **changes):
    torch.manual_seed(seed)
    args = {"channels": (8, 8, 16, 16), "stem_width": 4}
    return GFL(num_classes, backbone_args=args, head_channels=head_channels, bins=bins, **{**TINY, **changes})


def tiny_atss(*, seed, num_classes=3, head_channels=16, **changes):
    torch.manual_seed(seed)
    args = {"channels": (8, 8, 16, 16), "stem_width": 4}
    return ATSS(num_classes, backbone_args=args, head_channels=head_channels, **{**TINY, **changes})


@pytest.fixture
def batch():
    """Two images of different sizes with their ground truth."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 64, 64, generator=generator), torch.rand(3, 50, 60, generator=generator)]
    targets = [
        {"boxes": torch.tensor([[4.0, 6.0, 30.0, 40.0], [20.0, 20.0, 60.0, 60.0]]), "labels": torch.tensor([0, 2])},
        {"boxes": torch.tensor([[10.0, 10.0, 40.0, 45.0]]), "labels": torch.tensor([1])},
    ]
    return images, targets
