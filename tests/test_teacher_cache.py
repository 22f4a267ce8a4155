"""A teacher that is asked once: with a warm cache, a step has the values that it has with a live teacher."""

import copy
import gc
import weakref

import pytest
import torch
from safetensors.torch import load

from kdtoolkit import Distiller, KDError, teacher_cache
from kdtoolkit.classes import ClassMap
from kdtoolkit.compatibility import why_refused
from kdtoolkit.contract import Batch, CachedView
from kdtoolkit.libraries import adapt
from kdtoolkit.matrix import families
from kdtoolkit.methods import FGD, LD, PKD, Cosine, CrossKD, LogitKD, ObjectKD, all_methods
from kdtoolkit.models import open_detector
from kdtoolkit.teacher_cache import TeacherCache, digest
from kdtoolkit.testing._batch import example_batch
from kdtoolkit.testing._doubles import transformed
from tests._foundation import foundation
from tests.conftest import tiny_gfl
from tests.data._results import entry, write

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


def assert_close(found, expected):
    """The same losses and gradients within rounding. Some gradients are zero but for rounding."""
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    largest = max(gradient.abs().max() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max() <= 1e-4 * largest, name


def live_and_warm(teacher, student, methods, *, images=IMAGES, targets=TARGETS, **settings):
    """A step with a live teacher and one in which the cache knows all images, and the cache."""
    cache = TeacherCache.in_memory()
    distiller = distiller_of(teacher, student, methods, cache, **settings)
    live = step(distiller_of(teacher, student, methods, **settings), images, targets)
    cold, warm = (step(distiller, images, targets) for _ in range(2))
    torch.testing.assert_close(warm, cold, rtol=0, atol=0)
    assert (cache.hits, cache.misses) == (len(images),) * 2
    return live, warm


QUICK = ("GFL", "torchvision SSD", "torchvision Faster R-CNN", "YOLO26")


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in families()]
)
def test_a_warm_cache_gives_the_values_of_a_live_teacher(family):
    teacher, student = pair(family)
    live, warm = live_and_warm(teacher, student, working(teacher, student))
    assert_close(warm, live)


CASES = {
    "without labels": ([CrossKD, PKD], {"targets": None, "score": 0.01}),
    "shared classes": ([CrossKD, LogitKD, FGD], {"class_map": ClassMap(student=(0, 2), teacher=(3, 1))}),
    "shared classes, without labels": (
        [CrossKD, ObjectKD],
        {"targets": None, "score": 0.01, "class_map": ClassMap(student=(0, 2), teacher=(3, 1))},
    ),
    "a smaller teacher": ([PKD], {"teacher_scale": 0.5}),
    "some levels": ([lambda: PKD().at_strides(16)], {}),
    "a wider canvas": ([CrossKD, PKD, LD], {}),
}


@pytest.mark.parametrize("case", CASES)
def test_whatever_the_distiller_does_the_values_are_those_of_a_live_teacher(case):
    methods, settings = CASES[case]
    classes = 5 if "class_map" in settings else 3
    teacher = adapt(tiny_gfl(seed=1, num_classes=classes, score_threshold=0.005))
    if case == "a wider canvas":
        teacher = transformed(teacher, padding=32)
    live, warm = live_and_warm(teacher, tiny_gfl(seed=0), methods, **settings)
    assert_close(warm, live)


def test_a_backbone_without_a_head_is_asked_once():
    live, warm = live_and_warm(foundation(), tiny_gfl(seed=0), [Cosine])
    assert_close(warm, live)


def test_under_autocast_the_teacher_runs_and_is_kept_as_autocast_has_it():
    teacher, student = tiny_gfl(seed=1), tiny_gfl(seed=0)
    cache = TeacherCache.in_memory()
    distiller = distiller_of(teacher, student, [PKD, CrossKD], cache)
    step(distiller)
    with torch.autocast("cpu", torch.bfloat16):
        live = step(distiller_of(teacher, student, [PKD, CrossKD]))
        cold, warm = (step(distiller) for _ in range(2))
    assert (cache.hits, cache.misses) == (2, 4)
    torch.testing.assert_close(warm, cold, rtol=0, atol=0)
    torch.testing.assert_close(warm[0], live[0], rtol=0.02, atol=0)


def test_a_teacher_that_is_a_file_needs_no_cache(tmp_path):
    found = write(tmp_path / "d.json", [entry("a.png", 1)])
    file = open_detector(found, categories={1: "red", 2: "green", 3: "blue"}).model
    recorded = {"boxes": torch.tensor([[4.0, 6.0, 30.0, 40.0]]), "probabilities": torch.tensor([[0.9, 0.1, 0.0]])}
    cache = TeacherCache.in_memory()
    step(
        distiller_of(file, tiny_gfl(seed=0), [ObjectKD], cache), targets=[{**t, "recorded": recorded} for t in TARGETS]
    )
    assert (cache.hits, cache.misses, cache.bytes) == (0, 0, 0)


@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
def test_the_teachers_maps_are_freed_at_the_end_of_a_step(cached):
    maps = []

    def noted(level):
        maps.append(weakref.ref(level))
        return level

    teacher = transformed(adapt(tiny_gfl(seed=1)), levels=noted, padding=32)  # maps are cut to the student's canvas
    cache = TeacherCache.in_memory() if cached else None
    distiller = distiller_of(teacher, tiny_gfl(seed=0), [CrossKD, PKD], cache)
    gc.collect()
    gc.disable()
    try:
        step(distiller)
        assert maps
        assert not [each for each in maps if each() is not None]
    finally:
        gc.enable()


def test_an_image_on_a_different_canvas_is_a_different_view():
    cache = TeacherCache.in_memory()
    distiller = distiller_of(tiny_gfl(seed=1), tiny_gfl(seed=0), [PKD], cache)
    step(distiller)
    step(distiller, [IMAGES[0], torch.rand(3, 96, 64)])
    assert cache.misses == 4
    step(distiller, [IMAGES[0]], TARGETS[:1])
    assert (cache.hits, cache.misses) == (1, 4)


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
        distiller = distiller_of(teacher, student, [CrossKD, PKD, LD], TeacherCache.in_memory(precision=precision))
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
    for method in (lambda: PKD().at_strides(32), PKD, LD, CrossKD):
        cache = TeacherCache.in_memory()
        step(distiller_of(teacher, student, [method], cache))
        sizes.append(cache.bytes)
    spec = adapt(teacher).spec
    channels, cells = spec.channels[0], [(64 // stride) ** 2 for stride in spec.strides]
    predictions = sum(cells) * (3 + 4 * len(spec.bins)) * 4
    grid = len(cells) * 2 * 8
    statistics = 2 * 2 * len(cells) * channels * 4  # of both branches' states: means and variances
    levels = channels * cells[2] * 4, channels * sum(cells) * 4
    assert sizes == [2 * each for each in (*levels, predictions + grid, predictions + grid + statistics)]


def test_a_changed_teacher_is_asked_again():
    teacher, student = tiny_gfl(seed=1), tiny_gfl(seed=0)
    cache = TeacherCache.in_memory()
    distiller = distiller_of(teacher, student, [PKD], cache)
    step(distiller)
    teacher.load_state_dict(tiny_gfl(seed=5).state_dict())
    torch.testing.assert_close(step(distiller), step(distiller_of(teacher, student, [PKD])))
    assert cache.misses == 4


def test_a_new_distiller_notices_every_change_of_weights():
    teacher, student = tiny_gfl(seed=1), tiny_gfl(seed=0)
    cache = TeacherCache.in_memory()
    step(distiller_of(teacher, student, [PKD], cache))
    next(teacher.parameters()).data.mul_(2)
    step(distiller_of(teacher, student, [PKD], cache))
    assert cache.misses == 4


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_an_image_that_is_twice_in_a_batch_is_kept_once(kind, tmp_path):
    cache = TeacherCache.in_memory() if kind == "memory" else TeacherCache.on_disk(tmp_path)
    sizes = []
    for images in (IMAGES[:1], IMAGES[:1] * 2):
        distiller = distiller_of(tiny_gfl(seed=len(sizes)), tiny_gfl(seed=3), [PKD], cache)
        before = cache.bytes
        step(distiller, images, TARGETS[:1] * len(images))
        sizes.append(cache.bytes - before)
    assert sizes[0] == sizes[1]


def test_a_full_cache_takes_what_fits_and_says_so_once():
    teacher, student = tiny_gfl(seed=1), tiny_gfl(seed=0)
    live = step(distiller_of(teacher, student, [PKD]))
    cache = TeacherCache.in_memory(gigabytes=1e-5)
    distiller = distiller_of(teacher, student, [PKD], cache)
    for _ in range(2):
        torch.testing.assert_close(step(distiller), live)
    assert (cache.hits, cache.misses) == (1, 3)  # one of the two images has room
    assert cache.bytes <= 10**4
    assert cache.notices == [
        "the teacher cache is full (1e-05 GB): it takes what still fits, and the teacher runs on all further images in "
        "each epoch"
    ]


def test_half_the_memory_with_bfloat16():
    teacher, student = tiny_gfl(seed=1), tiny_gfl(seed=0)
    live, _ = step(distiller_of(teacher, student, [PKD, CrossKD]))
    caches = TeacherCache.in_memory(), TeacherCache.in_memory(precision="bfloat16")
    for cache in caches:
        distiller = distiller_of(teacher, student, [PKD, CrossKD], cache)
        step(distiller)
        warm, _ = step(distiller)
        torch.testing.assert_close(warm, live, rtol=0.02, atol=0.01)
    assert caches[1].bytes == pytest.approx(caches[0].bytes / 2, rel=0.1)  # the grid and statistics keep all digits


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


def folder_of(cache_folder):
    return sorted(path for path in cache_folder.rglob("*") if path.is_file())


def test_a_cache_on_disk_serves_a_second_process_with_the_same_bits(tmp_path):
    teacher, student = tiny_gfl(seed=1), tiny_gfl(seed=0)
    memory = TeacherCache.in_memory()
    warm = [step(distiller_of(teacher, student, [PKD, CrossKD], memory)) for _ in range(2)][1]
    step(distiller_of(teacher, student, [PKD], TeacherCache.on_disk(tmp_path)))
    step(distiller_of(teacher, student, [CrossKD], TeacherCache.on_disk(tmp_path)))  # adds to the same files
    assert len(folder_of(tmp_path)) == 2
    passes = counted(teacher)
    cache = TeacherCache.on_disk(tmp_path)
    found = step(distiller_of(teacher, student, [PKD, CrossKD], cache))
    assert not passes
    assert (cache.hits, cache.misses) == (2, 0)
    assert cache.bytes == sum(path.stat().st_size for path in folder_of(tmp_path))
    torch.testing.assert_close(found, warm, rtol=0, atol=0)


def test_parts_that_share_memory_are_kept_on_disk(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    parts = {"map": whole, "state": whole, "turned": whole.t(), "row": whole[1]}
    TeacherCache.on_disk(tmp_path).keep("ab", parts)
    torch.testing.assert_close(dict(TeacherCache.on_disk(tmp_path).find("ab")), parts, rtol=0, atol=0)


@pytest.mark.parametrize("writes", [True, False])
def test_parts_that_a_second_process_adds_are_found(tmp_path, writes):
    first, second = TeacherCache.on_disk(tmp_path), TeacherCache.on_disk(tmp_path)
    first.keep("ab", {"map": torch.ones(2)})
    first.find("ab")
    first._writes = writes
    second.keep("ab", {"state": torch.ones(2)})
    first.keep("ab", {"state": torch.ones(2)})  # computed, because it was not found
    assert first.find("ab").keys() == {"map", "state"}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 100], ids=["empty", "cut", "garbage"])
def test_a_broken_file_counts_as_missing_and_is_written_anew(tmp_path, content):
    teacher, student = tiny_gfl(seed=1), tiny_gfl(seed=0)
    live = step(distiller_of(teacher, student, [PKD], TeacherCache.on_disk(tmp_path)))
    first = folder_of(tmp_path)[0]
    whole = first.read_bytes()
    first.write_bytes(content or whole[:200])
    cache = TeacherCache.on_disk(tmp_path)
    torch.testing.assert_close(step(distiller_of(teacher, student, [PKD], cache)), live)
    assert (cache.hits, cache.misses) == (1, 1)
    torch.testing.assert_close(load(first.read_bytes()), load(whole))


def test_a_file_with_changed_values_counts_as_missing_and_is_written_anew(tmp_path):
    teacher, student = tiny_gfl(seed=1), tiny_gfl(seed=0)
    live = step(distiller_of(teacher, student, [PKD], TeacherCache.on_disk(tmp_path)))
    first = folder_of(tmp_path)[0]
    whole = first.read_bytes()
    first.write_bytes(whole[:-4000] + bytes(4000))  # what a failure of power leaves
    cache = TeacherCache.on_disk(tmp_path)
    distiller = distiller_of(teacher, student, [PKD], cache)
    for _ in range(2):
        torch.testing.assert_close(step(distiller), live, rtol=0, atol=0)
    assert (cache.hits, cache.misses) == (3, 1)
    assert cache.notices == [f"the teacher cache in {tmp_path} had broken files: the teacher sees their images again"]
    assert first.read_bytes() == whole


def test_a_file_is_checked_once(tmp_path, monkeypatch):
    monkeypatch.setattr("kdtoolkit.teacher_cache._HELD_BYTES", 0)  # so that each step reads the files
    teacher, student = tiny_gfl(seed=1), tiny_gfl(seed=0)
    step(distiller_of(teacher, student, [PKD], TeacherCache.on_disk(tmp_path)))
    checked = []
    own = teacher_cache._digest_of_parts
    monkeypatch.setattr("kdtoolkit.teacher_cache._digest_of_parts", lambda parts: checked.append(1) or own(parts))
    cache = TeacherCache.on_disk(tmp_path)
    distiller = distiller_of(teacher, student, [PKD], cache)
    for _ in range(3):
        step(distiller)
    assert (len(checked), cache.hits) == (2, 6)


def test_the_copy_of_a_distiller_shares_the_cache():
    distiller = distiller_of(tiny_gfl(seed=1), tiny_gfl(seed=0), [PKD], cache := TeacherCache.in_memory())
    step(distiller)
    step(copy.deepcopy(distiller))
    assert (cache.hits, cache.misses) == (2, 2)


def test_half_written_files_do_not_count(tmp_path):
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / ".abc.safetensors.123.partial").write_bytes(bytes(5000))
    assert TeacherCache.on_disk(tmp_path).bytes == 0


def test_labels_that_a_method_keeps_are_on_the_device_of_the_batch(monkeypatch):
    size = ((64, 64),) * 2
    batch = Batch(torch.empty(2, 3, 64, 64, device="meta"), size, size, size)
    known = {key: {"labels": torch.tensor([0]), "grid": torch.tensor([[8, 8]])} for key in "ab"}
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # which does not know this device
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    view = CachedView(adapt(tiny_gfl(seed=0)), batch, ["a", "b"], known.get, dtype=torch.bfloat16)
    view.parts.look_up(["labels", "grid"])
    assert (view.parts.found["labels"].device.type, view.parts.found["labels"].dtype) == ("meta", torch.int64)
    assert view.parts.found["grid"].tolist() == [[[8, 8]]] * 2


def test_a_full_disk_ends_the_taking_and_not_the_run(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kdtoolkit.teacher_cache.write_beside", full)
    teacher, student = tiny_gfl(seed=1), tiny_gfl(seed=0)
    cache = TeacherCache.on_disk(tmp_path)
    distiller = distiller_of(teacher, student, [PKD], cache)
    for _ in range(2):
        step(distiller)
    assert cache.misses == 4
    assert cache.notices == [f"the teacher cache in {tmp_path} takes no further images: No space left on device"]


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "cache", tmp_path / "file"):
        with pytest.raises(KDError, match=r"cannot use .*file.* as its folder: .*\. Name a folder"):
            TeacherCache.on_disk(folder)


@pytest.mark.slow
def test_a_compiled_step_is_not_compiled_anew_for_the_keys_of_each_batch():
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    cache = TeacherCache.in_memory()
    distiller = distiller_of(*pair("GFL"), [PKD], cache)
    compiled, counts = torch.compile(distiller, backend=backend), []
    for place in range(4):
        shown = [image * 0.9**place for image in IMAGES]
        for _ in range(2):
            distiller.calls = 0  # the step's number is compiled in
            compiled(shown, TARGETS, [*map(digest, shown)])
        counts.append(len(graphs))
    assert (cache.hits, cache.misses) == (4 * len(IMAGES),) * 2
    assert counts[0] > 0
    assert counts[1:] == counts[1:2] * 3
