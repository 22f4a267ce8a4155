import pytest
import torch
from torch import nn

from kdtoolkit import Distiller, KDError
from kdtoolkit.data import ProceduralShapes
from kdtoolkit.detectors import GFL
from kdtoolkit.engine.arithmetic import Arithmetic
from kdtoolkit.engine.config import TrainConfig
from kdtoolkit.engine.train import train
from kdtoolkit.methods import PKD
from kdtoolkit.winograd import gains
from tests.conftest import tiny_gfl

has_winograd = gains(nn.Conv2d(256, 256, 3, padding=1))


@pytest.fixture(scope="module")
def narrow():
    return Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [PKD()])


@pytest.fixture(scope="module")
def wide():
    narrow = {"channels": (8, 8, 16, 16), "stem_width": 4}
    return Distiller(None, GFL(3, backbone="resnet10t", backbone_args=narrow, neck_channels=64, head_channels=64))


@pytest.fixture(scope="module")
def data():
    return ProceduralShapes(4, image_size=64, seed=0)


def in_last_format(module):
    weights = [p for p in module.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    return all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


def test_on_a_cpu_the_channels_are_last_and_large_convolutions_are_winograds(narrow, wide):
    assert Arithmetic.of(narrow) == Arithmetic("cpu", "float32", True, False, "as fast or faster on a CPU")
    assert Arithmetic.of(wide).winograd == has_winograd


def test_the_user_chooses(wide):
    chosen = Arithmetic.of(wide, precision="bfloat16", channels_last=False, winograd=True)
    assert (chosen.precision, chosen.channels_last, chosen.winograd) == ("bfloat16", False, False)
    assert not Arithmetic.of(wide, winograd=False).winograd
    assert not Arithmetic.of(wide, compiled=True).winograd
    with pytest.raises(KDError, match="'bfloat8'"):
        Arithmetic.of(wide, precision="bfloat8")


def test_on_a_gpu_half_precision_has_the_channels_last(narrow):
    assert Arithmetic.of(narrow, "cuda", precision="float16").channels_last
    assert not Arithmetic.of(narrow, "cuda").channels_last
    assert not Arithmetic.of(narrow, "mps").channels_last
    assert Arithmetic.of(narrow, "cuda").why == "not measured on this device: torch's own format"


def test_it_says_what_and_why(narrow):
    assert str(Arithmetic.of(narrow)) == "float32; convolutions: channels last (as fast or faster on a CPU)"
    assert str(Arithmetic("cpu", "float32", False, True, "")) == (
        "float32; convolutions: channels first, Winograd's algorithm for large 3x3 ones"
    )


def test_a_loop_of_ones_own(batch):
    distiller = Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [PKD()])
    plain = distiller(*batch)
    arithmetic = Arithmetic.of(distiller, precision="bfloat16")
    arithmetic.lay_out(distiller)
    assert in_last_format(distiller.student)
    assert in_last_format(distiller.teacher_adapter.model)
    with arithmetic.forward_pass():
        assert torch.is_autocast_enabled("cpu")
        losses = distiller(*batch)
    losses.total.backward()
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(plain[name].item(), rel=0.1)


@pytest.mark.skipif(not has_winograd, reason="this processor or torch has no such algorithm")
def test_losses_are_equal_with_winograds_algorithm(wide):
    images = [torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(0))]
    targets = [{"boxes": torch.tensor([[30.0, 40, 120, 200]]), "labels": torch.tensor([1])}]
    found = []
    for allowed in (True, False):
        with Arithmetic.of(wide, winograd=allowed).forward_pass():
            found.append(wide(images, targets))
    assert {name: loss.item() for name, loss in found[0].items()} == pytest.approx(
        {name: loss.item() for name, loss in found[1].items()}, rel=1e-4
    )


@pytest.mark.parametrize(("choice", "last"), [("auto", True), (True, True), (False, False)])
def test_train_brings_the_models_into_the_format(data, choice, last):
    distiller = Distiller(None, tiny_gfl(seed=2, num_classes=len(data.class_names)))
    train(distiller, data, TrainConfig(steps=1, batch_size=2, channels_last=choice), seed=0)
    assert in_last_format(distiller.student) == last
