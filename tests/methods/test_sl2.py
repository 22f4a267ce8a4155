import pytest
import torch

from kdtoolkit import Distiller, adapt
from kdtoolkit.classes import ClassMap
from kdtoolkit.compatibility import why_refused
from kdtoolkit.contract import PriorKind
from kdtoolkit.errors import IncompatibleError
from kdtoolkit.methods.sl2 import SL2, score_maps, sl2_loss
from kdtoolkit.testing import check_method
from tests.conftest import tiny_gfl, tiny_of, tiny_retinanet
from tests.methods._views import GRID, batch, exchange, maps, predictions, spec

BATCH = batch([], [])


def ready(method, student=None, teacher=None):
    torch.manual_seed(0)
    method.setup(student or spec(), teacher or spec())
    return method


def naive(projected, teacher, scores):
    """Cell by cell and channel by channel, in float64; `scores` (N, H, W, classes of all priors of a cell)."""
    total = weights = 0.0
    n, channels, height, width = teacher.shape
    for i in range(n):
        for y in range(height):
            for x in range(width):
                weight = max(scores[i, y, x].double().tolist())
                for k in range(channels):
                    total += weight * (projected[i, k, y, x] - teacher[i, k, y, x]).double().item() ** 2
                weights += weight
    return total / (weights * channels)


def by_level(scores):
    """(N, A, K) as one (N, H, W, K * priors of a cell) for each level."""
    cells = torch.split(scores, [h * w for h, w in GRID], 1)
    return [x.reshape(len(x), h, w, -1) for x, (h, w) in zip(cells, GRID, strict=True)]


def test_the_loss_equals_a_loop():
    student, teacher, seen = maps(2, seed=1), maps(2, seed=2), predictions(2, seed=3)
    method = ready(SL2(weight=2))
    terms = method(exchange(BATCH, features=(student, teacher), heads=(None, seen)))
    levels = zip(student, teacher, method.align, by_level(seen.logits.sigmoid()), strict=True)
    expected = 2 * sum(naive(align(s).detach(), t.detach(), scores) for s, t, align, scores in levels)
    assert tuple(terms) == SL2.terms
    assert terms["feature"].item() == pytest.approx(expected, rel=1e-5)


def test_the_student_goes_through_two_convolutions_whatever_its_channels():
    method = ready(SL2(), student=spec(channels=(3, 4)))
    for align, channels in zip(method.align, (3, 4), strict=True):
        first, _, second = align
        assert first.weight.shape == (4, channels, 1, 1)
        assert second.weight.shape == (4, 4, 1, 1)
        x = torch.randn(1, channels, 2, 2)
        assert torch.equal(align(x), second(first(x).relu()))


def test_of_several_priors_in_a_cell_the_best_one_counts():
    seen = adapt(tiny_of("torchvision RetinaNet", seed=1))
    seen.model.eval()
    with torch.no_grad():
        prepared = seen.prepare([torch.rand(3, 64, 64)])
        found = seen.head(seen.features(prepared), prepared).predictions
    per_cell = seen.spec.priors_per_cell[0]
    assert per_cell > 1
    height, width = found.priors.grid[0]
    cells = found.logits[:, : height * width * per_cell].sigmoid().view(1, height, width, -1)
    torch.testing.assert_close(score_maps(found)[0], cells.amax(-1))


def test_cells_without_score_do_not_count():
    student, teacher = torch.zeros(1, 2, 1, 3), torch.tensor([1.0, 2.0, 9.0]).expand(1, 2, 1, 3)
    weights = torch.tensor([[[0.5, 0.5, 0.0]]])
    assert sl2_loss(student, teacher, weights).item() == pytest.approx(2.5)
    assert sl2_loss(student, teacher, weights / 100).item() == pytest.approx(2.5)  # how high scores are is no matter
    student.requires_grad_()
    nothing = sl2_loss(student, teacher, weights * 0)
    nothing.backward()
    assert nothing == 0
    assert student.grad.abs().sum() == 0


def test_gradient_reaches_the_student_and_the_projections_alone():
    student, teacher, seen = maps(2, seed=1), maps(2, seed=2), predictions(2, seed=3)
    method = ready(SL2())
    method(exchange(BATCH, features=(student, teacher), heads=(None, seen)))["feature"].backward()
    assert all(x.grad.abs().sum() > 0 for x in student)
    assert all(p.grad.abs().sum() > 0 for p in method.parameters())
    assert all(x.grad is None for x in (*teacher, seen.logits))


def test_the_teacher_must_predict_on_a_grid():
    queries = spec(priors=PriorKind.QUERIES, priors_per_cell=())
    assert "the teacher predicts at queries" in why_refused(SL2, spec(), queries)
    assert why_refused(SL2, queries, spec()) is None
    assert "no stride in common" in why_refused(SL2, spec(strides=(32, 64)), spec())


def test_levels_are_those_of_a_common_stride():
    student, teacher, seen = maps(2, seed=1), maps(2, seed=2), predictions(2, seed=3)
    method = ready(SL2(weight=1), student=spec(strides=(4, 16)))
    assert method.levels == [(1, 1)]
    terms = method(exchange(BATCH, features=(student, teacher), heads=(None, seen)))
    expected = naive(method.align[0](student[1]).detach(), teacher[1].detach(), by_level(seen.logits.sigmoid())[1])
    assert terms["feature"].item() == pytest.approx(expected, rel=1e-5)


def test_classes_may_differ(batch):
    """Without a class map all of the teacher's classes count; with one, those that the two share."""

    def value(class_map=None):
        torch.manual_seed(0)
        teacher, student = tiny_gfl(seed=1, num_classes=5), tiny_gfl(seed=2)
        return Distiller(teacher, student, [SL2()], class_map=class_map)(*batch)["sl2/feature"].item()

    assert value() != value(ClassMap(student=(0, 1), teacher=(4, 2)))


@pytest.mark.parametrize("scale", [0.5, 0.25])
def test_the_teacher_may_see_smaller_images(batch, scale):
    distiller = Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [SL2()], teacher_scale=scale)
    losses = distiller(*batch)
    losses.total.backward()
    assert losses["sl2/feature"].isfinite()
    assert distiller.methods[0].levels == ([(1, 0), (2, 1)] if scale == 0.5 else [(2, 0)])


def test_it_works_without_labels(batch):
    losses = Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [SL2()])(batch[0], None)
    assert list(losses) == ["sl2/feature"]


def test_a_teacher_of_queries_is_refused_at_once():
    with pytest.raises(IncompatibleError, match="predicts at queries"):
        Distiller(tiny_of("DETR", seed=1), tiny_gfl(seed=2), [SL2()])


@pytest.mark.parametrize("student", ["DETR", pytest.param("torchvision Faster R-CNN", marks=pytest.mark.slow)])
def test_students_of_different_kinds_keep_the_contract(student):
    report = check_method(SL2, tiny_of(student, seed=0), tiny_retinanet(seed=1))
    assert report.refused is None
