import copy
import re
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from kdtoolkit.adapters.torchvision.models import settle
from kdtoolkit.detectors import ATSS, GFL
from kdtoolkit.errors import KDError
from kdtoolkit.libraries import adapt
from kdtoolkit.matrix import families
from kdtoolkit.models import build_model, content_of, is_code, is_place, open_detector, save_detector
from tests._onelevel import OneLevel
from tests._opened import GFL as TINY_GFL
from tests._opened import NAMES, RT_DETR, assert_same, detect, stirred
from tests._published import published_state
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
        ("kdtoolkit/gfl", {"bins": "many"}, r"kdtoolkit/gfl\(bins='many'\): must be a whole number"),
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
    for name, message in (("leaves_at_import:x", "cannot be imported"), (":x", "unknown model ':x'")):
        with pytest.raises(KDError, match=message):
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


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_opens_again(name, tmp_path):
    detector = open_detector(name, class_names=["ant", "bee", "cow"], args=NAMES[name])
    assert (detector.trained, detector.weights, detector.class_names) == (False, "", ("ant", "bee", "cow"))
    trained = replace(detector, model=stirred(detector.model), trained=True, weights="trained here", image_size=128)
    expected = detect(trained.model)
    saved = save_detector(trained, tmp_path / "run" / "model", card="# A card\n")
    assert (saved.folder / "README.md").read_text() == "# A card\n"
    for place in (saved.folder, saved.folder.parent, saved.file):
        again = open_detector(place)
        assert (again.trained, again.weights, again.image_size) == (True, "trained here", 128)
        assert again.class_names == ("ant", "bee", "cow")
        assert_same(detect(again.model), expected)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_opened_again_sees_images_of_the_same_sizes(name, tmp_path):
    detector = open_detector(name, class_names=["ant"], args=NAMES[name])
    saved = save_detector(replace(detector, trained=True, image_size=96), tmp_path)
    again = open_detector(saved.folder)
    for height, width in ((40, 30), (96, 64), (50, 96), (120, 160)):
        images = [torch.rand(3, height, width)]
        assert adapt(again.model).prepare(images).sizes == adapt(detector.model).prepare(images).sizes
    assert ("at most 96 px" in saved.how_to_open) == (name == RT_DETR)


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_one_sentence_and_damages_nothing(name, tmp_path):
    resource = pytest.importorskip("resource")
    detector = open_detector(name, class_names=["ant", "bee", "cow"], args=NAMES[name])
    folder = tmp_path / "model"
    folder.mkdir()
    names = ("model.pth", "best.pt", "model.safetensors", "config.json", "detector.yaml", "README.md")
    before = {folder / name: f"the old {name}" for name in names}
    for file, text in before.items():
        file.write_text(text)
    # Files may have this many bytes: more cannot be written, as on a full disk.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(KDError, match=r"cannot write the detector into .*model \(.+\), which is as it was before"):
            save_detector(detector, folder, card="# A card")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {file: file.read_text() for file in folder.iterdir()} == before


@pytest.fixture(scope="module")
def saved_gfl(tmp_path_factory):
    """The folder of a GFL for three classes."""
    detector = open_detector(TINY_GFL, class_names=["ant", "bee", "cow"])
    detector = replace(detector, model=stirred(detector.model), trained=True)
    return save_detector(detector, tmp_path_factory.mktemp("gfl")).folder


@pytest.mark.parametrize("names", [("ant", "bee"), ("ant", "bee", "dog"), ("a", "b", "c", "d", "e")])
def test_other_classes_get_new_class_layers(saved_gfl, names):
    original, detector = open_detector(saved_gfl).model.state_dict(), open_detector(saved_gfl, class_names=names)
    assert (detector.trained, detector.class_names) == (False, names)
    assert any("class layers are new" in note for note in detector.notes)
    state = detector.model.state_dict()
    assert len(state["predictors.cls.bias"]) == len(names)
    changed = {
        key for key, value in state.items() if value.shape != original[key].shape or (value != original[key]).any()
    }
    assert changed == {"predictors.cls.weight", "predictors.cls.bias"}


def test_a_file_says_how_many_classes_it_is_for(saved_gfl):
    file = saved_gfl / "model.safetensors"
    for name, count in ((TINY_GFL, None), (TINY_GFL, 3)):
        detector = open_detector(name, weights=file, num_classes=count)
        assert (detector.model.num_classes, detector.trained, detector.class_names) == (3, True, None)
    named = open_detector(TINY_GFL, weights=file, class_names=["x", "y", "z"])
    assert (named.trained, named.class_names) == (True, ("x", "y", "z"))
    assert not open_detector(TINY_GFL, weights=file, num_classes=2).trained
    assert open_detector(TINY_GFL, weights="none", num_classes=2).weights == ""


def test_a_file_that_lacks_a_tensor_is_described_with_its_own_classes(tmp_path):
    state = build_model(TINY_GFL, 6).state_dict()
    del state["predictors.cls.bias"], state["scales"]
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(KDError, match=r"do not fit GFL: 2 missing: scales, predictors\.cls\.bias\. Build"):
        open_detector(TINY_GFL, weights=tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("kind", "more"),
    [("gfl", {"bins": 9}), ("atss", {}), ("retinanet", {}), ("fcos", {"strides": (8, 16, 32, 64), "head_blocks": 2})],
)
def test_published_checkpoints_are_recognised_by_their_keys(kind, more, tmp_path):
    args = {"backbone": "resnet18", "neck_channels": 32, "head_channels": 32, "head_blocks": 4, **more}
    model = stirred(build_model(f"kdtoolkit/{kind}", 4, args))
    meta = {"meta": {"CLASSES": ("ant", "bee", "cow", "dog"), "epoch": 12}}
    torch.save({"state_dict": published_state(model), **meta}, tmp_path / "x.pth")
    detector = open_detector(tmp_path / "x.pth")
    assert (detector.trained, detector.class_names) == (True, ("ant", "bee", "cow", "dog"))
    assert detector.name.startswith(f"kdtoolkit/{kind}?backbone=resnet18&")
    state = detector.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_checkpoint_of_ultralytics_opens_as_its_trainer_leaves_it(tmp_path, monkeypatch):
    model = stirred(build_model("ultralytics/yolo11n", 2))
    model.names = {0: "ant", 1: "bee"}
    half = copy.deepcopy(model).half().requires_grad_(False)
    content = {"model": None, "ema": half, "epoch": 3, "train_args": {"imgsz": 96, "box": 5.0}}
    torch.save(content, tmp_path / "best.pt")
    detector = open_detector(tmp_path / "best.pt")
    assert (detector.class_names, detector.image_size, detector.trained) == (("ant", "bee"), 96, True)
    assert detector.name == "ultralytics/yolo11n"
    assert any("no code of it was run" in note for note in detector.notes)
    frozen = [name for name, value in detector.model.named_parameters() if not value.requires_grad]
    assert frozen == ["model.23.dfl.conv.weight"]
    for name, value in detector.model.state_dict().items():
        assert torch.equal(value, half.state_dict()[name].float().to(value.dtype)), name
    assert detector.model.args["box"] == 5.0
    named = open_detector("ultralytics/yolo11n", weights=tmp_path / "best.pt")
    assert (named.class_names, named.trained) == (("ant", "bee"), True)
    torch.save(model.state_dict(), tmp_path / "state.pth")  # class towers are as wide as there are classes, up to 100
    plain = open_detector("ultralytics/yolo11n", weights=tmp_path / "state.pth")
    assert (plain.trained, plain.model.model[-1].nc) == (True, 2)
    torch.save({**content, "ema": Recorder(1)}, tmp_path / "other.pt")
    with pytest.raises(KDError, match=r"(?s)cannot be opened|holds Python objects"):
        open_detector(tmp_path / "other.pt")


@pytest.fixture(scope="module")
def yolo():
    return build_model("ultralytics/yolo11n", 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda yaml: yaml.update(activation="open('ran', 'w') and torch.nn.SiLU()"), "its activation .* is not one"),
        (lambda yaml: yaml["backbone"][0].__setitem__(2, "torch_safe_load"), "'torch_safe_load' is in none of"),
        (lambda yaml: yaml["backbone"][0].__setitem__(2, "nn.Module.__init__"), "'nn.Module.__init__' is in none of"),
        (lambda yaml: yaml["backbone"][0][3].append("open('ran', 'w')"), "Conv has the value .* which is no number"),
        (lambda yaml: yaml["scales"].update(n=["open('ran', 'w')", 1, 1]), "scales has the value"),
        (lambda yaml: yaml.update(nc="open('ran', 'w')"), "nc has the value"),
        (lambda yaml: yaml["head"].pop(), "it is no detector of boxes alone"),
        (lambda yaml: yaml["backbone"][0][3].__setitem__(0, 256), r"best\.pt do not fit DetectionModel"),
    ],
)
def test_a_checkpoint_of_ultralytics_runs_no_code(yolo, change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = copy.deepcopy(yolo)
    change(evil.yaml)
    torch.save({"model": evil}, "best.pt")
    for classes in (None, ["ant"]):  # new classes build the model again
        with pytest.raises(KDError, match=message):
            open_detector("best.pt", class_names=classes)
    assert not Path("ran").exists()


def test_a_checkpoint_of_ultralytics_gives_tensors_and_no_objects(yolo, tmp_path):
    odd = copy.deepcopy(yolo)
    odd.yaml["activation"] = "torch.nn.ReLU()"
    odd.end2end = False
    odd.surprise = torch.nn.ReLU(inplace=True)
    odd.model[0].forward = odd.model[1].forward
    torch.save({"model": odd}, tmp_path / "best.pt")
    model = open_detector(tmp_path / "best.pt").model
    assert not hasattr(model, "surprise")
    assert "forward" not in vars(model.model[0])
    assert isinstance(model.model[0].act, torch.nn.ReLU)
    state = odd.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_new_classes_of_yolo_leave_the_towers_before_them(tmp_path):
    old = ["class"] * 72  # towers of more than 64 channels are as wide as there are classes
    detector = open_detector("ultralytics/yolo11n", class_names=old)
    folder = save_detector(replace(detector, model=stirred(detector.model), trained=True), tmp_path).folder
    state = open_detector(folder).model.state_dict()
    for names in (["other"] * 72, ["ant", "bee"]):
        found = open_detector(folder, class_names=names)
        new = {key for key, value in found.model.state_dict().items() if not torch.equal(value, state[key])}
        predictors = {key for key in state if re.match(r"model\.23\.cv3\.\d\.2\.", key)}
        assert len(predictors) == 6
        if len(names) == len(old):
            assert new == predictors
            assert found.notes[-1].endswith("is for different classes; all other weights are taken from there")
        else:
            wider = {key for key in state if key.startswith("model.23.cv3.")} - predictors
            assert predictors < new
            assert new < predictors | wider
            shapes = {key for key in wider if found.model.state_dict()[key].shape != state[key].shape}
            told = f"; {len(shapes)} more of {len(state)} tensors are new, because .* classes: model.23.cv3; all other"
            assert re.search(told, found.notes[-1])


@pytest.mark.parametrize("family", families())
def test_adapters_name_all_layers_that_depend_on_classes(family):
    build = families()[family]
    model, larger = build(3), build(4).state_dict()
    layers = adapt(model).class_layers
    found = {key.rpartition(".")[0] for key, value in model.state_dict().items() if value.shape != larger[key].shape}
    assert found
    assert found == set(layers)


@pytest.fixture
def published_ssdlite(tmp_path, monkeypatch):
    """torchvision's SSDlite with weights that lie where the library keeps what it downloaded."""
    entry = torchvision.models.detection.SSDLite320_MobileNet_V3_Large_Weights.COCO_V1
    model = stirred(torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(model.state_dict(), tmp_path / "checkpoints" / entry.url.rpartition("/")[2])
    return model


def test_torchvisions_weights_open_by_name(published_ssdlite):
    name = "torchvision/ssdlite320_mobilenet_v3_large"
    for weights in ("COCO_V1", "pretrained"):
        detector = open_detector(name, weights=weights)
        assert (detector.trained, detector.image_size, len(detector.class_names)) == (True, 320, 90)
        assert (detector.class_names[0], detector.class_names[11]) == ("person", "unused 11")
    state = published_ssdlite.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in detector.model.state_dict().items())
    student = open_detector(name, weights="pretrained", class_names=["ant", "bee"])
    assert not student.trained
    new = {key for key, value in student.model.state_dict().items() if value.shape != state[key].shape}
    assert new
    assert all("classification_head" in key for key in new)
    assert all(torch.equal(value, state[key]) for key, value in student.model.state_dict().items() if key not in new)
    with pytest.raises(KDError, match=r"has no weights 'COCO_V9' \(did you mean 'COCO_V1'"):
        open_detector(name, weights="COCO_V9")


def test_a_trained_backbone_stays_frozen_and_computes_the_same():
    frozen, plain = torchvision.ops.FrozenBatchNorm2d(3, eps=0.0), torch.nn.BatchNorm2d(3).eval()
    for value in frozen.buffers():
        value.copy_(torch.rand(3) + 0.5)
    x = torch.rand(1, 3, 4, 4)
    before = frozen(x)
    settle(torch.nn.Sequential(frozen))
    plain.load_state_dict({**frozen.state_dict(), "num_batches_tracked": torch.tensor(0)})
    torch.testing.assert_close(frozen(x), before)
    torch.testing.assert_close(plain(x), before)


def test_code_is_not_imported_because_a_folder_names_it(tmp_path):
    detector = open_detector("tests.test_models:Recorder", num_classes=3)
    save_detector(detector, tmp_path)
    with pytest.raises(KDError, match=r"names tests\.test_models:Recorder, which imports .* name it yourself"):
        open_detector(tmp_path)


def test_a_detector_of_ones_own_is_opened_as_its_folder_says(tmp_path, monkeypatch):
    detector = open_detector("tests._onelevel:OneLevel", num_classes=3)
    saved = save_detector(replace(detector, class_names=tuple("abc"), trained=True, image_size=64), tmp_path / "model")
    for folder in (tmp_path, tmp_path / "model"):  # of a run, and of its detector
        opened = open_detector("tests._onelevel:OneLevel", weights=folder)
        assert (opened.class_names, opened.trained, opened.image_size) == (tuple("abc"), True, 64)
    monkeypatch.chdir(saved.folder)
    scope = {}
    exec(saved.how_to_open, scope)
    assert type(scope["model"]) is OneLevel
    assert "imports tests._onelevel" in saved.how_to_open


def test_a_path_is_no_code_whatever_it_is_called(saved_gfl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("ran.py").write_text("open('ran', 'w')")
    for name in ("runs/x:1", "ran:1"):
        assert is_code(name) == (name == "ran:1")
        shutil.copytree(saved_gfl, name)
        assert (is_place(name), is_code(name)) == (True, False)
        assert open_detector(name).class_names == open_detector(saved_gfl).class_names
        with pytest.raises(KDError, match="unknown model"):
            build_model(name, 3)
    with pytest.raises(KDError, match="unknown model 'runs/x:2'"):
        open_detector("runs/x:2", num_classes=3)
    assert not Path("ran").exists()


def test_a_path_may_begin_with_the_name_of_a_library(saved_gfl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved_gfl, "kdtoolkit/runs/birds/model")
    shutil.copytree(saved_gfl, "hf/birds")
    for name in ("kdtoolkit/runs/birds", "kdtoolkit/runs/birds/model", "hf/birds"):
        assert open_detector(name).class_names == open_detector(saved_gfl).class_names
    assert is_place("kdtoolkit/runs/birds/model/model.safetensors")
    Path("kdtoolkit/gfl").mkdir()  # of a clone: no detector lies there
    for name in ("kdtoolkit/gfl", "kdtoolkit/absent.pt", TINY_GFL, f"hf/detr?x={'y' * 300}"):
        assert not is_place(name)


def test_what_cannot_be_opened_is_explained(saved_gfl, tmp_path):
    for place, more, message in (
        (TINY_GFL, {}, "random weights, so its classes are not known: give class_names or num_classes"),
        (tmp_path, {}, "holds no detector: one of save_detector has detector.yaml"),
        (tmp_path / "absent.pth", {}, "there is no weights file"),
        (saved_gfl, {"weights": "other.pth"}, "has its own weights and arguments"),
        (TINY_GFL, {"weights": "pretrained", "num_classes": 2}, "publishes no weights"),
        (TINY_GFL, {"class_names": ["a"], "num_classes": 2}, "class_names has 1 names"),
        (TINY_GFL, {"weights": tmp_path / "absent.pth", "num_classes": 2}, "there is no weights file"),
    ):
        with pytest.raises(KDError, match=message):
            open_detector(place, **more)
    (tmp_path / "model.pth").write_bytes(b"")
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pth")
    with pytest.raises(KDError, match="does not say of which detector: name the detector"):
        open_detector(tmp_path / "x.pth")
