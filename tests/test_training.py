"""docs/training.md, and the loop of docs/speed.md: each code block does what the page says."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from kdtoolkit import Distiller
from kdtoolkit.data import ProceduralShapes
from kdtoolkit.engine.train import TrainConfig, train
from kdtoolkit.methods import FGD, LD, PKD, CrossKD
from tests.conftest import tiny_gfl

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "training.md").read_text("utf-8")


def blocks(page):
    """The code blocks of a page by the title of their section."""
    sections = re.findall(r"^## (.*?)$(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    return {title: re.findall(r"```python\n(.*?)```", section, re.DOTALL) for title, section in sections}


BLOCKS = blocks(PAGE)


@pytest.fixture
def names(batch):
    """What a block may use: what the blocks before it have made."""
    found = {
        "teacher": tiny_gfl(seed=1),
        "student": tiny_gfl(seed=2, head_channels=8),
        "loader": [batch, batch],
        "device": torch.device("cpu"),
    }
    exec(BLOCKS["The loop"][0], {**found, "loader": []}, found)
    return found


def run(block, names):
    """Run a block in training mode; the student's weights of before."""
    before = copy.deepcopy(names["student"].state_dict())
    exec(block, names)
    return before


def changed(before, student):
    after = student.state_dict()
    assert all(value.isfinite().all() for value in after.values() if value.is_floating_point())
    return any(not torch.equal(value, after[name]) for name, value in before.items() if "running" not in name)


def test_the_loop(names):
    before = run(BLOCKS["The loop"][0], names)
    assert changed(before, names["student"])
    assert names["distiller"].step == 2
    assert names["optimizer"].param_groups[0]["lr"] == pytest.approx(1e-3 * (0.01 + 0.99 * 2 / 500))


@pytest.fixture
def ready(tmp_path, monkeypatch):
    """What a block of the ready loop may use."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    images = ProceduralShapes(10, image_size=64, seed=0)
    classes = len(images.class_names)
    teacher, student = tiny_gfl(seed=1, num_classes=classes), tiny_gfl(seed=2, num_classes=classes)
    return {"teacher": teacher, "student": student, "images": images, "val_images": images, "steps": 5}


def test_the_ready_loop(ready, tmp_path, capsys):
    before = run(BLOCKS["Train"][0], ready)
    assert changed(before, ready["student"])
    assert [row["step"] for row in ready["result"].evaluations] == [3, 5]
    listed = set(re.findall(r"^\| `([\w.]+)/?`", PAGE, re.MULTILINE))
    assert listed >= {path.name for path in (tmp_path / "runs" / "mine").iterdir() if not path.name.startswith(".")}
    saved = safetensors.torch.load_file(tmp_path / "runs" / "mine" / "student.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in ready["student"].state_dict().items())


def test_the_ready_loop_without_torchrun(ready):
    exec(BLOCKS["Train"][0].partition("result =")[0], ready)
    monkey = {**ready, "config": ready["config"].model_copy(update={"steps": 2})}
    before = run(BLOCKS["Several GPUs and machines"][0].replace("group.join()", 'group.join("cpu")'), monkey)
    assert changed(before, monkey["student"])


@pytest.mark.slow
def test_the_ready_loop_by_torchrun(tmp_path):
    """Both blocks as one script."""
    preamble = """
import os
from kdtoolkit.data import ProceduralShapes
from tests.conftest import tiny_gfl
images = val_images = ProceduralShapes(10, image_size=64, seed=0)
teacher, student = (tiny_gfl(seed=seed, num_classes=len(images.class_names)) for seed in (1, 2))
steps = 4
"""
    settings = BLOCKS["Train"][0].partition("result =")[0]
    script = tmp_path / "train.py"
    script.write_text(preamble + settings + BLOCKS["Several GPUs and machines"][0])
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "runs" / "mine" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "lr" in row] == [1, 2, 3, 4]


@pytest.mark.slow
def test_the_ready_loop_compiled(ready, monkeypatch):
    plain, compile_ = copy.deepcopy(ready["student"]), torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: compile_(module, backend="eager"))
    for student, compiled in ((plain, False), (ready["student"], True)):
        config = TrainConfig(steps=3, batch_size=4, compile=compiled)
        train(Distiller(ready["teacher"], student, [PKD()]), ready["images"], config, seed=0)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ready["student"].state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_options_that_the_page_names_exist():
    section = PAGE[PAGE.index("## The recipe") : PAGE.index("## The loop")]
    named = [
        name for cell in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)", cell)
    ]
    assert len(named) > 12
    assert set(named) <= set(TrainConfig.model_fields)


def test_one_process_by_distributed_data_parallel(names, monkeypatch):
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 0,
    }.items():
        monkeypatch.setenv(name, str(value))
    before = run(BLOCKS["Your own loop in several processes"][0], names)
    assert changed(before, names["student"])
    assert not torch.distributed.is_initialized()


def test_bfloat16(names):
    before = run(BLOCKS["Half precision"][0], names)
    assert changed(before, names["student"])
    assert {loss.dtype for loss in names["losses"].values()} == {torch.float32}


def test_float16_with_scaled_gradients(names, batch):
    names["loader"] = [batch] * 12
    before = run(BLOCKS["Half precision"][1], names)
    assert changed(before, names["student"])
    assert {loss.dtype for loss in names["losses"].values()} == {torch.float32}
    assert 0 < names["scaler"].get_scale() < 2**16  # it came down to what fits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_in_half_precision_are_near_those_in_float32(batch, dtype):
    torch.manual_seed(3)
    methods = [CrossKD(), PKD(), FGD(), LD()]
    distiller = Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2, head_channels=8), methods)
    exact = distiller(*batch)
    with torch.autocast("cpu", dtype):
        found = distiller(*batch)
    for name, loss in exact.items():
        assert found[name].item() == pytest.approx(loss.item(), rel=0.05, abs=1e-3), name


def test_accumulation(names):
    before = run(BLOCKS["Gradient accumulation"][0], names)
    assert changed(before, names["student"])
    assert names["distiller"].step == 1


def test_accumulated_gradients_are_the_mean_of_the_calls(batch):
    def gradients(calls):
        torch.manual_seed(3)
        distiller = Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [CrossKD(), PKD()], accumulation=calls)
        distiller.student.backbone.eval()  # batch norm's statistics move with each call
        for _ in range(calls):
            (distiller(*batch).total / calls).backward()
        return [p.grad for p in distiller.parameters() if p.grad is not None]

    for one, two in zip(gradients(1), gradients(2), strict=True):
        torch.testing.assert_close(one, two)


def test_averaged_weights(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = run(BLOCKS["Averaged weights (EMA)"][0], names)
    saved = torch.load("student.pt", weights_only=True)
    tiny_gfl(seed=4, head_channels=8).load_state_dict(saved)
    assert changed(before, names["student"])
    now, name = names["student"].state_dict(), "predictors.cls.weight"
    # The first update copies the weights; the second moves them by a thousandth of the way.
    assert (saved[name] - before[name]).abs().max() > 0
    assert (saved[name] - now[name]).abs().max() > 0


@pytest.mark.slow
def test_compiled(names, batch, monkeypatch):
    names["student"].backbone.eval()  # batch norm's statistics move with each call
    plain = names["distiller"](*batch)
    compile_ = torch.compile
    # Traced as for any other backend; the default one would call a C++ compiler for a minute.
    monkeypatch.setattr(torch, "compile", lambda module: compile_(module, backend="eager"))
    names["loader"] = [batch]
    before = run(BLOCKS["torch.compile"][0], names)
    assert changed(before, names["student"])
    assert list(names["losses"]) == list(plain)
    assert names["losses"].total.item() == pytest.approx(plain.total.item(), rel=1e-5)


def test_the_loop_that_the_hardware_is_fastest_with(names, batch):
    names["loader"] = [batch]
    plain = names["distiller"](*batch)
    before = run(blocks((DOCS / "speed.md").read_text("utf-8"))["In a loop of your own"][0], names)
    assert changed(before, names["student"])
    for model in (names["teacher"], names["student"]):
        weight = model.backbone.conv1[0].weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
    rel = 1e-4 if names["arithmetic"].precision == "float32" else 0.1
    for name in ("task/cls", "pkd/feature"):
        assert names["losses"][name].item() == pytest.approx(plain[name].item(), rel=rel)
