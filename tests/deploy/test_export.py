import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdtoolkit.contract import DetectorAdapter
from kdtoolkit.deploy import export
from kdtoolkit.errors import KDError
from kdtoolkit.libraries import adapt
from kdtoolkit.matrix import families
from kdtoolkit.models import Detector, save_detector
from tests.conftest import tiny_fcos, tiny_of
from tests.test_cli import kd
from tests.workflow._blobs import BOX, COLOURS, dataset, right

onnx = pytest.importorskip("onnx", reason="needs kdtoolkit[onnx]")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs kdtoolkit[onnx]")

SIZE = 128
NAME = (
    "kdtoolkit/fcos?backbone=resnet10t&neck_channels=16&head_channels=16&head_blocks=2&head_groups=4"
    "&strides=[8, 16, 32]&backbone_args={channels: [8, 8, 16, 16], stem_width: 4}"
)


def lively(model):
    """Scores that differ from place to place, so that something is detected."""
    for name, module in model.named_modules():
        if name == "predictors.cls":
            torch.nn.init.normal_(module.weight, std=0.3)
        if ".cv3." in name and isinstance(module, torch.nn.Conv2d) and module.kernel_size == (1, 1):
            module.weight.data /= 3  # or many scores are 1
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A detector that is opened from a folder, its file, and what `kd export` would print."""
    root = tmp_path_factory.mktemp("exported")
    model = lively(tiny_fcos(seed=0))
    detector = Detector(model, NAME, COLOURS, "nowhere", True, image_size=SIZE)
    data = root / "data"
    for split in ("train", "val"):
        dataset(data, [right("red", 0.9), right("blue", 0.5)], split=split)
    done = export(detector, out=root / "fcos.onnx", data=data, int8=True)
    return detector, done, data


def test_any_batch_and_size_and_the_detections_are_those_of_pytorch(exported):
    _, done, _ = exported
    assert done.free == "any batch size, any image size"
    assert done.check.compared > 50
    assert done.check.missing <= done.check.unsure
    assert done.check.score <= 1e-3
    assert done.check.box <= 0.5


def test_the_file_says_what_it_is(exported):
    _, done, _ = exported
    model = onnx.load(done.file)
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert about["model"] == NAME
    assert json.loads(about["class_names"]) == list(COLOURS)
    assert json.loads(about["image_size"]) == [SIZE, SIZE]
    sides = {
        value.name: [each.dim_param or each.dim_value for each in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert sides["images"] == ["batch", 3, "height", "width"]
    assert sides["boxes"] == ["batch", 100, 4]
    assert sides["scores"] == sides["labels"] == ["batch", 100]


@pytest.mark.parametrize("shape", [(1, 96, 160), (3, 64, 64), (2, 130, 70)])
def test_other_sizes_than_it_was_exported_at(exported, shape):
    detector, done, _ = exported
    count, height, width = shape
    images = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))
    session = onnxruntime.InferenceSession(done.file, providers=["CPUExecutionProvider"])
    boxes, scores, labels = session.run(None, {"images": images.numpy()})
    adapter = adapt(detector.model.eval())
    batch = adapter.prepare([*images])
    expected = adapter.detections(adapter.head(adapter.features(batch), batch), batch)
    for i, own in enumerate(expected):
        kept = len(own["scores"])
        assert (scores[i] > 0).sum() == kept
        np.testing.assert_allclose(scores[i, :kept], own["scores"].detach(), atol=1e-4)
        np.testing.assert_allclose(boxes[i, :kept], own["boxes"].detach(), atol=0.01)
        assert (labels[i, :kept] == own["labels"].numpy()).all()
        assert (labels[i, kept:] == -1).all()


def test_int8_is_a_smaller_file_and_both_are_measured(exported):
    _, done, _ = exported
    found = done.int8
    assert found.file.stat().st_size == found.bytes
    assert found.images == 2
    assert None not in (found.ap, found.ap_float)
    assert found.seconds > 0
    model = onnx.load(found.file)
    quantised = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    assert len(quantised) > 10
    layers = [node for node in model.graph.node if node.op_type == "Conv"]
    made = {name: node for node in model.graph.node for name in node.output}
    floats = [node for node in layers if getattr(made.get(node.input[0]), "op_type", "") != "DequantizeLinear"]
    assert len(floats) == 3 * 3  # the predictors of class, box and centerness, on three levels


@pytest.mark.slow
def test_a_detector_that_is_told_to_be_fixed(tmp_path):
    model = lively(tiny_fcos(seed=0))
    done = export(Detector(model, "fcos", None), out=tmp_path / "a.onnx", image_size=96, batch_size=3, fixed=True)
    assert done.free == "one batch size, one image size"
    assert "generated images" in done.images
    (shape,) = (each.shape for each in onnxruntime.InferenceSession(done.file).get_inputs())
    assert shape == [3, 3, 96, 96]
    assert done.check.images == 8  # all of them, in three batches


@pytest.mark.slow
@pytest.mark.parametrize("family", ["YOLO11", "torchvision SSD", "DETR"])
def test_each_library(family, tmp_path):
    model = lively(tiny_of(family, seed=0))
    done = export(Detector(model, family, None), out=tmp_path / "a.onnx", image_size=SIZE, fixed=True)
    assert done.check.compared
    assert done.check.agrees


@pytest.mark.parametrize("family", [each for each in families() if "R-CNN" not in each])
def test_graphs_detect_what_their_adapters_do(family):
    adapter = adapt(lively(tiny_of(family, seed=0)).eval())
    images = torch.rand(2, 3, 100, 120, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        batch = adapter.prepare([*images])
        expected = adapter.detections(adapter.head(adapter.features(batch), batch), batch)
        boxes, scores, labels = adapter.graph().eval()(images)
    for i, own in enumerate(expected):
        assert (scores[i] > 0).sum() == len(own["scores"])
        kept = len(own["scores"])
        torch.testing.assert_close(scores[i, :kept], own["scores"], atol=1e-5, rtol=0)
        alone = torch.tensor(
            [(scores[i] - score).abs().le(1e-6).sum() == 1 for score in own["scores"]], dtype=torch.bool
        )
        torch.testing.assert_close(boxes[i, :kept][alone], own["boxes"][alone], atol=1e-3, rtol=0)
        assert (labels[i, :kept][alone] == own["labels"][alone]).all()


def test_the_graph_of_two_stages(tmp_path):
    adapter = adapt(tiny_of("torchvision Faster R-CNN", seed=0).eval())
    images = torch.rand(1, 3, 120, 125, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        batch = adapter.prepare([*images])
        (own,) = adapter.detections(adapter.head(adapter.features(batch), batch), batch)
        boxes, scores, _ = adapter.graph().eval()(images)
    torch.testing.assert_close(scores[0, : len(own["scores"])], own["scores"], atol=1e-5, rtol=0)
    torch.testing.assert_close(boxes[0, : len(own["boxes"])], own["boxes"], atol=1e-3, rtol=0)


@pytest.mark.slow
def test_a_file_that_differs_gets_no_name(tmp_path, monkeypatch):
    class Wrong(torch.nn.Module):
        def __init__(self, right):
            super().__init__()
            self.right = right

        def forward(self, images):
            boxes, scores, labels = self.right(images)
            return boxes + 2, scores, labels

    cls = type(adapt(tiny_fcos(seed=0)))
    graph = cls.graph
    monkeypatch.setattr(cls, "graph", lambda self: Wrong(graph(self)))
    detector = Detector(lively(tiny_fcos(seed=0)), "fcos", None)
    with pytest.raises(KDError, match=r"cannot be exported.*its detections differ from PyTorch's"):
        export(detector, out=tmp_path / "a.onnx", image_size=64, fixed=True)
    assert not list(tmp_path.iterdir())


def test_an_adapter_without_a_graph_is_refused(tmp_path, monkeypatch):
    cls = type(adapt(tiny_fcos(seed=0)))
    monkeypatch.setattr(cls, "graph", DetectorAdapter.graph)
    with pytest.raises(KDError, match="DenseAdapter has no `graph`"):
        export(Detector(tiny_fcos(seed=0), "fcos", None), out=tmp_path / "a.onnx")


@pytest.fixture
def run(monkeypatch, capsys):
    return lambda *arguments: kd(*arguments, monkeypatch=monkeypatch, capsys=capsys)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--format", "onx"], "unknown format 'onx' (did you mean 'onnx'?)"),
        (["--int8"], "int8 needs images to calibrate with"),
        (["--images", "nowhere"], "there is no file or folder nowhere"),
        (["--images", "empty"], "empty has no images"),
        (["--out", "a.pt"], "a.pt must be a file that ends in .onnx"),
        (["--out", "."], ". must be a file that ends in .onnx: write --out model.onnx"),
        (["--out", "empty"], "write --out empty/model.onnx"),
        (["--out", "x" * 300], "cannot write xxx"),
        (["--out", "file/a.onnx"], "cannot write file/a.onnx"),
        (["--opset", "11"], "opset 11 is too old"),
        (["--image-size", "8"], "at least 32 px"),
        (["--batch-size", "0"], "Invalid value for '--batch-size'"),
        (["--images", "broken"], "broken/a.png: the file cannot be decoded"),
        (["--data", "data", "--images", "empty"], "leave out one"),
        (["--data", "others", "--int8"], "whose classes are"),
    ],
)
def test_wrong_uses_are_one_sentence(run, exported, tmp_path, monkeypatch, arguments, error):
    monkeypatch.chdir(tmp_path)
    detector, _, _ = exported
    save_detector(detector, "model")
    Path("empty").mkdir()
    Path("file").touch()
    Path("broken").mkdir()
    Path("broken/a.png").write_text("no image")
    for name, classes in (("data", COLOURS), ("others", ("cat", "dog", "owl"))):
        for split in ("train", "val"):
            dataset(Path(name), [([("red", 0.9, BOX)], [(classes[0], BOX)])], classes, split=split)
    code, _, err = run("export", "model", *arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert error in err
    assert err.count("\n") == 1


def test_a_missing_library_is_named(exported, monkeypatch, tmp_path):
    detector, _, _ = exported
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(KDError, match=r"pip install 'kdtoolkit\[onnx\]'"):
        export(detector, out=tmp_path / "a.onnx")


def test_random_weights_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_detector(Detector(tiny_fcos(seed=0), NAME, COLOURS), "model")
    code, _, err = run("export", "model")
    assert code == 2
    assert "has no weights for detection" in err


def test_the_snippet_of_the_docs_draws_detections(exported, tmp_path, monkeypatch):
    _, done, _ = exported
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (150, 300, 3), np.uint8)).save("photo.jpg")
    Path("model.onnx").write_bytes(done.file.read_bytes())
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(import json.*?)```", page, re.DOTALL)
    assert not re.search(r"torch|kdtoolkit", code)
    exec(code.replace("score < 0.5", "score < 0.05"), {})
    drawn, photo = (np.asarray(Image.open(name).convert("RGB")).astype(int) for name in ("detections.png", "photo.jpg"))
    assert drawn.shape == photo.shape
    assert (drawn != photo).any()
