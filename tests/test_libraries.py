"""`adapt` (kdtoolkit/libraries.py): which adapters it looks at, and what it says of models that it does not take."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from kdtoolkit import Distiller
from kdtoolkit.adapters.native import DenseAdapter
from kdtoolkit.errors import KDError
from kdtoolkit.libraries import adapt
from kdtoolkit.matrix import families
from kdtoolkit.methods import PKD
from tests.conftest import tiny_gfl


def of_library(library):
    """A model whose class is one of a library's."""
    return type("Net", (nn.Linear,), {"__module__": f"{library}.models.net"})(1, 1)


@pytest.fixture
def old_transformers(monkeypatch):
    """A version of transformers that the adapters cannot be imported with, already loaded by somebody."""
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, "kdtoolkit.adapters.transformers", None)


def test_only_the_library_of_the_models_own_class_counts(old_transformers):
    assert isinstance(adapt(tiny_gfl(seed=0)), DenseAdapter)
    derived = type("Mine", (type(tiny_gfl(seed=0)),), {"__module__": "users.own"})
    assert isinstance(adapt(derived(3, backbone="test_resnet")), DenseAdapter)
    with pytest.raises(KDError, match=r"no adapter for torch\.nn\.modules\.linear\.Linear: there are some for"):
        adapt(nn.Linear(1, 1))


def test_a_library_of_another_version_is_one_sentence(old_transformers):
    with pytest.raises(KDError, match=r"cannot work with this version of transformers .*pip install -U 'kdtoolkit\[tr"):
        adapt(of_library("transformers"))


@pytest.mark.parametrize("family", ["GFL", "torchvision FCOS", "DETR"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_in_other_precisions_are_refused_in_words(family, dtype):
    with pytest.raises(KDError, match=rf"has parameters of {dtype}, and they must be float32: call model\.float\(\)"):
        adapt(families()[family](3).to(dtype))
    with pytest.raises(KDError, match=rf"has parameters of {dtype}"):
        Distiller(tiny_gfl(seed=0).to(dtype), tiny_gfl(seed=1))


def test_a_distiller_in_half_precision_says_so(batch):
    distiller = Distiller(tiny_gfl(seed=0), tiny_gfl(seed=1), [PKD()]).half()
    with pytest.raises(
        KDError, match=r"has parameters of torch\.float16, and they must be float32: call model\.float\(\)"
    ):
        distiller(*batch)
    assert distiller.float()(*batch).total.isfinite()
