"""docs/classes.md: each of its code blocks runs, and its table says what the methods say."""

import re
from pathlib import Path

import torch
import yaml
from PIL import Image

from kdtoolkit.benchmark.suite import DataSection, Suite
from kdtoolkit.data import ProceduralShapes
from kdtoolkit.engine.config import TrainConfig
from kdtoolkit.methods import FitNet, all_methods
from tests.conftest import tiny_gfl

PAGE = (Path(__file__).parents[1] / "docs" / "classes.md").read_text("utf-8")


def test_the_python_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more_photos").mkdir()
    for i in range(4):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(tmp_path / f"more_photos/{i}.png")
    images = ProceduralShapes(4, image_size=64, seed=0)
    names = {
        "coco_names": ["person", "bicycle", "car", "dog"],
        "teacher": tiny_gfl(seed=1, num_classes=4),
        "student": tiny_gfl(seed=2),
        "images": images,
    }
    shared, inherited, unlabelled = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(shared, names)
    assert (
        "shared classes: person, bike (the teacher's bicycle); the teacher says nothing about scooter"
        in capsys.readouterr().out
    )
    names["teacher"] = tiny_gfl(seed=1)
    exec(inherited, names)
    assert torch.equal(names["student"].scales, names["teacher"].scales)
    classes = len(images.class_names)
    names["distiller"] = names["Distiller"](
        tiny_gfl(seed=1, num_classes=classes), tiny_gfl(seed=2, num_classes=classes), [names["PKD"]()]
    )
    exec(unlabelled.replace("steps=1000", "steps=2, batch_size=2"), names)
    assert names["result"].steps == 2


def test_the_yaml_blocks_name_fields_of_suites():
    for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL):
        fields = yaml.safe_load(block)
        assert set(fields) <= set(Suite.model_fields)
        assert set(fields.get("data", {})) <= set(DataSection.model_fields)
        assert set(fields.get("student", {}).get("train", {})) <= set(TrainConfig.model_fields)


def test_the_table_says_what_each_method_does_without_labels():
    rows = re.findall(r"^\| (`.*`) \| (it needs|the teacher's)", PAGE, re.MULTILINE)
    told = {
        re.sub(r"\(.*\)", "", name): kind
        for names, kind in rows
        for name in re.findall(r"`(.*?)`", names)
        if "region" not in name
    }
    assert told == {
        name: "it needs" if method.unlabelled == "images" else "the teacher's" for name, method in all_methods().items()
    }
    assert FitNet(region="boxes").unlabelled == "detections"
