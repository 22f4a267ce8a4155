import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdtoolkit.detectors.gfl import distribution_focal_loss, quality_focal_loss
from tests.conftest import tiny_gfl


@settings(deadline=None, max_examples=30)
@given(st.floats(-6, 6), st.floats(0, 1))
def test_quality_focal_loss(logit, target):
    score = 1 / (1 + math.exp(-logit))
    entropy = -target * math.log(score) - (1 - target) * math.log(1 - score)
    loss = quality_focal_loss(torch.tensor(logit), torch.tensor(target))
    assert loss.item() == pytest.approx(entropy * (score - target) ** 2, rel=1e-3, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-5, 5), min_size=4, max_size=4), st.floats(0, 2.9))
def test_distribution_focal_loss(logits, target):
    log_total = math.log(sum(math.exp(x) for x in logits))
    left = int(target)
    expected = -sum(
        weight * (logits[bin_] - log_total) for bin_, weight in ((left, left + 1 - target), (left + 1, target - left))
    )
    loss = distribution_focal_loss(torch.tensor([logits]), torch.tensor([target]))
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_boxes_are_at_the_means_of_their_distributions():
    model = tiny_gfl(seed=0)
    priors = model.priors(((2, 2), (1, 1), (1, 1)))
    regression = torch.full((1, 6, 4, 5), -50.0)
    for side, bin_ in enumerate((1, 2, 3, 4)):
        regression[:, :, side, bin_] = 50.0
    regression[:, :, 0, 0] = 50.0  # left: half at 0, half at 1
    boxes = model.decode(regression, priors)[0]
    # Cell (1, 1) of stride 8 is centred at (8, 8).
    assert boxes[3].tolist() == pytest.approx([8 - 4, 8 - 16, 8 + 24, 8 + 32])
    assert boxes[5].tolist() == pytest.approx([-16, -64, 96, 128])


def test_a_perfect_prediction_has_almost_no_loss(batch):
    model = tiny_gfl(seed=0, bins=9)
    prepared = model.prepare(*batch)
    trace = model.predict([*model.walk_towers(model.entry(model.features(prepared.images)))][-1])
    assignment = model.assign(trace, prepared)
    positive = assignment.positive(model.num_classes)
    logits = torch.full_like(trace.logits, -20)
    logits[positive, assignment.labels[positive]] = 20
    points = (trace.priors.boxes[:, :2] + trace.priors.boxes[:, 2:]) / 2
    sides = torch.cat([points - assignment.boxes[..., :2], assignment.boxes[..., 2:] - points], -1)
    sides = (sides / trace.priors.strides[:, None]).clamp(0, 7.9)
    # A distribution whose mean is the side: what remains to the two bins around it.
    bins = torch.arange(9)
    share = (1 - (bins - sides[..., None]).abs()).clamp(min=1e-9)
    perfect = type(trace)(logits, share.log(), trace.priors, model.decode)
    losses, found = model.losses(perfect, assignment), model.losses(trace, assignment)
    assert losses["cls"] < 1e-3 < found["cls"]
    assert losses["box"] < 1e-3 < found["box"]
    assert losses["dfl"] < found["dfl"]
