"""3x3 convolutions by Winograd's algorithm, on a CPU in float32: fewer multiplications for the same result.

Torch computes them directly. The algorithm F(6x6, 3x3) (Lavin and Gray, CVPR 2016, arXiv 1509.09308) needs a fifth of
the multiplications, and its results differ by rounding alone: by up to 2e-5 of the largest value of the batch. Torch
has it in NNPACK, which it does not choose by itself.

The images of a batch lie on one sheet, and so do all levels of a pyramid that share a convolution. The tiles cross the
borders between them. So one image's rounding depends on its neighbours: if an image has values 10,000 times as large,
its neighbours' results are off by 1 % at their border. An infinite value in one image makes results of its neighbours
infinite or NaN. Activations of one detector are all of about one size.
"""

from __future__ import annotations

import math
import platform
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import Any, Self, TypeGuard, cast

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
    return _is_available() and any(True for model in models for _ in _large(model))


def lay_out_kernels(model: nn.Module) -> None:
    """Bring the kernels of these convolutions into torch's own memory format, which the algorithm takes."""
    for conv in _large(model):
        for parameter in conv.parameters(recurse=False):
            parameter.data = parameter.data.contiguous()


def _large(model: nn.Module) -> Iterator[nn.Conv2d]:
    convs = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    return (x for x in convs if _has_shape(x.weight, x.stride, x.padding, x.dilation, x.groups))


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


def over_maps(block: Callable[[Tensor], Tensor], maps: Sequence[Tensor]) -> list[Tensor]:
    """What a block makes of each of the maps (N, C, H, W), which may differ in H and W.

    In `FastConvolutions`, a large 3x3 convolution that the block is, or begins with, takes all maps at once. So its
    kernel is transformed once, and maps that are too small by themselves gain too. A block that can be iterated over,
    such as an `nn.Sequential`, begins with its first layer.
    """
    if torch.compiler.is_compiling() or not _is_in_context():
        return [block(x) for x in maps]
    conv, *rest = (list(block) if isinstance(block, Iterable) else []) or [block]
    if not _takes_all(conv, maps) or _is_hooked(block):
        return [block(x) for x in maps]
    found = list(_Convolution.apply(conv.weight, conv.bias, *maps))
    for layer in rest:
        found = [layer(x) for x in found]
    return found


def _takes_all(conv: object, maps: Sequence[Tensor]) -> TypeGuard[nn.Conv2d]:
    return (
        type(conv) is nn.Conv2d
        and conv.padding_mode == "zeros"
        and not _is_hooked(conv)
        and len({len(x) for x in maps}) == 1
        and _suits(maps, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        and _is_available()
    )


def _is_hooked(module: object) -> bool:
    """Whether somebody is told of the module's calls, and so must be told of each."""
    every = nn.modules.module
    return isinstance(module, nn.Module) and any(
        (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
            every._global_forward_hooks,
            every._global_forward_pre_hooks,
            every._global_backward_hooks,
            every._global_backward_pre_hooks,
        )
    )


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
) -> Tensor:
    """`F.conv2d`."""
    how = stride, padding, dilation, groups
    if _is_in_context() and _suits([input], weight, bias, *how) and _is_available():
        (found,) = _Convolution.apply(weight, bias, input)
        return cast(Tensor, found)
    return _direct(input, weight, bias, *how)


def _is_in_context() -> bool:
    return any(isinstance(each, FastConvolutions) for each in entered_again.get())


def _suits(
    maps: Sequence[Tensor], weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> bool:
    return (
        all(type(x) is Tensor and x.ndim == 4 for x in maps)
        and type(weight) in (Tensor, nn.Parameter)  # those of torch.export and the like have no values
        and torch._C._functorch.peek_interpreter_stack() is None  # not in torch.func.grad, vmap and the like
        and sum(x.shape[0] * x.shape[2] * x.shape[3] for x in maps) >= CELLS
        and _has_shape(weight, stride, padding, dilation, groups)
        and all(x.shape[1] == weight.shape[1] for x in maps)  # torch's own convolution says what does not fit
        and (bias is None or bias.shape == weight.shape[:1])
        and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in (*maps, weight, bias) if x is not None)
        and not torch.is_autocast_enabled("cpu")
    )


def _has_shape(weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    ones = all(each in (1, (1, 1), [1, 1]) for each in (stride, padding, dilation))
    return ones and groups == 1 and tuple(weight.shape[2:]) == (3, 3) and min(weight.shape[:2]) >= CHANNELS


class _Convolution(torch.autograd.Function):
    """3x3 convolution of stride 1 and padding 1, of float32 maps (N, C, H, W) of one or several sizes.

    It keeps its input only if the weight is trained. Torch's own convolution keeps it always, and so also where a
    gradient goes through a frozen teacher.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, *maps: Tensor) -> tuple[Tensor, ...]:
        ctx.shapes = [x.shape for x in maps]
        ctx.save_for_backward(weight, *(maps if ctx.needs_input_grad[0] else ()))
        return _by_winograd(maps, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, *maps = ctx.saved_tensors
        of_weight, of_bias, *of_maps = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True: a gradient that is itself differentiated
            return _direct_gradients(gradients, maps, ctx.shapes, weight, [any(of_maps), of_weight, of_bias])
        found: Tensor | None = None
        if of_weight and weight[..., 0, 0].numel() >= WEIGHT_CHANNELS:
            found = _weight_gradient(maps, gradients)
        elif of_weight:
            found = _direct_gradients(gradients, maps, ctx.shapes, weight, [False, True, False])[0]
        found_of_maps: Sequence[Tensor | None] = [None] * len(gradients)
        if any(of_maps):  # the convolution of the gradient with the mirrored kernel
            found_of_maps = _by_winograd(gradients, weight.contiguous().transpose(0, 1).flip(2, 3), None)
        # Torch's own gradient of the bias costs as much as that of the weight.
        found_of_bias = cast(Tensor, sum(x.sum((0, 2, 3)) for x in gradients)) if of_bias else None
        return found, found_of_bias, *found_of_maps


def _direct_gradients(
    gradients: Sequence[Tensor],
    maps: Sequence[Tensor],
    shapes: Sequence[torch.Size],
    weight: Tensor,
    mask: list[bool],
) -> tuple[Tensor | None, ...]:
    """Torch's own gradients of weight, bias and each map; None where the mask (of maps, weight, bias) is False.

    Only the gradient of the weight needs the maps. For the others their shapes are enough, and `maps` may be empty.
    """
    ones = [1, 1]
    sums: list[Tensor | None] = [None, None]
    found_of_maps: list[Tensor | None] = []
    for gradient, shape, x in zip_longest(gradients, shapes, maps):
        x = gradient.new_empty(()).expand(shape) if x is None else x
        of_map, *more = torch.ops.aten.convolution_backward(
            gradient, x, weight, weight.shape[:1], ones, ones, ones, False, [0, 0], 1, mask
        )
        found_of_maps.append(of_map)
        sums = [new if total is None else total + new for total, new in zip(sums, more, strict=True)]
    return *sums, *found_of_maps


@dataclass(frozen=True)
class _Sheet:
    """Where maps of several sizes lie on one sheet: `corners` has (row, column) of each image of each map.

    A row or a column of zeros is between two of them, so a 3x3 convolution takes each for itself.
    """

    rows: int
    columns: int
    corners: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    @lru_cache(maxsize=256)
    def of(cls, sizes: tuple[tuple[int, int], ...], count: int) -> Self:
        """The smaller one of two sheets: one as wide as the widest map, and one that is a column wider.

        With the column, two maps of half the width fit beside each other: those of a pyramid's next level.
        """
        widest = max(width for _, width in sizes)
        sheets = [cls._filled(sizes, count, widest + more) for more in (0, 1)]
        return min(sheets, key=lambda sheet: sheet.rows * sheet.columns)

    @classmethod
    def _filled(cls, sizes: tuple[tuple[int, int], ...], count: int, columns: int) -> Self:
        """Fill shelves from the left, the highest maps first. A shelf is as high as its first map."""
        corners: list[tuple[tuple[int, int], ...]] = [()] * len(sizes)
        row = column = below = 0
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i][0]):
            height, width = sizes[i]
            for _ in range(count):
                if column + width > columns:
                    row, column = below, 0
                if not column:
                    below = row + height + 1
                corners[i] += ((row, column),)
                column += width + 1
        return cls(below - 1, columns, tuple(corners))

    def places(self, sheet: Tensor, maps: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Each image (C, H, W) of the maps, after its place on a sheet (C, rows, columns)."""
        for x, corners in zip(maps, self.corners, strict=True):
            for image, (row, column) in zip(x, corners, strict=True):
                yield sheet[:, row : row + image.shape[1], column : column + image.shape[2]], image


def _by_winograd(maps: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """The convolution of each of `maps`, in the memory format of the first.

    All images of all maps lie on one sheet: the kernel is transformed only once, and NNPACK takes this algorithm for
    single images alone.
    """
    sheet = _Sheet.of(tuple((x.shape[2], x.shape[3]) for x in maps), len(maps[0]))
    last = maps[0].is_contiguous(memory_format=torch.channels_last) and not maps[0].is_contiguous()
    size, channels = (sheet.rows, sheet.columns), weight.shape[1]
    # Maps are copied in their own format, and the sheet is transposed: only a whole matrix is transposed fast.
    filled = maps[0].new_zeros((*size, channels) if last else (channels, *size))
    for place, image in sheet.places(filled.permute(2, 0, 1) if last else filled, maps):
        place.copy_(image)
    if last:
        filled = filled.view(-1, channels).t().contiguous()
    found = torch._nnpack_spatial_convolution(
        filled.view(1, channels, *size), weight.contiguous(), bias, [1, 1], [1, 1]
    )[0]
    if last:
        found = found.flatten(1).t().contiguous().view(*size, -1).permute(2, 0, 1)
    # New tensors: autograd forbids to change a view in place that a Function made, as `F.relu_` does.
    memory_format = torch.channels_last if last else torch.contiguous_format
    results = [torch.empty((len(x), len(weight), *x.shape[2:]), memory_format=memory_format) for x in maps]
    for place, image in sheet.places(found, results):
        image.copy_(place)
    return tuple(results)


def _weight_gradient(maps: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """The gradient (K, C, 3, 3) of the weights, by F(4x4, 3x3) with matrix products of torch: its adjoint."""
    seen = _of_tiles(_OF_IMAGE, maps, 6, edge=1)
    wanted = _of_tiles(_OF_RESULT.t(), gradients, 4, edge=0)
    products = torch.bmm(wanted.transpose(1, 2), seen)  # (36, K, C)
    found = _OF_KERNEL.t() @ products.flatten(1)
    return found.view(3, 3, *products.shape[1:]).permute(2, 3, 0, 1).contiguous()


def _of_tiles(matrix: Tensor, maps: Sequence[Tensor], size: int, *, edge: int) -> Tensor:
    """Multiply each tile of `size` x `size` cells, 4 cells apart, of all maps by a matrix: (36, tiles, C).

    `edge`: how many cells of zeros are above and left of a map's first cell.
    """
    channels = maps[0].shape[1]
    counts = [[len(x), *(-(-side // 4) for side in x.shape[2:])] for x in maps]  # of tiles: images, high, wide
    tiles = maps[0].new_empty(size * size, sum(map(math.prod, counts)), channels)
    places = torch.split(tiles, [*map(math.prod, counts)], 1)
    for x, count, place in zip(maps, counts, places, strict=True):
        below, right = (-side % 4 + edge for side in x.shape[2:])
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, edge, right, edge, below))
        seen = x.unfold(1, size, 4).unfold(2, size, 4).permute(4, 5, 0, 1, 2, 3)
        place.view(size, size, *count, channels).copy_(seen)
    return (matrix @ tiles.flatten(1)).view(len(matrix), -1, channels)
