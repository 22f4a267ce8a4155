"""Mosaics, mixed images and sizes: what is shown, and where the boxes lie on it."""

import pytest
import torch

from kdtoolkit.data import Augmentation, InputSize, ProceduralShapes, batches
from kdtoolkit.data.mix import GREY, mixup, mosaic
from kdtoolkit.data.resize import with_boxes


def bright(place, height=40, width=60):
    """A black image with one bright box, whose colour and label are its place."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, 10:30, 10:50] = 200 + place
    return image, {"boxes": torch.tensor([[10.0, 10, 50, 30]]), "labels": torch.tensor([place])}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(5))
def test_the_boxes_of_a_mosaic_lie_on_their_objects(seed):
    image, target = mosaic([bright(place) for place in range(4)], generator(seed))
    assert image.shape == (3, 40, 60)
    assert len(target["boxes"]) >= 2
    for (x1, y1, x2, y2), label in zip(target["boxes"].round().int().tolist(), target["labels"].tolist(), strict=True):
        inside = image[:, y1 + 1 : y2 - 1, x1 + 1 : x2 - 1]
        assert (inside == 200 + label).all()
    box = target["boxes"]
    assert (box >= 0).all()
    assert (box[:, 2] <= 60).all()
    assert (box[:, 3] <= 40).all()


def test_images_of_different_sizes_leave_grey():
    image, _ = mosaic([bright(0, 64, 64), bright(1, 200, 20), bright(2), bright(3)], generator())
    assert image.shape == (3, 64, 64)
    assert (image == GREY).any()


def test_mixup_shows_both_images_and_all_boxes():
    image, target = mixup(bright(0), bright(8, 80, 120))
    assert image.shape == (3, 40, 60)
    assert target["boxes"].tolist() == [[10, 10, 50, 30], [5, 5, 25, 15]]
    assert target["labels"].tolist() == [0, 8]
    assert image[0, 20, 40] == 100  # bright in the first alone
    assert image[0, 12, 15] == 204  # bright in both


def test_sizes_are_drawn_in_steps_of_32_and_keep_proportions():
    size = InputSize(short=(64, 160), long=200)
    drawn = {size.draw(generator(seed)) for seed in range(60)}
    assert drawn == {64, 96, 128, 160}
    image, target = bright(0)
    assert size.apply(image, 64).shape == (3, 64, 96)
    assert size.apply(image).shape == (3, 133, 200)  # the longer side decides
    assert with_boxes(target, image, size.apply(image, 80))["boxes"].tolist() == [[20, 20, 100, 60]]
    with pytest.raises(ValueError, match=r"short is a range \[low, high\] up to long \(200\), not \(300, 400\)"):
        InputSize(short=(300, 400), long=200)


def squares():
    """An image (3, 64, 128): a bright square at the left edge, and one at the right edge, each with its label."""
    image = torch.zeros(3, 64, 128, dtype=torch.uint8)
    image[:, 16:48, :16] = 200
    image[:, 16:48, 112:] = 201
    boxes = torch.tensor([[0.0, 16, 16, 48], [112, 16, 128, 48]])
    return image, {"boxes": boxes, "labels": torch.tensor([0, 1])}


def test_the_boxes_of_a_crop_are_cut_at_its_edge_and_none_is_empty():
    size = InputSize(short=(64, 64), crop=1, crop_short=(128,), crop_sides=(64, 64))
    found = set()
    for seed in range(40):
        image, target = size.cropped(*squares(), generator(seed))  # twice as large, cropped to a quarter of the width
        assert image.shape == (3, 64, 64)
        if not len(target["boxes"]):
            assert (image < 200).all()  # both squares are outside
            continue
        ((x1, y1, x2, y2),), (label,) = target["boxes"].int().tolist(), target["labels"].tolist()
        assert (image[:, y1 + 1 : y2 - 1, x1 + 2 : x2 - 2] == 200 + label).all()
        assert image[0].gt(100).sum() == (x2 - x1) * (y2 - y1)  # nothing of the square lies outside of its box
        assert 0 <= x1 < x2 <= 64
        assert 0 <= y1 < y2 <= 64
        found.add((label, x2 - x1 < 8))  # also boxes of which less than a quarter is left
    assert found == {(0, False), (0, True), (1, False), (1, True)}


def test_the_example_of_a_crop_worked_out_by_hand():
    image = torch.arange(64, dtype=torch.uint8).repeat(3, 64, 1)  # each pixel tells its column
    target = {
        "boxes": torch.tensor([[0.0, 0, 64, 64], [0, 0, 1, 64], [63, 10, 64, 20]]),
        "labels": torch.tensor([3, 4, 5]),
    }
    size = InputSize(short=(64, 64), crop=1, crop_short=(64,), crop_sides=(40, 40))
    part, seen = size.cropped(image, target, generator(2))
    left = int(part[0, 0, 0])
    assert 0 < left < 24  # so the second and the third box lie outside
    assert torch.equal(part, image[:, :40, left : left + 40])
    assert seen["boxes"].tolist() == [[0, 0, 40, 40]]
    assert seen["labels"].tolist() == [3]


def test_crops_take_all_their_sides_and_are_resized_at_last():
    size = InputSize(short=(96, 96), long=160, crop=1, crop_short=(64, 80), crop_sides=(48, 72))
    parts = [size.cropped(*squares(), generator(seed))[0] for seed in range(300)]
    assert {part.shape[1] for part in parts} == set(range(48, 73))
    assert {part.shape[2] for part in parts} == set(range(48, 73))
    assert all(min(size.apply(part).shape[1:]) == 96 for part in parts)


def test_a_share_of_the_images_is_cropped():
    size = InputSize(short=(64, 64), crop=0.5, crop_short=(64,), crop_sides=(32, 40))
    uncropped = [size.cropped(*squares(), generator(seed))[0].shape == (3, 64, 128) for seed in range(200)]
    assert 70 < sum(uncropped) < 130


def test_without_crops_the_images_are_the_same_whatever_the_sides():
    data = ProceduralShapes(8, image_size=64, seed=0)
    options = {"batch_size": 4, "steps": 4, "seed": 0, "augment": Augmentation(mosaic=0.5, colour=0.1)}
    plain = batches(data, **options, input_size=InputSize(short=(64, 96)))
    off = batches(data, **options, input_size=InputSize(short=(64, 96), crop=0, crop_short=(64,), crop_sides=(32, 48)))
    for (images, targets, _), (same, also, _) in zip(plain, off, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(images, same, strict=True))
        assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(targets, also, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_sides": (600, 384)}, r"crop_sides is a range \[low, high\], not \(600, 384\)"),
        (
            {"crop_short": (300, 500)},
            r"crop_short has 300, which is below the smallest side of a crop in crop_sides, 384: raise",
        ),
        ({"crop_short": ()}, "crop_short"),
        ({"crop": 1.5}, "less than or equal to 1"),
    ],
)
def test_wrong_crops_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        InputSize(short=(480, 800), **options)


def test_a_step_has_one_size_and_the_order_stays():
    data = ProceduralShapes(8, image_size=64, seed=0)
    options = {"batch_size": 4, "steps": 6, "seed": 0, "augment": Augmentation()}
    plain = list(batches(data, **options))
    sized = list(batches(data, **options, input_size=InputSize(short=(64, 128))))
    assert len({image.shape for batch in sized for image in batch.images}) > 1
    for (images, targets, _), (_, same, _) in zip(sized, plain, strict=True):
        assert len({image.shape for image in images}) == 1
        for one, two, image in zip(targets, same, images, strict=True):
            torch.testing.assert_close(one["boxes"], two["boxes"] * image.shape[1] / 64)


def test_photometric_changes_leave_the_global_random_state_alone():
    image, target = bright(0)
    state = torch.get_rng_state()
    changed, same = Augmentation(flip=0, photometric=1.0)(image, target, generator())
    again, _ = Augmentation(flip=0, photometric=1.0)(image, target, generator())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(changed, again)
    assert not torch.equal(changed, image)
    assert same is target


@pytest.mark.parametrize("start", [1, 4])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_may_begin_at_any_step_and_be_shared(start, workers):
    data = ProceduralShapes(6, image_size=64, seed=0)
    options = {
        "batch_size": 4,
        "steps": 5,
        "seed": 0,
        "augment": Augmentation(mosaic=0.5, mixup=0.5, colour=0.1),
        "input_size": InputSize(short=(64, 96), crop=0.5, crop_short=(48, 64), crop_sides=(32, 64)),
    }
    whole = list(batches(data, **options))
    parts = [list(batches(data, **options, start=start, share=(place, 2), workers=workers)) for place in range(2)]
    for (images, targets, _), (first, here, _), (second, there, _) in zip(whole[start:], *parts, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(images, first + second, strict=True))
        assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(targets, here + there, strict=True))
