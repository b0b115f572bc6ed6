"""Group norm of a sum and a concatenation: in one launch where whole groups of a sample fit into a program.

Its output is recomputed from the statistics by the last launch of those that larger planes take.
"""

__all__ = ["add_group_norm_silu", "add_group_norm_silu_backward", "recompute_group_norm_silu"]

import torch
from torch import Tensor

from ..layout import empty_with_channels
from .group_norm_planes import apply_statistics, normalise_planes
from .group_norm_planes_backward import plane_gradients
from .group_norm_slab import normalise_slabs, slab_gradients, slab_of


def add_group_norm_silu(
    x: Tensor,
    input_bias: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = len(weight)
    y = empty_with_channels(x, channels)
    h = torch.empty_like(y) if keep else None
    mean = x.new_empty((len(x), groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if y.numel() == 0:
        mean.fill_(float("nan"))
        rstd.fill_(float("nan"))
    else:
        given = (x, input_bias, residual, skip, weight, bias, scale, shift, y, h, mean, rstd, _row_stride(input_bias))
        adds = h is not None or input_bias is not None
        planar, plane = not adds and _is_planar(x), y[0, 0].numel()
        slab = None if planar else slab_of(x.shape[1], groups, False, y, x, residual, skip, h)
        if slab is None:
            normalise_planes(planar, *given, plane, groups, eps, silu)
        else:
            normalise_slabs(slab, *given, eps, silu)
    return y, x.new_empty(0) if h is None else h, mean, rstd


def add_group_norm_silu_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    input_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    silu: bool,
    kept: bool,
    channels: int,
) -> tuple[Tensor, ...]:
    """
    Args:
        x: the sum, if `kept`; otherwise input_bias is added to it.
        channels: of the x that was given to the forward pass; those of skip follow.
    """
    grad_x = empty_with_channels(x, channels)
    grad_skip = empty_with_channels(x, x.shape[1] - channels)
    parameters = (input_bias, weight, bias, scale, shift)
    grads = [None if p is None else p.new_empty(p.shape) for p in parameters]
    if x.numel() == 0:
        for p in grads:
            if p is not None:
                p.zero_()
    else:
        given = (grad, grad_sum, x, input_bias, mean, rstd, weight, bias, scale, shift)
        results = (grad_x, grad_skip if channels < x.shape[1] else None, *grads)
        planar, plane, stride = _is_planar(x), x[0, 0].numel(), _row_stride(input_bias)
        slab = None if planar else slab_of(channels, groups, True, x, grad, grad_sum, grad_x, grad_skip)
        if slab is None:
            plane_gradients(planar, *given, *results, stride, plane, groups, silu, kept)
        else:
            slab_gradients(slab, *given, *results, stride, silu, kept)
    return grad_x, grad_skip, *(x.new_empty(0) if p is None else p for p in grads)


def recompute_group_norm_silu(
    x: Tensor,
    input_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    silu: bool,
) -> Tensor:
    y = empty_with_channels(x, x.shape[1])
    if y.numel() > 0:
        given = (x, input_bias, mean, rstd, weight, bias, None, None, y, _row_stride(input_bias))
        apply_statistics(False, *given, y[0, 0].numel(), groups, silu)
    return y


def _is_planar(x: Tensor) -> bool:
    return x.shape[1] == 1 or x.stride(1) != 1


def _row_stride(input_bias: Tensor | None) -> int:
    return 0 if input_bias is None or input_bias.dim() == 1 else input_bias.stride(0)
