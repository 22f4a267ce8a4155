import pytest
import torch

from kdtoolkit.errors import KDError
from kdtoolkit.workflow.detecting import found_device


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
