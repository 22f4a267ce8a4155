import sys

import pytest
import torch
from safetensors.torch import save_file

from kdtoolkit.detectors import ATSS, GFL
from kdtoolkit.errors import KDError
from kdtoolkit.models import build_model, content_of
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
        ("kdtoolkit/yolo", {}, r"unknown model 'kdtoolkit/yolo'.*: write one of kdtoolkit/gfl, kdtoolkit/atss"),
        ("kdtoolkit/gfl", {"depth": 50}, "'kdtoolkit/gfl': got an unexpected keyword argument 'depth'.*backbone_args"),
        ("kdtoolkit/atss", {"bins": 9}, "unexpected keyword argument 'bins'"),
        ("kdtoolkit/gfl", {"bins": "many"}, "'kdtoolkit/gfl' cannot be built from bins='many': "),
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


def raises(num_classes):
    raise RuntimeError("no such luck")


def test_what_code_of_ones_own_raises_is_one_error(tmp_path, monkeypatch):
    with pytest.raises(KDError, match="RuntimeError: no such luck"):
        build_model("tests.test_models:raises", 3)
    (tmp_path / "leaves_at_import.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("leaves_at_import:x", ":x"):
        with pytest.raises(KDError, match="cannot be imported"):
            build_model(name, 3)


def test_arguments_in_the_name_are_overridden_by_arguments():
    model = build_model("kdtoolkit/gfl?backbone=resnet10t&strides=[8, 16, 32, 64]&bins=5", 4, {**ARGS, "bins": 7})
    assert (model.bins, model.strides) == (7, (8, 16, 32))  # ARGS has strides too
    with pytest.raises(KDError, match="name=value"):
        build_model("kdtoolkit/gfl?backbone", 4)


def test_a_library_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "kdtoolkit.adapters.ultralytics", None)
    with pytest.raises(KDError, match=r"pip install 'kdtoolkit\[ultralytics\]'"):
        build_model("ultralytics/yolo11n", 3)


def test_a_name_on_the_hub_is_known_by_the_commit_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert content_of("hf/owner/name") == content_of("hf/owner/no name?x=1") == content_of("hf/detr") == ""
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    for commit in ("0" * 40, "1" * 40):
        (repository / "refs" / "main").write_text(commit)
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
        assert content_of("hf/owner/name?num_queries=5") == commit


def test_a_folders_content_is_known_by_its_files(tmp_path):
    assert content_of("kdtoolkit/gfl") == content_of("hf/rt_detr") == content_of("hf/owner/name") == ""
    name = f"hf/{tmp_path}"
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    before = content_of(name)
    assert before
    assert content_of(f"{name}?num_queries=5") == before
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    after = content_of(name)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert len({before, after, content_of(name)}) == 3
