"""Group norm, a scale and a shift, and SiLU: one read of x for the statistics, one for the result."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, layout, reference
from .arguments import FLOATING, Rule, Rules, check_eps
from .transforms import by_reference_backward

__all__ = ["group_norm_silu", "in_their_dtypes", "modulation_fits"]


class GroupNormSiluArguments(NamedTuple):
    """The strict op's arguments, as csrc/common/arguments.h has them in struct GroupNormSilu."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    scale: Tensor | None
    shift: Tensor | None
    groups: int
    eps: float
    silu: bool


class GroupNormSiluBackwardArguments(NamedTuple):
    """The strict op's arguments, as csrc/common/arguments.h has them in struct GroupNormSiluBackward."""

    grad: Tensor
    x: Tensor
    mean: Tensor
    rstd: Tensor
    weight: Tensor
    bias: Tensor
    scale: Tensor | None
    shift: Tensor | None
    groups: int
    silu: bool


def modulation_fits(x: Tensor, channels: int, scale: Tensor | None, shift: Tensor | None) -> bool:
    """Whether scale and shift are both absent, or (N, channels), floating and on the device of x."""
    if scale is None or shift is None:
        return scale is shift
    return (
        scale.shape == (x.shape[0], channels) == shift.shape
        and scale.is_floating_point()
        and shift.is_floating_point()
        and scale.device == x.device == shift.device
    )


def in_their_dtypes(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor | None, ...]:
    """(weight, bias, scale, shift), dense: the first two in one dtype, x's or float32; the last two in x's."""
    if not weight.dtype == bias.dtype == x.dtype:
        inner = torch.promote_types(x.dtype, torch.float32)
        weight, bias = weight.to(inner), bias.to(inner)
    if scale is not None and shift is not None:
        scale, shift = scale.to(x.dtype), shift.to(x.dtype)
    return layout.dense(weight, bias, scale, shift)


# A network calls this op more often than all others: each rule is a plain comparison.
_RULES = Rules(
    "group_norm_silu",
    ("x", "weight", "bias", "groups", "scale", "shift"),
    Rule(
        "x (N, C, ...) floating with C a multiple of groups = {groups}",
        lambda x, weight, bias, groups, *_: (
            x.dtype in FLOATING and groups > 0 and x.dim() >= 2 and x.shape[1] % groups == 0
        ),
    ),
    Rule(
        "weight and bias (C,) floating, on the device of x",
        lambda x, weight, bias, *_: (
            weight.shape == x.shape[1:2] == bias.shape
            and weight.is_floating_point()
            and bias.is_floating_point()
            and weight.device == x.device == bias.device
        ),
    ),
    Rule(
        "scale and shift (N, C) floating, both or neither, on the device of x",
        lambda x, weight, bias, groups, scale, shift: modulation_fits(x, x.shape[1], scale, shift),
    ),
)


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
    _RULES.check(x, weight, bias, groups, scale, shift)
    check_eps("group_norm_silu", eps)
    x = x.contiguous(memory_format=layout.memory_format(x))
    weight, bias, scale, shift = in_their_dtypes(x, weight, bias, scale, shift)
    return _op(x)(*GroupNormSiluArguments(x, weight, bias, scale, shift, groups, eps, silu))[0]


def _reference(x, weight, bias, scale, shift, groups, eps, silu):
    y, mean, rstd = reference.group_norm_silu(x, weight, bias, scale, shift, groups, eps, silu)
    return y.contiguous(memory_format=layout.memory_format(x)), mean, rstd


def _fake(x, weight, bias, scale, shift, groups, eps, silu):
    statistics = x.new_empty((x.shape[0], groups), dtype=torch.float32)
    return (
        torch.empty_like(x, memory_format=layout.memory_format(x)),
        statistics,
        torch.empty_like(statistics),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, scale, shift, ctx.groups, ctx.eps, ctx.silu = inputs
    _, mean, rstd = output
    ctx.backend = dispatch.chosen()
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift)


def _backward(ctx, grad: Tensor | None, *_):
    x, mean, rstd, weight, bias, scale, shift = ctx.saved_tensors
    if grad is None:
        return (None,) * 8
    if by_reference_backward(grad):

        def y(*tensors: Tensor | None) -> Tensor:
            return reference.group_norm_silu(*tensors, ctx.groups, ctx.eps, ctx.silu)[0]

        tensors = (x, weight, bias, scale, shift)
        return *dispatch.reference_gradient(y, tensors, ctx.needs_input_grad[:5], grad), None, None, None
    grad = grad.contiguous(memory_format=layout.memory_format(x))
    arguments = (grad, x, mean, rstd, weight, bias, scale, shift, ctx.groups, ctx.silu)
    grads = _backward_op.kernel_of(ctx.backend)(*GroupNormSiluBackwardArguments(*arguments))
    if scale is None:
        grads = (*grads[:3], None, None)
    return *grads, None, None, None


def _backward_reference(grad, x, mean, rstd, weight, bias, scale, shift, groups, silu):
    grads = reference.group_norm_silu_backward(grad, x, mean, rstd, weight, bias, scale, shift, groups, silu)
    grad_x = grads[0].contiguous(memory_format=layout.memory_format(x))
    return grad_x, *(x.new_empty(0) if g is None else g for g in grads[1:])


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
    arguments=GroupNormSiluArguments,
    kernel=_reference,
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_backward_op = dispatch.define(
    "group_norm_silu_backward",
    # the gradients of x, weight, bias, scale and shift, the last two empty where there are none
    "(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, "
    "int groups, bool silu) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    arguments=GroupNormSiluBackwardArguments,
    kernel=_backward_reference,
    reference=_backward_reference,
    fake=_backward_fake,
)
