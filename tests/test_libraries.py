"""The table of libraries (kdtoolkit/libraries.py), and `adapt`: what it tries, and what it says if none fits."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from kdtoolkit import Distiller
from kdtoolkit.adapters.native import DenseAdapter
from kdtoolkit.benchmark.keys import package_of, source_digest
from kdtoolkit.detectors import GFL
from kdtoolkit.errors import KDError
from kdtoolkit.libraries import LIBRARIES, Library, adapt, adapter_classes
from kdtoolkit.matrix import families
from kdtoolkit.methods import PKD
from kdtoolkit.models import build_model
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


def test_a_library_is_one_module_and_one_row(monkeypatch):
    toy = type("Toy", (GFL,), {"__module__": "toylib.detectors"})

    class ToyAdapter(DenseAdapter):
        @classmethod
        def matches(cls, model):
            return isinstance(model, toy)

    module = ModuleType("toylib_adapters")
    module.ADAPTERS, module.build_model = (ToyAdapter,), lambda name, num_classes, args: toy(num_classes, **args)
    monkeypatch.setitem(sys.modules, "toylib", ModuleType("toylib"))
    monkeypatch.setitem(sys.modules, "toylib_adapters", module)
    row = Library("toys", "toys/small", "toylib", "toylib_adapters", "numpy")
    monkeypatch.setattr("kdtoolkit.libraries.LIBRARIES", (row, *LIBRARIES))
    model = build_model(
        "toys/small?backbone=test_resnet", 3, {"neck_channels": 16, "head_channels": 16, "head_groups": 4}
    )
    assert type(adapt(model)) is ToyAdapter
    assert ToyAdapter in adapter_classes()
    assert package_of("toys/small") == "numpy"
    assert source_digest("toys/small")


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
