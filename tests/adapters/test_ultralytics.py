import copy

import pytest
import torch
from safetensors.torch import save_model

from kdtoolkit.contract import Capability, PriorKind
from kdtoolkit.distiller import Distiller
from kdtoolkit.errors import IncompatibleError, KDError
from kdtoolkit.libraries import adapt
from kdtoolkit.methods import CWD, FGD, LD, PKD, CrossKD, Mimic
from kdtoolkit.weights import load_weights
from tests.conftest import tiny_fcos, tiny_gfl

pytest.importorskip("ultralytics")

from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel, SegmentationModel, yaml_model_load
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import clip_boxes, xyxy2xywhn

from kdtoolkit.adapters.ultralytics import UltralyticsAdapter, build_model
from tests._traced import traced

YAMLS = ("yolov8n", "yolo11n", "yolo26n", "yolov10n")
GREY = 114 / 255


def tiny(name="yolo11n", *, seed=0, width=0.0625, end2end=False, num_classes=3):
    torch.manual_seed(seed)
    config = {**yaml_model_load(f"{name}.yaml"), "nc": num_classes}
    model = DetectionModel({**config, "scales": {config["scale"]: [0.33, width, 1024]}}, verbose=False)
    model.end2end = end2end
    # Fresh statistics of batch norm let maps die out: in eval mode all cells would predict alike.
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    head = model.model[-1]
    with torch.no_grad():
        for towers in (getattr(head, "one2one_cv2", None), getattr(head, "one2one_cv3", None)):
            for parameter in towers.parameters() if towers is not None else ():  # they start as a copy of the others
                parameter += 0.1 * torch.randn_like(parameter)
        model(torch.rand(4, 3, 64, 64))
    for norm in norms:
        norm.momentum = 0.03
    return model


# Double heads are shown twice: with the one-to-many towers as what detects, and with the one-to-one towers.
MODELS = {name: {"name": name} for name in YAMLS} | {"yolo26n end2end": {"name": "yolo26n", "end2end": True}}
EACH = pytest.mark.parametrize("which", MODELS)


def make(which, **changes):
    return tiny(**MODELS[which], **changes)


# The library's own training and inference.


def own_canvas(images):
    canvas = torch.full((len(images), 3, 64, 64), GREY)
    for i, image in enumerate(images):
        canvas[i, :, : image.shape[1], : image.shape[2]] = image
    return canvas


def own_losses(model, images, targets):
    """The library's own loss, by the names it gives to the terms, in sum and gradient what its trainer uses."""
    if not hasattr(model, "args"):
        model.args = get_cfg()
    counts = torch.tensor([len(target["labels"]) for target in targets])
    batch = {
        "img": own_canvas(images),
        "batch_idx": torch.arange(len(targets)).repeat_interleave(counts).float(),
        "cls": torch.cat([target["labels"] for target in targets]).float(),
        "bboxes": xyxy2xywhn(torch.cat([target["boxes"] for target in targets]), 64, 64),
    }
    values, named = model.loss(batch)
    return {name.removesuffix("_loss"): value for name, value in zip(named, values, strict=True)}


@torch.no_grad()
def own_detections(model, images):
    kept = non_max_suppression(
        model(own_canvas(images))[0], 0.001, 0.7, multi_label=True, max_det=300, end2end=model.end2end
    )
    return [
        {"boxes": clip_boxes(each[:, :4], image.shape[-2:]), "scores": each[:, 4], "labels": each[:, 5].long()}
        for each, image in zip(kept, images, strict=True)
    ]


@EACH
def test_predictions_are_the_raw_outputs_to_the_bit(which, batch):
    model = make(which)
    adapter = UltralyticsAdapter(model)
    for train in (True, False):
        model.train(train)
        output = copy.deepcopy(model)(own_canvas(batch[0]))
        raw = output if train else output[1]
        raw = raw.get("one2many", raw)
        predictions = traced(adapter, batch)[2].predictions
        assert torch.equal(predictions.logits.transpose(1, 2), raw["scores"])
        assert torch.equal(predictions.regression.flatten(2).transpose(1, 2), raw["boxes"])
        if not train and not model.end2end:
            centre, size = output[0][:, :4].transpose(1, 2).split(2, -1)
            # Without distributions sides may pass each other: such boxes have no extent here.
            half = size.clamp(min=0) / 2
            torch.testing.assert_close(
                predictions.boxes, torch.cat([centre - half, centre + half], -1), atol=1e-4, rtol=1e-5
            )
            assert (size >= 0).all() or which == "yolo26n"


@EACH
def test_a_step_without_methods_is_the_librarys_own(which, batch):
    model = make(which)
    own = copy.deepcopy(model)
    sum(own_losses(own, *batch).values()).backward()
    Distiller(None, model)(*batch).total.backward()
    for (name, ours), theirs in zip(model.named_parameters(), own.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            # Terms are summed up in another order.
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4, msg=name)
    # Batch norm's statistics, those of the one-to-one towers among them, have seen one batch.
    for (name, ours), theirs in zip(model.named_buffers(), own.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("kind", [dict, get_cfg])
@pytest.mark.parametrize("which", ["yolo11n", "yolo26n"])
def test_gains_are_those_of_the_models_args(which, kind, batch):
    model = make(which)
    plain, _ = UltralyticsAdapter(model).task_losses(*reversed(traced(UltralyticsAdapter(model), batch)[::2]))
    overrides = {"box": 15.0, "cls": 5.0, "dfl": 0.15}
    model.args = overrides if kind is dict else get_cfg(overrides=overrides)
    adapter = UltralyticsAdapter(make(which))
    adapter.model.args = model.args
    losses, _ = adapter.task_losses(*reversed(traced(adapter, batch)[::2]))
    third = "l1" if which == "yolo26n" else "dfl"
    for name, factor in (("box", 2.0), ("cls", 10.0), (third, 0.1)):
        torch.testing.assert_close(losses[name], factor * plain[name])


@EACH
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resumed_from_any_stage_the_head_repeats_itself_to_the_bit(which, precision, batch):
    adapter = UltralyticsAdapter(make(which).eval())
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        _, features, trace = traced(adapter, batch)
        assert [stage.name for stage in adapter.spec.stages] == ["pyramid", "block 1", "block 2"]
        assert all(a is b for a, b in zip(trace.states[0]["cls"], features, strict=True))
        for i, state in enumerate(trace.states):
            again = adapter.resume(state, i, trace)
            for name in ("logits", "regression", "boxes"):
                assert torch.equal(getattr(again, name), getattr(trace.predictions, name)), (i, name)
                assert getattr(again, name).dtype == torch.float32


def test_each_branch_leads_to_its_own_output(batch):
    adapter = UltralyticsAdapter(tiny().eval())
    _, _, trace = traced(adapter, batch)
    for stage, state in enumerate(trace.states):
        for branch, output, other in (("cls", "logits", "regression"), ("reg", "regression", "logits")):
            changed = {b: tuple(-x for x in maps) if b == branch else maps for b, maps in state.items()}
            again = adapter.resume(changed, stage, trace)
            assert not torch.equal(getattr(again, output), getattr(trace.predictions, output))
            assert torch.equal(getattr(again, other), getattr(trace.predictions, other))


@EACH
def test_the_spec_tells_the_truth(which, batch):
    adapter = UltralyticsAdapter(make(which, width=0.125))
    _, _, trace = traced(adapter, batch)
    spec, predictions = adapter.spec, trace.predictions
    assert spec.name == MODELS[which]["name"]
    assert (spec.priors, spec.strides, spec.num_classes) == (PriorKind.POINTS, (8, 16, 32), 3)
    has_bins = not which.startswith("yolo26")
    assert spec.bins == (tuple(map(float, range(16))) if has_bins else ())
    assert (Capability.DISTRIBUTIONS in spec.capabilities) == has_bins
    assert predictions.regression.shape == ((2, 84, 4, 16) if has_bins else (2, 84, 4))
    # Cell centres, level by level, row by row.
    assert predictions.priors.boxes[:2].tolist() == [[4.0, 4.0, 4.0, 4.0], [12.0, 4.0, 12.0, 4.0]]
    assert predictions.priors.boxes[64].tolist() == [8.0] * 4
    assert predictions.priors.per_level == (64, 16, 4)


def test_images_are_padded_with_grey_and_neither_resized_nor_normalised(batch):
    images, targets = batch
    prepared = UltralyticsAdapter(tiny()).prepare([images[1], torch.rand(3, 70, 40)], [targets[1]] * 2)
    assert prepared.images.shape == (2, 3, 96, 64)
    assert torch.equal(prepared.images[0, :, :50, :60], images[1])
    assert (prepared.images[0, :, 50:] == GREY).all()
    assert (prepared.images[0, :, :, 60:] == GREY).all()
    assert prepared.sizes == prepared.original_sizes == ((50, 60), (70, 40))
    assert prepared.padded_sizes == ((64, 64), (96, 64))
    assert torch.equal(prepared.boxes[0], targets[1]["boxes"])
    with pytest.raises(KDError, match=r"image 0 has the shape \(64, 64\); images are \(3, H, W\)"):
        UltralyticsAdapter(tiny()).prepare([torch.rand(64, 64)])


def test_levels_of_stride_64_are_padded_for(batch):
    config = {**yaml_model_load("yolov8n-p6.yaml"), "nc": 3}
    model = DetectionModel({**config, "scales": {"n": [0.33, 0.0625, 1024]}}, verbose=False)
    adapter = UltralyticsAdapter(model)
    prepared, features, _ = traced(adapter, ([torch.rand(3, 70, 60)] * 2, batch[1]))
    assert adapter.spec.strides == (8, 16, 32, 64)
    assert prepared.images.shape[-2:] == (128, 64)
    assert [tuple(level.shape[-2:]) for level in features] == [(16, 8), (8, 4), (4, 2), (2, 1)]


@EACH
def test_the_assignment_is_the_one_that_the_losses_used(which, batch):
    adapter = UltralyticsAdapter(make(which))
    prepared, _, trace = traced(adapter, batch)
    _, used = adapter.task_losses(trace, prepared)
    again = adapter.assign(trace, prepared)
    positive = used.positive
    assert torch.equal(used.labels, again.labels)
    assert torch.equal(used.weights, again.weights)
    # The library's losses take boxes as shares of the canvas, and back.
    torch.testing.assert_close(used.normaliser, again.normaliser)
    torch.testing.assert_close(used.boxes[positive], again.boxes[positive])
    assert positive.sum(1).min() >= 1
    points = trace.predictions.priors.boxes[:, :2].expand(2, -1, -1)[positive]
    boxes = used.boxes[positive]
    # The assigner widens sides to 16 pixels.
    assert (points > boxes[:, :2] - 8).all()
    assert (points < boxes[:, 2:] + 8).all()


def test_without_objects_there_is_no_box_to_learn(batch):
    adapter = UltralyticsAdapter(tiny())
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * 2
    prepared, _, trace = traced(adapter, (batch[0], empty))
    losses, assignment = adapter.task_losses(trace, prepared)
    own = own_losses(tiny(), batch[0], empty)
    assert {name: value.item() for name, value in losses.items()} == {name: value.item() for name, value in own.items()}
    assert losses["cls"] > 0
    assert losses["box"] == losses["dfl"] == 0
    assert (assignment.labels == 3).all()
    assert assignment.normaliser == 1


def test_detections_follow_end2end_and_need_no_nms_then(batch):
    model = tiny("yolo26n").eval()
    adapter = UltralyticsAdapter(model)
    prepared, _, trace = traced(adapter, batch)
    with_nms = adapter.detections(trace, prepared)
    model.end2end = True
    without = adapter.detections(trace, prepared)
    assert len(with_nms[0]["scores"])
    assert len(without[0]["scores"])
    assert not torch.equal(with_nms[0]["scores"][:1], without[0]["scores"][:1])


def test_a_fused_model_can_teach_and_detects_the_same(batch):
    model = tiny("yolov8n", seed=1).eval()
    fused = copy.deepcopy(model).fuse(verbose=False)
    predictions = [traced(UltralyticsAdapter(m), batch)[2].predictions for m in (model, fused)]
    torch.testing.assert_close(predictions[1].logits, predictions[0].logits, atol=1e-3, rtol=1e-3)
    student = tiny("yolov8n")
    Distiller(fused, student, [CrossKD()])(*batch).total.backward()
    assert all(p.grad is None for p in fused.parameters())


def test_a_model_fused_to_one_to_one_towers_is_refused():
    fused = tiny("yolo26n", end2end=True).fuse(verbose=False)
    with pytest.raises(KDError, match="pass the model as it was before fuse"):
        UltralyticsAdapter(fused)
    assert UltralyticsAdapter(tiny("yolo26n").fuse(verbose=False)).spec.name == "yolo26n"


def test_a_yolo_object_stands_for_its_model():
    wrapper = YOLO("yolo11n.yaml")
    for model in (wrapper, wrapper.model):
        adapter = adapt(model)
        assert isinstance(adapter, UltralyticsAdapter)
        assert adapter.model is wrapper.model


def test_a_teacher_moves_with_the_distiller():
    teacher = tiny(seed=1)
    Distiller(teacher, tiny(seed=2), [PKD()]).to("meta")
    assert all(p.is_meta for p in teacher.parameters())


def test_other_tasks_do_not_match():
    assert not UltralyticsAdapter.matches(SegmentationModel("yolo11n-seg.yaml", verbose=False))
    assert not UltralyticsAdapter.matches(YOLO("yolo11n-cls.yaml"))
    assert not UltralyticsAdapter.matches(torch.nn.Linear(1, 1))


# Methods.


PAIRS = {
    "v8, wider v8": (lambda: tiny("yolov8n"), lambda: tiny("yolov8n", seed=1, width=0.125)),
    "11, v8": (lambda: tiny("yolo11n"), lambda: tiny("yolov8n", seed=1)),
    "26, 26": (lambda: tiny("yolo26n"), lambda: tiny("yolo26n", seed=1, end2end=True)),
    "26, 11": (lambda: tiny("yolo26n"), lambda: tiny("yolo11n", seed=1)),
    "11, GFL": (lambda: tiny("yolo11n"), lambda: tiny_gfl(seed=1)),
    "11, FCOS": (lambda: tiny("yolo11n"), lambda: tiny_fcos(seed=1)),
    "GFL, 11": (lambda: tiny_gfl(seed=0), lambda: tiny("yolo11n", seed=1)),
    "FCOS, 26": (lambda: tiny_fcos(seed=0), lambda: tiny("yolo26n", seed=1)),
}


@pytest.mark.parametrize(
    ("pair", "precision"), [*((pair, "float32") for pair in PAIRS), ("26, 26", "bfloat16"), ("GFL, 11", "bfloat16")]
)
def test_crosskd_and_feature_methods_teach_the_student_alone(pair, precision, batch):
    student, teacher = (build() for build in PAIRS[pair])
    keys, attributes = list(student.state_dict()), set(vars(student))
    frozen = {name: value.clone() for name, value in teacher.state_dict().items()}
    distiller = Distiller(teacher, student, [CrossKD(), PKD(), CWD(), FGD()])
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        losses = distiller(*batch)
    assert losses["crosskd/cls"] > 0
    assert losses["crosskd/box"] > 0
    assert all(value.isfinite() and value.dtype == torch.float32 for value in losses.values())
    sum(value for name, value in losses.items() if name.startswith("crosskd")).backward()
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, frozen[name]) for name, value in teacher.state_dict().items())
    assert (list(student.state_dict()), set(vars(student))) == (keys, attributes)


def test_crosskd_reaches_the_towers_below_its_stage_and_none_above(batch):
    student, teacher = tiny("yolo26n"), tiny("yolo26n", seed=1)
    losses = Distiller(teacher, student, [CrossKD(stage=1)])(*batch)
    (losses["crosskd/cls"] + losses["crosskd/box"]).backward()
    head = student.model[-1]

    def taught(block):
        return any(p.grad is not None and p.grad.any() for p in block.parameters())

    for tower in (*head.cv2, *head.cv3):
        assert [taught(block) for block in tower] == [True, False, False]
    assert not any(taught(tower) for tower in (*head.one2one_cv2, *head.one2one_cv3))
    assert taught(student.model[0])


def test_ld_needs_distributions(batch):
    student, teacher = tiny("yolo11n"), tiny("yolo11n", seed=1, width=0.125)
    losses = Distiller(teacher, student, [LD()])(*batch)
    terms = [value for name, value in losses.items() if name.startswith("ld/")]
    assert terms
    assert all(value.isfinite() for value in terms)
    assert sum(terms) > 0
    with pytest.raises(IncompatibleError, match="distributions"):
        Distiller(teacher, tiny("yolo26n"), [LD()])


@pytest.mark.parametrize("pair", ["v8, wider v8", "11, v8", "26, 26"])
def test_mimic_compares_what_both_predict(pair, batch):
    student, teacher = (build() for build in PAIRS[pair])
    losses = Distiller(teacher, student, [Mimic()])(*batch)
    assert losses["mimic/cls"] > 0
    assert losses["mimic/box"] > 0
    (losses["mimic/cls"] + losses["mimic/box"]).backward()
    for tower in (*student.model[-1].cv2, *student.model[-1].cv3):
        assert all(p.grad is not None for p in tower.parameters())


def test_equal_detectors_have_nothing_to_teach_each_other(batch):
    model = tiny("yolov8n").eval()
    distiller = Distiller(copy.deepcopy(model), model, [LD(), PKD()])
    losses = distiller.eval()(*batch)
    assert all(value.abs() < 1e-5 for name, value in losses.items() if not name.startswith("task/"))


# Names.


def test_build_model_knows_the_librarys_names(capfd):
    model = build_model("yolo11n", 7, {})
    assert UltralyticsAdapter(model).spec.num_classes == 7
    assert UltralyticsAdapter(build_model("yolov10n", 2, {})).spec.name == "yolov10n"
    assert capfd.readouterr().out == ""
    with pytest.raises(KDError, match=r"unknown model 'ultralytics/yolo11z' \(did you mean 'yolo11"):
        build_model("yolo11z", 7, {})
    with pytest.raises(KDError, match=r"There are yolov5\[n\|s\|m\|l\|x\], yolov8"):
        build_model("rtdetr-l", 7, {})
    with pytest.raises(KDError, match="depth"):
        build_model("yolo11n", 7, {"depth": 3})


def test_tensors_of_a_checkpoint_load_from_safetensors(tmp_path):
    trained = build_model("yolo11n", 4, {})
    save_model(trained, str(tmp_path / "yolo11n.safetensors"))
    model = build_model("yolo11n", 4, {})
    load_weights(model, tmp_path / "yolo11n.safetensors")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in trained.state_dict().items())
