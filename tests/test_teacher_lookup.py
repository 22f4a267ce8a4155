"""Keys of a teacher's views: a changed teacher has different keys."""

from pathlib import Path

import pytest
import torch
from torch import nn

from kdtoolkit.adapters.native import DenseAdapter
from kdtoolkit.adapters.timm import FoundationAdapter
from kdtoolkit.libraries import adapt
from kdtoolkit.matrix import families
from kdtoolkit.teacher_cache import TeacherCache
from kdtoolkit.teacher_lookup import TeacherLookup, _code_of, teacher_digest
from kdtoolkit.testing._batch import example_batch
from tests._foundation import foundation
from tests.conftest import tiny_gfl

IMAGES = example_batch(3)[0]


def keys_of(lookup, teacher):
    adapter = adapt(teacher)
    batch = adapter.prepare(IMAGES)
    return lookup.view(TeacherCache.in_memory(), adapter, batch, IMAGES, None, stages=None, scale=1.0).keys


def first_norm(model):
    return next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def load(teacher, other):
    teacher.load_state_dict(other.state_dict())


def assign(teacher, other):
    teacher.load_state_dict(other.state_dict(), assign=True)


def scale(teacher, other):
    with torch.no_grad():
        next(teacher.parameters()).mul_(2)


def replace_data(teacher, other):
    first = next(teacher.parameters())
    first.data = 2 * first.data


def replace_buffer(teacher, other):
    first_norm(teacher).running_mean = torch.ones_like(first_norm(teacher).running_mean)


def replace_module(teacher, other):
    teacher.neck = other.neck


@pytest.mark.parametrize("change", [load, assign, scale, replace_data, replace_buffer, replace_module])
def test_changes_of_a_teacher_in_use_are_noticed(change):
    teacher, other = tiny_gfl(seed=1), tiny_gfl(seed=5)
    lookup = TeacherLookup(adapt(teacher))
    before = keys_of(lookup, teacher)
    assert keys_of(lookup, teacher) == before
    change(teacher, other)
    assert not set(keys_of(lookup, teacher)) & set(before)


def test_a_teacher_of_inference_mode_is_like_any_other():
    with torch.inference_mode():
        teacher = tiny_gfl(seed=1)
    lookup, other = TeacherLookup(adapt(teacher)), tiny_gfl(seed=1)
    assert keys_of(lookup, teacher) == keys_of(TeacherLookup(adapt(other)), other)
    replace_module(teacher, tiny_gfl(seed=5))
    assert keys_of(lookup, teacher) != keys_of(TeacherLookup(adapt(other)), other)


def test_teachers_of_equal_weights_and_different_settings_have_different_digests():
    def ssd():
        torch.manual_seed(0)
        return adapt(families()["torchvision SSD"](3))

    teachers = [ssd() for _ in range(2)] + [adapt(tiny_gfl(seed=0)) for _ in range(2)]
    teachers[1].model.transform.image_mean = [0.1, 0.2, 0.3]
    next(m for m in teachers[3].model.modules() if hasattr(m, "eps")).eps = 0.1
    found = [teacher_digest(teacher) for teacher in teachers]
    assert len({*found}) == len(found)
    assert found[0] == teacher_digest(ssd())


def test_what_an_adapter_does_to_images_is_in_the_digest():
    teacher = foundation()
    adapters = [FoundationAdapter(teacher) for _ in range(2)]
    assert teacher_digest(adapters[0]) == teacher_digest(adapters[1])
    adapters[1]._mean = (0.1, 0.2, 0.3)
    assert teacher_digest(adapters[0]) != teacher_digest(adapters[1])


def test_addresses_in_the_description_of_a_layer_are_not_in_the_digest():
    found = []
    for _ in range(2):
        teacher = tiny_gfl(seed=0)
        teacher.extra_repr = lambda: repr(lambda x: x)
        found.append(teacher_digest(adapt(teacher)))
    assert found[0] == found[1]


def test_the_code_of_a_foreign_adapter_counts(monkeypatch):
    own = adapt(tiny_gfl(seed=1))
    teacher = type("Foreign", (DenseAdapter,), {"__module__": __name__})(own.model)
    read, found = Path.read_bytes, []
    for changed in ("", Path(__file__).name):
        monkeypatch.setattr(Path, "read_bytes", lambda path, name=changed: read(path) + b"#" * (path.name == name))
        _code_of.cache_clear()
        found.append((teacher_digest(teacher), teacher_digest(own)))
    _code_of.cache_clear()
    assert found[0][0] != found[1][0]
    assert found[0][1] == found[1][1]
