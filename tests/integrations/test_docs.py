"""docs/integrations.md: its code blocks run as they stand, with detectors and data of test size."""

import logging
import re
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdtoolkit.detector import Detector
from kdtoolkit.models import open_detector, save_detector
from tests.conftest import tiny_fcos, tiny_gfl

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "integrations.md").read_text("utf-8")
BLOCKS = {
    title: re.search(r"```python\n(.*?)```", section, re.DOTALL)
    for title, section in re.findall(r"^## (.*?)$(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
}


def block(title, **replaced):
    code = BLOCKS[title].group(1)
    for old, new in replaced.values():
        assert old in code
        code = code.replace(old, new)
    return code


@pytest.mark.slow
def test_ultralytics(yolo_data, tmp_path, monkeypatch):
    pytest.importorskip("ultralytics")
    from tests.adapters.test_ultralytics import tiny

    monkeypatch.chdir(tmp_path)
    for name, width in {"student": 0.0625, "teacher": 0.125}.items():
        made = Detector(tiny(width=width, num_classes=2), "ultralytics/yolo11n", ("red", "green"))
        save_detector(made, tmp_path / name)
    code = block(
        "Ultralytics",
        student=("yolo11n.pt", "student/best.pt"),
        teacher=("yolo11m-mine.pt", "teacher/best.pt"),
        data=("birds/data.yaml", str(yolo_data)),
        length=(
            "epochs=100, imgsz=640",
            f"epochs=1, imgsz=64, batch=4, plots=False, device='cpu', project='{tmp_path}/runs'",
        ),
    )
    exec(code, {})
    assert open_detector(next(tmp_path.rglob("runs/**/best.pt"))).class_names == ("red", "green")


@pytest.mark.slow
def test_transformers(boxes, pictures, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from transformers import RTDetrImageProcessor

    from tests.integrations.test_transformers import detector, examples

    monkeypatch.chdir(tmp_path)
    processor = RTDetrImageProcessor(do_resize=False)
    for seed, name in enumerate(("student", "teacher")):
        detector(seed=seed).save_pretrained(name)
        processor.save_pretrained(name)
    exec(block("transformers"), {"dataset": examples(processor, boxes, pictures)})
    assert (tmp_path / "best" / "model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore")  # Lightning's advice about workers and logging
def test_lightning(batch, tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    monkeypatch.chdir(tmp_path)
    names = {"teacher": tiny_gfl(seed=1, num_classes=2), "student": tiny_fcos(seed=2, num_classes=2)}
    exec(block("Lightning"), {**names, "pairs": list(zip(*batch, strict=True))})
    plain = tiny_fcos(seed=3, num_classes=2)
    plain.load_state_dict(torch.load("student.pt", weights_only=True))


def test_the_plain_loop(yolo_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = "backbone=resnet10t&neck_channels=32&head_channels=32"
    save_detector(open_detector(f"kdtoolkit/gfl?{small}", class_names=("red", "green")), tmp_path / "teacher")
    script = runpy.run_path(str(ROOT / "examples" / "plain_loop.py"))
    given = ["teacher", f"kdtoolkit/fcos?{small}", str(yolo_data), "--steps", "3", "--image-size", "64"]
    script["main"](given)
    assert "pkd/feature" in capsys.readouterr().out
    student = open_detector(f"kdtoolkit/fcos?{small}", class_names=("red", "green")).model
    student.load_state_dict(load_file("student.safetensors"))
