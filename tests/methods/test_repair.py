import pytest
import torch

from kdtoolkit.methods.queries import Outputs
from kdtoolkit.methods.repair import repaired
from tests.methods._decoders import corners, iou_and_giou

QUERIES, CLASSES = 8, 3


def outputs(seed, softmax):
    generator = torch.Generator().manual_seed(seed)
    centre = 0.3 + 0.4 * torch.rand(2, QUERIES, 2, generator=generator)
    size = 0.2 + 0.3 * torch.rand(2, QUERIES, 2, generator=generator)
    logits = 2 * torch.randn(2, QUERIES, CLASSES + softmax, generator=generator)
    return Outputs(logits, torch.cat([centre - size / 2, centre + size / 2], -1), softmax)


def naive(layers, positive, labels, boxes):
    """Query by query, as the paper says it."""
    logits, found = layers[-1].logits.clone(), layers[-1].boxes.clone()
    for i in range(2):
        if not positive[i].any():
            continue
        for q in range(QUERIES):
            scores = [each.probabilities[i, q] for each in layers]
            if positive[i, q]:
                label = labels[i, q].item()
                overlaps = [iou_and_giou(each.boxes[i, q].tolist(), boxes[i, q].tolist())[0] for each in layers]
                better = [
                    n
                    for n in range(len(layers) - 1)
                    if overlaps[n] > overlaps[-1] and scores[n][label] > scores[-1][label]
                ]
                chosen = max(better, key=lambda n: overlaps[n], default=None)
                if chosen is not None:
                    found[i, q] = layers[chosen].boxes[i, q]
            else:
                label = scores[-1].argmax().item()
                lower = [
                    n
                    for n in range(len(layers) - 1)
                    if scores[n].argmax() == label and scores[n][label] < scores[-1][label]
                ]
                chosen = min(lower, key=lambda n: scores[n][label], default=None)
            if chosen is not None:
                which = slice(None) if layers[0].softmax else label
                logits[i, q, which] = layers[chosen].logits[i, q, which]
    return logits, found


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_it_equals_a_loop(softmax, depth):
    layers = [outputs(seed, softmax) for seed in range(depth)]
    generator = torch.Generator().manual_seed(9)
    labels = torch.randint(CLASSES + 1, (2, QUERIES), generator=generator)
    boxes = torch.tensor([corners((0.5, 0.5, 0.4, 0.4))] * QUERIES).expand(2, -1, -1)
    for every in (labels, torch.stack([labels[0], torch.full((QUERIES,), CLASSES)])):
        positive = every < CLASSES
        got = repaired(layers, positive, every, boxes)
        logits, found = naive(layers, positive, every, boxes)
        assert torch.equal(got.logits, logits)
        assert torch.equal(got.boxes, found)
        assert torch.equal(got.logits, layers[-1].logits) == (depth == 1)
