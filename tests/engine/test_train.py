import copy
import json
import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from kdtoolkit import Distiller, KDError, NonFiniteLossError
from kdtoolkit.contract import Capability, Method
from kdtoolkit.data import ProceduralShapes, check_same_classes
from kdtoolkit.engine.train import RunFolder, TrainConfig, Validation, lr_factor, train
from kdtoolkit.methods import FGD, PKD, CrossKD
from tests._foundation import foundation
from tests.conftest import tiny_gfl

CLASSES = len(ProceduralShapes(1).class_names)


@pytest.fixture(scope="module")
def data():
    return ProceduralShapes(8, image_size=64, seed=0)


def model(seed):
    return tiny_gfl(seed=seed, num_classes=CLASSES)


def config(**changes):
    return TrainConfig(**{"steps": 4, "batch_size": 4, "warmup_steps": 0, **changes})


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_same_seed_same_student_to_the_last_bit(data):
    students = []
    for seed in (0, 0, 1):
        student = model(2)
        train(Distiller(model(1), student, [CrossKD(), PKD()]), data, config(), seed=seed)
        students.append(weights(student))
    assert torch.equal(students[0], students[1])
    assert not torch.equal(students[0], students[2])


def test_a_torch_device_is_taken_like_its_name(data):
    students = [model(2), model(2)]
    for student, device in zip(students, ("cpu", torch.device("cpu")), strict=True):
        train(Distiller(None, student), data, config(precision="bfloat16"), seed=0, device=device)
    assert torch.equal(*map(weights, students))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"augmentation": {"colour": 0.2}}, "colour gives an image different pixels .* Leave it out"),
        (
            {"augmentation": {"zoom": (0.5, 1), "mixup": 0.1}, "input_size": {"short": (64, 96), "crop": 0.5}},
            "zoom and augmentation.mixup and input_size.crop",
        ),
        ({"augmentation": {"photometric": 0.5, "mosaic": 1}}, "photometric and .*mosaic .* Leave them out"),
    ],
)
def test_a_teacher_cache_is_refused_if_no_view_comes_again(changes, named):
    with pytest.raises(ValidationError, match=f"teacher_cache is disk, and .*{named}"):
        config(teacher_cache="disk", **changes)
    assert config(**changes).never_repeat
    assert not config(teacher_cache="disk", augmentation={"flip": 1}, input_size={"short": (64, 96)}).never_repeat


class Counting(PKD):
    """Reports how many objects it has seen."""

    metrics = ("objects",)

    def forward(self, exchange):
        count = sum(len(boxes) for boxes in exchange.student.batch.boxes)
        return {**super().forward(exchange), "objects": torch.tensor(float(count))}


def test_metrics_of_methods_are_logged_and_told_at_the_end(data, tmp_path):
    shown = []
    distiller = Distiller(model(1), model(2), [Counting()])
    result = train(distiller, data, config(), seed=0, folder=RunFolder(tmp_path), report=shown.append)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    counts = [row["counting/objects"] for row in rows]
    assert len(counts) == 4
    assert min(counts) >= 4  # images of shapes have one object at least
    assert [point["counting/objects"] for point in result.history] == counts
    assert result.metrics == {"counting/objects": sum(counts) / 4}
    assert "counting/feature" in shown[-1].losses
    assert "counting/objects" not in shown[-1].losses


def test_the_loss_falls_and_history_tells(data):
    result = train(Distiller(None, model(2)), data, config(steps=150, lr=1e-2), seed=0)
    totals = [sum(v for k, v in point.items() if k.startswith("task/")) for point in result.history]
    assert totals[-1] < 0.8 * totals[0]
    assert result.history[-1]["step"] == result.steps == 150
    assert result.seconds > 0
    assert result.step_ms > 0
    assert result.warnings == []


def test_reports_begin_at_the_first_step_and_end_at_the_last(data):
    seen = []
    train(Distiller(None, model(2)), data, config(), seed=0, report=seen.append)
    assert (seen[0].step, seen[-1].step) == (1, 4)
    assert set(seen[0].losses) == {"task/cls", "task/box", "task/dfl"}


def test_a_validation_of_no_images_at_a_time_is_refused(data):
    with pytest.raises(KDError, match=r"batch_size \(0\) is the number of images in a batch: it must be 1 or more"):
        Validation(data, batch_size=0)


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_schedules(schedule):
    settings = config(steps=100, warmup_steps=10, schedule=schedule)
    factors = [lr_factor(step, settings) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11, rel=1e-3)
    assert all(0 <= factor <= 1 for factor in factors)
    expected = {"cosine": 0.5 * (1 + math.cos(math.pi * 0.99)), "step": 0.01, "constant": 1.0}
    assert factors[99] == pytest.approx(expected[schedule])
    if schedule == "step":  # 1x: 12 epochs with steps after 8 and 11
        assert factors[66] == pytest.approx(1.0)
        assert factors[67] == pytest.approx(0.1)
        assert factors[91] == pytest.approx(0.1)
        assert factors[92] == pytest.approx(0.01)


class Broken(Method):
    needs = frozenset({Capability.FEATURES})
    terms = ("term",)
    paper = "none"

    def __init__(self, make):
        super().__init__()
        self.make = make
        self.steps = 0

    def forward(self, exchange):
        self.steps += 1
        return {"term": self.make(self.steps, exchange.student.features[0])}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda _, x: 0 * x.sum(), "is exactly zero"),
        (lambda _, x: x.detach().square().mean(), "has no gradient"),
        (lambda _, x: nn.Parameter(torch.ones(())) * 2, "has no gradient to the student"),
    ],
)
def test_terms_that_do_nothing_are_reported_by_name(data, make, reason):
    distiller = Distiller(model(1), model(2), [Broken(make), PKD()])
    result = train(distiller, data, config(steps=6), seed=0)
    assert len(result.warnings) == 1
    assert result.warnings[0].startswith(f"loss term broken/term {reason} in each of the first")


def test_a_term_that_is_zero_only_at_first_is_not_reported(data):
    distiller = Distiller(model(1), model(2), [Broken(lambda step, x: (step > 2) * x.mean())])
    assert train(distiller, data, config(steps=6), seed=0).warnings == []


def test_a_term_that_is_not_finite_is_named_and_the_last_good_weights_stay(data):
    student = model(2)
    kept = []

    def explode(step, x):
        kept.append(weights(student).clone())
        return x.mean() * (math.nan if step == 3 else 1.0)

    with pytest.raises(NonFiniteLossError, match=r"step 3: broken/term = nan"):
        train(Distiller(model(1), student, [Broken(explode)]), data, config(), seed=0)
    assert torch.equal(weights(student), kept[2])


def test_a_metric_that_is_not_finite_stops_nothing_and_is_left_out(data, tmp_path):
    class Sizes(PKD):
        metrics = ("size", "never")

        def forward(self, exchange):
            self.calls = getattr(self, "calls", 0) + 1
            sizes = {"size": torch.tensor(math.nan if self.calls == 2 else 4.0), "never": torch.tensor(math.inf)}
            return super().forward(exchange) | sizes

    distiller = Distiller(model(1), model(2), [Sizes()])
    result = train(distiller, data, config(steps=3), seed=0, folder=RunFolder(tmp_path))
    assert ["sizes/size" in point for point in result.history] == [True, False, True]
    assert result.metrics == {"sizes/size": 4.0}
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert ["sizes/size" in row for row in log] == [True, False, True]


def test_the_first_place_that_is_not_finite_is_named_and_buffers_stay_good(data):
    student = model(2)
    kept = {}

    def spoil(module, _, output):
        if len(kept) >= 2:
            output[1].fill_(math.inf)
        kept[len(kept)] = copy.deepcopy(dict(student.named_buffers()))

    student.neck.register_forward_hook(lambda module, args, output: spoil(module, args, list(output.values())))
    place = "student: not finite, first in features at stride 16; teacher: all finite, the largest"
    with pytest.raises(NonFiniteLossError, match=place):
        train(Distiller(model(1), student, [PKD()]), data, config(), seed=0)
    assert all(torch.equal(buffer, kept[1][name]) for name, buffer in student.named_buffers())


@pytest.mark.parametrize("start", [0, 2])
def test_the_search_for_that_place_shows_the_teacher_what_the_step_showed_it(data, start):
    student, teacher = model(2), model(1)
    sizes = []
    teacher.backbone.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[-2:])))
    student.neck.register_forward_hook(lambda module, args, output: {k: x * math.inf for k, x in output.items()})
    distiller = Distiller(teacher, student, [PKD().scheduled(start=start)], teacher_scale=0.5)
    with pytest.raises(NonFiniteLossError, match="student: not finite") as caught:
        train(distiller, data, config(), seed=0)
    assert sizes == ([] if start else 2 * [(32, 32)])  # in the step, and in the search
    assert ("teacher: " in str(caught.value)) != bool(start)


def test_a_teacher_that_shows_features_alone_is_searched_too(data):
    distiller = Distiller(foundation(), model(2), [Broken(lambda step, x: x.mean() * math.nan)])
    with pytest.raises(NonFiniteLossError, match=r"broken/term = nan \(student: all finite.*; teacher: all finite"):
        train(distiller, data, config(), seed=0)


def test_a_search_that_fails_does_not_hide_the_error(data):
    student, teacher = model(2), model(1)
    passes = []

    def fail(*_):
        passes.append(1)
        if len(passes) == 2:
            raise RuntimeError("no")

    teacher.backbone.register_forward_hook(fail)
    distiller = Distiller(teacher, student, [Broken(lambda step, x: x.mean() * math.nan)])
    buffers = copy.deepcopy(dict(student.named_buffers()))
    says = r"broken/term = nan \(student: all finite.*; the search for the place ended with RuntimeError: no\)"
    with pytest.raises(NonFiniteLossError, match=says):
        train(distiller, data, config(), seed=0)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in student.named_buffers())


def test_a_gradient_that_is_not_finite_stops_too(data):
    student = model(2)
    make = lambda step, x: (x.square().sum() * 0).sqrt()  # noqa: E731
    with pytest.raises(NonFiniteLossError, match="gradient norm"):
        train(Distiller(model(1), student, [Broken(make)]), data, config(), seed=0)
    assert torch.isfinite(weights(student)).all()


def test_ema_keeps_an_average(data):
    plain, averaged = model(2), model(2)
    start = weights(plain).clone()
    train(Distiller(None, plain), data, config(), seed=0)
    train(Distiller(None, averaged), data, config(ema=0.9), seed=0)
    assert 0 < (weights(averaged) - start).norm() < (weights(plain) - start).norm()


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"lr": -1},
        {"schedule": "linear"},
        {"learning_rate": 1},
        {"milestones": (8, 11)},
        {"milestones": [-0.5]},
    ],
)
def test_wrong_settings_are_refused(changes):
    with pytest.raises(ValidationError):
        config(**changes)


def test_sgd_trains_what_the_method_must_learn(data):
    teacher = tiny_gfl(seed=1, num_classes=CLASSES, neck_channels=8)
    distiller = Distiller(teacher, model(2), [PKD()])
    before = weights(distiller.methods).clone()
    train(distiller, data, config(optimizer="sgd", lr=0.01, schedule="step"), seed=0)
    assert not torch.equal(weights(distiller.methods), before)


def test_devices_are_taken_by_name_or_as_they_are(data):
    students = [model(2) for _ in range(3)]
    for student, device in zip(students, (None, "cpu", torch.device("cpu")), strict=True):
        train(Distiller(None, student), data, config(steps=2), seed=0, device=device)
    assert torch.equal(weights(students[0]), weights(students[1]))
    assert torch.equal(weights(students[0]), weights(students[2]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cuda"}, r"device is cuda, and the model lies on cpu: move it there first, model.to\('cuda'\)"),
        ({"device": "gpu"}, "device='gpu' is no device"),
        ({"config": {"steps": 4}}, r"config is a dict; it must be a TrainConfig, as in TrainConfig\(steps=1000\)"),
        ({"dataset": [1, 2]}, "the data set is a list; it must be a DetectionDataset"),
        ({"distiller": nn.Identity()}, r"train takes a Distiller, not a Identity: .* Distiller\(None, student\)"),
        ({"distiller": Distiller(None, tiny_gfl(seed=2, num_classes=91))}, "GFL has 91 classes, the data set 6"),
        ({"seed": 2**65}, r"seed is 36893488147419103232; torch takes 64 bits"),
    ],
)
def test_wrong_arguments_are_told_in_one_sentence(data, changes, message):
    arguments = {"distiller": Distiller(None, model(2)), "dataset": data, "config": config(), "seed": 0, **changes}
    with pytest.raises(KDError, match=message):
        train(**arguments)


@pytest.mark.parametrize("methods", [[], [FGD()]])
def test_a_frozen_student_is_refused(data, methods):
    distiller = Distiller(model(1), model(2), methods)
    distiller.student.requires_grad_(False)
    with pytest.raises(KDError, match=r"all its parameters are frozen. Call student.requires_grad_\(True\)"):
        train(distiller, data, config(), seed=0)


def test_a_config_that_freezes_all_of_the_student_is_refused(data):
    student = model(2)
    frozen = tuple({name.partition(".")[0] for name, _ in student.named_parameters()})
    with pytest.raises(KDError, match=r"all its parameters are frozen.* name fewer parts in the config's `frozen`"):
        train(Distiller(model(1), student, [FGD()]), data, config(frozen=frozen), seed=0)
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("name", ["the teacher", "FGD"])
def test_models_on_different_devices_are_told_in_one_sentence(data, name):
    distiller = Distiller(model(1), model(2), [FGD()])
    (distiller.teacher_adapter.model if name == "the teacher" else distiller.methods[0]).to("meta")
    told = rf"the student lies on cpu, and {name} on meta: move all of them together, distiller.to\('cpu'\)"
    with pytest.raises(KDError, match=told):
        train(distiller, data, config(), seed=0)


def test_schedules_begin_with_the_run(data):
    runs = []
    for before in (0, 50):  # calls in a loop of the user's own
        distiller = Distiller(model(1), model(2), [PKD().scheduled(warmup=3)])
        distiller.set_extra_state({"step": before})
        runs.append(train(distiller, data, config(), seed=0).history)
    assert runs[0] == runs[1]


class Renamed(ProceduralShapes):
    def __init__(self, change):
        super().__init__(8, image_size=64, seed=1)
        self.class_names = change(self.class_names)


def test_validation_on_different_classes_is_refused(data):
    turned = Renamed(lambda names: names[::-1])
    with pytest.raises(KDError, match="the same classes come in a different order"):
        train(Distiller(None, model(2)), data, config(), seed=0, validation=Validation(turned))


def test_class_names_may_be_a_list(data):
    check_same_classes(data, Renamed(list))


@pytest.mark.parametrize("schedule", [{"warmup": 4}, {"start": 2, "warmup": 2}])
def test_a_schedule_that_is_not_over_at_the_last_step_is_refused(data, schedule):
    distiller = Distiller(model(1), model(2), [PKD().scheduled(**schedule)])
    with pytest.raises(KDError, match=r"PKD: start .* leave no step of the run \(4 steps\).*: shorten them"):
        train(distiller, data, config(steps=4), seed=0)
