"""What detectors would show to a method, without the detectors."""

from types import SimpleNamespace

import torch

from kdtoolkit.contract import (
    Assignment,
    Batch,
    DetectorSpec,
    Exchange,
    HeadTrace,
    Predictions,
    PriorKind,
    Priors,
    View,
)

STRIDES = (8, 16)
GRID = ((8, 6), (4, 3))
CLASSES = 3


def spec(**changes):
    facts = {
        "name": "stub",
        "num_classes": CLASSES,
        "strides": STRIDES,
        "channels": (4, 4),
        "priors": PriorKind.ANCHORS,
        "priors_per_cell": (1, 1),
        "bins": (0.0, 1.0, 2.0, 3.0, 4.0),
    }
    return DetectorSpec(**(facts | changes))


def batch(*boxes):
    """Images of 64 x 48, with these ground-truth boxes; the last is cut to 40 x 30 and padded to 48 x 32."""
    sizes = ((64, 48),) * (len(boxes) - 1) + ((40, 30),)
    padded = ((64, 48),) * (len(boxes) - 1) + ((48, 32),)
    boxes = tuple(torch.tensor(b, dtype=torch.float32).reshape(-1, 4) for b in boxes)
    labels = tuple(torch.zeros(len(b), dtype=torch.int64) for b in boxes)
    return Batch(torch.zeros(len(boxes), 3, 64, 48), sizes, padded, sizes, boxes, labels)


def anchors():
    boxes = []
    for stride, (height, width) in zip(STRIDES, GRID, strict=True):
        for row in range(height):
            for column in range(width):
                x, y, reach = column * stride, row * stride, 2 * stride
                boxes.append((x - reach, y - reach, x + reach, y + reach))
    return torch.tensor(boxes, dtype=torch.float32)


def maps(n, channels=4, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, channels, h, w, generator=generator).to(dtype).requires_grad_() for h, w in GRID)


def predictions(n, *, seed=0, bins=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    boxes = anchors()
    strides = torch.cat([torch.full((h * w,), s) for s, (h, w) in zip(STRIDES, GRID, strict=True)])
    logits = torch.randn(n, len(boxes), CLASSES, generator=generator).to(dtype).requires_grad_()
    regression = (2 * torch.randn(n, len(boxes), 4, bins, generator=generator)).to(dtype).requires_grad_()
    return Predictions(logits, regression, Priors(boxes, strides, GRID), lambda regression, priors: regression)


def assignment(labels):
    """Which priors are positive: labels (N, A), CLASSES for background."""
    n, a = labels.shape
    return Assignment(labels < CLASSES, labels, torch.zeros(n, a, 4), torch.ones(n, a), torch.ones(()))


def exchange(batch, *, features=((), ()), heads=(None, None), assigned=None, specs=None):
    """Student and teacher, in this order, of one batch."""
    specs = specs or (spec(), spec())
    views = [
        View(SimpleNamespace(spec=s), batch, f, None if h is None else HeadTrace((), h), a)
        for s, f, h, a in zip(specs, features, heads, (assigned, None), strict=True)
    ]
    return Exchange(*views)
