import pytest
import torch

from kdtoolkit.methods.mgd import MGD, mgd_loss
from tests.methods._views import batch, exchange, maps, spec

BATCH = batch([], [])


def ready(method, student=None):
    torch.manual_seed(0)
    method.setup(student or spec(), spec())
    return method


def test_nothing_blanked_is_the_distance_of_the_generated_map():
    student, teacher = maps(2, seed=1), maps(2, seed=2)
    method = ready(MGD(weight=0.5, mask_ratio=0.0))
    ours = method(exchange(BATCH, features=(student, teacher)))
    expected = 0.0
    for level, (s, t) in enumerate(zip(student, teacher, strict=True)):
        generated = method.generate[level](s)
        for i in range(2):
            expected += 0.5 * (generated[i] - t[i]).double().square().sum().item() / 2
    assert tuple(ours) == MGD.terms
    assert ours["feature"].item() == pytest.approx(expected, rel=1e-5)


def test_the_share_of_blanked_cells():
    seen = []
    student = tuple(torch.ones(8, 4, 40, 40) for _ in range(2))
    method = ready(MGD(mask_ratio=0.3))
    method.generate[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    method(exchange(BATCH, features=(student, student)))
    assert (seen[0] == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert seen[0].amax(1).equal(seen[0].amin(1))  # whole cells, all channels of one alike


def test_gradient_reaches_the_student_and_the_generator_alone():
    student, teacher = maps(2, seed=1), maps(2, seed=2)
    method = ready(MGD())
    method(exchange(BATCH, features=(student, teacher)))["feature"].backward()
    assert all(x.grad.abs().sum() > 0 for x in student)
    assert all(p.grad.abs().sum() > 0 for p in method.parameters())
    assert all(x.grad is None for x in teacher)


def test_equal_maps_cost_nothing():
    x = torch.randn(2, 3, 4, 4)
    assert mgd_loss(x, x) == 0


def test_half_precision_is_computed_in_float32():
    student, teacher = (maps(2, seed=s, dtype=torch.bfloat16) for s in (1, 2))
    method = ready(MGD(mask_ratio=0.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = method(exchange(BATCH, features=(student, teacher)))["feature"]
    full = method(exchange(BATCH, features=[[x.float() for x in side] for side in (student, teacher)]))["feature"]
    assert half.dtype == torch.float32
    assert half == full


def test_projects_and_resizes():
    method = ready(MGD(), spec(channels=(3, 4)))
    student = (torch.randn(2, 3, 5, 5), torch.randn(2, 4, 4, 3))
    assert torch.isfinite(method(exchange(BATCH, features=(student, maps(2))))["feature"])
