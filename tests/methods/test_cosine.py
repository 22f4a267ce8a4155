import math

import pytest
import torch

from kdtoolkit import Distiller
from kdtoolkit.compatibility import why_refused
from kdtoolkit.contract import Batch, View
from kdtoolkit.errors import KDError
from kdtoolkit.methods.common import on_images
from kdtoolkit.methods.cosine import Cosine, at_cells, cosine_loss, directions, relation_loss
from kdtoolkit.testing import check_method
from tests.conftest import tiny_gfl, tiny_of
from tests.methods._views import batch, exchange, maps, spec

BATCH = batch([], [])  # images of 64 x 48 and of 40 x 30
COUNTED = [[(y, x) for y in range(4) for x in range(3)], [(y, x) for y in range(2) for x in range(2)]]  # of stride 16


def ready(method, student=None, teacher=None):
    torch.manual_seed(0)
    method.setup(student or spec(), teacher or spec())
    return method


def cosine(a, b):
    a, b = a.double().tolist(), b.double().tolist()
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))


def test_terms_equal_a_loop():
    student, teacher = maps(2, seed=1), maps(2, 5, seed=2)
    method = ready(Cosine(weight=2, relation_weight=3), teacher=spec(channels=(5, 5)))
    terms = method(exchange(BATCH, features=(student, teacher)))
    s, t = student[1].detach(), teacher[1].detach()  # the deepest level
    projected = method.project(s).detach()
    distances = [1 - cosine(projected[i, :, y, x], t[i, :, y, x]) for i, cells in enumerate(COUNTED) for y, x in cells]
    relations = [
        (cosine(s[i, :, y, x], s[i, :, v, u]) - cosine(t[i, :, y, x], t[i, :, v, u])) ** 2
        for i, cells in enumerate(COUNTED)
        for y, x in cells
        for v, u in cells
    ]
    assert tuple(terms) == Cosine.terms
    assert terms["cosine"].item() == pytest.approx(2 * sum(distances) / len(distances), rel=1e-5)
    assert terms["relation"].item() == pytest.approx(3 * sum(relations) / len(relations), rel=1e-5)


def test_the_relation_is_left_out_by_default():
    student, teacher = maps(2, seed=1), maps(2, seed=2)
    assert list(ready(Cosine())(exchange(BATCH, features=(student, teacher)))) == ["cosine"]


def test_equal_directions_cost_nothing():
    x = torch.randn(2, 4, 3, 3)
    counts = torch.ones(2, 3, 3, dtype=torch.bool)
    assert cosine_loss(3 * x, x, counts).item() == pytest.approx(0, abs=1e-6)
    assert cosine_loss(-x, x, counts).item() == pytest.approx(2)
    turned = torch.einsum("dc,nchw->ndhw", torch.linalg.qr(torch.randn(4, 4)).Q, x)
    assert relation_loss(turned, 5 * x, counts).item() == pytest.approx(0, abs=1e-6)


def test_vectors_without_length_get_no_gradient():
    x = torch.randn(1, 4, 2, 2)
    x[..., 0] = 0
    x.requires_grad_()
    (directions(x) * torch.randn(1, 4, 2, 2)).sum().backward()
    assert (x.grad[..., 0] == 0).all()
    assert x.grad[..., 1].abs().max() < 1e3


def test_no_cell_on_an_image_gives_zero():
    nothing = torch.zeros(1, 2, 2, dtype=torch.bool)
    x = torch.randn(1, 4, 2, 2)
    assert cosine_loss(x, -x, nothing) == 0
    assert relation_loss(x, -x, nothing) == 0


def test_cells_of_padding_do_not_count():
    for stride, height, width in ((8, 8, 6), (16, 4, 3)):
        found = on_images(BATCH, stride, height, width)
        for i, (h, w) in enumerate(BATCH.sizes):
            for y in range(height):
                for x in range(width):
                    assert found[i, y, x] == ((y + 0.5) * stride < h and (x + 0.5) * stride < w)


@pytest.mark.parametrize(
    ("strides", "stride", "teacher_strides", "expected"),
    [
        ((8, 16, 32, 64, 128), 32, (8, 16, 32, 64, 128), (2, 2)),
        ((8, 16, 32, 64, 128), 32, (28,), (2, 0)),
        ((8, 16, 32, 64, 128), 16, (4, 8, 16, 32), (1, 2)),
        ((8, 16), 32, (4, 8, 16, 32), (1, 2)),
        ((32,), 32, (14,), (0, 0)),
        ((4, 8, 100), 100, (64, 128), (2, 1)),
    ],
)
def test_the_levels_that_are_compared(strides, stride, teacher_strides, expected):
    ours = spec(strides=strides, channels=(4,) * len(strides))
    theirs = spec(strides=teacher_strides, channels=(6,) * len(teacher_strides))
    method = ready(Cosine(stride=stride), ours, theirs)
    assert method.levels == expected
    assert method.project.weight.shape == (6, 4, 1, 1)


def test_students_without_such_a_level_are_refused():
    reason = why_refused(Cosine, spec(strides=(64, 128)), spec())
    assert "the student's strides are (64, 128). Use Cosine(stride=64)" in reason
    assert why_refused(Cosine(stride=64), spec(strides=(64, 128)), spec()) is None
    with pytest.raises(KDError, match=r"Cosine\(stride=0\)"):
        Cosine(stride=0)


class Shown:
    def __init__(self, strides):
        self.spec = spec(strides=strides, channels=(2,))


def views(canvas, stride, teacher_canvas, teacher_stride, teacher_map, scale):
    """Two views of one image that fills the student's canvas; its sizes on the teacher's follow from the scale."""
    size = canvas, canvas
    seen = round(canvas * scale), round(canvas * scale)
    ours = Batch(torch.zeros(1, 3, *size), (size,), (size,), (size,))
    theirs = Batch(torch.zeros(1, 3, teacher_canvas, teacher_canvas), (seen,), (seen,), (size,))
    cells = canvas // stride
    student = View(Shown((stride,)), ours, (torch.zeros(1, 2, cells, cells),))
    return student, View(Shown((teacher_stride,)), theirs, (teacher_map,), scale=scale)


def place_map(stride, cells, scale):
    """A map that says where the centre of each of its cells lies, in pixels of the student: (1, 2, cells, cells)."""
    places = (torch.arange(cells) + 0.5) * stride / scale
    return torch.stack(torch.meshgrid(places, places, indexing="xy"))[None]


@pytest.mark.parametrize(
    ("stride", "scale", "canvas", "inside"),
    [
        (14, 0.5, 168, slice(0, 10)),  # 28 px beside 32, padded from 160 to 168
        (14, 1.0, 322, slice(0, 10)),
        (16, 0.5, 160, slice(0, 10)),
        (16, 1.0, 320, slice(0, 10)),
        (8, 0.25, 80, slice(0, 10)),
        (32, 1.0, 384, slice(0, 10)),  # padded further
        (64, 1.0, 320, slice(1, 9)),  # coarser: at the edge the last cell is repeated
    ],
)
def test_the_teachers_map_is_read_where_the_students_cells_are(stride, scale, canvas, inside):
    pair = views(320, 32, canvas, stride, place_map(stride, canvas // stride, scale), scale)
    found = at_cells(*pair, (0, 0))
    expected = place_map(32, 10, 1.0)
    torch.testing.assert_close(found[..., inside, inside], expected[..., inside, inside])


def test_a_canvas_that_is_scaled_as_a_whole_is_read_in_its_own_scale():
    """SSD's canvas has one size: the student's image of 320 px has 300 px there."""
    student, teacher = views(320, 32, 300, 30, place_map(30, 10, 300 / 320), 1.0)
    teacher.batch = Batch(torch.zeros(1, 3, 300, 300), ((300, 300),), ((300, 300),), ((320, 320),))
    torch.testing.assert_close(at_cells(student, teacher, (0, 0)), place_map(32, 10, 1.0))


def test_gradient_reaches_the_student_and_the_projection_alone():
    student, teacher = maps(2, seed=1), maps(2, seed=2)
    method = ready(Cosine(relation_weight=1.0))
    sum(method(exchange(BATCH, features=(student, teacher))).values()).backward()
    assert student[0].grad is None
    assert student[1].grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in method.parameters())
    assert all(x.grad is None for x in teacher)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.25])
def test_the_teacher_may_see_smaller_images(batch, scale):
    method = Cosine(relation_weight=1.0)
    losses = Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [method], teacher_scale=scale)(*batch)
    losses.total.backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert method.levels == {1.0: (2, 2), 0.5: (2, 1), 0.25: (2, 0)}[scale]


def test_it_works_without_labels_and_on_chosen_levels(batch):
    distiller = Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [Cosine().at_strides(16)])
    assert list(distiller(batch[0], None)) == ["cosine/cosine"]
    assert distiller.methods[0].levels == (0, 0)


class Related(Cosine):
    """With both terms."""

    def __init__(self, *, weight: float = 1.0, relation_weight: float = 1.0) -> None:
        super().__init__(weight=weight, relation_weight=relation_weight)


@pytest.mark.parametrize("student", ["GFL", pytest.param("RT-DETR", marks=pytest.mark.slow)])
def test_relations_keep_the_contract(student):
    report = check_method(Related, tiny_of(student, seed=0), tiny_of("GFL", seed=1))
    assert report.refused is None
