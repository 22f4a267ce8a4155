"""Repair of a DETR teacher by its own earlier decoder layers (TPRD, arXiv 2609.19964).

A teacher's last layers are not better for every object. Where an earlier layer knows better, its answer is taken:

- A query that the teacher's own matching gave an object: of the layers whose box overlaps the object more and whose
  score for the object's class is higher, the one with the largest overlap. Its box and its logit of that class are
  taken.
- Each of the remaining queries: of the layers with the same best class and a lower score for it, the one with the
  lowest score. Its logit of that class is taken. In images without objects nothing changes.

It follows the authors' code (xingyitong1/TPRD @096fc09). That code has sigmoid scores only. With a softmax one logit
alone says nothing, so here the earlier layer's logits of all classes are taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit.boxes import elementwise_iou
from kdtoolkit.methods.queries import Outputs


def repaired(layers: Sequence[Outputs], positive: Tensor, labels: Tensor, boxes: Tensor) -> Outputs:
    """The outputs of the last of `layers`, repaired by the earlier ones.

    Args:
        layers: what the teacher's layers say of the same queries, from the first on.
        positive: (N, Q) bool, whether the query answers for an object in the last of them.
        labels: (N, Q) class of the object where `positive`.
        boxes: (N, Q, 4) box of the object where `positive`, in shares of the image.
    """
    logits, own = torch.stack([each.logits for each in layers]), torch.stack([each.boxes for each in layers])
    scores = torch.stack([each.probabilities for each in layers])
    label = torch.where(positive, labels, 0)
    of_object = _at(scores, label.expand(len(layers), -1, -1))
    overlap = elementwise_iou(own, boxes)
    better = positive & (overlap > overlap[-1]) & (of_object > of_object[-1])
    best = overlap.masked_fill(~better, -1).argmax(0)
    best_score, best_class = scores.max(-1)
    lower = (best_class == best_class[-1]) & (best_score < best_score[-1])
    lower &= ~positive & positive.any(1, keepdim=True)
    lowest = best_score.masked_fill(~lower, 2).argmin(0)
    source = torch.where(positive, best, lowest)
    changed = torch.where(positive, better.any(0), lower.any(0))
    taken = _of_layer(logits, source)
    if layers[-1].softmax:
        changed_logit = changed[..., None].expand_as(taken)
    else:
        replaced = torch.where(positive, label, best_class[-1])
        changed_logit = F.one_hot(replaced, logits.shape[-1]).bool() & changed[..., None]
    moved = (changed & positive)[..., None]
    return layers[-1]._replace(
        logits=torch.where(changed_logit, taken, logits[-1]),
        boxes=torch.where(moved, _of_layer(own, source), own[-1]),
    )


def _at(scores: Tensor, labels: Tensor) -> Tensor:
    """Scores (..., K) of the classes `labels` (...)."""
    return scores.gather(-1, labels[..., None])[..., 0]


def _of_layer(values: Tensor, layer: Tensor) -> Tensor:
    """Of values (L, N, Q, C), those of the layer (N, Q) that each query says: (N, Q, C)."""
    return values.gather(0, layer[None, ..., None].expand(1, -1, -1, values.shape[-1]))[0]
