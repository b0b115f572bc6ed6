"""Convolutions of small images, for training in bfloat16 on a CPU, with a backward pass that is put together here.

The gradient of a filter is a sum over pixels. Where there are few of them, oneDNN's kernel for it takes two to six
times as long as the product of matrices that it is: of the gradient's pixels, and of what surrounds each pixel.
"""

__all__ = ["conv2d", "serves"]

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.layout import eager_on_cpu

PIXELS = 64  # of a result, at most: with 16 x 16, oneDNN is the faster one


def serves(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether `conv2d` can stand in for the module and is faster: in eager mode, with gradients."""
    if not (torch.is_grad_enabled() and conv.weight.requires_grad and eager_on_cpu(x)):
        return False
    if x.dim() != 4 or x.numel() == 0:
        return False
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str) or conv.groups != 1 or conv.dilation != (1, 1):
        return False
    dtypes = {x.dtype, conv.weight.dtype}
    if torch.is_autocast_enabled("cpu") and torch.float64 not in dtypes:  # which autocast leaves alone
        dtypes = {torch.get_autocast_dtype("cpu")}
    if dtypes != {torch.bfloat16}:
        return False
    sizes = zip(x.shape[2:], conv.kernel_size, conv.stride, conv.padding, strict=True)
    height, width = ((size + 2 * padding - window) // stride + 1 for size, window, stride, padding in sizes)
    return height * width <= PIXELS


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """F.conv2d in bfloat16, with gradients of gradients too."""
    x, weight, bias = (None if a is None else a.to(torch.bfloat16) for a in (x, weight, bias))
    return _Conv2d.apply(x, weight, bias, stride, padding)


class _Conv2d(torch.autograd.Function):
    generate_vmap_rule = True  # for torch.func: the gradients of each sample

    @staticmethod
    def forward(x, weight, bias, stride, padding):
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, _, ctx.stride, ctx.padding = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        out, _, *window = weight.shape
        pixels = grad.permute(0, 2, 3, 1).reshape(-1, out)
        grads = [None] * 5
        if ctx.needs_input_grad[0]:
            how = (None, ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1)
            grads[0], *_ = torch.ops.aten.convolution_backward(grad, x, weight, *how, (True, False, False))
        if ctx.needs_input_grad[1]:
            product = pixels.t().contiguous() @ _surroundings(x, window, ctx.stride, ctx.padding)
            grads[1] = product.view(out, *window, -1).permute(0, 3, 1, 2)  # channels-last
        if ctx.needs_input_grad[2]:
            grads[2] = pixels.sum(0)
        return tuple(grads)


def _surroundings(x: Tensor, window: list[int], stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """What the filter sees at each pixel of the result, (pixels, H * W * C of the window)."""
    images, (top, left) = x.permute(0, 2, 3, 1), padding
    if top or left:
        images = F.pad(images, (0, 0, left, left, top, top))
    windows = images.unfold(1, window[0], stride[0]).unfold(2, window[1], stride[1])  # (N, H, W, C, window)
    return windows.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(0, 2)
