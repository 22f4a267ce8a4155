import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kdtoolkit.data import Augmentation

FLIP = Augmentation(flip=1)
FULL = Augmentation(flip=0.5, colour=0.5, zoom=(0.4, 2.5))


@st.composite
def pictures(draw):
    """An image of noise with boxes of whole pixels, and a generator."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    height, width = draw(st.integers(8, 40)), draw(st.integers(8, 40))
    image = torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)
    count = draw(st.integers(0, 4))
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([width - 4, height - 4])
    room = torch.tensor([width, height]) - corner
    corners = torch.cat([corner, corner + 2 + torch.rand(count, 2, generator=generator) * (room - 2)], 1)
    labels = torch.arange(count)
    return image, {"boxes": corners.floor(), "labels": labels}, generator


@given(pictures())
def test_mirrored_twice_is_the_same(picture):
    image, target, generator = picture
    once = FLIP(image, target, generator)
    twice = FLIP(*once, generator)
    assert torch.equal(once[0], image.flip(2))
    assert torch.equal(twice[0], image)
    assert torch.equal(twice[1]["boxes"], target["boxes"])


@given(pictures())
def test_boxes_follow_the_mirrored_pixels(picture):
    image, target, generator = picture
    mirrored, changed = FLIP(image, target, generator)
    for (x1, y1, x2, y2), (u1, v1, u2, v2) in zip(
        target["boxes"].int().tolist(), changed["boxes"].int().tolist(), strict=True
    ):
        assert torch.equal(image[:, y1:y2, x1:x2].flip(2), mirrored[:, v1:v2, u1:u2])


@given(pictures())
def test_boxes_stay_in_the_image_and_have_area(picture):
    image, target, generator = picture
    changed, found = FULL(image, target, generator)
    assert changed.shape == image.shape
    assert changed.dtype == torch.uint8
    boxes = found["boxes"]
    assert len(boxes) == len(found["labels"]) <= len(target["labels"])
    assert set(found["labels"].tolist()) <= set(target["labels"].tolist())
    if len(boxes):
        assert boxes.min() >= 0
        assert (boxes[:, 2:] <= torch.tensor([image.shape[2], image.shape[1]])).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()


@given(pictures())
def test_the_original_and_the_global_random_state_are_left_alone(picture):
    image, target, generator = picture
    copies = image.clone(), target["boxes"].clone(), torch.get_rng_state()
    FULL(image, target, generator)
    assert torch.equal(copies[0], image)
    assert torch.equal(copies[1], target["boxes"])
    assert torch.equal(copies[2], torch.get_rng_state())


@given(pictures(), st.integers(0, 1000))
def test_the_generator_decides(picture, seed):
    image, target, _ = picture
    results = [FULL(image, target, torch.Generator().manual_seed(seed)) for _ in range(2)]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1]["boxes"], results[1][1]["boxes"])


@pytest.mark.parametrize("scale", [0.5, 1.6, 3.0])
def test_boxes_follow_the_zoomed_pixels(scale):
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    image[:, 20:44, 30:60] = 255
    target = {"boxes": torch.tensor([[30.0, 20, 60, 44]]), "labels": torch.tensor([2])}
    zoom = Augmentation(flip=0, zoom=(scale, scale))
    for seed in range(30):
        changed, found = zoom(image, target, torch.Generator().manual_seed(seed))
        ys, xs = torch.nonzero(changed[0] > 200, as_tuple=True)
        if not len(found["labels"]):
            assert len(xs) < 0.3 * 30 * 24 * scale**2
            continue
        pixels = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert (found["boxes"][0] - pixels).abs().max() <= 1.01 + scale / 2


def test_smaller_images_lie_on_grey_at_random_places():
    image = torch.full((3, 40, 40), 255, dtype=torch.uint8)
    target = {"boxes": torch.tensor([[0.0, 0, 40, 40]]), "labels": torch.tensor([0])}
    zoom = Augmentation(flip=0, zoom=(0.5, 0.5))
    places = set()
    for seed in range(10):
        changed, found = zoom(image, target, torch.Generator().manual_seed(seed))
        x1, y1, x2, y2 = found["boxes"][0].int().tolist()
        assert (x2 - x1, y2 - y1) == (20, 20)
        assert (changed[:, y1:y2, x1:x2] == 255).all()
        assert (changed == 128).sum() == 3 * (1600 - 400)
        places.add((x1, y1))
    assert len(places) > 5


def test_flips_come_as_often_as_asked():
    image = torch.arange(4, dtype=torch.uint8).expand(3, 2, 4)
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    generator = torch.Generator().manual_seed(0)
    flips = sum(bool(Augmentation(flip=0.3)(image, target, generator)[0][0, 0, 0]) for _ in range(500))
    assert 110 < flips < 190
    assert Augmentation(flip=0)(image, target, generator)[0] is image


def test_colour_changes_pixels_and_leaves_boxes():
    image = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    image[0] = 180
    target = {"boxes": torch.tensor([[1.0, 1, 5, 5]]), "labels": torch.tensor([0])}
    colour = Augmentation(flip=0, colour=0.4)
    seen = [colour(image, target, torch.Generator().manual_seed(seed)) for seed in range(10)]
    assert len({tuple(changed[:, 0, 0].tolist()) for changed, _ in seen}) > 5
    assert all(found["boxes"] is target["boxes"] for _, found in seen)


@pytest.mark.parametrize(
    "arguments", [{"flip": 1.5}, {"flip": -0.1}, {"colour": 1}, {"zoom": (0, 1)}, {"zoom": (2, 1)}, {"flop": 1}]
)
def test_settings_out_of_range(arguments):
    with pytest.raises(ValidationError):
        Augmentation(**arguments)


def test_photometric_changes_leave_the_global_random_state_alone():
    image = torch.randint(256, (3, 8, 8), dtype=torch.uint8)
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    before = torch.get_rng_state()
    changed, _ = Augmentation(photometric=1.0)(image, target, torch.Generator().manual_seed(0))
    assert not torch.equal(changed, image)
    assert torch.equal(torch.get_rng_state(), before)
