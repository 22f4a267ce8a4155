import pytest
import torch

from kdtoolkit.detectors import ATSS, GFL
from kdtoolkit.errors import KDError
from kdtoolkit.models import build_model
from tests.conftest import TINY

ARGS = {**TINY, "backbone_args": {"channels": (8, 8, 16, 16), "stem_width": 4}, "head_channels": 16}


class Recorder(torch.nn.Module):
    def __init__(self, num_classes, *, width=1):
        super().__init__()
        self.settings = (num_classes, width)


def no_module(num_classes):
    return num_classes


def test_native_detectors_by_name():
    gfl, atss = build_model("kdtoolkit/gfl", 4, {**ARGS, "bins": 5}), build_model("kdtoolkit/atss", 2, ARGS)
    assert isinstance(gfl, GFL)
    assert isinstance(atss, ATSS)
    assert (gfl.num_classes, gfl.bins, atss.num_classes) == (4, 5, 2)


def test_any_callable_by_its_path():
    assert build_model("tests.test_models:Recorder", 7, {"width": 3}).settings == (7, 3)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("kdtoolkit/yolo", {}, "unknown model 'kdtoolkit/yolo': write one of kdtoolkit/gfl, kdtoolkit/atss"),
        ("kdtoolkit/gfl", {"depth": 50}, "'kdtoolkit/gfl': got an unexpected keyword argument 'depth'.*backbone_args"),
        ("kdtoolkit/atss", {"bins": 9}, "unexpected keyword argument 'bins'"),
        ("tests.test_models:Recorder", {"height": 1}, "'height'. Its arguments are num_classes, width"),
        ("tests.test_models:Absent", {}, "cannot be imported: .*Absent"),
        ("no_such_package.models:build", {}, "cannot be imported: .*no_such_package"),
        ("tests.test_models:ARGS", {}, "is not callable"),
        ("tests.test_models:no_module", {}, r"must return a torch\.nn\.Module; it returned int"),
    ],
)
def test_mistakes_are_explained(name, args, message):
    with pytest.raises(KDError, match=message):
        build_model(name, 3, args)
