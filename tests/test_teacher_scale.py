"""A teacher that sees smaller images than the student: its levels stand beside coarser ones of the student."""

import pytest
import torch
import torch.nn.functional as F

from kdtoolkit import Distiller, KDError
from kdtoolkit.compatibility import why_refused
from kdtoolkit.libraries import adapt
from kdtoolkit.matrix import families
from kdtoolkit.methods import PKD, all_methods
from kdtoolkit.methods.pkd import pkd_loss
from kdtoolkit.testing._batch import example_batch
from tests.conftest import tiny_gfl

IMAGES, TARGETS = example_batch(3, sizes=((128, 128), (100, 120)))


def build(family, seed):
    torch.manual_seed(seed)
    return families()[family](3)


def step(distiller):
    torch.manual_seed(0)
    return distiller.train()(IMAGES, TARGETS)


def test_levels_of_half_the_stride_are_compared():
    student, teacher = tiny_gfl(seed=0), tiny_gfl(seed=1)
    images = [torch.rand(3, 128, 128) for _ in range(2)]
    distiller = Distiller(teacher, student, [PKD(weight=1.0)], teacher_scale=0.5)
    with torch.no_grad():
        found = distiller(images, TARGETS)["pkd/feature"]
        ours = adapt(student)
        theirs = adapt(teacher)
        half = [F.interpolate(image[None], scale_factor=0.5, mode="bilinear")[0] for image in images]
        features = ours.features(ours.prepare(images)), theirs.features(theirs.prepare(half))
    strides = ours.spec.strides
    pairs = [(strides.index(2 * stride), t) for t, stride in enumerate(strides) if 2 * stride in strides]
    assert len(pairs) == len(strides) - 1
    expected = sum(pkd_loss(features[0][s], features[1][t]) for s, t in pairs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", ["GFL", "FCOS", "torchvision Faster R-CNN", "Deformable DETR", "YOLOv8"])
def test_every_method_that_takes_the_pair_teaches(family):
    teacher, student = build(family, 1), build(family, 0)
    specs = adapt(student).spec, adapt(teacher).spec.on_images_scaled_by(0.5)
    working = [cls for cls in all_methods().values() if why_refused(cls, *specs) is None]
    assert len(working) > 3
    distiller = Distiller(teacher, student, [cls() for cls in working], teacher_scale=0.5)
    losses = step(distiller)
    losses.total.backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert {name.split("/")[0] for name in losses} == {"task", *(cls.__name__.lower() for cls in working)}
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_a_scale_that_no_stride_suits_is_refused():
    with pytest.raises(KDError, match=r"teacher_scale is 0.7: it must be 1, 0.5 or 0.25"):
        Distiller(tiny_gfl(seed=1), tiny_gfl(seed=0), [PKD()], teacher_scale=0.7)


@pytest.mark.parametrize(("height", "scale"), [(399, 0.5), (335, 0.5), (430, 0.25), (417, 0.5)])
def test_cells_of_equal_stride_lie_at_the_same_place_whatever_the_height(height, scale):
    teacher, student = tiny_gfl(seed=1), tiny_gfl(seed=0)
    images = [torch.rand(3, height, 64)]
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]
    seen = []

    class Shapes(PKD):
        def loss(self, student, teacher, level):
            seen.append((student.shape[-2:], teacher.shape[-2:]))
            return super().loss(student, teacher, level)

    Distiller(teacher, student, [Shapes()], teacher_scale=scale)(images, nothing)
    assert seen
    assert all(ours == theirs for ours, theirs in seen)


def test_a_teacher_built_for_one_size_is_refused():
    student, teacher = build("torchvision SSD", 0), build("torchvision SSD", 1)
    with pytest.raises(KDError, match="is built for images of one size, so it cannot be shown smaller ones"):
        step(Distiller(teacher, student, [PKD()], teacher_scale=0.5))


def test_at_strides_means_pixels_of_the_student():
    distiller = Distiller(tiny_gfl(seed=1), tiny_gfl(seed=0), [PKD().at_strides(16)], teacher_scale=0.5)
    assert torch.isfinite(step(distiller)["pkd/feature"])
    (method,) = distiller.methods
    assert method.levels == [(0, 0)]
