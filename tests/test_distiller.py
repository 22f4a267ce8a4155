import copy
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from kdtoolkit import Distiller, IncompatibleError, KDError, adapt
from kdtoolkit.adapters.native import DenseAdapter
from kdtoolkit.compatibility import why_refused
from kdtoolkit.contract import Capability, Method, Schedule
from kdtoolkit.distiller import Losses
from kdtoolkit.listing import facts_of
from kdtoolkit.methods import FGD, LD, PKD, CrossKD, FitNet, Mimic, all_methods
from tests.conftest import DENSE, tiny_atss, tiny_gfl


@pytest.mark.parametrize("make", DENSE)
def test_without_methods_it_is_the_plain_loss_to_the_last_bit(make, batch):
    student = make(seed=2)
    plain = student(*batch)
    losses = Distiller(None, student)(*batch)
    assert {f"task/{name}": value.item() for name, value in plain.items()} == {k: v.item() for k, v in losses.items()}
    assert losses.total.item() == sum(plain.values()).item()


_GFL = adapt(tiny_gfl(seed=0)).spec
APPLY = sorted(name for name, cls in all_methods().items() if why_refused(cls, _GFL, _GFL) is None)


def test_terms_are_named_and_summed(batch):
    losses = Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [CrossKD(), PKD(), PKD(weight=3.0)])(*batch)
    assert {"crosskd/cls", "crosskd/box", "pkd/feature", "pkd2/feature"} < set(losses)
    assert losses["pkd2/feature"].item() == pytest.approx(losses["pkd/feature"].item() / 2)
    assert losses.total.item() == pytest.approx(sum(loss.item() for loss in losses.values()), rel=1e-6)


def test_no_name_is_given_twice(batch):
    pkd2, task = (type(name, (PKD,), {}) for name in ("PKD2", "Task"))
    task.terms = ("cls",)
    methods = [PKD(), PKD(weight=2.0), pkd2(weight=3.0), pkd2(), task()]
    distiller = Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), methods)
    assert distiller.names == ("pkd", "pkd2", "pkd22", "pkd23", "task2")
    losses, own = distiller(*batch), Distiller(None, tiny_gfl(seed=2))(*batch)
    assert losses.keys() - own.keys() == {*distiller.terms}
    assert len(distiller.terms) == len(methods)
    assert losses["task/cls"] == own["task/cls"]


def test_the_teacher_never_changes_and_the_student_stays_plain(batch):
    teacher, student = tiny_gfl(seed=1), tiny_gfl(seed=2, head_channels=8)
    before, keys = copy.deepcopy(teacher.state_dict()), list(student.state_dict())
    distiller = Distiller(teacher, student, [CrossKD(), PKD(), FGD()])
    distiller.train()
    optimizer = torch.optim.SGD([p for p in distiller.parameters() if p.requires_grad], 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        distiller(*batch).total.backward()
        optimizer.step()
    after = teacher.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not teacher.training
    assert all(p.grad is None for p in teacher.parameters())
    assert list(student.state_dict()) == keys
    tiny_gfl(seed=3, head_channels=8).load_state_dict(student.state_dict())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())


def test_a_teacher_set_to_train_meanwhile_is_set_back(batch):
    teacher = tiny_gfl(seed=1)
    distiller = Distiller(teacher, tiny_gfl(seed=2), [PKD()])
    teacher.train()
    buffers = copy.deepcopy(dict(teacher.named_buffers()))
    distiller(*batch)
    assert all(torch.equal(buffers[name], buffer) for name, buffer in teacher.named_buffers())


def test_a_teacher_made_trainable_meanwhile_is_frozen_again(batch):
    teacher = tiny_gfl(seed=1)
    distiller = Distiller(teacher, tiny_gfl(seed=2), [CrossKD()])
    [*teacher.parameters()][-1].requires_grad_(True)
    distiller(*batch).total.backward()
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("name", ["student", "teacher", "methods", "class_map", "teacher_scale"])
def test_what_methods_are_set_up_for_stays(name):
    distiller = Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [PKD()])
    with pytest.raises(KDError, match=f"the {name} of a Distiller cannot be changed, .*: make a new one"):
        setattr(distiller, name, tiny_gfl(seed=3))


def test_methods_are_not_added_later(batch):
    distiller = Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [PKD()])
    distiller.methods.append(CrossKD())
    with pytest.raises(KDError, match="was made with 1 methods and has 2 now"):
        distiller(*batch)


def test_one_teacher_pass_a_step(batch):
    calls = []
    teacher = tiny_gfl(seed=1)
    teacher.backbone.register_forward_hook(lambda *_: calls.append(1))
    Distiller(teacher, tiny_gfl(seed=2), [CrossKD(), PKD(), LD()])(*batch)
    assert len(calls) == 1


def test_state_dict_holds_the_student_and_the_methods_but_not_the_teacher():
    distiller = Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2, head_channels=8), [CrossKD()])
    prefixes = {name.split(".")[0] for name in distiller.state_dict()}
    assert prefixes == {"student", "methods", "_extra_state"}


def test_weights_follow_the_schedule_and_go_on_from_a_saved_state(batch):
    def terms(distiller):
        return {name: loss.item() for name, loss in distiller(*batch).items()}

    def make(schedule):
        return Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [PKD().scheduled(**schedule), CrossKD()])

    constant = terms(make({}))["pkd/feature"]
    scheduled = make({"warmup": 1, "decay": 1, "stop": 4})
    found = [terms(scheduled).get("pkd/feature", 0) for _ in range(2)]
    resumed = make({"warmup": 1, "decay": 1, "stop": 4})
    resumed.load_state_dict(scheduled.state_dict())
    found += [terms(resumed).get("pkd/feature", 0) for _ in range(3)]
    assert found == pytest.approx([constant / 2, constant, constant, constant / 2, 0])


def test_in_steps_without_a_method_the_teacher_rests(batch):
    teacher, calls = tiny_gfl(seed=1), []
    teacher.backbone.register_forward_hook(lambda *_: calls.append(len(seen)))
    distiller = Distiller(
        teacher, tiny_gfl(seed=2), [PKD().scheduled(start=2, every=3, stop=9), CrossKD().scheduled(start=5)]
    )
    seen = []
    for _ in range(7):
        seen.append(sorted({name.partition("/")[0] for name in distiller(*batch)} - {"task"}))
    assert seen == [[], [], ["pkd"], [], [], ["crosskd", "pkd"], ["crosskd"]]
    assert calls == [2, 5, 6]


def test_schedules_in_shares_of_the_run_are_those_in_steps():
    shares, steps = Schedule(start=0.1, warmup=0.2, decay=3, stop=0.9), Schedule(start=2, warmup=4, decay=3, stop=18)
    assert shares.in_run(20) == steps
    assert [shares.factor(step, 20) for step in range(20)] == [steps.factor(step) for step in range(20)]
    assert shares.why_too_long(20) is None
    assert "comes before start" in shares.why_too_long(3)


def test_rounding_takes_neither_a_method_nor_its_stop_out_of_the_run():
    late = Schedule(start=0.97)
    assert "leave no step of the run (10 steps) at full weight" in late.why_too_long(10)
    assert late.why_too_long(100) is None
    assert [late.factor(step, 100) for step in (96, 97, 99)] == [0, 1, 1]
    assert [Schedule(stop=0.9).factor(step, 4) for step in range(4)] == [1, 1, 1, 0]
    assert Schedule(stop=0.9).in_run(300).stop == 270
    warming = Schedule(warmup=9)
    assert warming.why_too_long(10) is None
    assert warming.factor(9) == 1  # the full weight in the last step
    assert Schedule(warmup=10).why_too_long(10) is not None


def test_a_share_of_the_run_needs_its_length(batch):
    distiller = Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [PKD().scheduled(stop=0.5)])
    with pytest.raises(KDError, match="number of steps is not known"):
        distiller(*batch)
    distiller.run_steps = 2
    assert [("pkd/feature" in distiller(*batch)) for _ in range(2)] == [True, False]


def test_schedules_count_optimiser_steps_not_calls(batch):
    def distiller():
        return Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [PKD().scheduled(stop=2)], accumulation=3)

    first = distiller()
    assert ["pkd/feature" in first(*batch) for _ in range(7)] == [True] * 6 + [False]
    assert first.step == 2
    resumed = distiller()
    resumed.load_state_dict(first.state_dict())
    assert resumed.step == 2
    with pytest.raises(KDError, match=r"accumulation \(0\)"):
        Distiller(None, tiny_gfl(seed=1), accumulation=0)


@pytest.mark.parametrize(
    ("move", "check"),
    [
        (lambda distiller: distiller.half(), lambda p: p.dtype == torch.float16),
        (lambda distiller: distiller.to("meta"), lambda p: p.is_meta),
        (lambda distiller: torch.nn.ModuleList([distiller]).bfloat16(), lambda p: p.dtype == torch.bfloat16),
        (
            lambda distiller: distiller.to(memory_format=torch.channels_last),
            lambda p: p.ndim != 4 or p.is_contiguous(memory_format=torch.channels_last),
        ),
    ],
)
def test_the_teacher_moves_with_the_distiller_and_is_none_of_its_parameters(move, check):
    teacher = tiny_gfl(seed=1)
    distiller = Distiller(teacher, tiny_gfl(seed=2), [PKD()])
    move(distiller)
    assert all(check(p) for p in teacher.parameters())
    assert all(check(p) for p in distiller.parameters())
    assert {id(p) for p in teacher.parameters()}.isdisjoint(id(p) for p in distiller.parameters())
    assert not any("teacher" in name for name in distiller.state_dict())


def test_wrapped_models_are_named_with_what_to_hand_in():
    teacher = tiny_gfl(seed=1)
    with pytest.raises(KDError, match=r"as it was before torch\.compile"):
        Distiller(teacher, torch.compile(tiny_gfl(seed=2)), [PKD()])
    with pytest.raises(KDError, match=r"a DataParallel around GFL: hand in the model itself, model\.module"):
        Distiller(torch.nn.DataParallel(teacher), tiny_gfl(seed=2), [PKD()])


def test_losses_are_taken_apart_and_put_together_by_pytree(batch):
    losses = Distiller(None, tiny_gfl(seed=1))(*batch)
    doubled = tree_map(lambda loss: 2 * loss, losses)
    assert type(doubled) is Losses
    assert list(doubled) == list(losses)
    assert doubled.total.item() == pytest.approx(2 * losses.total.item())


def test_a_stopped_method_costs_no_teacher_pass(batch):
    calls = []
    teacher = tiny_gfl(seed=1)
    teacher.backbone.register_forward_hook(lambda *_: calls.append(1))
    distiller = Distiller(teacher, tiny_gfl(seed=2), [PKD().scheduled(stop=1)])
    assert [set(distiller(*batch)) >= {"pkd/feature"} for _ in range(3)] == [True, False, False]
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"decay": 3}, r"decay \(3\) needs stop"),
        ({"warmup": -1}, "numbers of steps"),
        ({"warmup": 5, "stop": 4}, "comes before"),
        ({"start": 5, "stop": 4}, "comes before"),
        ({"every": 0}, "every=0: it must be 1 or more"),
    ],
)
def test_impossible_schedules_are_explained(schedule, message):
    with pytest.raises(KDError, match=message):
        PKD().scheduled(**schedule)


def test_a_method_of_features_works_on_chosen_levels(batch):
    def value(*methods):
        losses = Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), methods)(*batch)
        return sum(loss.item() for name, loss in losses.items() if not name.startswith("task/"))

    parts = [value(PKD().at_strides(8)), value(PKD().at_strides(16, 32))]
    assert sum(parts) == pytest.approx(value(PKD()))
    assert value(PKD().at_strides(8), PKD().at_strides(16, 32)) == pytest.approx(value(PKD()))
    with pytest.raises(KDError, match="uses the detectors' heads"):
        CrossKD().at_strides(8)
    with pytest.raises(IncompatibleError, match=r"at the strides \[64\]"):
        value(PKD().at_strides(64))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            {"boxes": [[4.0, 4.0, 9.0, 9.0]], "labels": [3]},
            "target 1: label 0 is 3, and GFL has 3 classes: labels must lie in 0..2",
        ),
        ({"boxes": [[4.0, 4.0, 2.0, 9.0]], "labels": [0]}, "target 1: box 0 is"),
        ({"boxes": [[4.0, 4.0, float("nan"), 9.0]], "labels": [0]}, "target 1: box 0 is"),
        ({"boxes": [[4.0, 4.0, 8.0, 9.0]], "labels": [0, 1]}, r"target 1: boxes must be \(G, 4\)"),
    ],
)
def test_wrong_targets_are_named(batch, target, message):
    images, targets = batch
    wrong = {name: torch.tensor(value) for name, value in target.items()}
    with pytest.raises(KDError, match=message):
        Distiller(None, tiny_gfl(seed=1))(images, [targets[0], wrong])


@pytest.mark.parametrize("name", APPLY)
def test_empty_targets_give_finite_losses_and_gradients(name, batch):
    images, targets = batch
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in targets]
    student = tiny_gfl(seed=2)
    losses = Distiller(tiny_gfl(seed=1), student, [all_methods()[name]()])(images, empty)
    losses.total.backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", APPLY)
def test_works_under_bfloat16_autocast_with_losses_in_float32(name, batch):
    student = tiny_gfl(seed=2)
    distiller = Distiller(tiny_gfl(seed=1), student, [all_methods()[name]()])
    with torch.autocast("cpu", torch.bfloat16):
        losses = distiller(*batch)
    losses.total.backward()
    assert all(loss.dtype == torch.float32 and torch.isfinite(loss) for loss in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", APPLY)
def test_terms_are_those_declared(name, batch):
    cls = all_methods()[name]
    losses = Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [cls()])(*batch)
    assert {key.split("/")[1] for key in losses if not key.startswith("task/")} <= set(cls.terms)
    assert cls.needs <= set(Capability)


def test_other_class_counts_are_refused_with_what_would_work():
    with pytest.raises(
        IncompatibleError, match=r"student has 3 classes, the teacher 5\. .*no classes.*this pair: .*PKD"
    ):
        Distiller(tiny_gfl(seed=1, num_classes=5), tiny_gfl(seed=2), [CrossKD()])
    Distiller(tiny_gfl(seed=1, num_classes=5), tiny_gfl(seed=2), [PKD()])
    Distiller(tiny_gfl(seed=1, num_classes=5), tiny_gfl(seed=2), [LD()])
    with pytest.raises(IncompatibleError, match="it compares class scores"):
        Distiller(tiny_gfl(seed=1, num_classes=5), tiny_gfl(seed=2), [LD(cls_weight=1.0)])


def test_methods_are_instances_each_of_its_own():
    method = FGD()
    for methods, reason in (([PKD], "list of methods"), (PKD(), "list of methods"), ([method, method], "listed twice")):
        with pytest.raises(KDError, match=reason):
            Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), methods)


def test_a_method_is_in_one_distiller():
    method = FGD()
    with pytest.raises(IncompatibleError):
        Distiller(tiny_gfl(seed=1), tiny_atss(seed=2), [method, LD()])
    first = Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [method])  # it was not set up by what failed
    learned = {name: p.clone() for name, p in first.named_parameters()}
    with pytest.raises(KDError, match=r"this FGD belongs to another Distiller.*make a new one, FGD\(\)"):
        Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2, neck_channels=24), [method])
    assert all(torch.equal(p, learned[name]) for name, p in first.named_parameters())


class Wrong(Method):
    needs = frozenset({Capability.FEATURES})
    terms = ("feature",)
    paper = "none"

    def __init__(self, *, returned=None):
        super().__init__()
        self.returned = returned

    def forward(self, exchange):
        return self.returned


class Counting(PKD):
    metrics = ("objects",)

    def forward(self, exchange):
        count = sum(len(boxes) for boxes in exchange.student.batch.boxes)
        return {**super().forward(exchange), "objects": exchange.student.features[0].sum() * 0 + count}


def test_metrics_are_no_losses(batch):
    plain = Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [PKD()])(*batch)
    distiller = Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [Counting(), Counting()])
    assert distiller.metrics == ["counting/objects", "counting2/objects"]
    losses = distiller(*batch)
    assert set(losses) == {*plain} - {"pkd/feature"} | {"counting/feature", "counting2/feature"}
    objects = sum(len(target["boxes"]) for target in batch[1])
    assert {name: value.item() for name, value in losses.metrics.items()} == dict.fromkeys(distiller.metrics, objects)
    assert not any(value.requires_grad for value in losses.metrics.values())
    doubled = tree_map(lambda x: 2 * x, losses)  # as DistributedDataParallel and torch.compile take it apart
    assert doubled.total.item() == pytest.approx(2 * losses.total.item())
    assert doubled.metrics["counting/objects"].item() == 2 * objects


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ({"feature": 1.5}, "returned 1.5 as 'feature': it must be a scalar float tensor"),
        ({"feature": torch.ones(2)}, r"returned a torch.float32 tensor of shape \(2,\) as 'feature'"),
        ({"feature": torch.tensor(1)}, "returned a torch.int64 tensor"),
        ({"features": torch.tensor(1.0)}, r"the term 'features', and Wrong.terms declares \('feature',\)"),
        (torch.tensor(1.0), "must return a dict of loss terms; it returned a Tensor"),
        (None, "it returned a NoneType"),
    ],
)
def test_wrong_terms_are_one_sentence(batch, returned, words):
    with pytest.raises(TypeError, match=words) as error:
        Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [Wrong(returned=returned)])(*batch)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"needs": None}, "Fact.needs is missing: write what both detectors must show"),
        ({"needs": [Capability.FEATURES]}, r"Fact.needs is \[.*\]: write what"),
        ({"needs": frozenset({"feature"})}, r"Fact.needs is frozenset\(\{'feature'\}\)"),
        ({"terms": None}, r"Fact.terms is missing: write a tuple of names, as in terms = \("),
        ({"terms": "x"}, "Fact.terms is 'x': write a tuple of names"),
        ({"metrics": ["x"]}, r"Fact.metrics is \['x'\]"),
        ({"metrics": ("feature",)}, "Fact has the name 'feature' twice in its terms and metrics"),
        ({"unlabelled": "image"}, "Fact.unlabelled is 'image': it must be one of 'images', 'detections', 'skips'"),
    ],
)
def test_wrong_facts_of_a_class_are_one_sentence(facts, words):
    method = type("Fact", (PKD,), facts)
    with pytest.raises(KDError, match=words):
        Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [method()])
    with pytest.raises(KDError, match=words):
        facts_of(method)


def test_targets_are_as_many_as_images_and_labels_are_integers(batch):
    images, targets = batch
    distiller = Distiller(None, tiny_gfl(seed=2))
    with pytest.raises(KDError, match="there are 2 images and 1 targets"):
        distiller(images, targets[:1])
    with pytest.raises(KDError, match=r"target 0: labels are torch\.float32"):
        distiller(images, [{**t, "labels": t["labels"].float()} for t in targets])


def test_a_teacher_may_know_fewer_classes_than_the_ground_truth_has(batch):
    images, targets = batch
    targets = [{**t, "labels": torch.full_like(t["labels"], 4)} for t in targets]
    losses = Distiller(tiny_gfl(seed=1, num_classes=2), tiny_gfl(seed=2, num_classes=5), [PKD(), LD()])(images, targets)
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["ld/main"] > 0


def test_a_student_that_cannot_learn_is_refused(batch):
    student = tiny_gfl(seed=2).requires_grad_(False)  # what YOLO("best.pt") holds: a moving average
    for teacher, methods in ((tiny_gfl(seed=1), [FGD()]), (None, [])):
        with pytest.raises(KDError, match=r"no parameter of the student \(GFL\).*student\.requires_grad_\(True\)"):
            Distiller(teacher, student, methods)
    Distiller(None, student.requires_grad_(True))
    student.backbone.requires_grad_(False)
    assert Distiller(None, student)(*batch).total.requires_grad  # a part may be frozen


def norms_of(student):
    return [module for module in student.modules() if isinstance(module, torch.nn.BatchNorm2d)]


def test_frozen_batch_norms_stay_frozen(batch):
    student = tiny_gfl(seed=2)
    frozen, free = norms_of(student)[:3], norms_of(student)[3:]
    for norm in frozen:
        norm.eval().requires_grad_(False)
    distiller = Distiller(tiny_gfl(seed=1), student, [PKD()])
    for _ in range(2):
        assert distiller.train() is distiller
        assert not any(norm.training for norm in frozen)
        assert all(norm.training for norm in free)
        distiller(*batch)
        distiller.eval()
    assert not any(norm.running_mean.any() for norm in frozen)
    assert all(norm.running_mean.any() for norm in free)
    frozen[0].requires_grad_(True)
    assert distiller.train() is distiller
    assert frozen[0].training


def test_batch_norms_without_parameters_are_frozen_where_they_alone_are_in_eval_mode():
    student = tiny_gfl(seed=2)
    student.backbone.bn1 = torch.nn.BatchNorm2d(4, affine=False)
    distiller = Distiller(None, student)
    student.eval()
    assert distiller.train().student.backbone.bn1.training
    student.backbone.bn1.eval()
    assert not distiller.train().student.backbone.bn1.training


def test_other_strides_are_refused():
    with pytest.raises(IncompatibleError, match="strides"):
        Distiller(tiny_gfl(seed=1, strides=(8, 16, 32, 64, 128)), tiny_gfl(seed=2), [Mimic()])


def test_distributions_are_needed_by_ld():
    with pytest.raises(IncompatibleError, match=r"needs distributions, which the student \(.*ATSS.*\) does not show"):
        Distiller(tiny_gfl(seed=1), tiny_atss(seed=2), [LD()])


def test_a_model_cannot_teach_itself():
    model = tiny_gfl(seed=1)
    with pytest.raises(KDError, match="share parameters"):
        Distiller(model, model, [PKD()])


def test_methods_need_a_teacher():
    with pytest.raises(KDError, match="need a teacher"):
        Distiller(None, tiny_gfl(seed=1), [PKD()])


def test_a_model_without_adapter_is_named():
    with pytest.raises(KDError, match=r"no adapter for torch\.nn\.modules\.linear\.Linear"):
        Distiller(None, torch.nn.Linear(1, 1))


class PaddedAdapter(DenseAdapter):
    """Pads to multiples of 128, as some libraries do."""

    def prepare(self, images, targets=None, like=None):
        batch = super().prepare(images, targets, like)
        height, width = batch.images.shape[-2:]
        return replace(batch, images=F.pad(batch.images, (0, -width % 128, 0, -height % 128)))


class Shapes(Method):
    needs = frozenset({Capability.FEATURES})
    terms = ("none",)
    paper = "none"
    seen: ClassVar[list] = []

    def forward(self, exchange):
        self.seen.append([[tuple(x.shape[-2:]) for x in v.features] for v in (exchange.student, exchange.teacher)])
        return {"none": exchange.student.features[0].sum()}


def test_features_of_canvases_with_other_padding_are_cut_to_the_students(batch):
    for swapped, cells in ((False, 8), (True, 16)):
        pair = PaddedAdapter(tiny_gfl(seed=1)), tiny_gfl(seed=2)
        teacher, student = reversed(pair) if swapped else pair
        Shapes.seen.clear()
        Distiller(teacher, student, [Shapes()])(*batch)
        assert Shapes.seen == [[[(cells // i, cells // i) for i in (1, 2, 4)]] * 2]
        losses = Distiller(teacher, student, [FitNet(region="boxes"), CrossKD(), Mimic()])(*batch)
        assert losses["fitnet/feature"] > 0
        assert losses["crosskd/cls"] > 0


def test_ground_truth_may_stay_on_the_host_whatever_its_numbers_are(batch):
    images, targets = batch
    doubles = [{"boxes": t["boxes"].double(), "labels": t["labels"].int()} for t in targets]
    losses = [Distiller(None, tiny_gfl(seed=2))(images, each) for each in (targets, doubles)]
    assert losses[0].total == losses[1].total


@pytest.mark.slow
def test_a_compiled_step_is_compiled_for_different_numbers_of_boxes_once():
    torch._dynamo.reset()
    compiled = []

    def backend(graph, inputs):  # traced as for any other backend, and run as it is
        compiled.append(graph)
        return graph.forward

    def batch(*counts):
        generator = torch.Generator().manual_seed(sum(counts))
        corners = [20 * torch.rand(count, 4, generator=generator) for count in counts]
        targets = [
            {"boxes": x + torch.tensor([0.0, 0.0, 30.0, 30.0]), "labels": torch.arange(len(x)) % 3} for x in corners
        ]
        return [torch.rand(3, 64, 64, generator=generator) for _ in counts], targets

    distiller = Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2), [CrossKD(), PKD()])
    distiller.student.backbone.eval()  # batch norm's statistics move with each call
    step, graphs = torch.compile(distiller, backend=backend), []
    for counts in ((3, 2), (2, 4), (4, 6), (7, 3)):
        plain = distiller(*batch(*counts))
        losses = step(*batch(*counts))
        losses.total.backward()
        graphs.append(len(compiled))
        for name, loss in plain.items():
            torch.testing.assert_close(losses[name], loss, rtol=1e-5, atol=1e-6)
    assert graphs[0] == 4
    assert graphs[1] == graphs[2] == graphs[3] == 8
