import numpy as np
import pytest
import torch

from kdtoolkit import Distiller, KDError
from kdtoolkit.checks import checked_batch
from tests.conftest import tiny_gfl


@pytest.fixture(scope="module")
def distiller():
    return Distiller(None, tiny_gfl(seed=1))


BOXES, LABELS = torch.tensor([[4.0, 6.0, 30.0, 40.0]]), torch.tensor([2])
IMAGE, TARGET = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)), {"boxes": BOXES, "labels": LABELS}

# (images, targets, what is said), of batches that cannot be meant as they are.
WRONG = {
    "no images": ([], [], "the batch is empty: hand in at least one image"),
    "no tensor of images": (torch.zeros(0, 3, 64, 64), [], "the batch is empty"),
    "images of another kind": ({"a": IMAGE}, [TARGET], r"images must be a list of tensors \(3, H, W\), not dict"),
    "numpy images": (
        [IMAGE.numpy()],
        [TARGET],
        r"image 0 is ndarray; images are float tensors \(3, H, W\) in \[0, 1\]",
    ),
    "channels last": (
        [IMAGE.permute(1, 2, 0)],
        [TARGET],
        r"image 0 has the shape \(64, 64, 3\); images are \(3, H, W\): hand in image.permute\(2, 0, 1\)",
    ),
    "one batch in a list": ([IMAGE[None]], [TARGET], r"image 0 has the shape \(1, 3, 64, 64\)"),
    "uint8": (
        [(IMAGE * 255).byte()],
        [TARGET],
        r"image 0 is torch.uint8; images are floats .*: hand in image.float\(\) / 255",
    ),
    "0 to 255": (
        [IMAGE, IMAGE * 255],
        [TARGET] * 2,
        r"image 1 has values from 0.* to 25\d; .* in \[0, 1\]: divide them by 255",
    ),
    "normalised": (
        [(IMAGE - 0.45) / 0.22],
        [TARGET],
        r"image 0 has values from -2.0\d to 2.\d+; .*hand them in before normalisation",
    ),
    "from -1 to 1": ([IMAGE * 2 - 1], [TARGET], "image 0 has values from -1 to 1; .*before normalisation"),
    "relative boxes": (
        [IMAGE],
        [{**TARGET, "boxes": BOXES / 64}],
        "target 0: all boxes lie within 0..1, .*multiply them by the",
    ),
    "relative boxes of one image": (
        [IMAGE] * 3,
        [TARGET, {"boxes": torch.zeros(0, 4), "labels": LABELS[:0]}, {**TARGET, "boxes": BOXES / 64}],
        "target 2: all boxes lie within 0..1",
    ),
    "boxes of larger images": (
        [IMAGE] * 3,
        [{"boxes": torch.zeros(0, 4), "labels": LABELS[:0]}, *[{**TARGET, "boxes": BOXES + 64}] * 2],
        r"no box of this batch overlaps its image: box 0 of target 1 is \[68.0, 70.0, 94.0, 104.0\], and image 1 is 64 "
        r"px wide and 64 px high. Are the boxes in pixels of the image before it was resized\?",
    ),
    "boxes left of the image": ([IMAGE], [{**TARGET, "boxes": BOXES - 50}], "no box of this batch overlaps its image"),
    "targets of another kind": (
        [IMAGE],
        TARGET,
        "targets must be a list with one dict of boxes and labels .* not dict",
    ),
    "no dict": ([IMAGE], ["boxes"], "target 0 must be a dict with boxes and labels, not str"),
    "transformers' name": (
        [IMAGE],
        [{"boxes": BOXES, "class_labels": LABELS}],
        "target 0 has no 'labels', only 'boxes', 'class_labels'; it needs both 'boxes' and 'labels'",
    ),
    "an empty dict": ([IMAGE], [{}], "target 0 has no 'boxes', only nothing"),
    "numpy boxes": (
        [IMAGE],
        [{**TARGET, "boxes": BOXES.numpy()}],
        r"target 0: boxes must be a tensor, not a numpy array \(torch.from_numpy",
    ),
    "numpy labels": ([IMAGE], [{**TARGET, "labels": np.array([2])}], "target 0: labels must be a tensor"),
    "a list of labels": ([IMAGE], [{**TARGET, "labels": [2]}], "target 0: labels must be a tensor, not list"),
    "bool labels": (
        [IMAGE],
        [{**TARGET, "labels": LABELS > 0}],
        "target 0: labels are torch.bool; they must be integers",
    ),
    "more targets": ([IMAGE], [TARGET] * 2, "there are 1 images and 2 targets: hand in one target for each image"),
    "no side once in float32": (
        [IMAGE],
        [{**TARGET, "boxes": torch.tensor([[20.5, 1, 20.5 + 1e-9, 9]], dtype=torch.float64)}],
        r"target 0: box 0 is \[20.5, 1.0, 20.5, 9.0\]",
    ),
    "labels out of reach": (
        [IMAGE],
        [{**TARGET, "labels": LABELS + 1}],
        r"target 0: label 0 is 3, and .* has 3 classes: labels must lie in 0\.\.2",
    ),
    "another device": ([IMAGE.to("meta")], [TARGET], "image 0 is on meta, the student on cpu: move one of them"),
}


@pytest.mark.parametrize(("images", "targets", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_meant_is_one_sentence(distiller, images, targets, message):
    with pytest.raises(KDError, match=message) as error:
        distiller(images, targets)
    assert "\n" not in str(error.value)


SAME = {
    "a tensor of images": (IMAGE[None], [TARGET]),
    "tuples": ((IMAGE,), (TARGET,)),
    "float64": ([IMAGE.double()], [{"boxes": BOXES.double(), "labels": LABELS}]),
    "integer boxes": ([IMAGE], [{"boxes": BOXES.int(), "labels": LABELS}]),
    "short labels": ([IMAGE], [{"boxes": BOXES, "labels": LABELS.byte()}]),
    "more than is needed": ([IMAGE], [{**TARGET, "image_id": 3}]),
}


@pytest.mark.parametrize(("images", "targets"), SAME.values(), ids=SAME)
def test_what_is_clear_is_taken(distiller, images, targets):
    assert dict(distiller(images, targets)) == dict(distiller([IMAGE], [TARGET]))


def test_no_boxes_in_whatever_shape(distiller):
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    bare = {"boxes": torch.tensor([]), "labels": torch.tensor([])}
    assert dict(distiller([IMAGE], [bare])) == dict(distiller([IMAGE], [empty]))


def test_what_resizing_and_changes_of_colour_leave_is_taken(distiller):
    distiller([IMAGE * 1.4 - 0.2], [TARGET])
    distiller([torch.zeros(3, 64, 64)], [TARGET])
    tiny = {**TARGET, "boxes": torch.tensor([[0.0, 0, 1, 1]])}  # a pixel of a tiny image
    distiller([torch.rand(3, 12, 12)] * 2, [tiny] * 2)


def test_what_a_crop_leaves_of_objects_is_taken(distiller):
    corner = {**TARGET, "boxes": torch.tensor([[0.0, 0, 0.7, 1]])}
    beside = {**TARGET, "boxes": BOXES + 64}
    distiller([IMAGE, IMAGE, IMAGE], [TARGET, corner, beside])


def test_what_is_not_finite_passes_for_training_tells_where_it_comes_from():
    model = tiny_gfl(seed=1)
    spec = Distiller(None, model).student_adapter.spec
    images, _ = checked_batch([torch.full((3, 64, 64), float("nan"))], [TARGET], model, spec)
    assert images[0].isnan().all()


def test_images_get_the_dtype_of_the_weights():
    distiller = Distiller(None, tiny_gfl(seed=1)).bfloat16()
    images, targets = checked_batch([IMAGE], [TARGET], distiller.student, distiller.student_adapter.spec)
    assert images[0].dtype == torch.bfloat16
    assert targets[0]["boxes"].dtype == torch.float32
