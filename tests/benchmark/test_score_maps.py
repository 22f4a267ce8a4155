import numpy as np
import pytest
import torch
from PIL import Image

from kdtoolkit.benchmark.score_maps import draw_map, score_map
from kdtoolkit.data import ProceduralShapes
from kdtoolkit.libraries import adapt
from tests._foundation import foundation
from tests.conftest import first_of_each_kind, tiny_gfl, tiny_of

IMAGE = ProceduralShapes(1, image_size=64, seed=0)[0][0][:, :48]  # (3, 48, 64)


def test_a_cell_has_its_largest_score():
    model = tiny_gfl(seed=0).eval()
    adapter = adapt(model)
    batch = adapter.prepare([IMAGE.float() / 255])
    with torch.no_grad():
        predictions = adapter.head(adapter.features(batch), batch).predictions
    found = score_map(model, IMAGE)
    assert found.shape == (48, 64)
    assert found.max() == pytest.approx(predictions.scores[0].max().item())
    height, width = predictions.priors.grid[0]
    first = predictions.scores[0, : height * width].view(height, width)
    for row, column in ((0, 0), (3, 5)):  # at stride 8
        assert (found[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] >= first[row, column].item() - 1e-6).all()


@pytest.mark.parametrize("family", first_of_each_kind())
def test_every_kind_of_detector_has_a_map(family):
    found = score_map(tiny_of(family, seed=0).eval(), IMAGE)
    assert found.shape == (48, 64)
    assert 0 <= found.min() <= found.max() <= 1
    assert found.max() > 0


def test_features_alone_have_no_map():
    assert score_map(foundation().eval(), IMAGE) is None


def test_higher_scores_are_lighter():
    scores = np.zeros((48, 64))
    scores[:, 32:] = 1
    drawn = np.asarray(draw_map(Image.new("RGB", (128, 96), "grey"), scores).convert("L"), int)
    assert drawn.shape == (96, 128)
    assert drawn[:, 80:].min() > drawn[:, :48].max() + 100
