"""One step of a pair: which maps heads run on, and how often they run, match and make a GPU's host wait."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torchvision.models.detection._utils import Matcher
from torchvision.ops import roi_align

from kdtoolkit import Distiller, adapt
from kdtoolkit.compatibility import why_refused
from kdtoolkit.contract import Capability, Method
from kdtoolkit.matrix import families
from kdtoolkit.methods import KDDETR, LD, PKD, CLoCKDistill, CrossKD, DETRDistill, LogitKD, Mimic, ObjectKD, all_methods
from kdtoolkit.testing.syncs import count_syncs
from tests.conftest import first_of_each_kind, tiny_of

FAMILIES = tuple(families())
# One of each kind of head; the others are slow tests.
QUICK = {"GFL", "torchvision RetinaNet", "torchvision Faster R-CNN", "DETR", "D-FINE", "YOLO11"}
each_family = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)


TWICE = (KDDETR, DETRDistill, CLoCKDistill)  # methods whose own idea is a second pass of the student


class Seen(Method):
    """Keeps the exchange, states and all."""

    needs = frozenset({Capability.FEATURES, Capability.STAGES})
    terms = ("none",)
    paper = ""

    def forward(self, exchange):
        self.exchange = exchange
        return {"none": exchange.student.features[0].sum() * 0}


def photos(*sizes):
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=generator) for size in sizes]
    targets = [
        {
            "boxes": torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.3, 0.3, 0.9, 0.95]]) * torch.tensor([w, h, w, h]),
            "labels": torch.tensor([0, 2]),
        }
        for h, w in sizes
    ]
    return images, targets


def exchange_of(teacher, student, batch):
    seen = Seen()
    Distiller(teacher, student, [seen]).train()(*batch)
    return seen.exchange


def worst(a, b):
    return (a - b).abs().max().item()


def alone(view, priors=None):
    """The head's pass on all that the backbone gives, by the adapter itself."""
    with torch.no_grad():
        return view.adapter.head(view.adapter.features(view.batch), view.batch, priors).predictions


def test_a_head_takes_its_own_maps_where_the_other_detector_pads_otherwise():
    exchange = exchange_of(tiny_of("RF-DETR", seed=1), tiny_of("RT-DETR", seed=2), photos((64, 128), (64, 128)))
    assert exchange.teacher.batch.images.shape[-2:] == (128, 128)
    pair = exchange.matched()
    expected = alone(exchange.teacher, pair.student.predictions.priors)
    assert worst(pair.teacher.predictions.logits, expected.logits) == 0
    assert worst(pair.teacher.predictions.boxes, expected.boxes) == 0
    assert [tuple(x.shape[-2:]) for x in exchange.teacher.features] == [(8, 16)]


def rcnn(divisor, seed, side=96):
    model = tiny_of("torchvision Faster R-CNN", seed=seed)
    model.transform.min_size, model.transform.max_size, model.transform.size_divisible = (side,), side, divisor
    return model


def test_proposals_and_their_network_are_of_whole_maps_where_canvases_differ():
    exchange = exchange_of(rcnn(128, 1), rcnn(32, 2), photos((96, 96), (96, 96)))
    pair = exchange.matched()
    expected = alone(exchange.teacher, pair.student.predictions.priors)
    assert worst(pair.teacher.predictions.logits, expected.logits) == 0
    assert worst(pair.teacher_boxes, expected.boxes) == 0
    first = exchange.first_stage
    assert first.teacher.head.predictions.priors.grid[0] == (32, 32)
    proposals = first.matched()
    assert proposals.teacher.predictions.priors.grid == proposals.student.predictions.priors.grid
    centres = proposals.teacher.predictions.priors.boxes.view(-1, 2, 2).mean(1)
    assert (centres[3] - centres[0]).tolist() == [4, 0]  # of one cell and the next, three anchors each


def test_proposals_are_pooled_where_they_are_although_most_of_the_canvas_is_padding():
    """The library takes 32 cells for 60 px of content to be of stride 2."""
    exchange = exchange_of(rcnn(128, 1, side=60), rcnn(32, 2, side=60), photos((60, 60), (60, 60)))
    assert exchange.teacher.batch.images.shape[-2:] == (128, 128)
    pair = exchange.matched()
    priors = pair.student.predictions.priors
    boxes = [priors.boxes[0, : priors.context[0]]]
    expected = roi_align(exchange.teacher.maps[0][:1], boxes, 7, spatial_scale=0.25, sampling_ratio=2)
    torch.testing.assert_close(pair.teacher.states[0]["box"][0][: len(boxes[0])], expected)


def test_the_teachers_own_proposals_are_pooled_where_they_are_on_a_students_square_canvas():
    """The library takes 32 rows of cells for 64 px of content to be of stride 2."""
    exchange = exchange_of(rcnn(32, 1), tiny_of("RF-DETR", seed=2), photos((64, 128), (64, 128)))
    teacher = exchange.teacher
    assert teacher.batch.images.shape[-2:] == (128, 128)
    boxes = [teacher.head.predictions.priors.boxes[0, : teacher.head.predictions.priors.context[0]]]
    expected = roi_align(teacher.maps[0][:1], boxes, 7, spatial_scale=0.25, sampling_ratio=2)
    torch.testing.assert_close(teacher.head.states[0]["box"][0][: len(boxes[0])], expected)


@pytest.mark.parametrize("teacher", ["torchvision FCOS", "torchvision RetinaNet"])
def test_on_grids_cells_of_unlike_canvases_correspond(teacher):
    """150 x 200 px: 160 x 224 in the student, 256 x 256 in the teacher, which pads to 128."""
    student = tiny_of("FCOS" if "FCOS" in teacher else "RetinaNet", seed=2)
    exchange = exchange_of(tiny_of(teacher, seed=1), student, photos((150, 200), (120, 200)))
    assert exchange.student.batch.images.shape[-2:] == (160, 224)
    assert exchange.teacher.batch.images.shape[-2:] == (256, 256)
    assert exchange.teacher.batch.sizes == exchange.student.batch.sizes
    shapes = [[tuple(x.shape[-2:]) for x in view.features] for view in (exchange.student, exchange.teacher)]
    assert shapes[0] == shapes[1]
    pair = exchange.matched()
    ours, theirs = pair.student.predictions.priors, pair.teacher.predictions.priors
    assert ours.grid == theirs.grid
    assert ours.boxes.shape == theirs.boxes.shape
    assert pair.teacher_assignment.labels.shape == pair.teacher.predictions.logits.shape[:2]
    for stage, state in enumerate(pair.teacher.states):
        again = pair.finish_with_teacher(state, stage)
        assert torch.equal(again.logits, pair.teacher.predictions.logits)
        assert torch.equal(again.boxes, pair.teacher.predictions.boxes)
    whole = exchange.teacher.head.predictions
    level = whole.priors.grid[0]
    per_cell = whole.priors.per_level[0] // (level[0] * level[1])
    first = whole.logits[:, : whole.priors.per_level[0]].view(2, *level, -1)[:, : ours.grid[0][0], : ours.grid[0][1]]
    cells = ours.grid[0][0] * ours.grid[0][1] * per_cell
    assert torch.equal(first.reshape(2, cells, -1), pair.teacher.predictions.logits[:, :cells])


def test_a_teacher_of_one_size_scales_the_students_canvas_as_a_whole():
    exchange = exchange_of(tiny_of("torchvision SSD", seed=1), tiny_of("GFL", seed=2), photos((96, 128), (96, 64)))
    assert exchange.teacher.batch.images.shape[-2:] == (64, 64)
    assert exchange.teacher.batch.sizes == ((64, 64), (64, 32))
    factors = torch.tensor([0.5, 2 / 3] * 2)
    torch.testing.assert_close(exchange.teacher.batch.boxes[1], exchange.student.batch.boxes[1] * factors)
    pair = exchange.matched()
    torch.testing.assert_close(pair.teacher_boxes * factors, pair.teacher.predictions.boxes)
    assert exchange.teacher.features[0].shape[-2:] == (8, 8)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("torchvision FCOS", "GFL"),
        ("FCOS", "torchvision FCOS"),
        ("torchvision RetinaNet", "RF-DETR"),
        ("RT-DETR", "LW-DETR"),
        ("torchvision Faster R-CNN", "torchvision Faster R-CNN v2"),
        ("Deformable DETR", "torchvision SSD"),
        ("torchvision SSD", "YOLO11"),
        ("YOLO11", "RetinaNet"),
    ],
)
def test_photos_of_any_size_and_several_scales(student, teacher):
    teacher, student = tiny_of(teacher, seed=1), tiny_of(student, seed=2)
    if hasattr(student, "transform"):
        student.transform.min_size = (96, 128)
    methods = [m for m in (PKD(), CrossKD()) if why_refused(m, adapt(student).spec, adapt(teacher).spec) is None]
    distiller = Distiller(teacher, student, methods).train()
    for sizes in (((150, 200), (97, 131)), ((64, 211), (120, 90))):
        losses = distiller(*photos(*sizes))
        losses.total.backward()
        assert len(losses) > len(methods)
        assert all(bool(loss.isfinite()) for loss in losses.values())


def test_several_scales_of_one_library():
    student = tiny_of("torchvision RetinaNet", seed=2)
    student.transform.min_size = (96, 128)
    teacher = tiny_of("torchvision RetinaNet", seed=1)
    distiller = Distiller(teacher, student, [Mimic(), PKD()]).train()
    seen = set()
    for _ in range(6):
        losses = distiller(*photos((64, 64), (50, 60)))
        assert losses.total.isfinite()
        seen.add(losses["pkd/feature"].item())
    assert len(seen) > 1


# Counts.


class Counted:
    """Counts an adapter's passes of the head, and of its first stage's, and how often it tells its facts."""

    def __init__(self, adapter, found, role):
        self.adapter, self.found, self.role = adapter, found, role
        adapter.head = self._head(adapter.head, role)
        if adapter.first_stage is not None:
            adapter.first_stage.head = self._head(adapter.first_stage.head, f"{role} first")

    def _head(self, head, name):
        def run(*args, **kwargs):
            self.found[name] += 1
            return head(*args, **kwargs)

        return run


def passes(student, teacher, methods, batch):
    """Passes of heads in one step, by whose they are."""
    found = Counter()
    adapters = [adapt(model) for model in (teacher, student)]
    for adapter, role in zip(adapters, ("teacher", "student"), strict=True):
        Counted(adapter, found, role)
    Distiller(*adapters, methods).train()(*batch)
    return found


def expected_passes(student, teacher, methods):
    heads = [m for m in methods if m.needs != {Capability.FEATURES}]
    found = Counter(student=1 + any(isinstance(m, TWICE) for m in methods), teacher=int(bool(heads)))
    if adapt(student).first_stage is not None:
        found["student first"] = 1
    if adapt(teacher).first_stage is not None and any(isinstance(m, ObjectKD) for m in methods):
        found["teacher first"] = 1  # its own detections are wanted, so its own proposals
    return found


def working(student, teacher):
    specs = adapt(student).spec, adapt(teacher).spec
    return [cls for cls in all_methods().values() if why_refused(cls, *specs) is None]


@each_family
def test_each_head_runs_once_a_step(family):
    student, teacher = tiny_of(family, seed=2), tiny_of(family, seed=1)
    batch = photos((64, 64), (50, 60))
    every = [cls() for cls in working(student, teacher)]
    heads = [[method] for method in every if method.needs != {Capability.FEATURES}]
    for methods in (*heads, [method for method in every if [method] not in heads]):
        assert passes(student, teacher, methods, batch) == expected_passes(student, teacher, methods), methods


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_each_head_runs_once_a_step_whatever_the_teacher(family):
    student, batch = tiny_of(family, seed=2), photos((64, 64), (50, 60))
    for other in first_of_each_kind():  # passes differ by kinds of heads, not by families
        teacher = tiny_of(other, seed=1)
        for cls in working(student, teacher):
            methods = [cls()]
            found = passes(student, teacher, methods, batch)
            assert found == expected_passes(student, teacher, methods), (other, cls.__name__)


def test_methods_share_passes_and_only_other_priors_need_a_second_one():
    student, teacher = tiny_of("RT-DETR", seed=2), tiny_of("RT-DETR", seed=1)
    batch = photos((64, 64), (64, 64))
    assert passes(student, teacher, [CrossKD(), LogitKD(), Mimic(), PKD()], batch) == Counter(student=1, teacher=1)
    both = [CrossKD(), CrossKD(priors="teacher")]
    assert passes(student, teacher, both, batch) == Counter(student=2, teacher=2)


def test_the_first_stage_runs_once_where_proposals_are_distilled_too():
    student, teacher = (tiny_of("torchvision Faster R-CNN", seed=i) for i in (2, 1))
    found = passes(student, teacher, [CrossKD(proposal_weight=0.1)], photos((64, 64), (50, 60)))
    assert found == Counter({"student": 1, "teacher": 1, "student first": 1, "teacher first": 1})


def test_states_that_no_method_takes_are_not_kept():
    for family in ("GFL", "torchvision RetinaNet", "YOLO11", "torchvision Faster R-CNN", "DETR", "RT-DETR"):
        adapter = adapt(tiny_of(family, seed=1))
        adapter.model.eval()
        with torch.no_grad():
            batch = adapter.prepare(photos((64, 64))[0])
            features = adapter.features(batch)
            whole, part = adapter.head(features, batch), adapter.head(features, batch, stages={1})
        assert [bool(state) for state in whole.states] == [True] * len(adapter.spec.stages)
        assert [bool(state) for state in part.states] == [i == 1 for i in range(len(whole.states))]
        assert torch.equal(whole.predictions.logits, part.predictions.logits)
        first = adapter.resume(part.states[1], 1, part)
        assert torch.equal(first.logits, whole.predictions.logits), family


def test_a_step_keeps_the_states_that_its_methods_take():
    kept = {}

    class Peek(CrossKD):
        def forward(self, exchange):
            for role in ("student", "teacher"):
                kept[role] = [bool(state) for state in getattr(exchange, role).head.states]
            return super().forward(exchange)

    teacher, student = tiny_of("GFL", seed=1), tiny_of("GFL", seed=2)
    Distiller(teacher, student, [Peek(stage=1), PKD(), LogitKD()]).train()(*photos((64, 64), (64, 64)))
    assert kept == {"student": [False, True, False], "teacher": [False, True, False]}


def test_facts_are_told_once():
    asked = []
    adapters = []
    for seed in (1, 2):
        adapter = adapt(tiny_of("D-FINE", seed=seed))

        class Told(type(adapter)):
            def describe(self):
                asked.append(self)
                return super().describe()

        adapter.__class__ = Told
        adapters.append(adapter)
    distiller = Distiller(*adapters, [CrossKD(), LD(), PKD()]).train()
    asked.clear()
    distiller(*photos((64, 64), (64, 64)))
    assert len(asked) <= 2  # the library checks its maps' strides by them


def matchings(step):
    """How often ground truth is matched, by any library."""
    found = []

    def hook(module: nn.Module, args: object, output: object) -> None:
        if "Matcher" in type(module).__name__ or "Assigner" in type(module).__name__:
            found.append(module)

    call = Matcher.__call__

    def counted(self, *args):
        found.append(self)
        return call(self, *args)

    with register_module_forward_hook(hook), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Matcher, "__call__", counted)
        step()
    return len(found)


@pytest.mark.parametrize(
    ("family", "method", "most"),
    [
        ("torchvision RetinaNet", CrossKD, 2),  # two images
        ("torchvision Faster R-CNN", CrossKD, 4),  # likewise, in each stage
        ("torchvision SSD", CrossKD, 2),
        ("D-FINE", CrossKD, 4),
        ("D-FINE", LD, 4),
        ("DETR", LogitKD, 1),
    ],
)
def test_ground_truth_is_matched_once(family, method, most):
    student, teacher = tiny_of(family, seed=2), tiny_of(family, seed=1)
    batch = photos((64, 64), (64, 64))
    plain = matchings(lambda: Distiller(None, student).train()(*batch))
    assert matchings(lambda: Distiller(teacher, student, [method()]).train()(*batch)) == plain == most


@each_family
def test_few_synchronisations_beyond_the_librarys_own_step(family):
    """At most three, however many images there are, beyond the student's own step and the teacher's own pass."""
    student, teacher = tiny_of(family, seed=2), tiny_of(family, seed=1)
    batch = photos((64, 64), (50, 60), (64, 64), (64, 64), (64, 50))
    for methods in ([CrossKD(), PKD()], [LD()], [LogitKD()], [ObjectKD()]):
        if any(why_refused(m, adapt(student).spec, adapt(teacher).spec) for m in methods):
            continue
        distiller = Distiller(teacher, student, methods).train()
        counts = []
        own = partial(own_passes, student, teacher, batch, shared=not isinstance(methods[0], ObjectKD))
        for step in (own, lambda: distiller(*batch)):  # noqa: B023
            torch.manual_seed(0)
            with count_syncs() as found:
                step()
            counts.append(found)
        assert counts[1].total() - counts[0].total() <= 3, (methods, counts[1] - counts[0])


def own_passes(student, teacher, batch, *, shared):
    """What the libraries' own forwards do: the student's losses, and the teacher's predictions of the same.

    `shared`: the teacher's head runs on the student's proposals or queries.
    """
    student, teacher = adapt(student), adapt(teacher)
    prepared = student.prepare(*batch)
    trace = student.head(student.features(prepared), prepared)
    student.task_losses(trace, prepared)
    with torch.no_grad():
        like = teacher.prepare(*batch, like=prepared)
        teacher.head(teacher.features(like), like, trace.predictions.priors if shared else None)
