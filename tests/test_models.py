import pytest
import torch
from safetensors.torch import save_file

from kdtoolkit.adapters.native import DenseAdapter
from kdtoolkit.detectors import ATSS, GFL
from kdtoolkit.errors import KDError
from kdtoolkit.models import build_model, load_weights, read_weights
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
    monkeypatch.setattr("kdtoolkit.models._LIBRARIES", {"ultralytics": ("no_such_library.adapter", "ultralytics")})
    with pytest.raises(KDError, match=r"pip install 'kdtoolkit\[ultralytics\]'"):
        build_model("ultralytics/yolo11n", 3)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_load_from_plain_files(tmp_path, suffix):
    build = DenseAdapter.examples()["GFL"]
    trained, fresh, path = build(3), build(3), tmp_path / f"weights{suffix}"
    state = {key: value.contiguous() for key, value in trained.state_dict().items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state, "epoch": 3}, path)
    load_weights(fresh, path)
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in state.items())
    with pytest.raises(KDError, match=r"do not fit GFL: \d+ of another shape: .*class count"):
        load_weights(build(4), path)


class Sprung:
    def __reduce__(self):
        return (print, ("run",))


def test_unusable_files_are_explained(tmp_path, capsys):
    torch.save({"state_dict": {}, "meta": Sprung()}, tmp_path / "code.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, message in {
        "code.pth": "holds Python objects",
        "text.pth": "damaged",
        "text.safetensors": "cannot be read",
        "list.pth": "no state dict",
        "absent.pth": "there is no weights file",
    }.items():
        with pytest.raises(KDError, match=message) as caught:
            read_weights(tmp_path / name)
        assert name in str(caught.value)
    assert "run" not in capsys.readouterr().out
