"""Tiny detectors and batches: a step takes milliseconds."""

from functools import cache
from multiprocessing.util import get_temp_dir

import pytest
import torch

from kdtoolkit.detectors import ATSS, FCOS, GFL, RetinaNet
from kdtoolkit.libraries import adapt
from kdtoolkit.matrix import families

torch.set_num_threads(1)
# The folder of a process's sockets is made once. Tests change where temporary files go, and their paths are too long
# for a socket: readers of images would then hang.
get_temp_dir()

BACKBONE = {"channels": (8, 8, 16, 16), "stem_width": 4}
TINY = {
    "backbone": "resnet10t",
    "strides": (8, 16, 32),
    "neck_channels": 16,
    "head_channels": 16,
    "head_blocks": 2,
    "head_groups": 4,
}


def _tiny(detector, seed, num_classes, **changes):
    torch.manual_seed(seed)
    return detector(num_classes, backbone_args=BACKBONE, **{**TINY, **changes})


def tiny_gfl(*, seed, num_classes=3, bins=5, **changes):
    return _tiny(GFL, seed, num_classes, bins=bins, **changes)


def tiny_atss(*, seed, num_classes=3, **changes):
    return _tiny(ATSS, seed, num_classes, **changes)


def tiny_retinanet(*, seed, num_classes=3, **changes):
    return _tiny(RetinaNet, seed, num_classes, **{"head_groups": 0, **changes})


def tiny_fcos(*, seed, num_classes=3, **changes):
    return _tiny(FCOS, seed, num_classes, **changes)


def tiny_of(family, *, seed, num_classes=3):
    """The example of a family, as the matrix names it, of any library."""
    torch.manual_seed(seed)
    return families()[family](num_classes)


@cache
def first_of_each_kind():
    """A family of each kind that a method can tell apart: to methods, families of one kind are one."""
    found = {}
    for family in families():
        spec = adapt(tiny_of(family, seed=0)).spec
        found.setdefault((spec.priors, spec.activation, bool(spec.bins), spec.first_stage is not None), family)
    return tuple(found.values())


DENSE = (tiny_gfl, tiny_atss, tiny_retinanet, tiny_fcos)


def cases_of(argument, cases, quick):
    """Parametrises by `cases`, a mapping from names or some names. All but the `quick` ones are slow tests."""
    values = cases if isinstance(cases, dict) else {name: name for name in cases}
    assert quick <= values.keys()
    return pytest.mark.parametrize(
        argument,
        [
            pytest.param(value, id=name, marks=() if name in quick else pytest.mark.slow)
            for name, value in values.items()
        ],
    )


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
