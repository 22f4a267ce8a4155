from dataclasses import replace

import pytest
import torch

from kdtoolkit.errors import KDError
from kdtoolkit.models import open_detector
from kdtoolkit.workflow.detecting import found_device, make_ready
from tests.workflow._data import TINY

FCOS = "torchvision/fcos?backbone=resnet10t&out_channels=32"


@pytest.mark.parametrize(
    ("name", "note"),
    [
        (f"{FCOS}&min_size=100&max_size=150", "enlarges small images: one of 64 x 64 px to 100 x 100 px"),
        (f"{FCOS}&min_size=64&max_size=64", "enlarges small images: one of 32 x 32 px to 64 x 64 px"),
        (TINY, ""),
    ],
)
def test_a_detector_that_enlarges_images_is_told(name, note):
    detector = replace(open_detector(name, num_classes=3), trained=True)
    notes = make_ready(detector, image_size=64, device="cpu").notes
    assert len(notes) == bool(note)
    assert note in "".join(notes)


@pytest.mark.parametrize("name", ["mps", "xpu", "meta", "gpu", "cpu:x", "", 1.5])
def test_devices_of_kinds_that_are_not_used_are_refused(name):
    with pytest.raises(KDError, match=f"device='{name}' is no device that kdtoolkit knows: write 'auto', 'cpu'"):
        found_device(name)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert found_device("auto") == found_device("cuda") == torch.device("cuda")
    assert found_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(KDError, match="there is no device cuda:5: this machine has cuda:0, cuda:1"):
        found_device("cuda:5")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KDError, match="there is no CUDA device: use --device cpu"):
        found_device("cuda:5")
    assert found_device("auto") == found_device("cpu") == torch.device("cpu")
