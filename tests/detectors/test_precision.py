import pytest
import torch

from kdtoolkit.detectors.precision import without_narrow_bfloat16


@pytest.mark.parametrize(
    ("dtype", "width", "computed"),
    [
        (torch.bfloat16, 64, torch.float32),
        (torch.bfloat16, 96, torch.bfloat16),
        (torch.float16, 64, torch.float16),
    ],
)
def test_autocast_is_off_for_narrow_images_in_bfloat16_alone(dtype, width, computed):
    conv, images = torch.nn.Conv2d(3, 4, 1), torch.zeros(1, 3, 96, width)
    with torch.autocast("cpu", dtype):
        with without_narrow_bfloat16(images, 128):
            assert conv(images).dtype == computed
        with torch.no_grad(), without_narrow_bfloat16(images, 128):
            assert conv(images).dtype == dtype
