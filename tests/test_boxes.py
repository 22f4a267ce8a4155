import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou, clip_boxes_to_image, generalized_box_iou

from kdtoolkit.boxes import (
    centres,
    clip,
    distances,
    elementwise_giou,
    elementwise_iou,
    from_distances,
    pairwise_iou,
)

seeds = st.integers(0, 2**20)


def random_boxes(count, seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 80 - 10
    return torch.cat([corner, corner + torch.rand(count, 2, generator=generator) * 50 + 0.1], 1)


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_overlaps_agree_with_torchvision(seed):
    a, b = random_boxes(6, seed), random_boxes(6, seed + 1)
    torch.testing.assert_close(elementwise_iou(a, b), box_iou(a, b).diagonal())
    torch.testing.assert_close(elementwise_giou(a, b), generalized_box_iou(a, b).diagonal())
    torch.testing.assert_close(pairwise_iou(a, b[:4]), box_iou(a, b[:4]))


def test_pairwise_iou_broadcasts_over_images():
    truth, priors = random_boxes(6, 0).view(2, 3, 4), random_boxes(5, 1)
    expected = torch.stack([box_iou(image, priors) for image in truth])
    torch.testing.assert_close(pairwise_iou(truth, priors), expected)


def test_boxes_without_extent_have_finite_overlap_and_gradient():
    point = torch.full((1, 4), 5.0, requires_grad=True)
    loss = elementwise_iou(point, point.detach()) + elementwise_giou(point, point.detach())
    loss.sum().backward()
    assert loss.item() == 0
    assert point.grad.isfinite().all()


def test_half_precision_boxes_are_compared_in_float32():
    a, b = random_boxes(4, 0).bfloat16(), random_boxes(4, 1).bfloat16()
    assert torch.equal(elementwise_iou(a, b), elementwise_iou(a.float(), b.float()))


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_clip_cuts_each_box_at_its_own_image(seed):
    boxes = random_boxes(2, seed)
    sizes = torch.tensor([[30.0, 60.0], [70.0, 20.0]])
    expected = torch.stack([clip_boxes_to_image(boxes[0], (30, 60)), clip_boxes_to_image(boxes[1], (70, 20))])
    assert torch.equal(clip(boxes, sizes), expected)


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_distances_and_boxes_are_inverse(seed):
    boxes = random_boxes(5, seed)
    points = centres(random_boxes(5, seed + 1))
    torch.testing.assert_close(from_distances(points, distances(points, boxes)), boxes)
    width_height = boxes[:, 2:] - boxes[:, :2]
    torch.testing.assert_close(distances(centres(boxes), boxes), width_height.repeat(1, 2) / 2)
