import pytest
import torch

from kdtoolkit.data import ProceduralShapes
from kdtoolkit.distiller import Distiller
from kdtoolkit.errors import KDError
from kdtoolkit.methods import PKD
from kdtoolkit.workflow.batch import fitting, trial_step
from tests.conftest import tiny_gfl


def memory_for(most):
    tried = []

    def trial(size):
        tried.append(size)
        if size > most:
            raise torch.OutOfMemoryError

    return trial, tried


def test_the_batch_is_halved_until_it_fits():
    trial, tried = memory_for(5)
    assert fitting(trial, 16) == 4
    assert tried == [16, 8, 4]


@pytest.mark.parametrize(("parts", "batch", "sizes"), [(3, 15, [5]), (2, 8, [8, 4]), (20, 20, [1])])
def test_a_batch_is_a_multiple_of_its_parts_and_a_part_is_tried(parts, batch, sizes):
    trial, tried = memory_for(5)
    assert fitting(trial, 16, parts) == batch
    assert tried == sizes


def test_too_little_memory_for_one_image_is_told():
    with pytest.raises(KDError, match="too little memory for a single image: use a smaller --image-size"):
        fitting(memory_for(0)[0], 8)


def test_a_trial_takes_the_images_with_the_most_boxes():
    data = ProceduralShapes(6, image_size=64, seed=0)
    distiller = Distiller(tiny_gfl(seed=0, num_classes=6), tiny_gfl(seed=1, num_classes=6), [PKD()])
    seen = []
    forward = distiller.forward
    distiller.forward = lambda images, targets: seen.extend(targets) or forward(images, targets)
    trial_step(distiller, data, 2, torch.device("cpu"), "float32")
    counts = sorted((len(data[i][1]["boxes"]) for i in range(len(data))), reverse=True)
    assert [len(target["boxes"]) for target in seen] == counts[:2]
    assert any(p.grad is not None for p in distiller.parameters())
