"""Whether detections equal the library's, and follow from the predictions."""

from __future__ import annotations

from itertools import pairwise

import torch

from kdtoolkit.contract import Detections, PriorKind, View
from kdtoolkit.testing._expect import expect
from kdtoolkit.testing.adapters._case import PIXELS, Case
from kdtoolkit.testing.report import LeftOut, by_name

SCORE = 1e-3  # scores computed in another order


LOOKED_AT = 20  # detections of an image that are traced back to predictions


@torch.no_grad()
def _detections(case: Case) -> None:
    """Detections are well formed, in pixels of the original images."""
    adapter = case.fresh()
    for where, view in case.shows(adapter).items():
        _expect_well_formed(case, adapter.detections(view.head, view.batch), where)


def _expect_well_formed(case: Case, found: list[Detections], where: str) -> None:
    classes = case.spec.num_classes
    expect(len(found) == len(case.images), f"{len(found)} lists of detections for {len(case.images)} images{where}")
    for image, each in zip(case.images, found, strict=True):
        boxes, scores, labels = each["boxes"], each["scores"], each["labels"]
        count = len(scores)
        shapes = tuple(boxes.shape), tuple(scores.shape), tuple(labels.shape)
        expect(shapes == ((count, 4), (count,), (count,)), f"boxes, scores, labels are {shapes}")
        expect(labels.dtype == torch.int64, f"labels are {labels.dtype}, not torch.int64")
        if not count:
            continue
        low, high = int(labels.min()), int(labels.max())
        expect(0 <= low <= high < classes, f"labels {low} to {high} of {classes} classes")
        expect(all(a >= b for a, b in pairwise(scores.tolist())), "scores are not sorted, highest first")
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        limits = boxes.new_tensor([image.shape[-1], image.shape[-2]]) + 1
        inside = bool(((centres >= -1) & (centres <= limits)).all())
        expect(inside, f"detections lie outside of their image of {tuple(image.shape[-2:])} pixels{where}")


@torch.no_grad()
def _sources(case: Case) -> None:
    """Each detection is a prediction with its class, its score and (not with proposals) its box."""
    adapter = case.fresh()
    for where, view in case.shows(adapter).items():
        _expect_sources(case, view, where)


def _expect_sources(case: Case, view: View, where: str) -> None:
    found, predictions = view.adapter.detections(view.head, view.batch), view.head.predictions
    if not any(len(each["scores"]) for each in found):
        raise LeftOut("the model detects nothing: hand in one with a lower score threshold")
    probabilities, boxes = predictions.probabilities, predictions.boxes
    quality = None if predictions.quality is None else predictions.quality.sigmoid()
    for i, each in enumerate(found):
        count = min(len(each["scores"]), LOOKED_AT)
        scores = probabilities[i][:, each["labels"][:count]].T
        # If there is a quality, a score is some mean of both, or their product.
        low, high = (scores, scores) if quality is None else (scores * quality[i], scores.maximum(quality[i]))
        scored = each["scores"][:count, None]
        fits = (scored >= low - SCORE) & (scored <= high + SCORE)
        if predictions.priors.boxes.numel() and case.spec.priors != PriorKind.PROPOSALS:
            (height, width), (content_height, content_width) = view.batch.original_sizes[i], view.batch.sizes[i]
            limits = boxes.new_tensor([width, height] * 2)
            scaled = boxes[i] * limits / boxes.new_tensor([content_width, content_height] * 2)
            ours, theirs = (x.clamp(min=0).minimum(limits) for x in (each["boxes"][:count, None], scaled))
            fits &= (ours - theirs).abs().amax(-1) <= 10 * PIXELS + 1e-4 * limits.max()
        if not bool(fits.any(1).all()):
            at = int((~fits.any(1)).nonzero()[0])
            what = f"box {[round(x, 1) for x in each['boxes'][at].tolist()]}, label {int(each['labels'][at])}"
            what = f"detection {at} of image {i}{where} ({what}, score {each['scores'][at]:.3f})"
            raise AssertionError(
                f"{what} is not in the predictions: no prior has this box (in pixels of the original image) and this "
                "probability of this class"
            )


@torch.no_grad()
def _own_detections(case: Case) -> None:
    """Detections equal the detections of the library's own inference."""
    if isinstance(case.own, str):
        raise LeftOut(case.own)
    adapter = case.fresh()
    expected = case.own(adapter.model, case.images)
    for i, (ours, theirs) in enumerate(zip(case.detections(adapter), expected, strict=True)):
        counts = len(ours["scores"]), len(theirs["scores"])
        expect(
            counts[0] == counts[1], f"image {i}: {counts[0]} detections; the library's own inference has {counts[1]}"
        )
        expect(torch.equal(ours["labels"], theirs["labels"]), f"image {i}: labels are not the library's own")
        pairs = {"boxes": (ours["boxes"], theirs["boxes"]), "scores": (ours["scores"], theirs["scores"])}
        for name, (actual, own) in pairs.items():
            distance = ((actual - own).abs() / own.abs().clamp(min=1)).max().item() if len(own) else 0.0
            expect(distance <= 1e-5, f"image {i}: {name} are off by {distance:g} from the library's own")
    if not any(len(each["scores"]) for each in expected):
        raise LeftOut("the model detects nothing: hand in one with a lower score threshold")


CHECKS = by_name(_detections, _sources, _own_detections)
