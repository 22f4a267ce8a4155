"""What decoders of several layers would show to a method, without the detectors."""

from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from kdtoolkit.contract import Batch, HeadTrace, Predictions, PriorKind, Priors, View
from tests.methods._views import CLASSES, spec

QUERIES = spec(
    priors=PriorKind.QUERIES, priors_per_cell=(), bins=(), prior_form="points of 4", strides=(16,), channels=(6,)
)
SIZES = ((64, 48), (40, 30))
WIDTH = 6


def batch(boxes=((), ()), labels=None):
    """Two images of 64 x 48 and 40 x 30, with these boxes in pixels."""
    boxes = tuple(torch.tensor(each, dtype=torch.float32).reshape(-1, 4) for each in boxes)
    labels = labels or [[0] * len(each) for each in boxes]
    return Batch(
        torch.zeros(2, 3, 64, 48), SIZES, SIZES, SIZES, boxes, tuple(torch.tensor(x, dtype=torch.long) for x in labels)
    )


def padded(shown, *maps):
    """The same batch on a canvas of 96 x 112, and its maps of stride 16. What is added to these are large numbers."""
    images = F.pad(shown.images, (0, 64, 0, 32))
    return replace(shown, images=images), *(F.pad(x, (0, 4, 0, 2), value=50.0 * i) for i, x in enumerate(maps))


def beyond(i, y, x):
    """Whether a cell of stride 16 begins beyond image `i`."""
    return 16 * y >= SIZES[i][0] or 16 * x >= SIZES[i][1]


def decode(regression, priors):
    """Boxes in pixels of (centre x, centre y, width, height) in shares of the image."""
    centre, size = regression.chunk(2, -1)
    scale = torch.tensor([(w, h) * 2 for h, w in SIZES], dtype=torch.float32)[:, None]
    return torch.cat([centre - size / 2, centre + size / 2], -1) * scale


def layers(seed, *, depth=2, queries=4, softmax=False):
    """Leaves of each layer: logits (2, Q, K), boxes (2, Q, 4) as centre and size, and states (2, WIDTH, Q)."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(depth):
        logits = 2 * torch.randn(2, queries, CLASSES + softmax, generator=generator)
        boxes = 0.2 + 0.3 * torch.rand(2, queries, 4, generator=generator)
        states = torch.randn(2, WIDTH, queries, generator=generator)
        found.append(tuple(x.requires_grad_() for x in (logits, boxes, states)))
    return found


def view(own, shown, maps=(), given=None, assignments=None, batch=None):
    """The view of a decoder that says `own` of its queries, and `given` of those that it is given."""

    def passes(said):
        activation = "softmax" if said[0][0].shape[-1] > CLASSES else "sigmoid"
        states, found = [{"decoder": (torch.zeros(2, WIDTH, said[0][0].shape[1]),)}], []
        for logits, boxes, state in said:
            states.append({"decoder": (state,)})
            priors = Priors(torch.zeros_like(boxes), torch.zeros(0))
            found.append(
                HeadTrace(tuple(states), Predictions(logits, boxes, priors, decode, activation=activation), said)
            )
        return found

    def find(trace):
        return passes(trace.context)

    def assign(trace, batch):
        index = next(i for i, each in enumerate(own) if each[0] is trace.predictions.logits)
        return assignments[index]

    adapter = SimpleNamespace(
        spec=QUERIES,
        head=lambda features, batch, priors, stages: passes(given or own)[-1],
        layers=find,
        assign=assign,
    )
    return View(adapter, shown if batch is None else batch, maps, passes(own)[-1])


def corners(box):
    x, y, w, h = box
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def iou_and_giou(a, b):
    """Of two boxes given by their corners."""
    intersection = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return intersection / union, intersection / union - (hull - union) / hull


def l1(a, b):
    """Of centres and sizes of two boxes given by their corners."""
    a, b = ((x1 + x2, y1 + y2, 2 * (x2 - x1), 2 * (y2 - y1)) for x1, y1, x2, y2 in (a, b))
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / 2
