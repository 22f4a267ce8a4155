import pickle
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdtoolkit.winograd import CHANNELS, FastConvolutions, gains, lay_out_kernels, over_maps

large = pytest.mark.skipif(
    not gains(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)), reason="this processor or torch has no such algorithm"
)


def maps(*shape, memory_format=torch.contiguous_format):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    return x.to(memory_format=memory_format).requires_grad_()


def differs(found, expected):
    """The largest difference, relative to the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def results(conv, x, context):
    with context:
        y = conv(x)
    gradients = torch.autograd.grad((y * torch.linspace(0.5, 1, y.shape[-1])).sum(), [x, *conv.parameters()])
    return [y, *gradients]


@large
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 64, 20, 20), (1, 64, 31, 23), (5, 64, 9, 17)])
def test_values_and_gradients_are_those_of_the_direct_convolution(shape, memory_format, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 72, 3, padding=1, bias=bias)
    x = maps(*shape, memory_format=memory_format)
    exact = results(conv.double(), x.double().detach().requires_grad_(), torch.enable_grad())
    found = results(conv.float(), x, FastConvolutions())
    assert "_Convolution" in type(found[0].grad_fn).__name__
    assert found[0].is_contiguous(memory_format=memory_format)
    for one, other in zip(found, exact, strict=True):
        assert differs(one, other) < 1e-4


@large
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 64, 31, 23), (2, 64, 20, 20)])
def test_a_result_can_be_changed_in_place(shape, memory_format):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(inplace=True))
    x = maps(*shape, memory_format=memory_format)
    exact = results(model.double(), x.double().detach().requires_grad_(), torch.enable_grad())
    for one, other in zip(results(model.float(), x, FastConvolutions()), exact, strict=True):
        assert differs(one, other) < 1e-4


@large
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 128, 40, 30), (3, 128, 27, 26)])
def test_gradients_of_wide_weights_are_those_of_the_direct_convolution(shape, memory_format):
    torch.manual_seed(0)
    conv = nn.Conv2d(128, 128, 3, padding=1)
    x = maps(*shape, memory_format=memory_format)
    exact = results(conv.double(), x.double().detach().requires_grad_(), torch.enable_grad())
    for one, other in zip(results(conv.float(), x, FastConvolutions()), exact, strict=True):
        assert differs(one, other) < 1e-4


@large
def test_frozen_weights_and_inputs_get_no_gradient():
    conv = nn.Conv2d(64, 64, 3, padding=1).requires_grad_(False)
    x = maps(2, 64, 20, 20)
    with FastConvolutions():
        conv(x).sum().backward()
        assert conv.weight.grad is None
        assert x.grad is not None
        assert not conv(x.detach()).requires_grad
        trained = nn.Conv2d(64, 64, 3, padding=1)
        trained(x.detach()).sum().backward()
    assert trained.weight.grad is not None
    assert trained.bias.grad is not None


@large
@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv2d(64, 64, 3, padding=1), (2, 64, 8, 8)),  # too small
        (nn.Conv2d(48, 64, 3, padding=1), (2, 48, 20, 20)),  # too narrow
        (nn.Conv2d(64, 64, 3, padding=1, stride=2), (2, 64, 40, 40)),
        (nn.Conv2d(64, 64, 3, padding=2, dilation=2), (2, 64, 20, 20)),
        (nn.Conv2d(64, 64, 3, padding=1, groups=64), (2, 64, 20, 20)),
        (nn.Conv2d(64, 64, 3, padding="same"), (2, 64, 20, 20)),
        (nn.Conv2d(64, 64, 1), (2, 64, 20, 20)),
        (nn.Conv2d(64, 64, 3, padding=1), (64, 30, 30)),  # a single image
    ],
)
def test_other_convolutions_are_torchs_to_the_last_bit(conv, shape):
    x = maps(*shape)
    with FastConvolutions():
        found = conv(x)
    assert "_Convolution" not in type(found.grad_fn).__name__
    assert torch.equal(found, conv(x))


@large
@pytest.mark.parametrize(
    ("channels", "bias"), [(32, torch.zeros(64)), (64, torch.zeros(32)), (64, torch.zeros(64, dtype=torch.float64))]
)
def test_what_does_not_fit_is_torchs_own_error(channels, bias):
    arguments = maps(2, channels, 20, 20), maps(64, 64, 3, 3), bias, 1, 1
    with pytest.raises(RuntimeError) as expected:
        F.conv2d(*arguments)
    with FastConvolutions(), pytest.raises(RuntimeError) as found:
        F.conv2d(*arguments)
    assert str(found.value) == str(expected.value)


@large
def test_autocast_has_its_own_convolutions():
    conv, x = nn.Conv2d(64, 64, 3, padding=1), maps(2, 64, 20, 20)
    with FastConvolutions(), torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16


@large
def test_functional_calls_with_names_work():
    x, weight = maps(2, 64, 20, 20), maps(64, 64, 3, 3)
    with FastConvolutions():
        found = F.conv2d(input=x, weight=weight, padding=(1, 1))
    assert differs(found, F.conv2d(x, weight, padding=1)) < 1e-4


@large
def test_only_models_with_such_convolutions_gain():
    narrow = nn.Sequential(nn.Conv2d(3, 64, 7), nn.Conv2d(16, 16, 3, padding=1))
    assert not gains(narrow, nn.Linear(4, 4))
    assert gains(narrow, nn.Sequential(nn.Conv2d(256, 256, 3, padding=1)))


def test_processors_of_other_kinds_compute_directly(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert not gains(nn.Conv2d(256, 256, 3, padding=1))


def test_a_processor_without_the_algorithm_computes_directly_in_the_context(monkeypatch):
    context = FastConvolutions()
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    conv, x = nn.Conv2d(64, 64, 3, padding=1), maps(2, 64, 20, 20)
    with context:
        assert torch.equal(conv(x), conv.forward(x))
        assert "_Convolution" not in type(conv(x).grad_fn).__name__


@large
@pytest.mark.slow
def test_a_context_that_was_sent_to_a_new_process_works_there():
    code = (
        "import pickle, sys, torch\n"
        "with pickle.load(sys.stdin.buffer): torch.nn.Conv2d(64, 64, 3, padding=1)(torch.rand(2, 64, 20, 20))"
    )
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(FastConvolutions()), check=True)


@large
def test_transforms_of_torch_func_compute_directly():
    conv, x = nn.Conv2d(64, 64, 3, padding=1), maps(2, 64, 20, 20).detach()

    def loss(weight):
        return torch.func.functional_call(conv, {"weight": weight}, x).square().mean()

    weight = conv.weight.detach()
    with FastConvolutions():
        found = torch.func.grad(loss)(weight)
        _, tangent = torch.func.jvp(loss, (weight,), (weight,))
        mapped = torch.func.vmap(conv)(x[None])
    torch.testing.assert_close(found, torch.func.grad(loss)(weight))
    torch.testing.assert_close(tangent, (found * weight).sum())
    torch.testing.assert_close(mapped[0], conv(x))


@large
def test_export_computes_directly():
    conv, x = nn.Conv2d(64, 64, 3, padding=1), maps(2, 64, 20, 20).detach()
    with FastConvolutions():
        program = torch.export.export(conv, (x,))
    torch.testing.assert_close(program.module()(x), conv(x))


@large
@pytest.mark.parametrize("frozen", [False, True])
def test_a_gradient_can_be_differentiated(frozen):
    conv, x = nn.Conv2d(128, 128, 3, padding=1).requires_grad_(not frozen), maps(2, 128, 20, 20)

    def penalty(context):
        with context:
            y = conv(x.square())
        (gradient,) = torch.autograd.grad(y.square().mean(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [x, *([] if frozen else conv.parameters())])

    for found, expected in zip(penalty(FastConvolutions()), penalty(torch.enable_grad()), strict=True):
        assert differs(found, expected) < 1e-4


@large
def test_the_context_holds_for_its_thread_and_leaves_nothing_behind():
    own, conv, x = F.conv2d, nn.Conv2d(64, 64, 3, padding=1), maps(2, 64, 20, 20).detach()
    direct, found = conv(x), []
    with FastConvolutions(), FastConvolutions():
        thread = threading.Thread(target=lambda: found.append(conv(x)))
        thread.start()
        thread.join()
        assert not torch.equal(conv(x), direct)
    assert torch.equal(found[0], direct)
    with pytest.raises(ZeroDivisionError), FastConvolutions():
        _ = 1 / 0
    assert F.conv2d is own
    assert torch.equal(conv(x), direct)


@large
@pytest.mark.parametrize("frozen", [False, True])
def test_the_input_is_kept_only_for_a_weight_that_is_trained(frozen):
    conv, x = nn.Conv2d(64, 64, 3, padding=1, bias=False).requires_grad_(not frozen), maps(2, 64, 20, 20)
    kept = []
    with FastConvolutions(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = conv(x)
    assert any(t is x for t in kept) != frozen
    (found,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(conv(x).sum(), x)
    assert differs(found, expected) < 1e-4


PYRAMIDS = {
    "two images of a square pyramid": (2, [(20, 20), (10, 10), (5, 5), (3, 3), (2, 2)]),
    "one image": (1, [(24, 31), (12, 16), (6, 8)]),
    "odd sides": (5, [(13, 9), (7, 5), (4, 3), (2, 2), (1, 1)]),
    "no order": (2, [(4, 9), (21, 13), (9, 25)]),
}


@large
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_all_maps_together_have_the_values_and_gradients_of_each_alone(pyramid, memory_format, channels):
    torch.manual_seed(0)
    count, sizes = PYRAMIDS[pyramid]
    block = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(8, channels), nn.SiLU(inplace=True))
    pyramid = [maps(count, channels, *size, memory_format=memory_format) for size in sizes]

    def found(model, levels, context):
        with context:
            results = over_maps(model, levels)
        total = sum((y * torch.linspace(0.5, 1, y.shape[-1])).sum() for y in results)
        return [*results, *torch.autograd.grad(total, [*levels, *model.parameters()])]

    exact = found(block.double(), [x.double().detach().requires_grad_() for x in pyramid], torch.enable_grad())
    together = found(block.float(), pyramid, FastConvolutions())
    assert [x.is_contiguous(memory_format=memory_format) for x in together[: len(sizes)]] == [True] * len(sizes)
    for one, other in zip(together, exact, strict=True):
        assert differs(one, other) < 1e-4


@large
def test_small_maps_of_a_pyramid_gain_too():
    conv, small = nn.Conv2d(64, 64, 3, padding=1), maps(2, 64, 5, 5)
    with FastConvolutions():
        alone, (_, together) = conv(small), over_maps(conv, [maps(2, 64, 20, 20), small])
        few = over_maps(conv, [small, small])
    assert "_Convolution" in type(together.grad_fn).__name__
    assert not any("_Convolution" in type(each.grad_fn).__name__ for each in (alone, *few))


@large
def test_hooks_see_each_map():
    conv, pyramid = nn.Conv2d(64, 64, 3, padding=1), [maps(2, 64, 20, 20), maps(2, 64, 10, 10)]
    seen = []
    block = nn.Sequential(conv)
    with FastConvolutions():
        for module in (conv, block):
            with module.register_forward_hook(lambda _, __, y: seen.append(y.shape[-1])):
                over_maps(block, pyramid)
    assert seen == [20, 10, 20, 10]


@large
@pytest.mark.parametrize(
    ("block", "counts"),
    [
        (nn.Conv2d(64, 64, 3, padding=1), (2, 1)),  # counts of images that differ
        (nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"), (2, 2)),
        (nn.Conv2d(64, 64, 3, stride=2, padding=1), (2, 2)),
        (nn.Sequential(nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)), (2, 2)),
        (nn.Sequential(), (2, 2)),
        (torch.relu, (2, 2)),
    ],
)
def test_what_does_not_take_all_maps_takes_one_after_the_other(block, counts):
    pyramid = [maps(count, 64, size, size) for count, size in zip(counts, (20, 10), strict=True)]
    with FastConvolutions():
        assert all(torch.equal(y, block(x)) for x, y in zip(pyramid, over_maps(block, pyramid), strict=True))


@large
def test_kernels_of_these_convolutions_are_laid_out_as_the_algorithm_takes_them():
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1, stride=2))
    model.to(memory_format=torch.channels_last)
    lay_out_kernels(model)
    assert [conv.weight.is_contiguous() for conv in model] == [True, False]
