import pytest
import torch
from torch import nn

from kdtoolkit.data import ProceduralShapes
from kdtoolkit.engine.inference_cost import measure
from kdtoolkit.models import open_detector
from tests._foundation import foundation
from tests.conftest import tiny_gfl
from tests.data._results import entry, write


def multiplications(model, image):
    """How many multiplications its convolutions need, by the sizes of their outputs."""
    found = []

    def count(layer, _, output):
        found.append(output.numel() * layer.weight[0].numel())

    handles = [layer.register_forward_hook(count) for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    with torch.no_grad():
        model.eval()([image.float() / 255])
    for handle in handles:
        handle.remove()
    return sum(found)


def test_cost_of_a_detector():
    model, image = tiny_gfl(seed=0, num_classes=6).train(), ProceduralShapes(1, image_size=64, seed=0)[0][0]
    cost = measure(model, image)
    assert model.training
    assert cost.gflops == pytest.approx(2 * multiplications(model, image) / 1e9, rel=0.02)  # and a projection of bins
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert 0 < cost.latency_iqr_ms < 100 * cost.latency_ms
    assert (cost.size, cost.device, cost.threads) == ((64, 64), "cpu", torch.get_num_threads())


def test_what_computes_no_detections_has_no_cost(tmp_path):
    data = ProceduralShapes(1, image_size=64, seed=0)
    truth = data.coco()
    found = [entry(each["image_id"], each["category_id"], each["bbox"], 0.5) for each in truth["annotations"]]
    names = {each["id"]: each["name"] for each in truth["categories"]}
    for detector in (open_detector(write(tmp_path / "d.json", found), categories=names).model, foundation()):
        assert measure(detector, data[0][0]) is None
