"""A teacher that is asked once: with a warm cache, a step has the values that it has with a live teacher."""

import pytest
import torch

from kdtoolkit import Distiller, KDError
from kdtoolkit.compatibility import why_refused
from kdtoolkit.libraries import adapt
from kdtoolkit.matrix import families
from kdtoolkit.methods import LD, PKD, CrossKD, ObjectKD, all_methods
from kdtoolkit.teacher_cache import TeacherCache, digest
from kdtoolkit.testing._batch import example_batch
from tests.conftest import tiny_gfl

IMAGES, TARGETS = example_batch(3)


def build(family, seed):
    torch.manual_seed(seed)
    return families()[family](3)


def pair(family):
    return build(family, 1), build(family, 0)


def working(teacher, student):
    specs = adapt(student).spec, adapt(teacher).spec
    return [cls for cls in all_methods().values() if why_refused(cls, *specs) is None]


def distiller_of(teacher, student, methods, cache=None, **settings):
    torch.manual_seed(3)  # what the methods learn
    return Distiller(teacher, student, [method() for method in methods], teacher_cache=cache, **settings).train()


def step(distiller, images=IMAGES, targets=TARGETS, keys=None):
    """The losses of a step, and the gradients of all that is trained."""
    torch.manual_seed(4)
    distiller.zero_grad()
    buffers = [buffer.clone() for buffer in distiller.student.buffers()]
    losses = distiller(images, targets, keys)
    losses.total.backward()
    for buffer, before in zip(distiller.student.buffers(), buffers, strict=True):
        buffer.data.copy_(before)
    gradients = {name: p.grad.clone() for name, p in distiller.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def counted(teacher):
    """Lists to which each pass of the teacher's backbone and head adds the number of its images."""
    seen = []
    teacher.backbone.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize("family", ["GFL", "ATSS", "FCOS", "RetinaNet"])
def test_a_warm_cache_gives_the_values_of_a_live_teacher(family):
    teacher, student = pair(family)
    methods = working(teacher, student)
    live = step(distiller_of(teacher, student, methods))
    cache = TeacherCache.in_memory()
    distiller = distiller_of(teacher, student, methods, cache)
    passes = counted(teacher)
    cold = step(distiller)
    assert passes == [1, 1]
    warm = step(distiller)
    assert passes == [1, 1]
    assert (cache.hits, cache.misses) == (2, 2)
    torch.testing.assert_close(cold, live)
    torch.testing.assert_close(warm, cold, rtol=0, atol=0)


def test_only_images_that_are_not_known_are_shown_to_the_teacher():
    teacher, student = tiny_gfl(seed=1), tiny_gfl(seed=0)
    methods = CrossKD, PKD
    more = [IMAGES[0], IMAGES[1].flip(-1)]
    live = step(distiller_of(teacher, student, methods), more)
    cache = TeacherCache.in_memory()
    distiller = distiller_of(teacher, student, methods, cache)
    step(distiller)
    passes = counted(teacher)
    torch.testing.assert_close(step(distiller, more), live)
    assert passes == [1]
    assert (cache.hits, cache.misses) == (1, 3)
    assert step(distiller, more)[0].keys() == live[0].keys()
    assert passes == [1]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_values_do_not_depend_on_when_an_image_was_shown_first(precision):
    teacher, student = (model.to(memory_format=torch.channels_last) for model in (tiny_gfl(seed=1), tiny_gfl(seed=0)))
    found = []
    for first in ([], IMAGES[:1], IMAGES):
        distiller = distiller_of(teacher, student, [CrossKD, PKD], TeacherCache.in_memory(precision=precision))
        if first:
            step(distiller, first, TARGETS[: len(first)])
        found.append(step(distiller))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


def test_what_a_further_method_takes_is_added():
    teacher, student = tiny_gfl(seed=1), tiny_gfl(seed=0)
    cache = TeacherCache.in_memory()
    step(distiller_of(teacher, student, [PKD], cache))
    size = cache.bytes
    live = step(distiller_of(teacher, student, [PKD, ObjectKD]))
    passes = counted(teacher)
    further = distiller_of(teacher, student, [PKD, ObjectKD], cache)
    for _ in range(2):
        torch.testing.assert_close(step(further), live)
    assert passes == [1, 1]
    assert cache.bytes > size


def test_nothing_is_kept_that_no_method_takes():
    teacher, student = tiny_gfl(seed=1), tiny_gfl(seed=0)
    sizes = []
    for method in (lambda: PKD().at_strides(32), PKD, LD):
        cache = TeacherCache.in_memory()
        step(distiller_of(teacher, student, [method], cache))
        sizes.append(cache.bytes)
    spec = adapt(teacher).spec
    channels, cells = spec.channels[0], [(64 // stride) ** 2 for stride in spec.strides]
    predictions = sum(cells) * (3 + 4 * len(spec.bins)) * 4
    grid = len(cells) * 2 * 8
    assert sizes == [2 * channels * cells[2] * 4, 2 * channels * sum(cells) * 4, 2 * (predictions + grid)]


def test_a_changed_teacher_is_asked_again():
    teacher, student = tiny_gfl(seed=1), tiny_gfl(seed=0)
    cache = TeacherCache.in_memory()
    distiller = distiller_of(teacher, student, [PKD], cache)
    step(distiller)
    teacher.load_state_dict(tiny_gfl(seed=5).state_dict())
    torch.testing.assert_close(step(distiller), step(distiller_of(teacher, student, [PKD])))
    assert cache.misses == 4


def test_a_full_cache_takes_no_more_and_says_so_once():
    teacher, student = tiny_gfl(seed=1), tiny_gfl(seed=0)
    live = step(distiller_of(teacher, student, [PKD]))
    cache = TeacherCache.in_memory(gigabytes=1e-5)
    distiller = distiller_of(teacher, student, [PKD], cache)
    for _ in range(2):
        torch.testing.assert_close(step(distiller), live)
    assert (cache.hits, cache.misses) == (1, 3)  # one of the two images has room
    assert cache.bytes <= 10**4
    assert cache.notices == ["the teacher cache is full (1e-05 GB): it takes no further images"]


def test_half_the_memory_with_bfloat16():
    teacher, student = tiny_gfl(seed=1), tiny_gfl(seed=0)
    live, _ = step(distiller_of(teacher, student, [PKD, CrossKD]))
    caches = TeacherCache.in_memory(), TeacherCache.in_memory(precision="bfloat16")
    for cache in caches:
        distiller = distiller_of(teacher, student, [PKD, CrossKD], cache)
        step(distiller)
        warm, _ = step(distiller)
        torch.testing.assert_close(warm, live, rtol=0.02, atol=0.01)
    assert caches[1].bytes == pytest.approx(caches[0].bytes / 2, rel=0.01)


def test_keys_stand_for_the_images():
    teacher, student = tiny_gfl(seed=1), tiny_gfl(seed=0)
    cache = TeacherCache.in_memory()
    distiller = distiller_of(teacher, student, [PKD], cache)
    keys = [digest((image * 255).round().to(torch.uint8)) for image in IMAGES]
    first = step(distiller, keys=keys)
    torch.testing.assert_close(step(distiller, keys=keys), first)
    assert (cache.hits, cache.misses) == (2, 2)
    with pytest.raises(KDError, match="2 images and 1 keys"):
        step(distiller, keys=keys[:1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"gigabytes": 0}, "must be above 0"), ({"precision": "float16"}, "keeps float32 or bfloat16")],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(KDError, match=message):
        TeacherCache.in_memory(**settings)
