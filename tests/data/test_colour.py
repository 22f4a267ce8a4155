import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms.v2 import RandomPhotometricDistort
from torchvision.transforms.v2 import functional as torchvision

from kdtoolkit.data import Augmentation
from kdtoolkit.data.colour import brightness, contrast, hue, recoloured, saturation

THEIRS = {
    brightness: torchvision.adjust_brightness,
    contrast: torchvision.adjust_contrast,
    saturation: torchvision.adjust_saturation,
    hue: torchvision.adjust_hue,
}


@st.composite
def images(draw):
    """Noise, one colour, greys, or few values, so that channels are often equal."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    size = (draw(st.integers(1, 24)), draw(st.integers(1, 24)))
    noise = torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator)
    kind = draw(st.sampled_from(["noise", "one colour", "grey", "few values"]))
    if kind == "one colour":
        return noise[:, :1, :1].expand(3, *size)
    if kind == "grey":
        return noise[:1].expand(3, *size)
    return noise if kind == "noise" else noise // 128 * 255


def furthest(ours, theirs):
    assert (ours.dtype, ours.shape) == (torch.uint8, theirs.shape)
    return (ours.int() - theirs.int()).abs().max()


@given(images(), st.sampled_from([brightness, contrast, saturation]), st.floats(0, 2))
def test_a_change_has_torchvisions_values_within_one_step(image, change, factor):
    copy = image.clone()
    assert furthest(recoloured(image, [(change, factor)]), THEIRS[change](image, factor)) <= 1
    assert torch.equal(image, copy)


@given(images(), st.floats(-1 / 6, 1 / 6))
def test_a_turned_hue_has_torchvisions_values_within_one_step(image, turn):
    assert furthest(recoloured(image, [(hue, turn)]), torchvision.adjust_hue(image, turn)) <= 1


@given(images(), st.permutations([(brightness, 1.2), (contrast, 0.7), (saturation, 1.3), (hue, 0.04)]))
def test_changes_follow_each_other_as_torchvisions_do(image, changes):
    theirs = image
    for change, amount in changes:
        theirs = THEIRS[change](theirs, amount)
    assert furthest(recoloured(image, changes), theirs) <= 6  # later changes enlarge a difference


def test_without_changes_the_image_is_the_same():
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    assert recoloured(image, []) is image


@pytest.mark.parametrize("chance", [0.5, 1.0])
def test_photometric_changes_are_distributed_as_torchvisions(chance):
    """Mean and spread of each channel over many draws, on an image of one colour."""
    image = torch.tensor([200, 120, 60], dtype=torch.uint8)[:, None, None].expand(3, 2, 2)
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    count = 600
    generator, augment = torch.Generator().manual_seed(0), Augmentation(flip=0, photometric=chance)
    ours = torch.stack([augment(image, target, generator)[0][:, 0, 0] for _ in range(count)]).float()
    torch.manual_seed(0)
    distort = RandomPhotometricDistort(p=chance)
    theirs = torch.stack([distort(image)[:, 0, 0] for _ in range(count)]).float()
    error = theirs.std(0) * (2 / count) ** 0.5
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 4 * error).all()
    assert (ours.std(0) / theirs.std(0) - 1).abs().max() < 0.1
    channels_apart = [(x[:, 0] - x[:, 1]).abs().mean() for x in (ours, theirs)]
    assert channels_apart[0] == pytest.approx(channels_apart[1].item(), rel=0.1)
