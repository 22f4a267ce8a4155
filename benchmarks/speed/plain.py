"""Plain readings: each method's formula, written again. benchmarks/speed/methods.py compares the methods with them.

A reading is a function of a method, for its settings and learned layers, and of the exchange that the method would see.
It is simple PyTorch code: one line for each line of the formula. It is written without care for speed, but never slow
on purpose. tests/benchmarks/test_plain.py checks that each reading has the value of its method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit.contract import (
    Assignment,
    Batch,
    Capability,
    DetectorSpec,
    Exchange,
    HeadTrace,
    Method,
    Predictions,
    PriorKind,
    Priors,
    Stage,
    View,
)
from kdtoolkit.methods import (
    BCKD,
    CWD,
    FBKD,
    FGD,
    KDDETR,
    LD,
    MGD,
    PKD,
    CanKD,
    CrossKD,
    DeFeat,
    DetKDS,
    FitNet,
    LogitKD,
    Mimic,
)
from kdtoolkit.methods.fbkd import NonLocal
from kdtoolkit.methods.fgd import ContextBlock

Terms = Mapping[str, Tensor]
Reading = Callable[[Method, Exchange], Terms]


# ---- What a method sees


@dataclass(frozen=True)
class Shapes:
    """Of a step: `grid` is the (H, W) of each level, strides doubling from `stride`; one prior a cell."""

    grid: tuple[tuple[int, int], ...] = ((100, 152), (50, 76), (25, 38), (13, 19), (7, 10))
    stride: int = 8
    channels: int = 256
    images: int = 2
    boxes: int = 20
    classes: int = 80
    bins: int = 17
    positives: int = 40

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(self.stride * 2**level for level in range(len(self.grid)))

    @property
    def canvas(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.grid[0][0] * self.stride, self.grid[0][1] * self.stride


def _boxes(regression: Tensor, priors: Priors) -> Tensor:
    """Boxes around the priors' centres, whose sides' distances the first bin tells."""
    centre = (priors.boxes[:, :2] + priors.boxes[:, 2:]) / 2
    reach = regression[..., 0].exp() * priors.strides[:, None]
    return torch.cat([centre - reach[..., :2], centre + reach[..., 2:]], -1)


def _predictions(logits: Sequence[Tensor], regression: Sequence[Tensor], priors: Priors, bins: int) -> Predictions:
    """Of maps (N, K, H, W) and (N, 4 B, H, W), one a level."""
    flat = [torch.cat([x.flatten(2) for x in maps], 2).transpose(1, 2) for maps in (logits, regression)]
    return Predictions(flat[0], flat[1].unflatten(2, (4, bins)), priors, _boxes)


class Detector:
    """The least of a detector that methods ask for: its predictors hand on the first channels of their input."""

    assigner = "any"
    first_stage = None

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        levels = len(shapes.grid)
        width = max(shapes.channels, shapes.classes, 4 * shapes.bins)
        self.spec = DetectorSpec(
            name="stub",
            num_classes=shapes.classes,
            strides=shapes.strides,
            channels=(shapes.channels,) * levels,
            priors=PriorKind.ANCHORS,
            priors_per_cell=(1,) * levels,
            stages=(Stage("tower", dict.fromkeys(("cls", "reg"), (width,) * levels), activation=F.relu),),
            bins=tuple(map(float, range(shapes.bins))),
        )
        cells = [torch.cartesian_prod(torch.arange(h), torch.arange(w)).flip(1) for h, w in shapes.grid]
        centres = torch.cat([x * stride for x, stride in zip(cells, shapes.strides, strict=True)]).float()
        strides = torch.cat([torch.full((len(x),), float(s)) for x, s in zip(cells, shapes.strides, strict=True)])
        reach = 4 * strides[:, None]
        self.priors = Priors(torch.cat([centres - reach, centres + reach], 1), strides, shapes.grid)

    def trace(self, states: Mapping[str, tuple[Tensor, ...]]) -> HeadTrace:
        return HeadTrace((states,), self._predict({branch: map(F.relu, x) for branch, x in states.items()}))

    def resume(self, state: Mapping[str, tuple[Tensor, ...]], stage: int, trace: HeadTrace) -> Predictions:
        return self._predict(state)

    def _predict(self, state: Mapping[str, object]) -> Predictions:
        logits = [x[:, : self.shapes.classes] for x in state["cls"]]
        regression = [x[:, : 4 * self.shapes.bins] for x in state["reg"]]
        return _predictions(logits, regression, self.priors, self.shapes.bins)


def random_boxes(count: int, canvas: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Boxes (G, 4) with sides of 1/32 to 1/2 of the canvas's, as many small as large ones."""
    size = torch.tensor([canvas[1], canvas[0]])
    sides = size * 2 ** (-5 + 4 * torch.rand(count, 2, generator=generator))
    corner = (size - sides) * torch.rand(count, 2, generator=generator)
    return torch.cat([corner, corner + sides], 1)


def exchange(method: Method, shapes: Shapes, seed: int = 0) -> tuple[Exchange, list[Tensor]]:
    """A step of `method`, set up and its learned layers given random weights, and the student's tensors."""
    generator = torch.Generator().manual_seed(seed)
    detector = Detector(shapes)
    spec, (height, width) = detector.spec, shapes.canvas
    boxes = tuple(random_boxes(shapes.boxes, shapes.canvas, generator) for _ in range(shapes.images))
    sizes = ((height, width),) * (shapes.images - 1) + ((height * 7 // 8, width),)
    boxes = (*boxes[:-1], boxes[-1] * 7 / 8)
    labels = tuple(torch.randint(shapes.classes, (len(x),), generator=generator) for x in boxes)
    batch = Batch(torch.empty(shapes.images, 3, 0, 0), sizes, sizes, sizes, boxes, labels)

    def maps(channels: int) -> tuple[Tensor, ...]:
        # Some channels and some cells are stronger than others, as in trained pyramids.
        strength = torch.rand(shapes.images, channels, 1, 1, generator=generator) + 0.5
        return tuple(torch.randn(shapes.images, channels, *hw, generator=generator) * strength for hw in shapes.grid)

    total = len(detector.priors.boxes)
    assigned = torch.full((shapes.images, total), shapes.classes)
    for row in assigned:
        chosen = torch.randperm(total, generator=generator)[: shapes.positives // shapes.images]
        row[chosen] = torch.randint(shapes.classes, (len(chosen),), generator=generator)
    assignment = Assignment(
        assigned < shapes.classes,
        assigned,
        detector.priors.boxes.expand(shapes.images, -1, -1),
        torch.ones(assigned.shape),
        torch.tensor(float(shapes.positives)),
    )
    leaves: list[Tensor] = []
    views = []
    for student in (True, False):
        if Capability.STAGES in method.needs:
            states = {branch: maps(channels[0]) for branch, channels in spec.stages[0].channels.items()}
            if student:
                leaves += [x.requires_grad_() for state in states.values() for x in state]
            features, trace = (), detector.trace(states)
        elif Capability.PREDICTIONS in method.needs:
            with torch.no_grad():
                found = _predictions(maps(shapes.classes), maps(4 * shapes.bins), detector.priors, shapes.bins)
            if student:
                leaves += [found.logits.requires_grad_(), found.regression.requires_grad_()]
            features, trace = (), HeadTrace((), found)
        else:
            features = maps(shapes.channels)
            if student:
                leaves += [x.requires_grad_() for x in features]
            nothing = torch.empty(shapes.images, 0, 0)
            trace = HeadTrace((), Predictions(nothing, nothing, detector.priors, lambda regression, priors: regression))
        views.append(View(detector, batch, features, trace, assignment))
    method.setup(spec, spec)
    for parameter in method.parameters():
        scale = 1 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return Exchange(*views), leaves


# ---- Methods on features


def pkd(method: PKD, seen: Exchange) -> Terms:
    """Both maps standardised, channel by channel; half the mean squared difference."""
    total = torch.zeros(())
    for student, teacher in zip(seen.student.features, seen.teacher.features, strict=True):
        copies = [
            (x - x.mean((0, 2, 3), keepdim=True)) / (x.std((0, 2, 3), keepdim=True) + 1e-6) for x in (student, teacher)
        ]
        total = total + F.mse_loss(*copies) / 2
    return {"feature": method.weights[0] * total}


def cwd(method: CWD, seen: Exchange) -> Terms:
    """A softmax over the cells of each channel; KL divergence written out."""
    total = torch.zeros(())
    for student, teacher in zip(seen.student.features, seen.teacher.features, strict=True):
        images, channels = student.shape[:2]
        p_student = (student.reshape(images * channels, -1) / method.temperature).softmax(1)
        p_teacher = (teacher.reshape(images * channels, -1) / method.temperature).softmax(1)
        divergence = (p_teacher * (p_teacher.log() - p_student.log())).sum()
        total = total + method.temperature**2 * divergence / (images * channels)
    return {"feature": method.weights[0] * total}


def mgd(method: MGD, seen: Exchange) -> Terms:
    """Cells whose random number exceeds 1 - ratio are blanked; two convolutions; the sum of squares."""
    total = torch.zeros(())
    levels = zip(seen.student.features, seen.teacher.features, method.generate, strict=True)
    for student, teacher, block in levels:
        random = torch.rand(len(student), 1, *student.shape[2:])
        mask = torch.where(random > 1 - method.mask_ratio, 0.0, 1.0)
        total = total + F.mse_loss(block(student * mask), teacher, reduction="sum") / len(student)
    return {"feature": method.weights[0] * total}


def fitnet(method: FitNet, seen: Exchange) -> Terms:
    """The squared difference, averaged over the map, or over the cells whose prior's centre is inside a box."""
    priors, total = seen.student.head.predictions.priors, torch.zeros(())
    centres = (priors.boxes[:, :2] + priors.boxes[:, 2:]) / 2
    points = centres.split(list(priors.per_level))
    for student, teacher, point in zip(seen.student.features, seen.teacher.features, points, strict=True):
        if method.region == "whole":
            total = total + F.mse_loss(student, teacher)
            continue
        mask = torch.zeros(len(student), *student.shape[2:])
        x, y = point.reshape(*student.shape[2:], 2).unbind(2)
        for image, boxes in enumerate(seen.student.batch.boxes):
            for x1, y1, x2, y2 in boxes:
                mask[image][(x > x1) & (x < x2) & (y > y1) & (y < y2)] = 1
        count = (mask.sum() * student.shape[1]).clamp(min=1)
        total = total + ((student - teacher) ** 2 * mask[:, None]).sum() / count
    return {"feature": method.weights[0] * total}


# ---- FGD


def fgd_masks(
    boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]], height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Foreground and background weights (N, H, W): image by image and box by box, a slice of the mask each."""
    foreground = torch.zeros(len(boxes), height, width)
    background = torch.zeros(len(boxes), height, width)
    for image, (image_height, image_width) in enumerate(sizes):
        x1 = (boxes[image][:, 0] / image_width * width).floor().int()
        y1 = (boxes[image][:, 1] / image_height * height).floor().int()
        x2 = (boxes[image][:, 2] / image_width * width).ceil().int()
        y2 = (boxes[image][:, 3] / image_height * height).ceil().int()
        weight = 1.0 / ((y2 + 1 - y1) * (x2 + 1 - x1))
        for box in range(len(boxes[image])):
            rows, columns = slice(y1[box], y2[box] + 1), slice(x1[box], x2[box] + 1)
            foreground[image, rows, columns] = torch.maximum(foreground[image, rows, columns], weight[box])
        background[image] = torch.where(foreground[image] > 0, 0.0, 1.0)
        if background[image].sum() > 0:
            background[image] /= background[image].sum()
    return foreground, background


def fgd_attention(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Spatial (N, H, W) and channel attention (N, C): the mean of |x|, a softmax, times the number of its entries."""
    images, channels, height, width = x.shape
    value = x.abs()
    spatial = height * width * (value.mean(1).reshape(images, -1) / temperature).softmax(1)
    channel = channels * (value.mean((2, 3)) / temperature).softmax(1)
    return spatial.reshape(images, height, width), channel


def fgd_context(block: ContextBlock, x: Tensor) -> Tensor:
    """What GCNet's block makes of a map (N, C, H, W)."""
    images, channels, height, width = x.shape
    weight = block.mask(x).reshape(images, height * width, 1).softmax(1)
    context = torch.matmul(x.reshape(images, channels, height * width), weight)
    return x + block.add(context.reshape(images, channels, 1, 1))


def fgd(method: FGD, seen: Exchange) -> Terms:
    """Section 3.1's sums of weights times squared differences, foreground and background apart, and section 3.2's."""
    batch, totals = seen.teacher.batch, [torch.zeros(())] * 4
    levels = zip(
        seen.student.features, seen.teacher.features, method.student_context, method.teacher_context, strict=True
    )
    for student, teacher, student_context, teacher_context in levels:
        foreground, background = fgd_masks(batch.boxes, batch.sizes, *teacher.shape[2:])
        spatial, channel = fgd_attention(teacher, method.temperature)
        student_spatial, student_channel = fgd_attention(student, method.temperature)
        attention = spatial[:, None] * channel[:, :, None, None]
        relation = fgd_context(teacher_context, teacher), fgd_context(student_context, student)
        terms = (
            (foreground[:, None] * attention * (teacher - student) ** 2).sum(),
            (background[:, None] * attention * (teacher - student) ** 2).sum(),
            (student_spatial - spatial).abs().sum() + (student_channel - channel).abs().sum(),
            ((relation[0] - relation[1]) ** 2).sum(),
        )
        totals = [total + term / len(student) for total, term in zip(totals, terms, strict=True)]
    return {name: w * x for name, w, x in zip(FGD.terms, method.weights, totals, strict=True)}


# ---- FBKD


def fbkd_non_local(block: NonLocal, x: Tensor) -> Tensor:
    """What a non-local block of dot products makes of a map (N, C, H, W), keys and values max-pooled."""
    images, _, height, width = x.shape
    window = min(block.pool, height), min(block.pool, width)
    query = block.query(x).flatten(2).transpose(1, 2)
    key = F.max_pool2d(block.key(x), window).flatten(2)
    value = F.max_pool2d(block.value(x), window).flatten(2).transpose(1, 2)
    relation = torch.matmul(query, key) / key.shape[2]
    gathered = torch.matmul(relation, value).transpose(1, 2).reshape(images, -1, height, width)
    normed = F.batch_norm(block.out(gathered), None, None, block.scale.flatten(), block.shift.flatten(), training=True)
    return x + normed


def fbkd_attention(x: Tensor, temperature: float) -> Tensor:
    """Attention (N, 1, H, W): the mean of |x| over channels, a softmax, times the number of cells."""
    images, _, height, width = x.shape
    value = (x.abs().mean(1).reshape(images, -1) / temperature).softmax(1)
    return (height * width * value).reshape(images, 1, height, width)


def fbkd(method: FBKD, seen: Exchange) -> Terms:
    """Section 3.1's norms, of the attended difference of features and of those of means; section 3.2's."""
    totals = [torch.zeros(())] * 4
    for student, teacher, layers in zip(seen.student.features, seen.teacher.features, method.connectors, strict=True):
        with torch.no_grad():
            attention = [fbkd_attention(x, method.temperature) for x in (student, teacher)]
            attention = (attention[0] + attention[1]) / 2
        pairs = (
            (layers.feature(student) * attention.sqrt(), teacher * attention.sqrt()),
            (layers.channel(student.mean((2, 3))), teacher.mean((2, 3))),
            (layers.spatial(student.mean(1, keepdim=True)), teacher.mean(1, keepdim=True)),
            (
                layers.relation(fbkd_non_local(layers.student_relation, student)),
                fbkd_non_local(layers.teacher_relation, teacher),
            ),
        )
        norms = [((ours - theirs) ** 2).sum().sqrt() for ours, theirs in pairs]
        totals = [total + norm for total, norm in zip(totals, norms, strict=True)]
    return {name: w * x for name, w, x in zip(FBKD.terms, method.weights, totals, strict=True)}


# ---- Methods on predictions


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL divergence of softmaxes over the last dimension, written out, times T^2."""
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    return temperature**2 * (p * (p.log() - q.log())).sum(-1)


def prediction_terms(method: CrossKD | Mimic, student: Predictions, teacher: Predictions, seen: Exchange) -> Terms:
    """Equations 4 and 5 at all priors: quality focal loss, and KL of box sides weighted by the teacher's best score."""
    assignment = seen.matched().teacher_assignment
    score, target = student.logits.sigmoid(), teacher.logits.sigmoid()
    entropy = -(target * F.logsigmoid(student.logits) + (1 - target) * F.logsigmoid(-student.logits))
    focal = entropy * (score - target).abs() ** method.distances.beta
    cls = (focal * assignment.weights[..., None]).sum() / assignment.normaliser
    weight = target.max(-1).values * assignment.weights
    sides = divergence(student.regression, teacher.regression)
    box = (sides * weight[..., None]).sum() / (4 * weight.sum())
    return {"cls": method.distances.cls_weight * cls, "box": method.distances.distribution_weight * box}


def mimic(method: Mimic, seen: Exchange) -> Terms:
    """The student's own predictions against the teacher's."""
    return prediction_terms(method, seen.student.head.predictions, seen.teacher.head.predictions, seen)


def crosskd(method: CrossKD, seen: Exchange) -> Terms:
    """The student's activated state, standardised and given the teacher's mean and std, through the teacher's head."""
    crossed = {}
    for branch, maps in seen.student.head.states[0].items():
        crossed[branch] = []
        for student, teacher in zip(maps, seen.teacher.head.states[0][branch], strict=True):
            student, teacher = F.relu(student), F.relu(teacher)
            mean, std = student.mean((0, 2, 3), keepdim=True), student.std((0, 2, 3), keepdim=True)
            standardised = (student - mean) / (std + 1e-6)
            teacher_mean, teacher_std = teacher.mean((0, 2, 3), keepdim=True), teacher.std((0, 2, 3), keepdim=True)
            crossed[branch].append(standardised * teacher_std + teacher_mean)
    cross = seen.teacher.adapter.resume(crossed, 0, seen.teacher.head)
    return prediction_terms(method, cross, seen.teacher.head.predictions, seen)


def ld(method: LD, seen: Exchange) -> Terms:
    """KL of the box sides at all priors, weighted by the student's best score where a prior is positive, else by 0."""
    student, teacher = seen.student.head.predictions, seen.teacher.head.predictions
    positive = seen.matched().student_assignment.labels < student.logits.shape[-1]
    weight = student.logits.detach().sigmoid().max(-1).values * positive
    sides = divergence(student.regression, teacher.regression, method.temperature) / student.regression.shape[-1]
    return {"main": method.weight * (sides * weight[..., None]).sum() / 4}


def logitkd(method: LogitKD, seen: Exchange) -> Terms:
    """KL of the class scores at all priors, averaged over the positive ones."""
    student, teacher = seen.student.head.predictions, seen.teacher.head.predictions
    positive = (seen.matched().teacher_assignment.labels < student.logits.shape[-1]).float()
    kl = divergence(student.logits, teacher.logits, method.temperature)
    return {"cls": method.weight * (kl * positive).sum() / positive.sum()}


# ---- Later methods


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of boxes (..., 4), from its definition."""
    inner = (torch.min(a[..., 2:], b[..., 2:]) - torch.max(a[..., :2], b[..., :2])).clamp(min=0)
    intersection = inner[..., 0] * inner[..., 1]
    area_a, area_b = ((x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (a, b))
    union = (area_a + area_b - intersection).clamp(min=1e-7)
    outer = torch.max(a[..., 2:], b[..., 2:]) - torch.min(a[..., :2], b[..., :2])
    hull = (outer[..., 0] * outer[..., 1]).clamp(min=1e-7)
    return intersection / union - (hull - union) / hull


def defeat(method: DeFeat, seen: Exchange) -> Terms:
    """A mask of the boxes of each level, box by box; half the mean square inside and outside."""
    inside, outside, levels = torch.zeros(()), torch.zeros(()), len(method.align)
    spec, boxes = seen.teacher.spec, seen.teacher.batch.boxes
    pyramids = zip(seen.student.features, seen.teacher.features, method.align, spec.strides, strict=True)
    for level, (student, teacher, align, stride) in enumerate(pyramids):
        images, channels, height, width = teacher.shape
        mask = torch.zeros(images, height, width)
        for image in range(images):
            for x1, y1, x2, y2 in boxes[image].tolist():
                side = math.sqrt((x2 - x1 + 1) * (y2 - y1 + 1))
                if min(max(math.floor(math.log2(side / 56 + 1e-6)), 0), levels - 1) != level:
                    continue
                left, top = min(int(x1 / stride), width - 1), min(int(y1 / stride), height - 1)
                right, bottom = min(int(x2 / stride), width), min(int(y2 / stride), height)
                if right <= left or bottom <= top:
                    right, bottom = left + 1, top + 1
                mask[image, top:bottom, left:right] = 1
        square = (align(student) - teacher) ** 2
        inside = inside + (square * mask[:, None]).sum() / (mask.sum() * channels).clamp(min=1) / 2
        outside = outside + (square * (1 - mask[:, None])).sum() / ((1 - mask).sum() * channels).clamp(min=1) / 2
    return {"object": method.weights[0] * inside / levels, "background": method.weights[1] * outside / levels}


def cankd(method: CanKD, seen: Exchange) -> Terms:
    """Affinities of all of the student's cells to all of the teacher's; instance normalisation of both; MSE."""
    total = torch.zeros(())
    for student, teacher, block in zip(seen.student.features, seen.teacher.features, method.attention, strict=True):
        window = min(teacher.shape[2], 2), min(teacher.shape[3], 2)
        query = block.theta(student).flatten(2).transpose(1, 2)
        key = F.max_pool2d(block.phi(teacher), window).flatten(2)
        value = F.max_pool2d(block.g(teacher), window).flatten(2).transpose(1, 2)
        found = torch.matmul(torch.matmul(query, key) / key.shape[2], value).transpose(1, 2)
        added = F.batch_norm(block.out(found.reshape(len(found), -1, *student.shape[2:])), None, None, training=True)
        mixed = student + block.scale * added
        total = total + F.mse_loss(F.instance_norm(mixed), F.instance_norm(teacher))
    return {"feature": method.weights[0] * total}


def detkds(method: DetKDS, seen: Exchange) -> Terms:
    """Channel attention, pooling, the norm over images, mean absolute difference, one after the other."""
    total = torch.zeros(())
    for student, teacher in zip(seen.student.features, seen.teacher.features, strict=True):
        chain = []
        for x in (student, teacher):
            attention = x.shape[1] * (x.abs().mean((2, 3)) / method.temperature).softmax(1)
            x = x * attention.sqrt()[:, :, None, None]
            x = F.max_pool2d(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)), 2)
            chain.append(F.normalize(x, dim=0, eps=1e-6))
        total = total + F.l1_loss(*chain)
    return {"feature": method.weights[0] * total}


def bckd(method: BCKD, seen: Exchange) -> Terms:
    """Binary cross entropy of each class times the difference of its scores; 1 - GIoU times the largest of them."""
    student, teacher = seen.student.head.predictions, seen.teacher.head.predictions
    p, q = student.logits.sigmoid(), teacher.logits.sigmoid()
    cls = (-(q * p.log() + (1 - q) * (1 - p).log()) * (p - q).abs()).sum()
    weight = (p - q).abs().max(-1).values.detach()
    box = (weight * (1 - overlap(student.boxes, teacher.boxes))).sum()
    count = seen.matched().student_assignment.normaliser
    return {"cls": method.cls_weight * cls / count, "box": method.box_weight * box / count}


def kddetr(method: KDDETR, seen: Exchange) -> Terms:
    """KL of softened scores, L1 and GIoU of boxes, each weighted by the teacher's largest score."""
    student, teacher, temperature = seen.student.head.predictions, seen.teacher.head.predictions, method.temperature
    weight = teacher.logits.sigmoid().max(-1).values
    p, q = ((x.logits / temperature).softmax(-1) for x in (student, teacher))
    divergence = (q * (q.log() - p.log())).sum(-1) * temperature**2 / p.shape[-1]
    scale = torch.tensor([(width, height) * 2 for height, width in seen.student.batch.sizes])[:, None]
    centred = [
        torch.cat([(x[..., :2] + x[..., 2:]) / 2, x[..., 2:] - x[..., :2]], -1) / scale
        for x in (student.boxes, teacher.boxes)
    ]
    distance = (centred[0] - centred[1]).abs().mean(-1)
    return {
        "cls": method.cls_weight * (weight * divergence).sum(),
        "box": method.box_weight * (weight * distance).sum() / weight.sum(),
        "giou": method.giou_weight * (weight * (1 - overlap(student.boxes, teacher.boxes))).sum() / weight.sum(),
    }


CASES: dict[str, tuple[Callable[[], Method], Reading]] = {
    "CrossKD": (CrossKD, crosskd),
    "PKD": (PKD, pkd),
    "FGD": (lambda: FGD(published_masks=True), fgd),
    "LD": (LD, ld),
    "FitNet": (FitNet, fitnet),
    "FitNet, boxes": (lambda: FitNet(region="boxes"), fitnet),
    "CWD": (CWD, cwd),
    "MGD": (MGD, mgd),
    "FBKD": (FBKD, fbkd),
    "Mimic": (Mimic, mimic),
    "LogitKD": (LogitKD, logitkd),
    "DeFeat": (DeFeat, defeat),
    "CanKD": (CanKD, cankd),
    "DetKDS": (DetKDS, detkds),
    "BCKD": (BCKD, bckd),
    "KDDETR": (KDDETR, kddetr),
}
"""By name: how the method is made, and its plain reading."""
