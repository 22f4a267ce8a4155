import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
import transformers

from kdtoolkit.adapters.native import DenseAdapter
from kdtoolkit.adapters.transformers import ADAPTERS, build_model
from kdtoolkit.adapters.transformers.base import Queries, pixel_mask
from kdtoolkit.adapters.transformers.conditional_detr import ConditionalDetrAdapter
from kdtoolkit.adapters.transformers.dab_detr import DabDetrAdapter
from kdtoolkit.adapters.transformers.deformable_detr import DeformableDetrAdapter
from kdtoolkit.adapters.transformers.detr import DetrAdapter
from kdtoolkit.adapters.transformers.detr_base import tiny_backbone, tiny_detr
from kdtoolkit.contract import Capability, PriorKind
from kdtoolkit.distiller import Distiller
from kdtoolkit.errors import IncompatibleError, KDError
from kdtoolkit.libraries import adapt
from kdtoolkit.methods import PKD, CrossKD
from kdtoolkit.models import open_detector
from tests._narrow import check_gradients_of_narrow_images
from tests._traced import traced
from tests.conftest import cases_of, tiny_gfl

torch.set_num_threads(1)

detr = partial(tiny_detr, transformers.DetrForObjectDetection, 3)
conditional = partial(tiny_detr, transformers.ConditionalDetrForObjectDetection, 3)
dab = partial(tiny_detr, transformers.DabDetrForObjectDetection, 3)
single = partial(
    tiny_detr,
    transformers.DeformableDetrForObjectDetection,
    3,
    backbone_config=tiny_backbone(2, 3, 4),
    d_model=64,
)
VARIANTS = {
    "detr": (DetrAdapter, detr),
    "detr-learned-positions": (DetrAdapter, partial(detr, position_embedding_type="learned")),
    "conditional": (ConditionalDetrAdapter, conditional),
    "dab": (DabDetrAdapter, dab),
    "dab-patterns": (DabDetrAdapter, partial(dab, num_patterns=2)),
    "deformable": (DeformableDetrAdapter, single),
    "deformable-one-level": (
        DeformableDetrAdapter,
        partial(single, num_feature_levels=1, backbone_config=tiny_backbone(4)),
    ),
    "deformable-refine": (DeformableDetrAdapter, partial(single, with_box_refine=True)),
    "deformable-two-stage": (
        DeformableDetrAdapter,
        partial(single, with_box_refine=True, two_stage=True, two_stage_num_proposals=20),
    ),
}
# Losses of inner layers change what the decoders of DETR and Conditional DETR compute: they normalise between layers.
CASES = {
    f"{name}{'-auxiliary' * auxiliary}": (cls, partial(make, auxiliary_loss=auxiliary))
    for name, (cls, make) in VARIANTS.items()
    for auxiliary in (False, True)
}
QUICK = {"detr", "conditional", "dab", "deformable-two-stage"}  # one of each kind of decoder
EACH = cases_of("case", CASES, QUICK | {"detr-auxiliary", "deformable-two-stage-auxiliary"})
PLAIN = cases_of("case", VARIANTS, QUICK)
FAMILIES = ("detr", "conditional", "dab", "deformable", "deformable-refine", "deformable-two-stage")
FAMILY = cases_of("family", FAMILIES, QUICK)


def build(case, seed=0, **changes):
    """The adapter of a detector whose weights are all random: fresh ones have layers of zeros."""
    cls, make = case
    torch.manual_seed(seed)
    model = make(**changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "backbone" not in name and parameter.ndim < 3:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.tie_weights()
    assert cls.matches(model)
    return cls(model.eval())


def insides(model):
    """Whatever an adapter could have left behind in a model: attributes, hooks, parameters, buffers."""
    return [
        (name, sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks), module.training)
        for name, module in model.named_modules()
    ] + list(model.state_dict())


@pytest.fixture
def batch():
    """Images of unlike sizes, so that whole cells of stride 32 are padding."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 96, 64, generator=generator), torch.rand(3, 50, 120, generator=generator)]
    targets = [
        {"boxes": torch.tensor([[4.0, 6.0, 30.0, 40.0], [20.0, 20.0, 60.0, 90.0]]), "labels": torch.tensor([0, 2])},
        {"boxes": torch.tensor([[10.0, 10.0, 100.0, 45.0]]), "labels": torch.tensor([1])},
    ]
    return images, targets


@pytest.fixture
def empty(batch):
    images, _ = batch
    return images, [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in images]


def library_labels(targets, images):
    """Ground truth as the library's image processors give it, written out again here."""
    return [
        {
            "class_labels": target["labels"],
            "boxes": torch.stack(
                [
                    (target["boxes"][:, 0] + target["boxes"][:, 2]) / 2 / image.shape[2],
                    (target["boxes"][:, 1] + target["boxes"][:, 3]) / 2 / image.shape[1],
                    (target["boxes"][:, 2] - target["boxes"][:, 0]) / image.shape[2],
                    (target["boxes"][:, 3] - target["boxes"][:, 1]) / image.shape[1],
                ],
                1,
            ),
        }
        for target, image in zip(targets, images, strict=True)
    ]


@EACH
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_predictions_losses_and_gradients_are_the_librarys_own(case, train, batch):
    adapter = build(case)
    model = adapter.model.train(train)
    prepared = adapter.prepare(*batch)
    torch.manual_seed(1)  # of dropout
    expected = model(prepared.images, pixel_mask=pixel_mask(prepared), labels=library_labels(batch[1], batch[0]))
    expected.loss.backward()
    expected_gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.manual_seed(1)
    trace = adapter.head(adapter.features(prepared), prepared)
    losses, assignment = adapter.task_losses(trace, prepared)
    assert torch.equal(trace.predictions.logits, expected.logits)
    assert torch.equal(trace.predictions.regression, expected.pred_boxes)
    total = sum(losses.values())
    again = adapter.assign(trace, prepared)  # the loss has matched the same
    assert all(torch.equal(getattr(assignment, name), getattr(again, name)) for name in vars(again))
    assert torch.equal(total, expected.loss)
    assert set(losses) <= set(expected.loss_dict)
    assert ("loss_ce_0" in losses) == model.config.auxiliary_loss
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() <= expected_gradients.keys()
    for name, expected_gradient in expected_gradients.items():  # the library runs unused heads of inner layers: zeros
        gradient = gradients.get(name, torch.zeros_like(expected_gradient))
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["dab-patterns", "deformable", "deformable-refine", "deformable-two-stage"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_wide_ones_are_the_librarys_own_to_the_last_bit(name, train, batch):
    """From some width on products depend on how their factors lie in memory: states must lie as in the library."""
    width = {"hidden_size" if name == "dab-patterns" else "d_model": 256}
    many = {"two_stage_num_proposals": 100} if "two-stage" in name else {"num_queries": 100}
    adapter = build(VARIANTS[name], **width, **many)
    model = adapter.model.train(train)
    prepared = adapter.prepare(*batch)
    torch.manual_seed(1)
    expected = model(prepared.images, pixel_mask=pixel_mask(prepared), labels=library_labels(batch[1], batch[0]))
    torch.manual_seed(1)
    trace = adapter.head(adapter.features(prepared), prepared)
    assert torch.equal(trace.predictions.logits, expected.logits)
    assert torch.equal(trace.predictions.regression, expected.pred_boxes)
    assert torch.equal(sum(adapter.task_losses(trace, prepared)[0].values()), expected.loss)
    if not train:
        for i, state in enumerate(trace.states):
            assert torch.equal(adapter.resume(state, i, trace).logits, trace.predictions.logits)


@EACH
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resumed_from_any_stage_the_head_repeats_itself_to_the_bit(case, precision, batch):
    adapter = build(case)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        _, _, trace = traced(adapter, batch)
        once = trace.predictions
        for i in range(len(adapter.spec.stages)):
            again = adapter.resume(trace.states[i], i, trace)
            for name in ("logits", "regression", "boxes"):
                assert torch.equal(getattr(again, name), getattr(once, name)), (i, name)
                assert getattr(again, name).dtype == torch.float32
            turned = adapter.resume({"decoder": (-trace.states[i]["decoder"][0] + 1,)}, i, trace)
            assert not torch.equal(turned.boxes, once.boxes)
            assert not torch.equal(turned.logits, once.logits)


@EACH
def test_each_layer_says_what_the_library_says_of_it(case, batch):
    """The library tells it if inner layers have losses. Without these losses the heads are the same."""
    adapter = build(case)
    model = adapter.model
    prepared, _, trace = traced(adapter, batch)
    *inner, last = adapter.layers(trace)
    assert last is trace
    assert [len(each.states) for each in inner] == [2, 3]
    if not model.config.auxiliary_loss:
        normalised = isinstance(adapter, DetrAdapter)
        hidden = trace.states[2]["decoder"][0].transpose(1, 2)
        expected = adapter.judge(1, adapter.last_norm(hidden) if normalised else hidden, trace.context.references[1])
        assert torch.equal(inner[1].predictions.logits, expected[0])
        return
    said = model(prepared.images, pixel_mask=pixel_mask(prepared), labels=library_labels(batch[1], batch[0]))
    for each, expected in zip(inner, said.auxiliary_outputs, strict=True):
        assert torch.equal(each.predictions.logits, expected["logits"])
        assert torch.equal(each.predictions.regression, expected["pred_boxes"])


@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.startswith("detr")])
def test_queries_are_placed_at_boxes(name, batch):
    adapter = build(VARIANTS[name])
    prepared = adapter.prepare(*batch)
    content = torch.randn(2, 2, adapter.spec.channels[0])
    boxes = torch.tensor([[4.0, 6.0, 30.0, 40.0], [0.0, 0.0, 64.0, 96.0]]).expand(2, -1, -1)
    priors = adapter.queries_at(content, boxes, prepared)
    assert priors.context.content is content
    is_box = priors.context.references.shape[-1] == 4
    expected = boxes if is_box else ((boxes[..., :2] + boxes[..., 2:]) / 2).repeat(1, 1, 2)
    torch.testing.assert_close(priors.boxes, expected, rtol=0, atol=1e-4)
    trace = adapter.head(adapter.features(prepared), prepared, priors)
    assert torch.equal(adapter.layers(trace)[-1].predictions.logits, trace.predictions.logits)


def test_queries_of_detr_have_no_place():
    assert not DetrAdapter(detr()).spec.places_queries
    assert ConditionalDetrAdapter(conditional()).spec.places_queries


@PLAIN
def test_the_spec_tells_the_truth(case, batch):
    adapter = build(case)
    prepared, features, trace = traced(adapter, batch)
    spec = adapter.spec
    assert spec == adapter.spec
    assert prepared.images.shape[-2:] == (96, 128)
    assert [x.shape[1] for x in features] == list(spec.channels)
    assert [128 // x.shape[3] for x in features] == list(spec.strides)
    assert len(trace.states) == len(spec.stages) == 4
    queries = 40 if adapter.model.config.to_dict().get("num_patterns") else 20
    for stage, state in zip(spec.stages, trace.states, strict=True):
        assert not stage.spatial
        assert {branch: tuple(x.shape for x in tensors) for branch, tensors in state.items()} == {
            branch: tuple((2, channels, queries) for channels in each) for branch, each in stage.channels.items()
        }
    assert spec.priors is PriorKind.QUERIES
    assert spec.activation == trace.predictions.activation
    assert trace.predictions.logits.shape == (2, queries, 3 + (spec.activation == "softmax"))
    assert trace.predictions.probabilities.shape == (2, queries, 3)
    assert trace.predictions.priors.boxes.shape == trace.predictions.boxes.shape == (2, queries, 4)
    assert trace.predictions.priors.per_level == (queries,)
    assert Capability.ASSIGNMENT in spec.capabilities


def test_strides_without_running():
    assert DetrAdapter(detr()).spec.strides == DabDetrAdapter(dab()).spec.strides == (32,)
    assert build(VARIANTS["deformable"]).spec.strides == (8, 16, 32, 64)
    early = tiny_backbone(3, 4)
    early.downsample_in_first_stage = True
    assert build(
        (DeformableDetrAdapter, partial(single, backbone_config=early, num_feature_levels=2))
    ).spec.strides == (32, 64)
    vit = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    plain = {"model_type": "dinov2", "out_features": ["stage1", "stage2"], **vit}
    assert DetrAdapter(detr(backbone_config=plain)).spec.strides == (14,)
    timm = {"model_type": "timm_backbone", "backbone": "resnet10t", "out_indices": [2, 3], "num_channels": 3}
    for cls, make in (VARIANTS["detr"], VARIANTS["dab"]):
        assert cls(make(backbone_config=dict(timm))).spec.strides == (16,)


def test_places_in_images_are_exact_under_autocast(batch):
    adapter = build(VARIANTS["deformable-two-stage"])
    given = []
    adapter.model.model.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        for name, parameter in adapter.model.named_parameters():
            if "bbox_embed" in name or "class_embed" in name:
                parameter.zero_()  # each box is the place of its cell, each cell as good as the others
        prepared = adapter.prepare(*batch)
        features = adapter.features(prepared)
        adapter.model.config.two_stage_num_proposals = sum(level[0, 0].numel() for level in features)
        expected = adapter.head(features, prepared).predictions.priors.boxes
        with torch.autocast("cpu", torch.bfloat16):
            adapter.features(prepared)
            rounded = tuple(level.bfloat16() for level in features)
            found = adapter.head(rounded, prepared).predictions.priors.boxes
    for name in ("valid_ratios", "spatial_position_embeddings"):
        assert torch.equal(given[0][name], given[1][name])
    orders = [boxes[0].double() @ torch.tensor([1.0, 1e3, 1e6, 1e9]).double() for boxes in (expected, found)]
    ordered = [boxes[0][order.argsort()] for boxes, order in zip((expected, found), orders, strict=True)]
    torch.testing.assert_close(ordered[1], ordered[0], rtol=0, atol=1e-3)


def test_two_stage_images_with_fewer_cells_than_queries_are_told(batch):
    adapter = build(VARIANTS["deformable-two-stage"], two_stage_num_proposals=1000)
    with pytest.raises(KDError, match=r"selects 1000 queries .* have \d+: .*fewer two_stage_num_proposals"):
        traced(adapter, batch)


@pytest.mark.parametrize("cls", ADAPTERS)
def test_configs_may_ask_for_tuples(cls, batch):
    images, targets = batch
    for make in cls.examples().values():
        torch.manual_seed(0)
        model = make(3).eval()
        expected = Distiller(None, model).eval()(images, targets)
        model.config.return_dict = False
        losses = Distiller(None, model).eval()(images, targets)
        assert {k: v.item() for k, v in losses.items()} == {k: v.item() for k, v in expected.items()}


@FAMILY
def test_boxes_are_relative_to_each_images_content(family, batch):
    """Padding changes nothing: boxes of an image alone are those of the image in a wider batch, but for the weave."""
    adapter = build(VARIANTS[family])
    prepared, _, trace = traced(adapter, batch)
    scale = torch.tensor([[64.0, 96.0, 64.0, 96.0], [120.0, 50.0, 120.0, 50.0]])[:, None]
    centre, size = trace.predictions.regression.split(2, -1)
    torch.testing.assert_close(trace.predictions.boxes, torch.cat([centre - size / 2, centre + size / 2], -1) * scale)
    for labels, expected in zip(adapter.library_labels(prepared), library_labels(batch[1], batch[0]), strict=True):
        torch.testing.assert_close(labels["boxes"], expected["boxes"])


@FAMILY
def test_own_queries_handed_over_repeat_the_own_pass(family, batch):
    adapter = build(VARIANTS[family])
    prepared, features, trace = traced(adapter, batch)
    again = adapter.head(features, prepared, trace.predictions.priors)
    assert torch.equal(again.predictions.boxes, trace.predictions.boxes)
    assert torch.equal(again.predictions.logits, trace.predictions.logits)
    assert all(torch.equal(a["decoder"][0], b["decoder"][0]) for a, b in zip(again.states, trace.states, strict=True))


@FAMILY
def test_queries_of_another_detector_go_through_the_own_decoder(family, batch):
    student = build(VARIANTS[family])
    many = {"two_stage_num_proposals": 31} if "two-stage" in family else {"num_queries": 31}
    teacher = build(VARIANTS[family], seed=5, **many)
    prepared, features, own = traced(student, batch)
    _, _, theirs = traced(teacher, batch)
    priors = theirs.predictions.priors
    trace = student.head(features, prepared, priors)
    assert trace.predictions.logits.shape[1] == 31
    assert torch.equal(trace.predictions.priors.boxes, priors.boxes)
    for name, value in vars(priors.context).items():
        given = getattr(trace.predictions.priors.context, name)
        assert given is value or torch.equal(given, value)
    assert not torch.equal(trace.predictions.logits, theirs.predictions.logits)
    assert torch.equal(student.resume(trace.states[1], 1, trace).boxes, trace.predictions.boxes)
    # Each of what queries are made of matters.
    queries = priors.context
    for name in ("content", "positions", "references"):
        value = getattr(queries, name)
        if value is not None:
            changed = replace(priors, context=replace(queries, **{name: value * 0.5 + 0.1}))
            if name == "references":  # which follow the boxes
                changed = replace(priors, boxes=priors.boxes * 0.5 + 3)
            assert not torch.equal(student.head(features, prepared, changed).predictions.boxes, trace.predictions.boxes)
    assert student.spec.prior_form == teacher.spec.prior_form
    assert own.predictions.logits.shape[1] == 20


def test_prior_forms():
    forms = {family: build(VARIANTS[family]).spec.prior_form for family in FAMILIES}
    assert forms["detr"] == "queries of content 32, positions 32"
    assert forms["conditional"] == "queries of content 32, positions 32, reference points"
    assert forms["dab"] == "queries of content 32, reference boxes"
    assert forms["deformable"] == forms["deformable-refine"] == "queries of content 64, positions 64, reference points"
    assert forms["deformable-two-stage"] == "queries of content 64, positions 64, reference boxes"


def test_priors_that_are_no_queries_are_refused(batch):
    adapter = build(VARIANTS["detr"])
    prepared, features, trace = traced(adapter, batch)
    with pytest.raises(KDError, match="not made of queries"):
        adapter.head(features, prepared, replace(trace.predictions.priors, context=None))


@FAMILY
def test_the_matching_is_one_to_one(family, batch):
    adapter = build(VARIANTS[family])
    prepared, _, trace = traced(adapter, batch)
    assignment = adapter.assign(trace, prepared)
    assert assignment.labels.dtype == torch.int64
    positive = assignment.positive
    assert positive.sum(1).tolist() == [2, 1]
    assert sorted(assignment.labels[0][positive[0]].tolist()) == [0, 2]
    for i, target in enumerate(batch[1]):
        for query in positive[i].nonzero()[:, 0].tolist():
            same = target["labels"] == assignment.labels[i, query]
            assert torch.equal(assignment.boxes[i, query], target["boxes"][same][0])
    assert assignment.weights.eq(1).all()
    assert assignment.normaliser == 3
    # A prediction that hits a box is the one that answers for it.
    regression = trace.predictions.regression.clone()
    regression[1, 7] = adapter.library_labels(prepared)[1]["boxes"][0]
    logits = torch.zeros_like(trace.predictions.logits)
    logits[1, 7, 1] = 9.0
    hit = replace(trace, predictions=replace(trace.predictions, regression=regression, logits=logits))
    assert adapter.assign(hit, prepared).labels[1].tolist() == [3] * 7 + [1] + [3] * 12


@FAMILY
def test_detections_are_those_of_the_image_processor(family, batch):
    adapter = build(VARIANTS[family])
    processor = {
        "detr": transformers.DetrImageProcessor,
        "conditional": transformers.ConditionalDetrImageProcessor,
        "dab": transformers.ConditionalDetrImageProcessor,
    }.get(family, transformers.DeformableDetrImageProcessor)()
    prepared = replace(adapter.prepare(batch[0]), original_sizes=((192, 128), (100, 240)))
    trace = adapter.head(adapter.features(prepared), prepared)
    output = adapter.model(prepared.images, pixel_mask=pixel_mask(prepared))
    for threshold in (0.0, 0.4):
        expected = processor.post_process_object_detection(output, threshold, [(192, 128), (100, 240)])
        for ours, own in zip(adapter.detections(trace, prepared), expected, strict=True):
            kept = ours["scores"] > threshold
            order = own["scores"].argsort(descending=True, stable=True)
            assert all(torch.equal(ours[key][kept], own[key][order]) for key in ("boxes", "scores", "labels"))
            assert ours["scores"].diff().le(0).all()
            assert len(ours["scores"]) == (20 if family == "detr" else 60)


@EACH
def test_images_without_boxes(case, empty):
    adapter = build(case)
    adapter.model.train()
    prepared, _, trace = traced(adapter, empty)
    losses, _ = adapter.task_losses(trace, prepared)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in adapter.model.parameters() if p.grad is not None)
    assignment = adapter.assign(trace, prepared)
    assert not assignment.positive.any()
    assert assignment.normaliser == 1


@EACH
def test_under_autocast_predictions_are_float32_and_losses_finite(case, batch):
    adapter = build(case)
    adapter.model.train()
    with torch.autocast("cpu", torch.bfloat16):
        prepared, _, trace = traced(adapter, batch)
        losses, _ = adapter.task_losses(trace, prepared)
    assert trace.predictions.logits.dtype == trace.predictions.boxes.dtype == torch.float32
    total = sum(losses.values())
    assert total.dtype == torch.float32
    assert total.isfinite()
    total.backward()
    assert all(p.grad.isfinite().all() for p in adapter.model.parameters() if p.grad is not None)


@FAMILY
@pytest.mark.parametrize(
    ("whose", "precision"), [("teacher", "float32"), ("student", "float32"), ("student", "bfloat16")]
)
def test_crosskd_between_two_of_a_family(family, whose, precision, batch, empty):
    many = {"two_stage_num_proposals": 25} if "two-stage" in family else {"num_queries": 25}
    student, teacher = build(VARIANTS[family]), build(VARIANTS[family], seed=5, decoder_layers=2, **many)
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    untouched = insides(student.model), insides(teacher.model.eval().requires_grad_(False))
    distiller = Distiller(teacher, student, [CrossKD(priors=whose)])
    distiller.train()
    for data in (batch, empty):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            losses = distiller(*data)
        assert {"crosskd/cls", "crosskd/box"} <= set(losses)
        assert all(loss.isfinite() for loss in losses.values())
    student.model.zero_grad()
    (losses["crosskd/cls"] + losses["crosskd/box"]).backward()
    gradients = [p.grad for n, p in student.model.named_parameters() if "decoder.layers" in n and p.grad is not None]
    assert gradients
    assert any(gradient.any() for gradient in gradients)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(p.grad is None for p in teacher.model.parameters())
    assert not teacher.model.training
    assert student.model.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())
    student.model.eval()
    assert (insides(student.model), insides(teacher.model)) == untouched


def test_crosskd_vanishes_between_twins(batch):
    student, teacher = build(VARIANTS["deformable-two-stage"]), build(VARIANTS["deformable-two-stage"])
    distiller = Distiller(teacher, student, [CrossKD()]).eval()
    student.model.eval()
    losses = distiller(*batch)
    torch.testing.assert_close(losses["crosskd/cls"], torch.tensor(0.0), rtol=0, atol=1e-5)
    torch.testing.assert_close(losses["crosskd/box"], torch.tensor(0.0), rtol=0, atol=1e-4)


def test_crosskd_refuses_queries_of_another_make():
    with pytest.raises(IncompatibleError, match="reference boxes"):
        Distiller(build(VARIANTS["dab"]), build(VARIANTS["conditional"]), [CrossKD()])


@pytest.mark.parametrize("family", ["detr", "deformable-two-stage"])
def test_features_go_to_and_from_a_pyramid(family, batch):
    gfl = DenseAdapter(tiny_gfl(seed=1))
    for teacher, student in ((build(VARIANTS[family]), gfl), (gfl, build(VARIANTS[family]))):
        losses = Distiller(teacher, student, [PKD()]).train()(*batch)
        losses.total.backward()
        assert losses["pkd/feature"].isfinite()
        assert losses["pkd/feature"] > 0


def test_without_methods_the_losses_are_the_students_own(batch):
    adapter = build(VARIANTS["conditional"])
    adapter.model.train()
    prepared = adapter.prepare(*batch)
    torch.manual_seed(3)
    expected = adapter.model(prepared.images, pixel_mask=pixel_mask(prepared), labels=adapter.library_labels(prepared))
    torch.manual_seed(3)
    assert torch.equal(Distiller(None, adapter)(*batch).total, expected.loss)


def test_prepare_normalises_and_pads(batch):
    images, targets = batch
    adapter = DetrAdapter(detr())
    prepared = adapter.prepare(images, targets)
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    torch.testing.assert_close(prepared.images[1, :, :50, :120], (images[1] - mean) / std)
    assert not prepared.images[1, :, 50:].any()
    assert not prepared.images[1, :, :, 120:].any()
    assert prepared.sizes == prepared.original_sizes == ((96, 64), (50, 120))
    assert prepared.padded_sizes == ((96, 64), (64, 128))
    mask = pixel_mask(prepared)
    assert mask[1, :50, :120].all()
    assert mask[1].sum() == 50 * 120
    plain = DetrAdapter(detr(), image_mean=(0, 0, 0), image_std=(1, 1, 1), size_divisor=1).prepare(images)
    assert plain.images.shape == (2, 3, 96, 120)
    assert torch.equal(plain.images[1, :, :50, :120], images[1])
    assert plain.boxes == ()
    with pytest.raises(KDError, match="image 0 has the shape"):
        adapter.prepare([torch.zeros(64, 64, 3)])


def test_layers_left_out_at_random_are_refused():
    with pytest.raises(KDError, match="decoder_layerdrop"):
        ConditionalDetrAdapter(conditional(decoder_layerdrop=0.1))


@pytest.mark.parametrize("cls", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused(cls, dtype):
    for make in cls.examples().values():
        with pytest.raises(KDError, match=rf"{dtype}.*model\.float\(\)"):
            adapt(make(2).to(dtype))


@pytest.mark.parametrize("cls", ADAPTERS)
def test_examples_work_on_any_small_image(cls):
    for make in cls.examples().values():
        torch.manual_seed(0)
        model = make(2)
        adapter = cls(model)
        assert [other for other in ADAPTERS if other.matches(model)] == [cls]
        targets = [{"boxes": torch.tensor([[4.0, 6.0, 30.0, 40.0]]), "labels": torch.tensor([1])}]
        losses = Distiller(None, adapter).train()([torch.rand(3, 64, 64)], targets)
        assert losses.total.isfinite()
        assert adapter.spec.num_classes == 2


def test_priors_of_queries_without_a_place_are_the_whole_image(batch):
    adapter = build(VARIANTS["detr"])
    prepared = adapter.prepare(*batch)
    priors = adapter.priors(Queries(torch.zeros(2, 3, 32)), prepared)
    assert priors.boxes.tolist() == [[[0.0, 0.0, 64.0, 96.0]] * 3, [[0.0, 0.0, 120.0, 50.0]] * 3]
    points = adapter.priors(Queries(torch.zeros(2, 1, 32), references=torch.full((2, 1, 2), 0.5)), prepared)
    assert points.boxes[0].tolist() == [[32.0, 48.0, 32.0, 48.0]]
    boxes = torch.tensor([0.5, 0.5, 0.5, 0.25]).expand(2, 1, 4)
    boxed = adapter.priors(Queries(torch.zeros(2, 1, 32), references=boxes), prepared)
    assert boxed.boxes[1].tolist() == [[30.0, 18.75, 90.0, 31.25]]


TINY_ARGS = {
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage4"],
    },
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "d_model": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_queries": 7,
}


def test_build_by_type():
    model = build_model("detr", 4, TINY_ARGS)
    assert isinstance(model, transformers.DetrForObjectDetection)
    assert DetrAdapter(model).spec.num_classes == 4
    assert DetrAdapter(model).spec.channels == (32,)
    for name in ("conditional-detr", "conditional_detr"):
        assert isinstance(build_model(name, 4, TINY_ARGS), transformers.ConditionalDetrForObjectDetection)
    timm = build_model("detr", 4, {**TINY_ARGS, "backbone_config": None, "backbone": "resnet10t"})
    assert timm.config.backbone_config.backbone == "resnet10t"
    with pytest.raises(KDError, match="no num_querys"):
        build_model("detr", 4, {"num_querys": 7})
    with pytest.raises(KDError, match="num_labels follows"):
        build_model("detr", 4, {"num_labels": 7})
    with pytest.raises(KDError, match="two_stage"):
        build_model("deformable_detr", 4, {"two_stage": True})


def test_build_from_a_folder(tmp_path):
    model = build_model("detr", 4, TINY_ARGS)
    model.save_pretrained(tmp_path)
    same = build_model(str(tmp_path), 4, {})
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in same.state_dict().items())
    other = build_model(str(tmp_path), 2, {"auxiliary_loss": True})
    assert other.class_labels_classifier.out_features == 3
    assert other.config.auxiliary_loss
    assert torch.equal(other.bbox_predictor.layers[0].weight, model.bbox_predictor.layers[0].weight)
    with pytest.raises(KDError, match="no colour"):
        build_model(str(tmp_path), 4, {"colour": 1})


def test_a_folder_without_weights_of_a_layer_is_not_trained(tmp_path):
    model = build_model("detr", 3, TINY_ARGS)
    model.save_pretrained(tmp_path / "whole")
    whole = open_detector(tmp_path / "whole")
    assert (whole.trained, whole.notes) == (True, ())
    model.model.save_pretrained(tmp_path / "headless")
    opened = open_detector(tmp_path / "headless")
    assert not opened.trained
    assert "random: bbox_predictor.layers.0.bias" in opened.notes[0]
    assert not open_detector("hf/detr", args=TINY_ARGS, weights=tmp_path / "headless", num_classes=3).trained
    config = json.loads((tmp_path / "whole/config.json").read_text())
    config.update(id2label={"0": "ant", "1": "bee"}, label2id={"ant": 0, "bee": 1})
    (tmp_path / "whole/config.json").write_text(json.dumps(config))
    opened = open_detector(tmp_path / "whole")
    assert (opened.trained, opened.class_names) == (False, ("ant", "bee"))
    assert "class_labels_classifier.bias, class_labels_classifier.weight. Train the detector" in opened.notes[0]


def test_a_folder_brings_its_image_processor(tmp_path):
    build_model("detr", 4, TINY_ARGS).save_pretrained(tmp_path)
    assert adapt(build_model(str(tmp_path), 4, {})).image_mean == pytest.approx((0.485, 0.456, 0.406))
    size = {"shortest_edge": 64, "longest_edge": 96}
    processor = transformers.DetrImageProcessor(size=size, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])
    processor.save_pretrained(tmp_path)
    adapter = adapt(build_model(str(tmp_path), 4, {}))
    image, box = torch.rand(3, 50, 100), torch.tensor([[10.0, 10.0, 50.0, 40.0]])
    batch = adapter.prepare([image], [{"boxes": box, "labels": torch.tensor([1])}])
    own = processor(images=image, do_rescale=False, return_tensors="pt")["pixel_values"]
    height, width = own.shape[-2:]
    assert (batch.sizes, batch.original_sizes) == (((height, width),), ((50, 100),))
    torch.testing.assert_close(batch.images[..., :height, :width], own)
    factor = torch.tensor([width / 100, height / 50] * 2)
    torch.testing.assert_close(batch.boxes[0], box * factor)
    found = adapter.detections(adapter.head(adapter.features(batch), batch), batch)
    assert found[0]["boxes"].max() < 110
    plain = type(adapter)(adapter.model, image_mean=(0.0,) * 3, image_std=(1.0,) * 3).prepare([image])
    torch.testing.assert_close(plain.images[0, :, :height, :width], processor.resize(image, processor.size))


@pytest.mark.parametrize(
    ("settings", "mean", "std"),
    [
        ({"do_normalize": False}, 0.0, 1.0),
        ({"image_mean": 0.5, "image_std": 0.25}, 0.5, 0.25),
        ({"rescale_factor": 2 / 255, "image_mean": 1.0, "image_std": 0.5}, 0.5, 0.25),
        ({"do_rescale": False, "image_mean": 127.5, "image_std": 51.0}, 0.5, 0.2),
    ],
)
def test_all_that_a_processor_does_to_values_is_one_mean_and_std(settings, mean, std, tmp_path):
    build_model("detr", 4, TINY_ARGS).save_pretrained(tmp_path)
    transformers.DetrImageProcessor(**settings).save_pretrained(tmp_path)
    adapter = adapt(build_model(str(tmp_path), 4, {}))
    assert adapter.image_mean == pytest.approx((mean,) * 3)
    assert adapter.image_std == pytest.approx((std,) * 3)


def test_a_broken_image_processor_is_named(tmp_path):
    build_model("detr", 4, TINY_ARGS).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(KDError, match=r"image processor of .* cannot be used .*: correct .*preprocessor_config\.json"):
        adapt(build_model(str(tmp_path), 4, {}))


def test_narrow_images_are_learnt_from_under_autocast():
    torch.manual_seed(0)
    check_gradients_of_narrow_images(adapt(DeformableDetrAdapter.tiny(3)), 32)


def test_weights_of_a_folder_are_read_in_float32(tmp_path):
    model = build_model("detr", 4, TINY_ARGS)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = build_model(str(tmp_path), 4, {})
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(
        torch.equal(value.float(), loaded.state_dict()[name].float()) for name, value in model.state_dict().items()
    )
    adapt(loaded)


def test_pickles_are_not_read(tmp_path):
    model = build_model("detr", 4, TINY_ARGS)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(KDError, match="safetensors"):
        build_model(str(tmp_path), 4, {})


def test_unknown_names(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(KDError, match=r"hf/nobody/nothing.*deformable_detr"):
        build_model("nobody/nothing", 4, {})
    with pytest.raises(KDError, match=r"config\.json"):
        build_model(str(tmp_path), 4, {})
    for name in ("detr2", "some/folder/missing", str(tmp_path / "missing")):
        with pytest.raises(
            KDError, match=r"no such model type, and no such folder.*\(conditional_detr, d_fine, dab_detr"
        ):
            build_model(name, 4, {})


def test_without_a_network_the_hub_is_asked_once(monkeypatch):
    """By the library's own tries it takes more than a minute until the error comes."""
    asked = []

    def session():
        asked.append(1)
        raise OSError("Name or service not known")

    def fail(*args, **kwargs):
        raise AssertionError("the library asks the hub")

    monkeypatch.setattr("kdtoolkit.adapters.transformers.get_session", session)
    monkeypatch.setattr("huggingface_hub.utils._http.get_session", fail)
    with pytest.raises(KDError, match=r"hf/nobody/nothing.*connect"):
        build_model("nobody/nothing", 4, {})
    assert asked == [1]


def test_deformable_example_is_the_strongest():
    config = DeformableDetrAdapter.tiny(3).config
    assert config.two_stage
    assert config.with_box_refine
    assert SimpleNamespace(**config.to_dict()).num_feature_levels == 4
