"""RT-DETR, and what all detectors that select their queries have in common: D-FINE, DEIMv2, RF-DETR and LW-DETR too."""

from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("transformers")
import transformers

from kdtoolkit.adapters.native import DenseAdapter
from kdtoolkit.adapters.transformers import ADAPTERS as ALL
from kdtoolkit.adapters.transformers.base import Queries, queries_of
from kdtoolkit.adapters.transformers.dab_detr import DabDetrAdapter
from kdtoolkit.adapters.transformers.dfine import Deimv2Adapter, DFineAdapter
from kdtoolkit.adapters.transformers.rfdetr import LwDetrAdapter, RfDetrAdapter, tiny_lw_detr, tiny_rf_detr
from kdtoolkit.adapters.transformers.rtdetr import RTDetrAdapter, RTDetrV2Adapter, tiny_rt_detr
from kdtoolkit.adapters.transformers.selecting import SelectingAdapter
from kdtoolkit.contract import Capability, PriorKind
from kdtoolkit.distiller import Distiller
from kdtoolkit.errors import IncompatibleError, KDError
from kdtoolkit.libraries import adapt, adapter_classes
from kdtoolkit.methods import PKD, CrossKD
from tests._narrow import check_gradients_of_narrow_images
from tests._traced import traced
from tests.conftest import cases_of, tiny_gfl

torch.set_num_threads(1)

ADAPTERS = [cls for cls in ALL if issubclass(cls, SelectingAdapter)]
rt_detr = partial(tiny_rt_detr, transformers.RTDetrForObjectDetection, 3)
rt_detr_v2 = partial(tiny_rt_detr, transformers.RTDetrV2ForObjectDetection, 3)
d_fine = partial(tiny_rt_detr, transformers.DFineForObjectDetection, 3)
deimv2 = partial(tiny_rt_detr, transformers.Deimv2ForObjectDetection, 3)
FAMILIES = {
    "rt-detr": (RTDetrAdapter, rt_detr),
    "rt-detr-v2": (RTDetrV2Adapter, rt_detr_v2),
    "d-fine": (DFineAdapter, d_fine),
    "deimv2": (Deimv2Adapter, deimv2),
    "rf-detr": (RfDetrAdapter, partial(tiny_rf_detr, 3)),
    "lw-detr": (LwDetrAdapter, partial(tiny_lw_detr, 3)),
}
VARIANTS = {
    "rt-detr-four-levels": (RTDetrAdapter, partial(rt_detr, num_feature_levels=4)),
    "rt-detr-v2-four-levels": (RTDetrV2Adapter, partial(rt_detr_v2, num_feature_levels=4, decoder_n_levels=4)),
    "rt-detr-v2-discrete": (RTDetrV2Adapter, partial(rt_detr_v2, decoder_method="discrete")),
    "rt-detr-dropout": (RTDetrAdapter, partial(rt_detr, dropout=0.1, attention_dropout=0.1)),
    "rt-detr-anchors": (RTDetrAdapter, partial(rt_detr, anchor_image_size=[96, 128])),
    "rt-detr-no-noise": (RTDetrAdapter, partial(rt_detr, num_denoising=0)),
    "rt-detr-last-layer": (RTDetrAdapter, partial(rt_detr, auxiliary_loss=False)),
    "d-fine-projected": (DFineAdapter, partial(d_fine, encoder_hidden_dim=24, decoder_in_channels=[24] * 3)),
    "d-fine-two-layers": (DFineAdapter, partial(d_fine, decoder_layers=2, dropout=0.1)),
    "deimv2-gateway-less": (Deimv2Adapter, partial(deimv2, use_gateway=False, share_bbox_head=True)),
    "deimv2-one-to-one": (Deimv2Adapter, partial(deimv2, use_dense_one_to_one=False)),
    "rf-detr-dropout": (RfDetrAdapter, partial(tiny_rf_detr, 3, dropout=0.1, attention_dropout=0.1)),
    "rf-detr-last-layer": (RfDetrAdapter, partial(tiny_rf_detr, 3, auxiliary_loss=False)),
    "lw-detr-one-level": (LwDetrAdapter, partial(tiny_lw_detr, 3, projector_scale_factors=[1.0], num_queries=10)),
}
CASES = {**FAMILIES, **VARIANTS}
QUICK = {"rt-detr", "d-fine", "rf-detr"}  # one of each kind of head
EACH = cases_of("case", CASES, QUICK)
FAMILY = cases_of("family", list(FAMILIES), QUICK)


def build(case, seed=0, **changes):
    """The adapter of a detector whose weights are all random: fresh ones have layers of zeros."""
    cls, make = case
    torch.manual_seed(seed)
    model = make(**changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "backbone" not in name and parameter.requires_grad and parameter.ndim < 3:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.tie_weights()
    assert cls.matches(model)
    return cls(model.eval())


@pytest.mark.parametrize("case", ["rt-detr-four-levels", "rt-detr-v2-four-levels"])
def test_narrow_images_are_learnt_from_under_autocast(case):
    check_gradients_of_narrow_images(build(VARIANTS[case]), 32)


def detecting(adapter, output, count):
    """The library's outputs of the queries that detect: the first group, or those behind the noisy ones."""
    shown = slice(0, count) if isinstance(adapter, LwDetrAdapter) else slice(-count, None)
    return output[:, shown]


def to_pixels(boxes, canvas):
    centre, size = boxes.split(2, -1)
    return torch.cat([centre - size / 2, centre + size / 2], -1) * boxes.new_tensor([*canvas[::-1], *canvas[::-1]])


def two_images():
    """Images of unlike sizes, so that the second has padding on two sides, with their ground truth."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 96, 64, generator=generator), torch.rand(3, 50, 120, generator=generator)]
    targets = [
        {"boxes": torch.tensor([[4.0, 6.0, 30.0, 40.0], [20.0, 20.0, 60.0, 90.0]]), "labels": torch.tensor([0, 2])},
        {"boxes": torch.tensor([[10.0, 10.0, 100.0, 45.0]]), "labels": torch.tensor([1])},
    ]
    return images, targets


def without_objects():
    """The same images without ground truth."""
    images, _ = two_images()
    return images, [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in images]


@pytest.fixture
def batch():
    return two_images()


@pytest.fixture
def empty():
    return without_objects()


def library_labels(targets, canvas):
    """Ground truth as the library wants it, relative to the canvas, written out again here."""
    height, width = canvas
    return [
        {
            "class_labels": target["labels"],
            "boxes": torch.stack(
                [
                    (target["boxes"][:, 0] + target["boxes"][:, 2]) / 2 / width,
                    (target["boxes"][:, 1] + target["boxes"][:, 3]) / 2 / height,
                    (target["boxes"][:, 2] - target["boxes"][:, 0]) / width,
                    (target["boxes"][:, 3] - target["boxes"][:, 1]) / height,
                ],
                1,
            ),
        }
        for target in targets
    ]


@EACH
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_predictions_losses_and_gradients_are_the_librarys_own(case, train, batch):
    adapter = build(case)
    model = adapter.model.train(train)
    prepared = adapter.prepare(*batch)
    canvas = prepared.images.shape[-2:]
    buffers = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)  # of noise and dropout
    expected = model(prepared.images, labels=library_labels(batch[1], canvas))
    expected.loss.backward()
    expected_gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    expected_state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(buffers)
    model.zero_grad()
    torch.manual_seed(1)
    trace = adapter.head(adapter.features(prepared), prepared)
    losses, assignment = adapter.task_losses(trace, prepared)
    count = model.config.num_queries
    torch.testing.assert_close(trace.predictions.logits, detecting(adapter, expected.logits, count))
    torch.testing.assert_close(
        trace.predictions.boxes, to_pixels(detecting(adapter, expected.pred_boxes, count), canvas)
    )
    if not train:
        assert torch.equal(trace.predictions.logits, expected.logits)
    total = sum(losses.values())
    assert torch.equal(total, expected.loss)
    again = adapter.assign(trace, prepared)  # the loss has matched the same
    assert all(torch.equal(getattr(assignment, name), getattr(again, name)) for name in vars(again))
    noisy = train and model.config.to_dict().get("num_denoising") and model.config.auxiliary_loss
    assert any("_dn_" in name for name in losses) == bool(noisy)
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() <= expected_gradients.keys()
    for name, expected_gradient in expected_gradients.items():
        gradient = gradients.get(name, torch.zeros_like(expected_gradient))
        # The sums over layers are taken in another order.
        rounding = 1e-5 * max(1.0, float(expected_gradient.abs().max()))
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=rounding)
    for name, value in model.state_dict().items():  # statistics of batch norms too
        assert torch.equal(value, expected_state[name]), name


@FAMILY
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resumed_from_any_stage_the_head_repeats_itself_to_the_bit(family, precision, batch):
    adapter = build(FAMILIES[family])
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


@FAMILY
def test_resumed_while_training(family, batch):
    adapter = build(FAMILIES[family], dropout=0.0)
    adapter.model.train()
    _, _, trace = traced(adapter, batch)
    for i in range(len(adapter.spec.stages)):
        again = adapter.resume(trace.states[i], i, trace)
        torch.testing.assert_close(again.logits, trace.predictions.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again.boxes, trace.predictions.boxes, rtol=1e-4, atol=1e-3)


@FAMILY
def test_each_layer_says_what_the_library_says_of_it(family, batch):
    """The library tells it in train mode only. Only D-FINE's kin count their first guess as a layer."""
    adapter = build(FAMILIES[family], dropout=0.0)
    model = adapter.model.train()
    model.config.num_denoising = 0
    prepared = adapter.prepare(*batch)
    said = model(prepared.images, labels=library_labels(batch[1], prepared.images.shape[-2:]))
    features = adapter.features(prepared)
    model.zero_grad()
    trace = adapter.head(features, prepared)
    *inner, last = adapter.layers(trace)
    assert last is trace
    assert [len(each.states) for each in inner] == [2, 3]
    if isinstance(adapter, LwDetrAdapter):
        expected = [(each["logits"], each["pred_boxes"]) for each in said.auxiliary_outputs]
    else:
        first = isinstance(adapter, DFineAdapter)
        layers = said.intermediate_logits, said.intermediate_reference_points
        expected = [tuple(each[:, i + first] for each in layers) for i in range(2)]
    for each, (logits, boxes) in zip(inner, expected, strict=True):
        count = model.config.num_queries
        canvas = prepared.images.shape[-2:]
        torch.testing.assert_close(each.predictions.logits, detecting(adapter, logits, count), rtol=1e-4, atol=1e-4)
        boxes = to_pixels(detecting(adapter, boxes, count), canvas)
        torch.testing.assert_close(each.predictions.boxes, boxes, rtol=1e-4, atol=1e-3)


@FAMILY
def test_queries_are_placed_at_boxes(family, batch):
    adapter = build(FAMILIES[family])
    prepared = adapter.prepare(*batch)
    content = torch.randn(2, 2, 32)
    boxes = torch.tensor([[4.0, 6.0, 30.0, 40.0], [0.0, 0.0, 64.0, 96.0]]).expand(2, -1, -1)
    priors = adapter.queries_at(content, boxes, prepared)
    torch.testing.assert_close(priors.boxes, boxes, rtol=0, atol=1e-4)
    assert queries_of(priors).content is content
    for train in (False, True):  # in train mode some decode groups of queries
        adapter.model.train(train)
        trace = adapter.head(adapter.features(prepared), prepared, priors)
        assert trace.predictions.logits.shape == (2, 2, 3)


@EACH
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_the_spec_tells_the_truth(case, train, batch):
    adapter = build(case)
    adapter.model.train(train)
    prepared, features, trace = traced(adapter, batch)
    spec, config = adapter.spec, adapter.model.config
    assert spec == adapter.spec
    height, width = prepared.images.shape[-2:]
    assert (height, width) == ((128, 128) if isinstance(adapter, RfDetrAdapter) else (96, 128))
    assert [x.shape[1] for x in features] == list(spec.channels)
    assert [(-(-height // s), -(-width // s)) for s in spec.strides] == [tuple(x.shape[-2:]) for x in features]
    assert len(trace.states) == len(spec.stages) == config.decoder_layers + 1
    for stage, state in zip(spec.stages, trace.states, strict=True):
        assert not stage.spatial
        assert stage.channels == {"decoder": (32,)}
        assert [x.shape for x in state["decoder"]] == [(2, 32, config.num_queries)]
    assert spec.priors is PriorKind.QUERIES
    assert spec.prior_form == "queries of content 32, reference boxes"
    assert spec.activation == trace.predictions.activation == "sigmoid"
    assert trace.predictions.logits.shape == (2, config.num_queries, 3)
    assert trace.predictions.priors.boxes.shape == trace.predictions.boxes.shape == (2, config.num_queries, 4)
    distributions = isinstance(adapter, DFineAdapter)
    assert trace.predictions.regression.shape[2:] == ((4, len(spec.bins)) if distributions else (4,))
    assert (Capability.DISTRIBUTIONS in spec.capabilities) == distributions
    assert spec.capabilities >= set(Capability) - {Capability.DISTRIBUTIONS}


def test_strides():
    names = ("rt-detr", "d-fine", "rt-detr-four-levels", "rf-detr", "lw-detr", "lw-detr-one-level")
    strides = {name: build(CASES[name]).spec.strides for name in names}
    assert strides["rt-detr"] == strides["d-fine"] == (8, 16, 32)
    assert strides["rt-detr-four-levels"] == (8, 16, 32, 64)
    assert strides["rf-detr"] == (8,)
    assert strides["lw-detr"] == (8, 32)
    assert strides["lw-detr-one-level"] == (16,)


def test_strides_that_do_not_fit_the_backbone_are_told(batch):
    adapter = build((RTDetrAdapter, partial(rt_detr, feat_strides=[4, 8, 16])))
    with pytest.raises(KDError, match="feat_strides"):
        adapter.features(adapter.prepare(*batch))


@pytest.mark.parametrize("family", ["rt-detr", "rt-detr-v2", "d-fine", "deimv2"])
def test_what_the_library_cannot_run_is_refused(family):
    cls, make = FAMILIES[family]
    with pytest.raises(KDError, match="learn_initial_query"):
        cls(make(learn_initial_query=True))
    if family in ("d-fine", "deimv2"):
        with pytest.raises(KDError, match="eval_idx=1"):
            cls(make(eval_idx=1))
        assert cls(make(eval_idx=2)).spec == cls(make()).spec


@FAMILY
def test_images_with_fewer_cells_than_queries_are_told(family, batch):
    adapter = build(FAMILIES[family], num_queries=1000)
    with pytest.raises(KDError, match="selects 1000 queries"):
        traced(adapter, batch)


@FAMILY
def test_places_of_cells_are_exact_under_autocast(family, batch):
    adapter = build(FAMILIES[family])
    with torch.no_grad():
        for name, parameter in adapter.model.named_parameters():
            if any(part in name for part in ("bbox", "class", "score", "reference_point")):
                parameter.zero_()  # each box is the place of its cell, each cell as good as the others
        prepared = adapter.prepare(*batch)
        features = adapter.features(prepared)
        adapter.model.config.num_queries = count = sum(level[0, 0].numel() for level in features)
        for name in ("query_feat", "reference_point_embed"):
            if hasattr(adapter.model.model, name):
                setattr(adapter.model.model, name, torch.nn.Embedding.from_pretrained(torch.zeros(count, 32)))
        if hasattr(adapter.model.model, "reference_point_embed"):
            adapter.model.model.reference_point_embed = torch.nn.Embedding.from_pretrained(torch.zeros(count, 4))
        expected = adapter.head(features, prepared).predictions.priors.boxes
        with torch.autocast("cpu", torch.bfloat16):
            rounded = tuple(level.bfloat16() for level in features)
            found = adapter.head(rounded, prepared).predictions.priors.boxes
    assert found.dtype == torch.float32
    orders = [boxes[0].double() @ torch.tensor([1.0, 1e3, 1e6, 1e9]).double() for boxes in (expected, found)]
    ordered = [boxes[0][order.argsort()] for boxes, order in zip((expected, found), orders, strict=True)]
    torch.testing.assert_close(ordered[1], ordered[0], rtol=0, atol=1e-3)


@FAMILY
def test_selected_boxes_are_the_encoders_best(family, batch):
    adapter = build(FAMILIES[family])
    prepared, _, trace = traced(adapter, batch)
    output = adapter.model(prepared.images)
    references = queries_of(trace.predictions.priors).references
    own = output.init_reference_points
    own = own if isinstance(adapter, LwDetrAdapter) else own.sigmoid()
    assert torch.equal(references, own)
    canvas = prepared.images.shape[-2:]
    torch.testing.assert_close(trace.predictions.priors.boxes, to_pixels(own, canvas))


@FAMILY
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_own_queries_handed_over_repeat_the_own_pass(family, train, batch):
    adapter = build(FAMILIES[family], dropout=0.0)
    adapter.model.train(train)
    prepared, features, trace = traced(adapter, batch)
    state = {name: value.clone() for name, value in adapter.model.state_dict().items()}
    again = adapter.head(features, prepared, trace.predictions.priors)
    # In train mode noisy queries and further groups are left out, so that sums are rounded otherwise.
    close = {"rtol": 1e-4, "atol": 1e-3} if train else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(again.predictions.boxes, trace.predictions.boxes, **close)
    torch.testing.assert_close(again.predictions.logits, trace.predictions.logits, **close)
    for a, b in zip(again.states, trace.states, strict=True):
        torch.testing.assert_close(a["decoder"][0], b["decoder"][0], **close)
    assert all(torch.equal(value, state[name]) for name, value in adapter.model.state_dict().items())
    with pytest.raises(KDError, match="own queries"):
        adapter.task_losses(again, prepared)


@FAMILY
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_queries_of_another_detector_go_through_the_own_decoder(family, train, batch):
    student, teacher = build(FAMILIES[family]), build(FAMILIES[family], seed=5, num_queries=31)
    student.model.train(train)
    prepared, features, own = traced(student, batch)
    _, _, theirs = traced(teacher, batch)
    priors = theirs.predictions.priors
    trace = student.head(features, prepared, priors)
    assert trace.predictions.logits.shape[1] == 31
    assert torch.equal(trace.predictions.priors.boxes, priors.boxes)
    assert trace.predictions.priors.context is priors.context
    assert not torch.equal(trace.predictions.logits, theirs.predictions.logits)
    # Each of what queries are made of matters; boxes are taken in pixels.
    queries = priors.context
    changed = replace(priors, context=replace(queries, content=queries.content * 0.5))
    assert not torch.equal(student.head(features, prepared, changed).predictions.boxes, trace.predictions.boxes)
    moved = replace(priors, boxes=priors.boxes + 1)
    assert not torch.equal(student.head(features, prepared, moved).predictions.boxes, trace.predictions.boxes)
    assert own.predictions.logits.shape[1] == 20


@FAMILY
def test_queries_from_another_canvas_keep_their_place_in_pixels(family, batch):
    """A detector that pads to other sizes refers to another canvas: what counts is where boxes are in pixels."""
    adapter = build(FAMILIES[family])
    prepared, features, trace = traced(adapter, batch)
    priors = trace.predictions.priors
    elsewhere = replace(priors.context, references=priors.context.references * torch.tensor([0.5, 0.25, 0.5, 0.25]))
    again = adapter.head(features, prepared, replace(priors, context=elsewhere))
    torch.testing.assert_close(again.predictions.boxes, trace.predictions.boxes, rtol=1e-4, atol=1e-2)


def test_priors_that_are_no_boxes_are_refused(batch):
    adapter = build(FAMILIES["rt-detr"])
    prepared, features, trace = traced(adapter, batch)
    priors = trace.predictions.priors
    with pytest.raises(KDError, match="not made of queries"):
        adapter.head(features, prepared, replace(priors, context=None))
    with pytest.raises(KDError, match="no reference boxes"):
        adapter.head(features, prepared, replace(priors, context=Queries(torch.zeros(2, 3, 32))))


@FAMILY
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_the_matching_is_one_to_one(family, train, batch):
    adapter = build(FAMILIES[family])
    adapter.model.train(train)
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
    # A prediction that is sure of a class and far from other boxes answers for it.
    logits = torch.full_like(trace.predictions.logits, -9.0)
    logits[1, 7, 1] = 9.0
    sure = replace(trace, predictions=replace(trace.predictions, logits=logits))
    assert adapter.assign(sure, prepared).labels[1].tolist() == [3] * 7 + [1] + [3] * 12


PROCESSORS = {"rf-detr": transformers.RfDetrImageProcessor, "lw-detr": transformers.DeformableDetrImageProcessor}


@FAMILY
def test_detections_are_those_of_the_image_processor(family):
    adapter = build(FAMILIES[family])
    processor = PROCESSORS.get(family, transformers.RTDetrImageProcessor)()
    images = [torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    prepared = replace(adapter.prepare(images), original_sizes=((192, 128), (100, 240)))
    trace = adapter.head(adapter.features(prepared), prepared)
    output = adapter.model(prepared.images)
    for threshold in (0.0, 0.4):
        expected = processor.post_process_object_detection(
            output, threshold=threshold, target_sizes=[(192, 128), (100, 240)]
        )
        for ours, own in zip(adapter.detections(trace, prepared), expected, strict=True):
            kept = ours["scores"] > threshold
            order = own["scores"].argsort(descending=True, stable=True)
            assert all(torch.equal(ours[key][kept], own[key][order]) for key in ("scores", "labels"))
            torch.testing.assert_close(ours["boxes"][kept], own["boxes"][order], rtol=1e-5, atol=1e-5)
            assert ours["scores"].diff().le(0).all()
            assert len(ours["scores"]) == (60 if family == "lw-detr" else 20)


def test_nothing_is_detected_in_padding(batch):
    left_out = 0
    for family, case in FAMILIES.items():
        adapter = build(case)
        processor = PROCESSORS.get(family, transformers.RTDetrImageProcessor)()
        prepared = replace(adapter.prepare(*batch), original_sizes=((96, 64), (100, 240)))
        trace = adapter.head(adapter.features(prepared), prepared)
        height, width = prepared.images.shape[-2:]
        # The second image was halved, so that the canvas stands for twice as many of its pixels.
        everything = processor.post_process_object_detection(
            adapter.model(prepared.images), threshold=0.0, target_sizes=[(height, width), (2 * height, 2 * width)]
        )
        found = adapter.detections(trace, prepared)
        for ours, own, (h, w) in zip(found, everything, prepared.original_sizes, strict=True):
            centres = (own["boxes"][:, :2] + own["boxes"][:, 2:]) / 2
            inside = (centres[:, 0] <= w) & (centres[:, 1] <= h)
            left_out += int((~inside).sum())
            torch.testing.assert_close(ours["scores"], own["scores"][inside].sort(descending=True).values)
            torch.testing.assert_close(ours["boxes"].sum(0), own["boxes"][inside].sum(0))
    assert left_out > 20


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


@FAMILY
def test_under_autocast_predictions_are_float32_and_losses_finite(family, batch):
    adapter = build(FAMILIES[family])
    adapter.model.train()
    with torch.autocast("cpu", torch.bfloat16):
        prepared, _, trace = traced(adapter, batch)
        losses, _ = adapter.task_losses(trace, prepared)
    predictions = trace.predictions
    assert predictions.logits.dtype == predictions.regression.dtype == predictions.boxes.dtype == torch.float32
    total = sum(losses.values())
    assert total.dtype == torch.float32
    assert total.isfinite()
    total.backward()
    assert all(p.grad.isfinite().all() for p in adapter.model.parameters() if p.grad is not None)


def insides(model):
    """What an adapter must not add: modules, hooks, attributes, entries of the state dict."""
    modules = {name: sorted(vars(module)) for name, module in model.named_modules()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
    return modules, hooks, list(model.state_dict())


@FAMILY
@pytest.mark.parametrize(
    ("whose", "precision"), [("teacher", "float32"), ("student", "float32"), ("student", "bfloat16")]
)
def test_crosskd_between_two_of_a_family(family, whose, precision, batch, empty):
    student = build(FAMILIES[family])
    teacher = build(FAMILIES[family], seed=5, decoder_layers=2, num_queries=25)
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    untouched = insides(student.model), insides(teacher.model.eval().requires_grad_(False))
    distiller = Distiller(teacher, student, [CrossKD(priors=whose)])
    distiller.train()
    for data in (empty, batch):
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


@FAMILY
def test_crosskd_vanishes_between_twins(family, batch):
    student, teacher = build(FAMILIES[family]), build(FAMILIES[family])
    distiller = Distiller(teacher, student, [CrossKD()]).eval()
    student.model.eval()
    losses = distiller(*batch)
    torch.testing.assert_close(losses["crosskd/cls"], torch.tensor(0.0), rtol=0, atol=1e-4)
    torch.testing.assert_close(losses["crosskd/box"], torch.tensor(0.0), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("student", "teacher"), [("rt-detr", "rf-detr"), ("lw-detr", "d-fine"), ("rt-detr", "dab")])
def test_crosskd_across_families_of_equal_queries(student, teacher, batch):
    """RF-DETR's canvas is square and DAB-DETR's boxes are relative to content: queries are where they are in pixels."""
    dab = DabDetrAdapter, DabDetrAdapter.examples()["DAB-DETR"]
    teacher = DabDetrAdapter(dab[1](3)) if teacher == "dab" else build(FAMILIES[teacher], seed=5)
    losses = Distiller(teacher, build(FAMILIES[student]), [CrossKD()]).train()(*batch)
    losses.total.backward()
    assert losses["crosskd/cls"] > 0
    assert losses["crosskd/box"].isfinite()


def test_crosskd_refuses_queries_of_another_make():
    wide = build(FAMILIES["rt-detr"], d_model=64, encoder_hidden_dim=64, decoder_in_channels=[64] * 3)
    with pytest.raises(IncompatibleError, match="content 64"):
        Distiller(wide, build(FAMILIES["rt-detr"]), [CrossKD()])


@FAMILY
def test_features_go_to_and_from_a_pyramid(family, batch):
    # The square of RF-DETR is another canvas: images that are alike square share it.
    images = [torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    gfl = DenseAdapter(tiny_gfl(seed=1))
    for teacher, student in ((build(FAMILIES[family]), gfl), (gfl, build(FAMILIES[family]))):
        losses = Distiller(teacher, student, [PKD()]).train()(images, batch[1])
        losses.total.backward()
        assert losses["pkd/feature"].isfinite()
        assert losses["pkd/feature"] > 0


@FAMILY
def test_without_methods_the_losses_are_the_students_own(family, batch):
    adapter = build(FAMILIES[family])
    adapter.model.train()
    prepared = adapter.prepare(*batch)
    torch.manual_seed(3)
    expected = adapter.model(prepared.images, labels=adapter.library_labels(prepared))
    torch.manual_seed(3)
    assert torch.equal(Distiller(None, adapter)(*batch).total, expected.loss)


def test_images_are_as_the_image_processors_leave_them(batch):
    images, targets = batch
    for family in ("rt-detr", "d-fine", "deimv2"):
        prepared = build(FAMILIES[family]).prepare(images, targets)
        assert prepared.images.shape == (2, 3, 96, 128)
        assert torch.equal(prepared.images[1, :, :50, :120], images[1])
        assert not prepared.images[1, :, 50:].any()
        assert prepared.padded_sizes == ((96, 64), (64, 128))
    processor = transformers.RfDetrImageProcessor()
    mean, std = torch.tensor(processor.image_mean)[:, None, None], torch.tensor(processor.image_std)[:, None, None]
    for family in ("rf-detr", "lw-detr"):
        prepared = build(FAMILIES[family]).prepare(images, targets)
        torch.testing.assert_close(prepared.images[1, :, :50, :120], (images[1] - mean) / std)
    plain = Deimv2Adapter(deimv2(), image_mean=(0.5,) * 3, image_std=(0.5,) * 3).prepare(images)
    torch.testing.assert_close(plain.images[1, :, :50, :120], 2 * images[1] - 1)


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


def test_queries_lie_at_the_same_pixels_whatever_boxes_are_relative_to():
    """DAB-DETR's are relative to an image's content, RT-DETR's to the canvas."""
    examples = {name: make for cls in adapter_classes(load=True) for name, make in cls.examples().items()}
    torch.manual_seed(0)
    ours, theirs = adapt(examples["DAB-DETR"](3).eval()), adapt(examples["RT-DETR"](3).eval())
    images = [torch.rand(3, 64, 96), torch.rand(3, 96, 64)]
    for receiver, giver in ((ours, theirs), (theirs, ours)):
        batches = receiver.prepare(images), giver.prepare(images)
        given = giver.head(giver.features(batches[1]), batches[1]).predictions.priors
        found = receiver.head(receiver.features(batches[0]), batches[0], given).predictions.priors
        torch.testing.assert_close(found.boxes, given.boxes, atol=1e-3, rtol=1e-4)
