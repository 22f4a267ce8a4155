"""3x3 convolutions by Winograd's algorithm, on a CPU in float32: fewer multiplications for the same result.

Torch computes them directly. The algorithm F(6x6, 3x3) (Lavin and Gray, CVPR 2016, arXiv 1509.09308) needs a fifth of
the multiplications, and its results differ by rounding alone: by up to 2e-5 of the largest value of the batch. Torch
has it in NNPACK, which it does not choose by itself.

The tiles cross the borders between the images of a batch. So one image's rounding depends on its neighbours: if an
image has values 10,000 times as large, the results of the next one are off by 1 % at their border. An infinite value in
one image makes results of the next one infinite or NaN. Activations of one detector are all of about one size.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Sequence
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtoolkit.contract.recompute import entered_again

# The transformation of a kernel costs as much as the direct computation of about 150 cells, and that of an image as
# much as several channels. Below these sizes the direct way is as fast.
CELLS = 600
CHANNELS = 64
WEIGHT_CHANNELS = 128 * 128  # of input and result multiplied, for gradients of weights


def gains(*models: nn.Module) -> bool:
    """Whether models have convolutions that `FastConvolutions` makes faster on this processor."""
    return _is_available() and any(
        isinstance(module, nn.Conv2d)
        and _has_shape(module.weight, module.stride, module.padding, module.dilation, module.groups)
        for model in models
        for module in model.modules()
    )


def _is_available() -> bool:
    """Whether this processor and this torch have the algorithm. Only x86 processors count: no other was measured.

    The question also makes NNPACK ready in this process.
    """
    known = platform.machine().lower() in ("x86_64", "amd64")
    has_it: bool = torch.backends.nnpack.is_available()  # type: ignore[no-untyped-call]
    return known and has_it and hasattr(torch, "_nnpack_spatial_convolution")


# The matrices of F(4x4, 3x3), from the paper, for tiles whose cells are flattened.
_OF_IMAGE, _OF_KERNEL, _OF_RESULT = (
    torch.kron(matrix, matrix)
    for matrix in (
        torch.tensor(
            [
                [4.0, 0, -5, 0, 1, 0],
                [0, -4, -4, 1, 1, 0],
                [0, 4, -4, -1, 1, 0],
                [0, -2, -1, 2, 1, 0],
                [0, 2, -1, -2, 1, 0],
                [0, 4, 0, -5, 0, 1],
            ]
        ),
        torch.tensor([[6.0, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24,
        torch.tensor([[1.0, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]),
    )
)


class FastConvolutions:
    """Context in which `F.conv2d`, and so each `nn.Conv2d`, computes large 3x3 convolutions by Winograd's algorithm.

    It holds for this thread. Gradients of the convolutions' inputs are computed in the same way, wherever `backward` is
    called. All other convolutions are computed as without the context, and so are all under autocast, in transforms of
    `torch.func`, in `torch.export`, and on processors without the algorithm.

    `F.conv2d` is a different function while any thread is in the context. A `TorchFunctionMode` of torch does without,
    but Python then looks at each operation: on small images that took 13 % of a step.
    """

    def __enter__(self) -> Self:
        global _entered, _direct
        with _lock:
            _entered += 1
            if _entered == 1:
                _direct, F.conv2d = F.conv2d, _conv2d
        entered_again.set((*entered_again.get(), self))
        return self

    def __exit__(self, *error: object) -> None:
        global _entered
        entered_again.set(entered_again.get()[:-1])
        with _lock:
            _entered -= 1
            if not _entered:
                F.conv2d = _direct


_lock = threading.Lock()
_entered = 0  # in all threads
_direct = F.conv2d


def _conv2d(*args: Any, **kwargs: Any) -> Tensor:
    """`F.conv2d`."""
    in_context = any(isinstance(each, FastConvolutions) for each in entered_again.get())
    if in_context and _suits(*args, **kwargs) and _is_available():
        return _convolve(*args, **kwargs)
    return _direct(*args, **kwargs)


def _suits(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> bool:
    return (
        type(input) is Tensor
        and type(weight) in (Tensor, nn.Parameter)  # those of torch.export and the like have no values
        and torch._C._functorch.peek_interpreter_stack() is None  # not in torch.func.grad, vmap and the like
        and input.ndim == 4
        and input.shape[0] * input.shape[2] * input.shape[3] >= CELLS
        and _has_shape(weight, stride, padding, dilation, groups)
        and input.shape[1] == weight.shape[1]  # torch's own convolution says what does not fit
        and (bias is None or bias.shape == weight.shape[:1])
        and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in (input, weight, bias) if x is not None)
        and not torch.is_autocast_enabled("cpu")
    )


def _has_shape(weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    ones = all(each in (1, (1, 1), [1, 1]) for each in (stride, padding, dilation))
    return ones and groups == 1 and tuple(weight.shape[2:]) == (3, 3) and min(weight.shape[:2]) >= CHANNELS


def _convolve(input: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    return cast(Tensor, _Convolution.apply(input, weight, bias))


class _Convolution(torch.autograd.Function):
    """3x3 convolution of stride 1 and padding 1, of (N, C, H, W) float32.

    It keeps its input only if the weight is trained. Torch's own convolution keeps it always, and so also where a
    gradient goes through a frozen teacher.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, weight)
        return _by_winograd(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True: a gradient that is itself differentiated
            return _direct_gradients(gradient, input, weight, [of_input, of_weight, of_bias])
        found: list[Tensor | None] = [None, None, None]
        if of_weight and weight[..., 0, 0].numel() >= WEIGHT_CHANNELS:
            found[1] = _weight_gradient(input, gradient)
            of_weight = False
        if of_weight or of_bias:
            _, direct, found[2] = _direct_gradients(gradient, input, weight, [False, of_weight, of_bias])
            found[1] = direct if of_weight else found[1]
        if of_input:  # the convolution of the gradient with the mirrored kernel
            found[0] = _by_winograd(gradient, weight.transpose(0, 1).flip(2, 3), None)
        return found[0], found[1], found[2]


def _direct_gradients(
    gradient: Tensor, input: Tensor | None, weight: Tensor, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Torch's own gradients of input, weight and bias; None where the mask is False.

    Only the gradient of the weight needs the input; for the others its shape is enough.
    """
    ones = [1, 1]
    if input is None:
        shape = (gradient.shape[0], weight.shape[1], *gradient.shape[2:])
        input = gradient.new_empty(()).expand(shape)
    found = torch.ops.aten.convolution_backward(
        gradient, input, weight, weight.shape[:1], ones, ones, ones, False, [0, 0], 1, mask
    )
    return cast(tuple[Tensor | None, Tensor | None, Tensor | None], found)


def _by_winograd(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution, in the memory format of `input`.

    All images of a batch form one tall image, with a row of zeros between two: the kernel is transformed only once, and
    NNPACK takes this algorithm for single images alone.
    """
    count, channels, height, width = input.shape
    last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    rows = height + 1
    if last:
        tall = F.pad(input.permute(0, 2, 3, 1), (0, 0, 0, 0, 0, 1)).view(-1, channels).t().contiguous()
    else:
        tall = F.pad(input.transpose(0, 1), (0, 0, 0, 1)).contiguous()
    found = torch._nnpack_spatial_convolution(
        tall.view(1, channels, count * rows, width), weight.contiguous(), bias, [1, 1], [1, 1]
    )[0]
    images = found.view(-1, count, rows, width)[:, :, :height].transpose(0, 1)
    # A new tensor: autograd forbids to change a view in place that a Function made, as `F.relu_` does.
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty_like(images, memory_format=memory_format).copy_(images)


def _weight_gradient(input: Tensor, gradient: Tensor) -> Tensor:
    """The gradient (K, C, 3, 3) of the weights, by F(4x4, 3x3) with matrix products of torch: its adjoint."""
    high, wide = (-(-side // 4) for side in input.shape[2:])
    images, gradients = (
        F.pad(x.permute(0, 2, 3, 1), (0, 0, edge, 4 * wide + edge - x.shape[3], edge, 4 * high + edge - x.shape[2]))
        for x, edge in ((input, 1), (gradient, 0))
    )
    seen = _of_tiles(_OF_IMAGE, images, 6)
    wanted = _of_tiles(_OF_RESULT.t(), gradients, 4)
    products = torch.bmm(wanted.transpose(1, 2), seen)  # (36, K, C)
    found = _OF_KERNEL.t() @ products.flatten(1)
    return found.view(3, 3, *products.shape[1:]).permute(2, 3, 0, 1).contiguous()


def _of_tiles(matrix: Tensor, x: Tensor, size: int) -> Tensor:
    """Multiply each tile of `size` x `size` cells, 4 cells apart, of (N, H, W, C) by a matrix: (36, tiles, C)."""
    channels = x.shape[-1]
    tiles = x.unfold(1, size, 4).unfold(2, size, 4).permute(4, 5, 0, 1, 2, 3).reshape(size * size, -1)
    return (matrix @ tiles).view(len(matrix), -1, channels)
