"""What `save_detector` wrote opens with the detector's own library, where kdtoolkit cannot be imported."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from kdtoolkit.matrix import families
from kdtoolkit.models import Detector, build_model, open_detector, save_detector
from tests._opened import assert_same, detect, stirred

pytestmark = pytest.mark.slow
SIZE = 128  # a side of the image in pixels
NAMES = ("ant", "bee", "cow")
SIZES = f"min_size={SIZE}&max_size={SIZE}"
TORCHVISION = {
    "torchvision RetinaNet": f"retinanet_resnet50_fpn?{SIZES}",
    "torchvision RetinaNet v2": f"retinanet_resnet50_fpn_v2?{SIZES}",
    "torchvision FCOS": f"fcos_resnet50_fpn?{SIZES}",
    "torchvision SSD": "ssd300_vgg16",
    "torchvision SSDlite": "ssdlite320_mobilenet_v3_large",
    "torchvision Faster R-CNN": f"fasterrcnn_mobilenet_v3_large_320_fpn?{SIZES}",
    "torchvision Faster R-CNN v2": f"fasterrcnn_resnet50_fpn_v2?{SIZES}&box_score_thresh=0",
    "torchvision Mask R-CNN": f"maskrcnn_resnet50_fpn?{SIZES}&box_score_thresh=0",
}

# Opens each folder as its `how_to_open.py` says, detects in the image, and writes what it found.
PLAIN = """
import json, os, sys
from pathlib import Path

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "kdtoolkit":
            raise ImportError("kdtoolkit is not to be imported")

sys.meta_path.insert(0, Refuse())
import torch

torch.set_num_threads(1)
image = torch.load(sys.argv[1], weights_only=True)
for folder in map(Path, sys.argv[2:]):
    os.chdir(folder)
    scope = {}
    exec(Path("how_to_open.py").read_text(), scope)
    model, library = scope["model"], Path("library").read_text()
    with torch.no_grad():
        if library == "torchvision":
            found = model([image / 255])[0]
            names = None
        elif library == "hf":
            inputs = scope["processor"](images=image, return_tensors="pt")
            finish, size = scope["processor"].post_process_object_detection, tuple(image.shape[1:])
            found = finish(model(**inputs), threshold=0.0, target_sizes=[size])[0]
            names = [model.config.id2label[i] for i in range(len(model.config.id2label))]
        else:
            from ultralytics.utils.nms import non_max_suppression
            raw = model.model.eval()(image[None] / 255)
            kept = non_max_suppression(raw[0], 0.001, 0.7, multi_label=True, max_det=300, max_time_img=1e9)[0]
            found = {"boxes": kept[:, :4].clamp(0, 128), "scores": kept[:, 4], "labels": kept[:, 5].long()}
            names = [model.names[i] for i in range(len(model.names))]
            bgr = image.permute(1, 2, 0).numpy()[..., ::-1].copy()
            shown = model.predict(bgr, conf=0.001, imgsz=128, verbose=False)
            assert len(shown[0].boxes)
    found = {key: found[key].tolist() for key in ("boxes", "scores", "labels")}
    Path("found.json").write_text(json.dumps({**found, "names": names}))
assert not any(name.partition(".")[0] == "kdtoolkit" for name in sys.modules)
"""


def build(family):
    """A detector of a family: tiny, except for those of torchvision, which are as its builders make them."""
    if family in TORCHVISION:
        name = f"torchvision/{TORCHVISION[family]}"
        return name, build_model(name, len(NAMES))
    return "", families()[family](len(NAMES))


@pytest.fixture(scope="module")
def image():
    return torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, image):
    """For each family the folder that was saved, what its adapter detects, and what its library does."""
    root = tmp_path_factory.mktemp("plain")
    torch.save(image, root / "image.pt")
    folders, expected = {}, {}
    for i, family in enumerate(families()):
        torch.manual_seed(i)
        name, model = build(family)
        stirred(model, 0.01 if "R-CNN" in family else 0.05)
        detector = Detector(model, name, NAMES, trained=True, image_size=SIZE)
        folders[family] = save_detector(detector, root / str(i))
        expected[family] = detect(model, image)
    library = {family: family_library(family) for family in folders}
    plain = [family for family in folders if library[family] != "kdtoolkit"]
    for family in plain:
        folder = folders[family].folder
        (folder / "how_to_open.py").write_text(folders[family].how_to_open)
        (folder / "library").write_text(library[family])
    command = [sys.executable, "-I", "-c", PLAIN, root / "image.pt", *(folders[family].folder for family in plain)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folders, expected


def family_library(family):
    known = {
        **dict.fromkeys(TORCHVISION, "torchvision"),
        **dict.fromkeys(("GFL", "ATSS", "FCOS", "RetinaNet"), "kdtoolkit"),
    }
    return known.get(family, "ultralytics" if family.startswith("YOLO") else "hf")


@pytest.mark.parametrize("family", families())
def test_a_saved_detector_is_the_same_in_its_own_library(family, saved):
    folders, expected = saved
    folder = folders[family].folder
    if family_library(family) == "kdtoolkit":  # its module is part of kdtoolkit; its weights are not
        state = build(family)[1].state_dict()
        assert load_file(folder / "model.safetensors").keys() == state.keys()
        return
    found = json.loads((folder / "found.json").read_text())
    assert found.pop("names") in (None, list(NAMES))
    order = sorted(range(len(found["scores"])), key=lambda i: -found["scores"][i])
    plain = {key: torch.tensor(values)[order] for key, values in found.items()}
    plain["labels"] = plain["labels"] - first_label(family)
    assert_same(plain, expected[family], tolerance=1e-4)


@pytest.mark.parametrize("family", ["DETR", "RT-DETR", "YOLO11", "torchvision SSDlite"])
def test_the_folder_opens_here_too(family, saved, image):
    folders, expected = saved
    detector = open_detector(folders[family].folder)
    assert detector.class_names == NAMES
    assert_same(detect(detector.model, image), expected[family], tolerance=1e-5)


def first_label(family):
    """The label of the first class in torchvision: 1 where 0 is background."""
    return int(family in TORCHVISION and not family.startswith(("torchvision RetinaNet", "torchvision FCOS")))
