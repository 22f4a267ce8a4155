"""Two processes with half of the batch each do what one does with all of it."""

import pytest
import torch

from kdtoolkit.processes import reach
from tests import _pair

# Their own losses are divided by what one process has, and they choose proposals or background for it.
OWN_LOSS_PER_PROCESS = {"torchvision FCOS", "torchvision SSD", "torchvision SSDlite"}
# Proposals are drawn at random, so that no two runs have the same.
RANDOM = {
    "torchvision Faster R-CNN",
    "torchvision Faster R-CNN v2",
    "torchvision Mask R-CNN",
    "torchvision Keypoint R-CNN",
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return _pair.run(tmp_path_factory.mktemp("pair"), [*_pair.NATIVE, _pair.OTHERS], with_ways=True)


@pytest.fixture(scope="module")
def torchvision_pair(tmp_path_factory):
    return _pair.run(tmp_path_factory.mktemp("pair"), _pair.TORCHVISION)


def same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    largest = max(value.norm() for value in expected.values())
    for name, value in expected.items():
        difference = (found[name] - value).norm()
        bound = tolerance * (value.norm() + 0.1 * largest)  # some are 0 but for rounding
        assert difference <= bound, f"{name}: {difference} of {value.norm()}"


@pytest.mark.parametrize("family", [*_pair.NATIVE, _pair.OTHERS])
def test_native_detectors_train_as_in_one_process(pair, family):
    first, second = (found[family]["all"] for found in pair)
    same(first, second, 0)
    same(first, _pair.alone(family)["all"], 1e-5)


def test_steps_without_labels_train_as_in_one_process(pair):
    first, second = (found["unlabelled"] for found in pair)
    same(first, second, 0)
    same(first, _pair.unlabelled(), 1e-5)


def test_a_loss_with_all_parameters_in_its_graph_can_be_changed_in_place():
    x, unused = torch.ones((), requires_grad=True), torch.ones((), requires_grad=True)
    loss = reach(3 * x, [unused])
    loss *= 2
    loss.backward()
    assert (loss.item(), x.grad.item(), unused.grad) == (6, 6, None)


@pytest.mark.slow
@pytest.mark.parametrize("family", _pair.TORCHVISION)
def test_torchvision_detectors_train_as_in_one_process(torchvision_pair, family):
    first, second = (found[family] for found in torchvision_pair)
    same(first["all"], second["all"], 0)
    same(first["methods"], second["methods"], 0)
    if family not in RANDOM:
        expected = _pair.alone(family)
        # One process takes statistics of channels by batch norm's kernel, several by sums over their parts. On the
        # coarsest level, which has a few cells, the two round differently.
        same(first["methods"], expected["methods"], 1e-4)
        if family not in OWN_LOSS_PER_PROCESS:
            same(first["all"], expected["all"], 1e-4)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("case", _pair.UNUSED)
def test_parameters_without_gradient_are_no_trouble(pair, case, static):
    first, second = (found[case, static] for found in pair)
    same(first, second, 0)
    same(first, _pair.trained("GFL", _pair.UNUSED[case](), _pair.whole()), 1e-5)


def test_processes_may_have_images_of_different_sizes_and_none_with_objects(pair):
    first, second = (found["uneven"] for found in pair)
    same(first, second, 0)
    assert all(torch.isfinite(gradient).all() for gradient in first.values())
    assert any(gradient.any() for gradient in first.values())


def test_shares_are_held_alike_in_all_processes_and_as_in_one(pair):
    first, second = (found["held"] for found in pair)
    assert first == second
    for name, expected in _pair.held(_pair.whole()).items():
        assert first[name] == pytest.approx(expected, rel=1e-3)


def test_processes_share_a_teacher_cache_on_disk(pair):
    distiller = _pair.distiller_of("GFL", [_pair.CrossKD(), _pair.PKD()])
    distiller(*_pair.whole()).total.backward()
    live = _pair.gradients(distiller)
    for found in (each["cached"] for each in pair):
        assert (found["hits"], found["misses"]) == (2, 2)
        same(found["cold"], pair[0]["cached"]["cold"], 0)
        same(found["cold"], live, 1e-5)
        same(found["warm"], live, 1e-5)
