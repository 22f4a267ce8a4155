import copy
import math
import random

import numpy as np
import pytest
import torch

import kdtoolkit
from kdtoolkit import Distiller, KDError
from kdtoolkit.data import Augmentation, ProceduralShapes, batches
from kdtoolkit.methods import FGD, PKD, CrossKD, FitNet, Mimic
from tests.conftest import tiny_fcos, tiny_gfl, tiny_of


def pair(*methods, **changes):
    torch.manual_seed(0)
    return Distiller(tiny_gfl(seed=1), tiny_gfl(seed=2, **changes), methods)


def shown(count=2):
    data = ProceduralShapes(4 * count, image_size=64, seed=0)
    generator = torch.Generator().manual_seed(0)
    for images, targets, _ in batches(data, batch_size=2, steps=count, seed=0, augment=Augmentation()):
        for target in targets:
            target["labels"] = torch.randint(3, target["labels"].shape, generator=generator)
        yield images, targets


def naive(distiller, data, terms):
    """For each term and part: norm, the task's norm, cosine and gain, parameter by parameter, as means over batches."""
    adapter = distiller.student_adapter
    parameters = dict(distiller.student.named_parameters())

    def gradients(loss):
        return torch.autograd.grad(loss, [*parameters.values()], retain_graph=True, allow_unused=True)

    found = {}
    for images, targets in data:
        losses = distiller.train()(images, targets)
        task = gradients(sum(loss for name, loss in losses.items() if name.startswith("task/")))
        whole = sum(each.square().sum().item() for each in task if each is not None)
        pyramid = gradients(sum(level.sum() for level in adapter.features(adapter.prepare(images))))
        for term in terms:
            own = gradients(sum(x for name, x in losses.items() if name == term or name.startswith(f"{term}/")))
            sums = {}
            for name, first, second, third in zip(parameters, own, task, pyramid, strict=True):
                where = "backbone" if name.startswith("backbone.") else "head" if third is None else "neck"
                for part in ("all", where) if first is not None and second is not None else ():
                    products = [
                        (a * b).double().sum().item() for a, b in ((first, first), (second, second), (first, second))
                    ]
                    sums[part] = [total + x for total, x in zip(sums.get(part, (0, 0, 0)), products, strict=True)]
            for part, (square, task_square, product) in sums.items():
                norms = math.sqrt(square), math.sqrt(task_square)
                found.setdefault((term, part), []).append((*norms, product / math.prod(norms), product / whole))
    return {key: [sum(column) / len(column) for column in zip(*each, strict=True)] for key, each in found.items()}


def test_it_measures_what_a_loop_over_parameters_finds():
    distiller = pair(Mimic(), FGD())
    found = kdtoolkit.probe(distiller, shown())
    rows = {
        name: next(row for row in found.rows if row.name == name) for name in ("mimic", "mimic/cls", "fgd", "task/box")
    }
    expected = naive(distiller, shown(), rows)
    assert {(name, part) for name, row in rows.items() for part in row.parts} == expected.keys()
    assert ("fgd", "head") not in expected
    for (name, part), values in expected.items():
        measured = rows[name].parts[part]
        numbers = measured.norm, measured.task_norm, measured.cosine, measured.gain
        assert numbers == pytest.approx(values, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("method", [PKD, Mimic])
def test_the_gain_is_that_of_a_small_step(method):
    """A step on PKD's loss moves no parameter of the head, where much of the task's gradient is.

    FCOS's targets do not depend on its predictions, so its loss's slope is its gradient. That of GFL is not.
    """
    torch.manual_seed(0)
    distiller, batch = Distiller(tiny_fcos(seed=1), tiny_fcos(seed=2), [method()]).train(), next(shown(1))
    losses = distiller(*batch)
    parameters = [*distiller.student.parameters()]
    steps = [
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for loss in (
            sum(x for name, x in losses.items() if name.startswith("task/")),
            sum(x for name, x in losses.items() if not name.startswith("task/")),
        )
    ]

    @torch.no_grad()
    def lowered(step):
        """How much a step lowers the task's loss, by its slope at the point between a step forward and one back."""
        norm = math.sqrt(sum(each.square().sum().item() for each in step if each is not None))
        size, values = 1e-3 / norm, []
        for move in (size, -2 * size, size):
            for parameter, each in zip(parameters, step, strict=True):
                if each is not None:
                    parameter.sub_(move * each)
            values.append(sum(x.item() for name, x in distiller(*batch).items() if name.startswith("task/")))
        return (values[1] - values[0]) / (2 * size)

    expected = lowered(steps[1]) / lowered(steps[0])
    found = kdtoolkit.probe(distiller, [batch]).methods[method.__name__.lower()].parts["all"]
    assert found.gain == pytest.approx(expected, rel=0.1)


def test_values_and_rows_are_those_of_the_losses():
    distiller = pair(PKD(), CrossKD())
    found = kdtoolkit.probe(distiller, shown(1))
    losses = distiller.train()(*next(shown(1)))
    assert [row.name for row in found.rows if not row.is_sum] == list(losses)
    assert list(found.methods) == ["pkd", "crosskd"]
    for row in found.rows:
        own = [loss.item() for name, loss in losses.items() if name == row.name or name.startswith(f"{row.name}/")]
        assert row.value == pytest.approx(sum(own), rel=1e-5)
    assert found.agreement == {}
    assert found.rows[0].parts["all"].cosine == pytest.approx(1)
    assert found.rows[0].parts["all"].margin is None


@pytest.mark.parametrize(("count", "t"), [(2, 12.706), (3, 4.303)])
def test_the_margin_is_that_of_students_t(count, t):
    data = [*shown(3)][:count]
    cosines = [kdtoolkit.probe(pair(PKD()), [batch]).methods["pkd"].parts["all"].cosine for batch in data]
    found = kdtoolkit.probe(pair(PKD()), data).methods["pkd"].parts["all"]
    mean = sum(cosines) / count
    deviation = math.sqrt(sum((cosine - mean) ** 2 for cosine in cosines) / (count - 1))
    assert found.margin == pytest.approx(t * deviation / math.sqrt(count), rel=1e-3)


def test_the_agreement_is_that_of_the_task_on_two_batches():
    distiller = pair(PKD())
    gradients = []
    for images, targets in shown():
        distiller.zero_grad()
        Distiller(None, distiller.student).train()(images, targets).total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in distiller.student.parameters()]))
    expected = torch.nn.functional.cosine_similarity(*gradients, dim=0).item()
    assert kdtoolkit.probe(distiller, shown()).agreement["all"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("method", [PKD, Mimic])
def test_weights_times_the_factor_have_the_share(method):
    factor = kdtoolkit.probe(pair(method()), shown(1), share=0.25).factor(method.__name__.lower())
    use = kdtoolkit.probe(pair(method()), shown(1), share=0.25).methods[method.__name__.lower()]
    weights = {"weight": 6.0 * factor} if method is PKD else {"cls_weight": factor, "distribution_weight": 4 * factor}
    share = kdtoolkit.probe(pair(method(**weights)), shown(1)).methods[method.__name__.lower()].parts["all"].share
    assert share == pytest.approx(0.25, rel=1e-3)
    assert use.parts["all"].share != pytest.approx(0.25, rel=1e-2)


def test_schedules_and_held_shares_are_left_out():
    plain = kdtoolkit.probe(pair(PKD()), shown(1))
    for method in (PKD().scheduled(start=5), PKD().scheduled(warmup=100, every=3), PKD().held_at(share=0.3)):
        found = kdtoolkit.probe(pair(method), shown(1))
        assert found.methods["pkd"].parts["all"].share == pytest.approx(plain.methods["pkd"].parts["all"].share)


def facts(distiller):
    return {
        "values": copy.deepcopy({**distiller.state_dict(), **distiller.teacher_adapter.model.state_dict()}),
        "modes": [module.training for module in (*distiller.modules(), *distiller.teacher_adapter.model.modules())],
        "gradients": [p.grad is None for p in distiller.parameters()],
        "schedules": [(method.schedule, method.held and method.held.share) for method in distiller.methods],
        "calls": distiller.calls,
        "held": {name: held.metrics for name, held in distiller.held.items()},
        "hooks": [len(module._forward_hooks) for module in distiller.modules()],
        "random": (torch.rand(1).item(), random.random(), np.random.rand()),  # noqa: NPY002
    }


@pytest.mark.parametrize("breaks", [False, True])
def test_it_leaves_everything_as_it_was(breaks):
    data = [*shown(1), (next(shown(1))[0], None)] if breaks else [*shown(2)]
    found = []
    for probes in (False, True):
        method = PKD().scheduled(start=3).held_at(share=0.2)
        distiller = pair(method, FitNet(), head_channels=8)
        for _ in range(4):
            distiller(*next(shown(1)))
        distiller.eval()
        distiller.student.neck.train()
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        if probes and breaks:
            with pytest.raises(KDError, match="with labels"):
                kdtoolkit.probe(distiller, data)
        elif probes:
            kdtoolkit.probe(distiller, data)
        found.append(facts(distiller))
    for name, value in found[0].items():
        if name == "values":
            assert value.keys() == found[1][name].keys()
            tensors = (key for key, each in value.items() if isinstance(each, torch.Tensor))
            assert all(torch.equal(value[key], found[1][name][key]) for key in tensors)
        else:
            assert value == found[1][name], name


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["torchvision FCOS", "torchvision Faster R-CNN", "DETR", "Deformable DETR", "YOLO11"]
)
def test_every_kind_of_student_has_backbone_neck_and_head(family):
    student = tiny_of(family, seed=2).requires_grad_()  # transformers freezes the backbone of some
    distiller = Distiller(tiny_of(family, seed=1), student, [PKD()])
    found = kdtoolkit.probe(distiller, shown(1))
    assert set(found.rows[0].parts) == {"all", "backbone", "neck", "head"}
    assert set(found.methods["pkd"].parts) == {"all", "backbone", "neck"}


def test_frozen_parameters_are_left_out():
    distiller = pair(PKD())
    distiller.student.backbone.requires_grad_(False)
    parts = kdtoolkit.probe(distiller, shown(1)).methods["pkd"].parts
    assert set(parts) == {"all", "neck"}


@pytest.mark.parametrize("still", [False, True])
def test_batch_norms_that_keep_their_statistics_in_training_do_so(still):
    distiller = pair(PKD()).train()
    norms = [m for m in distiller.student.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.train(not still)
    expected = distiller(*next(shown(1)))["pkd/feature"].item()
    for norm in norms:
        norm.reset_running_stats()
    found = kdtoolkit.probe(distiller, shown(1)).methods["pkd"].value
    assert [norm.training for norm in norms] == [not still] * len(norms)
    assert found == pytest.approx(expected, rel=1e-5)


def test_wrong_uses_are_one_sentence():
    with pytest.raises(KDError, match="name a teacher and a method"):
        kdtoolkit.probe(Distiller(None, tiny_fcos(seed=1)), shown())
    with pytest.raises(KDError, match="at least one batch"):
        kdtoolkit.probe(pair(PKD()), [])
    for share in (0, 1, 5):
        with pytest.raises(KDError, match="above 0 and below 1"):
            kdtoolkit.probe(pair(PKD()), shown(), share=share)
    distiller = pair(PKD())
    with torch.no_grad():
        next(distiller.student.backbone.parameters()).fill_(math.nan)
    with pytest.raises(KDError, match="is nan in a batch"):
        kdtoolkit.probe(distiller, shown(1))
