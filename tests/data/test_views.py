"""Views: what is counted without images is what a run shows."""

import pytest

from kdtoolkit.data import Augmentation, InputSize, ProceduralShapes, batches
from kdtoolkit.data.views import count_views


@pytest.mark.parametrize("flip", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("input_size", [None, InputSize(short=(32, 96), long=128)])
def test_views_are_counted_as_a_run_shows_them(flip, input_size):
    data = ProceduralShapes(6, image_size=32)
    options = {
        "batch_size": 4,
        "steps": 20,
        "seed": 3,
        "augment": Augmentation(flip=flip),
        "input_size": input_size,
    }
    keys = [key for batch in batches(data, **options, keys=True) for key in batch.keys]
    found = count_views([(32, 32)] * 6, **options)
    assert (found.shown, found.different) == (80, len(set(keys)))
    assert found.repeats == 80 / len(set(keys))


def test_batches_of_different_canvases_show_different_views():
    options = {"steps": 30, "seed": 0, "augment": Augmentation(flip=0)}
    sizes = [(64, 96), (96, 64), (64, 64)]
    assert count_views(sizes, **options, batch_size=1).different == 3
    assert count_views(sizes, **options, batch_size=2).different > 3
    assert count_views(sizes, **options, batch_size=3).different == 3  # each batch has all of them
    for parts, alike in ((3, 1), (2, 1), (1, 3)):  # a part is a batch of its own, as far as its canvas goes
        found = count_views(sizes, **options, batch_size=3, parts=parts)
        alone = count_views(sizes, **{**options, "steps": 30 * 3 // alike}, batch_size=alike)
        assert found.different == alone.different
