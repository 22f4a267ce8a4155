"""Which prior answers for which ground-truth box: the ATSS rule, for a whole batch at once.

Shapes are as in kdtoolkit/contract. Ground truth is padded to G boxes per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kdtoolkit import processes
from kdtoolkit.boxes import centres, distances, pairwise_iou
from kdtoolkit.contract import Assignment, Batch, Priors


def pad_targets(boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Stack ground truth: boxes (N, G, 4), labels (N, G), and which of them are real (N, G) bool. G is at least 1."""
    device = boxes[0].device
    lengths = [len(image) for image in boxes]
    counts = torch.tensor(lengths, device=device)
    # One box more than in the longest list, which is not real, so that G is never 0 and a maximum over G exists.
    sentinel = torch.zeros(max(lengths) + 1, 4, device=device)
    padded = pad_sequence([*boxes, sentinel], batch_first=True)[:-1]
    padded_labels = pad_sequence([*labels, sentinel[:, 0].long()], batch_first=True)[:-1]
    real = torch.arange(padded.shape[1], device=device) < counts[:, None]
    return padded, padded_labels, real


def inside_padded(priors: Priors, batch: Batch) -> Tensor:
    """(N, A) bool: cells that belong to an image or to its own padding, and not only to the batch's canvas."""
    padded = torch.tensor(batch.padded_sizes, device=priors.boxes.device)
    # A cell's first pixel decides. Priors are centred there or half a cell further; a quarter absorbs rounding.
    strides = priors.strides[:, None]
    corner = (centres(priors.boxes) / strides + 0.25).floor() * strides
    return (corner < padded.flip(-1)[:, None]).all(-1)


@dataclass(frozen=True)
class ATSSAssigner:
    """Adaptive training sample selection (Zhang et al., CVPR 2020, arXiv 1912.02424, algorithm 1).

    On each level the `topk` priors nearest to a box's centre are candidates. A candidate is positive if its centre lies
    in the box and its IoU is at least mean + std (unbiased) of all candidates' IoUs. If several boxes want one prior,
    the box of highest IoU gets it. Priors outside an image's own padding take no part.
    """

    topk: int = 9

    def __call__(self, priors: Priors, batch: Batch, num_classes: int) -> Assignment:
        """Assign the batch's boxes to priors (A, 4). The normaliser is the sum over images of max(positives, 1)."""
        valid = inside_padded(priors, batch)
        boxes, labels, real = pad_targets(batch.boxes, batch.labels)
        prior_centres = centres(priors.boxes)
        iou = pairwise_iou(boxes, priors.boxes)  # (N, G, A)
        candidates, usable = self._candidates(centres(boxes), prior_centres, valid, priors.per_level)
        positive = self._positive(iou, candidates, usable)
        positive &= (distances(prior_centres, boxes[:, :, None]).amin(-1) > 0.01) & real[:, :, None]

        best, chosen = iou.masked_fill(~positive, -1).max(dim=1)
        assigned = best >= 0
        matched_labels = labels.gather(1, chosen).masked_fill(~assigned, num_classes)
        return Assignment(
            positive=assigned,
            labels=matched_labels,
            boxes=boxes.gather(1, chosen[..., None].expand(-1, -1, 4)),
            weights=valid.float(),
            normaliser=processes.share(assigned.sum(1).clamp(min=1).sum()),
        )

    def _candidates(
        self, box_centres: Tensor, prior_centres: Tensor, valid: Tensor, per_level: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Indices (N, G, topk * L) of the nearest priors on all levels, and which of them are valid."""
        squared = (box_centres[:, :, None] - prior_centres).square().sum(-1).masked_fill(~valid[:, None], torch.inf)
        nearest, start = [], 0
        for level in torch.split(squared, list(per_level), -1):
            nearest.append(level.topk(min(self.topk, level.shape[-1]), largest=False).indices + start)
            start += level.shape[-1]
        indices = torch.cat(nearest, -1)
        return indices, valid[:, None].expand(-1, indices.shape[1], -1).gather(2, indices)

    def _positive(self, iou: Tensor, candidates: Tensor, usable: Tensor) -> Tensor:
        """(N, G, A) bool: usable candidates whose IoU is at least mean + std of all usable candidates."""
        chosen = iou.gather(2, candidates)
        count = usable.sum(-1, keepdim=True)
        mean = (chosen * usable).sum(-1, keepdim=True) / count.clamp(min=1)
        variance = ((chosen - mean).square() * usable).sum(-1, keepdim=True) / (count - 1).clamp(min=1)
        return torch.zeros_like(iou, dtype=torch.bool).scatter(
            2, candidates, (chosen >= mean + variance.sqrt()) & usable
        )
