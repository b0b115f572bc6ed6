"""Group norm of a sum and a concatenation: the sum in plain PyTorch, the norm by its Triton kernels."""

__all__ = ["add_group_norm_silu", "add_group_norm_silu_backward"]

from torch import Tensor

from .. import reference
from ..layout import memory_format
from .group_norm_silu import group_norm_silu, group_norm_silu_backward


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
    h = reference.add_inputs(x, input_bias, residual, skip).contiguous(memory_format=memory_format(x))
    y, mean, rstd = group_norm_silu(h, weight, bias, scale, shift, groups, eps, silu)
    return y, h if keep else x.new_empty(0), mean, rstd


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
    form = memory_format(x)
    h = x if kept else reference.add_inputs(x, input_bias, None, None)
    # In float32, so that the sums are rounded once.
    h, grad = (v.float().contiguous(memory_format=form) for v in (h, grad))
    parameters = (weight, bias, scale, shift)
    given = (None if p is None else p.float() for p in parameters)
    of_h, *grads = group_norm_silu_backward(grad, h, mean, rstd, *given, groups, silu)
    grads = [x.new_empty(0) if p is None else g.to(p.dtype) for g, p in zip(grads, parameters, strict=True)]
    if grad_sum is not None:
        of_h = of_h + grad_sum
    grad_x, grad_skip = of_h[:, :channels], of_h[:, channels:]
    grad_input_bias = x.new_empty(0) if input_bias is None else reference.sum_to_bias(grad_x, input_bias)
    grad_x, grad_skip = (part.to(x.dtype).contiguous(memory_format=form) for part in (grad_x, grad_skip))
    return grad_x, grad_skip, grad_input_bias, *grads
