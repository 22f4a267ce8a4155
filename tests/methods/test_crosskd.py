import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kdtoolkit import Distiller, IncompatibleError, KDError
from kdtoolkit.boxes import elementwise_giou
from kdtoolkit.compatibility import shared_levels
from kdtoolkit.contract import Exchange, Predictions, PriorKind, Priors, Stage, View
from kdtoolkit.libraries import adapt
from kdtoolkit.methods.common import quality_focal_kd
from kdtoolkit.methods.crosskd import CrossKD, align_statistics
from kdtoolkit.methods.prediction_losses import classification_kd
from kdtoolkit.testing import check_method
from tests.conftest import DENSE, tiny_atss, tiny_gfl, tiny_of
from tests.methods._views import spec


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 10_000))
def test_aligned_states_have_the_teachers_statistics(n, c, cells, seed):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(n, c, cells, 3, generator=generator) * 3 + 1
    teacher = torch.randn(n, c, cells, 3, generator=generator) - 2
    aligned = align_statistics(student, teacher)
    for channel in range(c):
        torch.testing.assert_close(aligned[:, channel].mean(), teacher[:, channel].mean(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(aligned[:, channel].std(), teacher[:, channel].std(), rtol=1e-4, atol=1e-5)


def test_alignment_of_a_constant_channel_has_a_finite_gradient():
    student = torch.zeros(2, 1, 3, 3, requires_grad=True)
    align_statistics(student, torch.randn(2, 1, 3, 3)).sum().backward()
    assert torch.isfinite(student.grad).all()


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([1.0, 2.0]), st.integers(0, 10_000))
def test_quality_focal_loss_against_a_loop(beta, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (4 * torch.randn(2, 5, 3, generator=generator)).unbind()
    ours = quality_focal_kd(student, teacher, beta)
    for i in range(5):
        for k in range(3):
            q, p = teacher[i, k].sigmoid(), student[i, k].sigmoid()
            bce = -(q * F.logsigmoid(student[i, k]) + (1 - q) * F.logsigmoid(-student[i, k]))
            torch.testing.assert_close(ours[i, k], bce * (p - q).abs() ** beta, rtol=1e-4, atol=1e-6)


def exchange_of(teacher, student, images, targets):
    """A step's exchange, assembled by hand."""
    views = []
    for adapter in (adapt(student), adapt(teacher)):
        batch = adapter.prepare(images, targets)
        features = adapter.features(batch)
        views.append(View(adapter, batch, features, adapter.head(features, batch)))
    return Exchange(*views)


@pytest.mark.parametrize("stage", [0, 1, 2, -1, -2])
@pytest.mark.parametrize("tap", ["after", "before"])
def test_cross_head_predictions_of_twins_are_the_teachers_own(stage, tap, batch):
    teacher, student = tiny_gfl(seed=1).eval(), tiny_gfl(seed=1).eval()
    method = CrossKD(stage=stage, tap=tap)
    method.setup(adapt(student).spec, adapt(teacher).spec)
    exchange = exchange_of(teacher, student, *batch)
    cross, own = method.cross(exchange.matched()), exchange.teacher.head.predictions
    torch.testing.assert_close(cross.logits, own.logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(cross.regression, own.regression, rtol=1e-3, atol=1e-3)


def test_terms_are_computed_from_cross_head_predictions(batch):
    teacher, student = tiny_gfl(seed=1), tiny_gfl(seed=2)
    method = CrossKD()
    losses = Distiller(teacher, student, [method])(*batch)
    exchange = exchange_of(teacher, student, *batch)
    cross, own = method.cross(exchange.matched()), exchange.teacher.head.predictions
    positives = exchange.matched().teacher_assignment.positive.sum(-1).clamp(min=1).sum()
    score = own.logits.sigmoid().amax(-1)
    kl = F.kl_div(cross.regression.log_softmax(-1), own.regression.log_softmax(-1), reduction="none", log_target=True)
    weights = exchange.matched().teacher_assignment.weights
    expected_cls = (quality_focal_kd(cross.logits, own.logits).sum(-1) * weights).sum() / positives
    expected_box = 4 * (score * weights * kl.sum(-1).mean(-1)).sum() / (score * weights).sum()
    torch.testing.assert_close(losses["crosskd/cls"], expected_cls, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["crosskd/box"], expected_box, rtol=1e-4, atol=1e-6)


def test_gradient_reaches_the_students_tower_but_not_its_predictors(batch):
    teacher, student = tiny_gfl(seed=1), tiny_gfl(seed=2)
    losses = Distiller(teacher, student, [CrossKD()])(*batch)
    (losses["crosskd/cls"] + losses["crosskd/box"]).backward()
    reached = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("backbone" in name for name in reached)
    # Its last block and what predicts come after the state that is handed over.
    own = {name for name, _ in student.named_parameters() if name.startswith(("towers", "predictors"))}
    assert reached & own == {name for name in own if name.startswith(("towers.cls.0", "towers.reg.0"))}
    assert all(p.grad is None for p in teacher.parameters())


def test_centerness_is_a_term_where_the_teacher_judges_it(batch):
    losses = Distiller(tiny_atss(seed=1), tiny_atss(seed=2), [CrossKD()])(*batch)
    assert losses["crosskd/quality"] > 0
    assert "crosskd/quality" not in Distiller(tiny_gfl(seed=1), tiny_atss(seed=2), [CrossKD()])(*batch)


@pytest.mark.parametrize("teacher", DENSE)
@pytest.mark.parametrize("student", DENSE)
def test_works_between_kinds_and_channel_counts(teacher, student, batch):
    small = student(seed=2, head_channels=8)
    losses = Distiller(teacher(seed=1), small, [CrossKD()])(*batch)
    losses.total.backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in small.parameters() if p.grad is not None)


def test_a_stage_the_head_does_not_have_is_refused():
    with pytest.raises(IncompatibleError, match="stages 0 to 2, so there is no stage 3"):
        Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [CrossKD(stage=3)])


def test_proposal_networks_that_do_not_fit_are_refused_with_the_way_out():
    def two_stage(strides):
        first = spec(num_classes=1, strides=strides, stages=(Stage("pyramid", {"rpn": (4,) * len(strides)}),) * 2)
        stages = (Stage("roi", {"box": (4,)}),) * 2
        return spec(priors=PriorKind.PROPOSALS, prior_form="boxes", stages=stages, first_stage=first)

    both = CrossKD(proposal_weight=1.0)
    assert both.refuses(two_stage((8, 16)), two_stage((8, 16))) is None
    assert "proposal_weight=0" in both.refuses(two_stage((8, 16)), two_stage((32, 64)))
    assert CrossKD().refuses(two_stage((8, 16)), two_stage((32, 64))) is None


def test_levels_of_repeated_strides_are_paired_once():
    assert shared_levels(spec(strides=(32, 32, 64)), spec(strides=(16, 32, 64))) == [(0, 1), (2, 2)]
    assert shared_levels(spec(strides=(32, 32, 64)), spec(strides=(32, 32, 64))) == [(0, 0), (1, 1), (2, 2)]


def test_detectors_that_share_some_strides_are_compared_on_those(batch):
    """A level more on either side adds nothing but its share of the normaliser, and gets no gradient."""
    tall, short = (8, 16, 32, 64), (8, 16, 32)
    for teacher, student in ((tall, short), (short, tall)):
        teacher, student = tiny_gfl(seed=1, strides=teacher), tiny_gfl(seed=2, strides=student)
        adapters = adapt(student), adapt(teacher)
        distiller = Distiller(teacher, student, [CrossKD()])
        distiller(*batch).total.backward()
        method = distiller.methods[0]
        views = []
        for adapter in adapters:
            prepared = adapter.prepare(*batch)
            features = tuple(x.detach().requires_grad_() for x in adapter.features(prepared))
            views.append(View(adapter, prepared, features, adapter.head(features, prepared)))
        terms = method(Exchange(*views))
        gradients = torch.autograd.grad(sum(terms.values()), views[0].features, allow_unused=True)
        assert [gradient is not None and bool(gradient.any()) for gradient in gradients] == [True] * 3 + [False] * (
            len(gradients) - 3
        )
        assert all(term.isfinite() and term > 0 for term in terms.values())


def test_other_strides_are_refused():
    assert "no stride in common" in CrossKD().refuses(spec(strides=(8, 16)), spec(strides=(32, 64)))


def test_an_exponent_with_an_infinite_gradient_is_refused():
    assert CrossKD(beta=0).distances.beta == 0
    with pytest.raises(KDError, match="must be 0, or at least 1"):
        CrossKD(beta=0.5)


def test_the_tap_before_the_activation_is_another_one(batch):
    """Only what a ReLU cuts off tells them apart, which the ReLU after the alignment does not bring back."""
    after, before = (
        Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [CrossKD(tap=tap)])(*batch) for tap in ("after", "before")
    )
    assert after["crosskd/cls"] != before["crosskd/cls"]
    assert after["crosskd/box"] != before["crosskd/box"]


def test_the_settings_for_fcos_are_the_published_ones():
    method = CrossKD.for_fcos()
    losses = method.distances
    assert (method.stage, losses.cls_weight, losses.box_weight, losses.quality_weight) == (-2, 0.4, 0.75, 0)
    assert losses.box_loss == "iou"


@pytest.mark.parametrize("priors", ["student", "teacher"])
def test_whose_proposals_go_through_both_heads(priors, batch):
    teacher, student = (tiny_of("torchvision Faster R-CNN", seed=seed) for seed in (1, 2))
    method = CrossKD(priors=priors)
    distiller = Distiller(teacher, student, [method])
    asked = []
    whole = Exchange.matched
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Exchange, "matched", lambda exchange, whose="teacher": asked.append(whose) or whole(exchange, whose)
        )
        distiller(*batch)
    assert asked == [priors]


def test_statistics_are_of_real_proposals_alone(batch):
    """One image has few proposals beside the other, and boxes of the whole image fill its gap."""
    teacher, student = (tiny_of("torchvision Faster R-CNN", seed=seed).eval() for seed in (1, 2))
    images = [batch[0][0], batch[0][1][:, :, :8]]
    targets = [{"boxes": torch.tensor([[1.0, 1.0, 7.0, 40.0]]), "labels": torch.tensor([1])}] * 2
    exchange = exchange_of(teacher, student, images, targets)
    pair = exchange.matched()
    priors, method = pair.student.predictions.priors, CrossKD()
    assert priors.context[0] != priors.context[1]
    method.setup(exchange.student.spec, exchange.teacher.spec)
    crossed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair, "finish_with_teacher", lambda state, stage: crossed.append(state))
        method.cross(pair)
    heads = [adapt(model).model.roi_heads for model in (student, teacher)]
    alone = []
    for view, head in zip((exchange.student, exchange.teacher), heads, strict=True):
        maps = dict(zip(adapt(view.adapter.model).level_names, view.maps, strict=True))
        proposals = [boxes[:count] for boxes, count in zip(priors.boxes, priors.context, strict=True)]
        pooled = head.box_roi_pool(maps, proposals, [tuple(view.batch.images.shape[-2:])])
        alone.append(head.box_head.fc6(pooled.flatten(1)).relu())
    torch.testing.assert_close(crossed[0]["box"][0], align_statistics(*alone))


def test_proposal_terms_are_those_of_the_first_stage_weighted(batch):
    teacher, student = (tiny_of("torchvision Faster R-CNN", seed=seed) for seed in (1, 2))
    losses = []
    for weight in (1.0, 3.0):
        torch.manual_seed(0)
        losses.append(Distiller(teacher, student, [CrossKD(proposal_weight=weight)])(*batch))
    for term in ("crosskd/proposal_cls", "crosskd/proposal_box"):
        assert losses[0][term] > 0
        torch.testing.assert_close(losses[1][term], 3 * losses[0][term], rtol=1e-4, atol=0)
    torch.testing.assert_close(losses[1]["crosskd/cls"], losses[0]["crosskd/cls"])


def test_softmax_scores_are_compared_by_kl():
    student, teacher = torch.randn(2, 2, 5, 4, generator=torch.Generator().manual_seed(0)).unbind()
    priors = Priors(torch.zeros(5, 4), torch.zeros(0))
    pair = [
        Predictions(x, torch.zeros(2, 5, 4), priors, lambda r, _: r, activation="softmax") for x in (student, teacher)
    ]
    p, q = student.softmax(-1), teacher.softmax(-1)
    torch.testing.assert_close(classification_kd(*pair), (q * (q / p).log()).sum(-1))


def memory_pair():
    pytest.importorskip("transformers")
    return tiny_of("Deformable DETR", seed=1).eval(), tiny_of("Deformable DETR", seed=2).eval()


def test_the_teachers_decoder_on_the_memory_of_a_twin_says_what_it_says_itself(batch):
    teacher, student = memory_pair()
    method = CrossKD(state="memory")
    method.setup(adapt(student).spec, adapt(teacher).spec)
    twins, others = (method(exchange_of(teacher, each, *batch)) for each in (copy.deepcopy(teacher), student))
    assert set(twins) == {"cls", "box"}
    for name, term in twins.items():
        assert abs(term) < 1e-3 * others[name]


def aligned_on_images(student, teacher, stride, sizes=((64, 64), (50, 60))):
    """The student's map with the teacher's statistics in the cells that begin on an image, channel by channel."""
    cells = [
        (i, y, x)
        for i, (height, width) in enumerate(sizes)
        for y in range(teacher.shape[2])
        for x in range(teacher.shape[3])
        if y * stride < height and x * stride < width
    ]
    i, y, x = torch.tensor(cells).T
    found = teacher.clone()
    # Vectors (M, C) of these cells.
    found[i, :, y, x] = align_statistics(student[i, :, y, x], teacher[i, :, y, x])
    return found


@pytest.mark.parametrize("priors", ["student", "teacher"])
def test_all_layers_of_the_teachers_decoder_are_compared_on_both_memories(priors, batch):
    teacher, student = memory_pair()
    losses = Distiller(teacher, student, [CrossKD(state="memory", priors=priors)]).eval()(*batch)
    exchange = exchange_of(teacher, student, *batch)
    view, pair = exchange.teacher, exchange.matched(priors)
    maps = tuple(map(aligned_on_images, exchange.student.features, view.features, view.spec.strides))
    queries = pair.teacher.predictions.priors
    both = [view.adapter.layers(view.adapter.head(each, view.batch, queries)) for each in (maps, view.features)]
    count = sum(len(target["boxes"]) for target in batch[1])
    cls = box = 0.0
    for cross, own in zip(*both, strict=True):
        cls = cls + quality_focal_kd(cross.predictions.logits, own.predictions.logits).sum() / count
        overlap = elementwise_giou(cross.predictions.boxes, own.predictions.boxes)
        box = box + (own.predictions.scores * (1 - overlap)).sum() / count
    assert len(both[0]) == 3
    torch.testing.assert_close(losses["crosskd/cls"], cls, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["crosskd/box"], box, rtol=1e-4, atol=1e-6)
    (losses["crosskd/cls"] + losses["crosskd/box"]).backward()
    reached = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("encoder.layers" in name for name in reached)
    assert not any("decoder.layers" in name for name in reached)
    assert all(p.grad is None for p in teacher.parameters())


def test_only_detectors_with_queries_have_a_memory():
    with pytest.raises(IncompatibleError, match=r"predict at anchors. Use CrossKD\(stage=0\)"):
        Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [CrossKD(state="memory")])


@pytest.mark.slow
def test_across_the_memory_a_method_keeps_its_promises():
    teacher, student = memory_pair()
    known = {"passes": "the teacher's head runs on the student's memory too: that is the method"}
    check_method(partial(CrossKD, state="memory"), student, teacher, known=known)
