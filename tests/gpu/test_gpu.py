"""What a GPU may do otherwise than a CPU. Run by hand, or by benchmarks/gpu/check.py: `pytest tests/gpu`.

Elsewhere it is skipped. KDTOOLKIT_TEST_DEVICE=cpu runs it on a CPU, which shows that the tests themselves are right.
"""

import copy
import math
import os

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from kdtoolkit import Distiller, adapt
from kdtoolkit.compatibility import why_refused
from kdtoolkit.data import ProceduralShapes
from kdtoolkit.engine.evaluate import evaluate
from kdtoolkit.engine.train import TrainConfig, train
from kdtoolkit.matrix import families
from kdtoolkit.methods import FGD, LD, PKD, CrossKD, all_methods
from kdtoolkit.teacher_cache import TeacherCache
from kdtoolkit.testing import example_batch
from tests import _pair
from tests.conftest import tiny_gfl, tiny_of
from tests.test_processes import RANDOM, same

DEVICE = os.environ.get("KDTOOLKIT_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA GPU; there is none"),
]
EXACT = [family for family in (*_pair.NATIVE, *_pair.TORCHVISION) if family not in RANDOM]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Products in float32, not in TF32, so that numbers can be compared."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_device(images, targets):
    return [x.to(DEVICE) for x in images], [{name: x.to(DEVICE) for name, x in t.items()} for t in targets]


def vector(distiller):
    return torch.cat([p.grad.flatten().double().cpu() for p in distiller.parameters() if p.grad is not None])


def finite(distiller, losses):
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert all(math.isfinite(loss.item()) for loss in losses.values()), {k: v.item() for k, v in losses.items()}
    assert vector(distiller).isfinite().all()


def with_all_methods(teacher, student, *, leave_out=()):
    specs = adapt(student).spec, adapt(teacher).spec
    found = {name: cls() for name, cls in all_methods().items() if name not in leave_out}
    torch.manual_seed(3)
    return Distiller(teacher, student, [method for method in found.values() if why_refused(method, *specs) is None])


@pytest.mark.parametrize("family", EXACT)
def test_a_step_has_the_losses_and_gradients_of_a_cpu(family):
    exact = with_all_methods(*_pair.detectors(family), leave_out=("MGD",))  # it draws its masks on the device
    found = copy.deepcopy(exact).to(DEVICE)
    batch = _pair.whole()
    expected, losses = exact(*batch), found(*on_device(*batch))
    expected.total.backward()
    losses.total.backward()
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        {name: loss.item() for name, loss in expected.items()}, rel=1e-3, abs=1e-5
    )
    ours, theirs = vector(found), vector(exact)
    assert (ours - theirs).norm() <= 1e-2 * theirs.norm()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", families())
def test_every_family_takes_a_step_with_all_methods(family, dtype):
    distiller = with_all_methods(tiny_of(family, seed=1), tiny_of(family, seed=2)).to(DEVICE)
    with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
        losses = distiller(*example_batch(3, torch.device(DEVICE), ((64, 64), (64, 64))))
    losses.total.backward()
    finite(distiller, losses)


def test_float16_with_scaled_gradients():
    torch.manual_seed(3)
    student = tiny_gfl(seed=2, head_channels=8)
    distiller = Distiller(tiny_gfl(seed=1), student, [CrossKD(), PKD(), FGD(), LD()]).to(DEVICE)
    before = copy.deepcopy(student.state_dict())
    optimizer, scaler = torch.optim.AdamW(distiller.parameters(), 1e-3), torch.amp.GradScaler(DEVICE)
    batch = on_device(*_pair.whole())
    for _ in range(16):
        with torch.autocast(DEVICE, torch.float16):
            losses = distiller(*batch)
        optimizer.zero_grad()
        scaler.scale(losses.total).backward()
        scaler.step(optimizer)
        scaler.update()
    after = student.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(value, after[name]) for name, value in before.items() if "predictors" in name)


def test_a_detector_that_was_used_on_a_cpu_works_after_it_has_moved():
    distiller = Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [CrossKD(), LD(valuable_weight=0.25, cls_weight=1.0)])
    distiller(*_pair.whole())  # priors are kept, device by device
    distiller.to(DEVICE)
    losses = distiller(*on_device(*_pair.whole()))
    losses.total.backward()
    finite(distiller, losses)
    assert {loss.device.type for loss in losses.values()} == {DEVICE}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_and_evaluation(precision):
    data = ProceduralShapes(8, image_size=64)
    teacher, student = (tiny_gfl(seed=seed, num_classes=len(data.class_names)) for seed in (1, 2))
    distiller = Distiller(teacher, student, [CrossKD(), PKD()]).to(DEVICE)
    config = TrainConfig(steps=6, batch_size=4, precision=precision, channels_last=True, ema=0.9)
    result = train(distiller, data, config, seed=0, device=DEVICE)
    assert result.steps == 6
    found = evaluate(distiller.student, data, device=DEVICE, precision=precision)
    assert 0 <= found.ap <= 100


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has no TF32")
@pytest.mark.parametrize("switch", [torch.backends.cuda.matmul, torch.backends.cudnn])
def test_what_a_teacher_shows_in_tf32_is_kept_apart(switch, monkeypatch):
    cache, models = TeacherCache.in_memory(), [tiny_gfl(seed=seed).to(DEVICE) for seed in (1, 0)]
    distiller, batch = Distiller(*models, [PKD()], teacher_cache=cache), on_device(*example_batch(3))
    for choice in (True, False, True):
        monkeypatch.setattr(switch, "allow_tf32", choice)
        distiller(*batch)
    assert (cache.hits, cache.misses) == (2, 4)


def test_one_process_by_distributed_data_parallel(tmp_path):
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        distiller = Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [CrossKD(), PKD()]).to(DEVICE)
        model = DistributedDataParallel(distiller)
        losses = model(*on_device(*_pair.whole()))
        losses.total.backward()
        finite(distiller, losses)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one(tmp_path):
    found = _pair.run(tmp_path, _pair.NATIVE, kind=DEVICE)
    for family in _pair.NATIVE:
        first, second = (each[family]["all"] for each in found)
        same(first, second, 1e-6)
        same(first, _pair.alone(family, DEVICE)["all"], 1e-3)
