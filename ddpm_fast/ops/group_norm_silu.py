"""Group norm, a scale and a shift, and SiLU: one read of x for the statistics, one for the result."""

import torch
from torch import Tensor

from . import dispatch, layout, reference

__all__ = ["group_norm_silu"]


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """SiLU(GroupNorm(x) (1 + scale) + shift). Wu & He (2018); Nichol & Dhariwal (2021), sec. 3 for scale and shift.

    Args:
        x: (N, C, ...), floating.
        weight, bias: (C,), floating: float32 parameters may go with half-precision x.
        groups: divides C.
        eps: added to the variance.
        silu: False for the norm alone.
        scale, shift: (N, C), floating; both or neither.

    Returns:
        The shape and dtype of x; channels-last where x is, contiguous otherwise. The statistics and the arithmetic are
        float32 (float64 for float64 data), and safe where the mean is far larger than the spread. For the gradient
        only x, the means and the deviations are kept.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    # A network calls this more often than all other ops: the checks are plain comparisons, 5 us in all.
    channels, device = x.shape[1:2], x.device
    fits = (
        x.dtype in layout.FLOATING
        and groups > 0
        and channels
        and channels[0] % groups == 0
        and weight.shape == channels == bias.shape
        and weight.is_floating_point()
        and bias.is_floating_point()
        and weight.device == device == bias.device
        and (scale is None) == (shift is None)
    )
    if fits and scale is not None:
        fits = all(p.shape == x.shape[:2] and p.is_floating_point() and p.device == device for p in (scale, shift))
    if not fits:
        layout.refuse(
            "group_norm_silu",
            f"x (N, C, ...) floating with C a multiple of groups = {groups}, weight and bias (C,), and scale and shift "
            "(N, C) both or neither, on one device",
            x=x,
            weight=weight,
            bias=bias,
            scale=scale,
            shift=shift,
        )
    x = x.contiguous(memory_format=layout.memory_format(x))
    # The parameters share a dtype, x's or float32; scale and shift have x's.
    if not weight.dtype == bias.dtype == x.dtype:
        inner = torch.promote_types(x.dtype, torch.float32)
        weight, bias = weight.to(inner), bias.to(inner)
    if scale is not None:
        scale, shift = layout.dense(scale.to(x.dtype), shift.to(x.dtype))
    weight, bias = layout.dense(weight, bias)
    return _op(x)(x, weight, bias, scale, shift, groups, eps, silu)[0]


def _kernel(x, weight, bias, scale, shift, groups, eps, silu):
    return reference.group_norm_silu(x, weight, bias, scale, shift, groups, eps, silu)


def _fake(x, weight, bias, scale, shift, groups, eps, silu):
    statistics = x.new_empty((len(x), groups), dtype=torch.float32)
    return (
        torch.empty_like(x, memory_format=layout.memory_format(x)),
        statistics,
        torch.empty_like(statistics),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, scale, shift, ctx.groups, _, ctx.silu = inputs
    _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift)


def _backward(ctx, grad: Tensor | None, *_):
    x, mean, rstd, weight, bias, scale, shift = ctx.saved_tensors
    if grad is None:
        return (None,) * 8
    grad = grad.contiguous(memory_format=layout.memory_format(x))
    arguments = (grad, x, mean, rstd, weight, bias, scale, shift, ctx.groups, ctx.silu)
    grads = _backward_op(x)(*arguments)
    if scale is None:
        grads = (*grads[:3], None, None)
    return *grads, None, None, None


def _backward_kernel(grad, x, mean, rstd, weight, bias, scale, shift, groups, silu):
    grads = reference.group_norm_silu_backward(grad, x, mean, rstd, weight, bias, scale, shift, groups, silu)
    return tuple(x.new_empty(0) if g is None else g for g in grads)


def _backward_fake(grad, x, mean, rstd, weight, bias, scale, shift, groups, silu):
    return (
        torch.empty_like(x, memory_format=layout.memory_format(x)),
        torch.empty_like(weight),
        torch.empty_like(bias),
        *(x.new_empty(0) if p is None else torch.empty_like(p) for p in (scale, shift)),
    )


_op = dispatch.define(
    "group_norm_silu",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, int groups, float eps, bool silu) "
    "-> (Tensor y, Tensor mean, Tensor rstd)",
    kernel=_kernel,
    reference=reference.group_norm_silu,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_backward_op = dispatch.define(
    "group_norm_silu_backward",
    # the gradients of x, weight, bias, scale and shift, the last two empty where there are none
    "(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, "
    "int groups, bool silu) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_backward_kernel,
    reference=_backward_kernel,
    fake=_backward_fake,
)
