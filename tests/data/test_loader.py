from itertools import islice

import pytest
import torch

from kdtoolkit import KDError
from kdtoolkit.data import Augmentation, CocoDetection, ProceduralShapes, batches
from tests.data._coco import write

PLAIN = Augmentation(flip=0)
FULL = Augmentation(flip=0.5, colour=0.2, zoom=(0.7, 1.4))


@pytest.fixture(scope="module")
def data():
    return ProceduralShapes(10, image_size=32)


def run(data, **changes):
    return list(batches(data, **{"batch_size": 4, "steps": 7, "seed": 0, "augment": FULL, **changes}))


def same(one, other):
    return all(
        torch.equal(a, b) and torch.equal(s["boxes"], t["boxes"]) and torch.equal(s["labels"], t["labels"])
        for (images_a, targets_a, _), (images_b, targets_b, _) in zip(one, other, strict=True)
        for a, b, s, t in zip(images_a, images_b, targets_a, targets_b, strict=True)
    )


def places(data, found):
    """Which image of the data set each one of the unchanged batches is."""
    known = {data[i][0].numpy().tobytes(): i for i in range(len(data))}
    return [known[(image * 255).round().byte().numpy().tobytes()] for images, *_ in found for image in images]


def test_images_are_floats_in_the_unit_range_with_their_targets(data):
    found = run(data, augment=PLAIN)
    assert [len(batch.images) for batch in found] == [4] * 7
    for index, (image, target) in zip(
        places(data, found),
        [pair for batch in found for pair in zip(batch.images, batch.targets, strict=True)],
        strict=True,
    ):
        assert image.dtype == torch.float32
        assert 0 <= image.min() < image.max() <= 1
        assert set(target) == {"boxes", "labels"}
        assert torch.equal(target["boxes"], data[index][1]["boxes"])


def test_each_epoch_has_every_image_once_in_a_new_order(data):
    order = places(data, run(data, augment=PLAIN, steps=15))
    epochs = [order[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_batches_may_be_larger_than_the_data_set(data):
    order = places(data, run(data, augment=PLAIN, batch_size=25, steps=2))
    assert sorted(order) == sorted(5 * list(range(10)))


def test_the_seed_decides_and_nothing_else(data):
    torch.manual_seed(0)
    first = run(data)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert same(first, run(data))
    assert not same(first, run(data, seed=1))
    torch.set_rng_state(state)
    run(data)
    assert torch.equal(state, torch.get_rng_state())


def test_a_longer_run_begins_like_a_shorter_one(data):
    assert same(run(data, steps=3), list(islice(batches(data, batch_size=4, steps=50, seed=0, augment=FULL), 3)))


def test_an_image_is_changed_otherwise_each_time(data):
    one = data.subset(1, seed=0)
    images = [batch.images[0] for batch in run(one, batch_size=1, steps=5)]
    assert len({image.numpy().tobytes() for image in images}) == 5


def test_a_list_of_images_is_no_data_set(data):
    with pytest.raises(KDError, match="the data set is a list; it must be a DetectionDataset"):
        run([data[0]])


def test_workers_change_nothing(data, tmp_path):
    before = torch.get_rng_state()
    assert same(run(data), run(data, workers=2))
    assert torch.equal(before, torch.get_rng_state())
    lazy = CocoDetection(write(tmp_path), "train", memory_bytes=0)
    assert same(run(lazy, steps=2), run(lazy, steps=2, workers=1))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_one_sentence_also_from_a_worker(tmp_path, workers):
    lazy = CocoDetection(write(tmp_path), "train", memory_bytes=0)
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(KDError) as caught:
        run(lazy, steps=1, workers=workers)
    assert str(tmp_path) in str(caught.value)
    assert "Caught KDError" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_keys_say_which_images_have_the_same_pixels(data, workers):
    found = run(data, augment=Augmentation(), steps=10, keys=True, workers=workers)
    without = run(data, augment=Augmentation(), steps=10)
    assert same(found, without)
    assert {batch.keys for batch in without} == {None}
    pixels = {}
    for images, _, keys in found:
        for image, key in zip(images, keys, strict=True):
            pixels.setdefault(key, set()).add(image.numpy().tobytes())
    assert all(len(own) == 1 for own in pixels.values())
    assert 10 < len(pixels) == len(set.union(*pixels.values())) <= 20  # each image, and its mirror image
