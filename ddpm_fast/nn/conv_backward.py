"""Convolutions of small images in bfloat16 on a CPU, with the gradient of the weight as a matrix product.

The gradient of the weight is a sum over pixels: the product of the output's gradient, (out, pixels), and of the windows
of x that the filter covers, (pixels, in * window). For few pixels, oneDNN's kernel takes two to six times as long.
"""

__all__ = ["conv2d", "serves"]

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.layout import eager_on_cpu

PIXELS = 64  # of the output, at most: with 16 x 16, oneDNN is faster


def serves(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether `conv2d` computes what the module does, and is faster: in eager mode, with gradients."""
    if not (torch.is_grad_enabled() and conv.weight.requires_grad and eager_on_cpu(x)):
        return False
    if x.dim() != 4 or x.numel() == 0:
        return False
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str) or conv.groups != 1 or conv.dilation != (1, 1):
        return False
    dtypes = {x.dtype, conv.weight.dtype}
    if torch.is_autocast_enabled("cpu") and torch.float64 not in dtypes:  # autocast does not convert float64
        dtypes = {torch.get_autocast_dtype("cpu")}
    if dtypes != {torch.bfloat16}:
        return False
    sizes = zip(x.shape[2:], conv.kernel_size, conv.stride, conv.padding, strict=True)
    height, width = ((size + 2 * padding - window) // stride + 1 for size, window, stride, padding in sizes)
    return height * width <= PIXELS


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """F.conv2d in bfloat16, differentiable any number of times."""
    x, weight, bias = (None if a is None else a.to(torch.bfloat16) for a in (x, weight, bias))
    return _Conv2d.apply(x, weight, bias, stride, padding)


class _Conv2d(torch.autograd.Function):
    generate_vmap_rule = True  # for torch.func: gradients of each sample

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
            product = pixels.t().contiguous() @ _windows(x, window, ctx.stride, ctx.padding)
            of_weight = product.view(out, *window, -1).permute(0, 3, 1, 2)  # channels-last
            grads[1] = of_weight.contiguous() if weight.is_contiguous() else of_weight
        if ctx.needs_input_grad[2]:
            grads[2] = pixels.sum(0)
        return tuple(grads)


def _windows(x: Tensor, window: list[int], stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """The elements of x that the filter covers at each pixel of the output, (pixels, H * W * C of the window)."""
    images, (top, left) = x.permute(0, 2, 3, 1), padding
    if top or left:
        images = F.pad(images, (0, 0, left, left, top, top))
    windows = images.unfold(1, window[0], stride[0]).unfold(2, window[1], stride[1])  # (N, H, W, C, window)
    return windows.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(0, 2)
