"""A run that asks its teacher once: the same training, with few passes of the teacher."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from kdtoolkit import Distiller, KDError
from kdtoolkit.data import InputSize, ProceduralShapes
from kdtoolkit.engine import arithmetic
from kdtoolkit.engine.caching import bytes_of_view, resolve_cache, seconds_of_view
from kdtoolkit.engine.train import RunFolder, TrainConfig, train
from kdtoolkit.methods import PKD, CrossKD
from kdtoolkit.teacher_cache import TeacherCache
from tests.conftest import tiny_gfl

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data():
    return ProceduralShapes(6, image_size=64, seed=0)


def distiller_of(data, methods=(CrossKD, PKD), **settings):
    classes = len(data.class_names)
    torch.manual_seed(0)
    teacher, student = tiny_gfl(seed=1, num_classes=classes), tiny_gfl(seed=2, num_classes=classes)
    return Distiller(teacher, student, [method() for method in methods], **settings)


def config(**changes):
    return TrainConfig(**{"steps": 12, "batch_size": 4, "warmup_steps": 0, **changes})


def trained(data, folder=None, distiller=None, **changes):
    distiller = distiller or distiller_of(data)
    result = train(distiller, data, config(**changes), seed=0, folder=None if folder is None else RunFolder(folder))
    return torch.cat([p.detach().flatten() for p in distiller.student.parameters()]), result, distiller


@pytest.mark.slow
def test_a_run_with_a_cache_trains_as_one_without(data, tmp_path):
    live, alone, _ = trained(data)
    assert alone.cache is None
    cached, result, distiller = trained(data, teacher_cache="memory")
    torch.testing.assert_close(cached, live, rtol=1e-3, atol=1e-4)
    views = result.cache.misses
    assert 6 < views <= 12  # each image, and its mirror image
    assert result.cache.hits == 48 - views
    assert result.cache.bytes == views * bytes_of_view(distiller, data, config(), CPU)
    assert distiller.teacher_cache is None
    first, on_disk, _ = trained(data, tmp_path / "a", teacher_cache="disk")
    assert torch.equal(first, cached)
    assert (on_disk.cache.hits, on_disk.cache.misses) == (result.cache.hits, views)
    assert sum(path.is_file() for path in (tmp_path / "a" / "teacher_cache").rglob("*")) == views


def test_runs_that_share_a_folder_ask_once(data, tmp_path):
    found = []
    for name in "ab":
        distiller = distiller_of(data)
        folder = RunFolder(tmp_path / name, teacher_cache=tmp_path / "shared")
        found.append(train(distiller, data, config(teacher_cache="disk"), seed=0, folder=folder).cache)
    assert found[0].misses > found[1].misses == 0
    assert found[1].hits == 48
    assert 0 < found[0].bytes <= found[1].bytes  # of whole files, once they are there


def test_a_cache_of_the_distiller_comes_first_and_stays(data):
    cache = TeacherCache.in_memory()
    distiller = distiller_of(data, teacher_cache=cache)
    for hits in (True, False):
        _, result, _ = trained(data, distiller=distiller)
        assert (result.cache.misses > 0) is hits
    assert distiller.teacher_cache is cache


def test_without_a_teacher_there_is_nothing_to_keep(data):
    alone = distiller_of(data, methods=())
    _, result, _ = trained(data, distiller=alone, teacher_cache="disk")
    assert result.cache is None


def test_a_cache_on_disk_needs_a_folder(data):
    with pytest.raises(KDError, match="teacher_cache is disk, and the run has no folder to keep it in"):
        trained(data, teacher_cache="disk")


def test_what_a_view_takes_is_measured_without_a_trace(data):
    distiller = distiller_of(data, methods=(PKD, lambda: CrossKD().scheduled(start=6)))
    before = {name: value.clone() for name, value in distiller.state_dict().items() if isinstance(value, torch.Tensor)}
    size = bytes_of_view(distiller, data, config(), CPU)
    assert size > bytes_of_view(distiller_of(data, methods=(PKD,)), data, config(), CPU)
    assert bytes_of_view(distiller, data, config(teacher_cache_precision="bfloat16"), CPU) < 0.6 * size
    large = config(input_size=InputSize(short=(128, 128)))
    assert bytes_of_view(distiller, data, large, CPU) == pytest.approx(4 * size, rel=0.1)  # statistics of channels stay
    assert seconds_of_view(distiller, data, config(), CPU) > 0
    assert distiller.teacher_cache is None
    assert distiller.calls == 0
    assert all(torch.equal(distiller.state_dict()[name], value) for name, value in before.items())


def test_batch_norms_that_learn_no_parameter_keep_their_mode(data):
    distiller = distiller_of(data, methods=(PKD,)).train()
    norms = [module for module in distiller.student.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.requires_grad_(False)
    norms[0].eval()
    bytes_of_view(distiller, data, config(), CPU)
    assert [norm.training for norm in norms] == [False] + [True] * (len(norms) - 1)


def test_the_pass_that_is_charged_is_computed_as_the_run_computes_it(data, monkeypatch):
    inside = []

    @contextmanager
    def fast():
        inside.append(True)
        yield
        inside.pop()

    monkeypatch.setattr(arithmetic, "gains", lambda *models: True)  # as on a processor that has the algorithm
    monkeypatch.setattr(arithmetic, "FastConvolutions", fast)
    distiller, passes = distiller_of(data), []
    distiller.teacher_adapter.model.backbone.register_forward_hook(lambda *_: passes.append(bool(inside)))
    for winograd in (True, False):
        passes.clear()
        assert seconds_of_view(distiller, data, config(winograd=winograd), CPU) > 0
        assert set(passes) == {winograd}


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, "disk"),
        ({"steps": 4}, "off"),  # views are shown too seldom
        ({"teacher_cache_gb": 1e-4}, "off"),  # 12 views take 300 kB
        ({"augmentation": {"zoom": (0.5, 1)}}, "off"),
        ({"teacher_cache": "memory"}, "memory"),
    ],
)
def test_auto_is_a_cache_on_disk_where_that_pays(data, changes, chosen):
    options = config(**{"teacher_cache": "auto", **changes})
    words = {"seed": 0, "device": CPU, "has_folder": True}
    assert resolve_cache(distiller_of(data), data, None, options, **words).teacher_cache == chosen
    if chosen == "disk":
        assert resolve_cache(distiller_of(data, ()), data, None, options, **words).teacher_cache == "off"
        words["has_folder"] = False
        assert resolve_cache(distiller_of(data), data, None, options, **words).teacher_cache == "off"
