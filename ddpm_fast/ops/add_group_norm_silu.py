"""Group norm of a sum and a concatenation, which the same launch computes.

h = cat([x + input_bias + residual, skip]), and y = SiLU(GroupNorm(h) (1 + scale) + shift). In a U-Net h is what a
residual block ends with, and y is what the next one begins with: h costs no pass over memory of its own, nor do the
bias of a convolution, a time embedding and a skip connection.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, layout, reference
from .arguments import FLOATING, Rule, Rules, check_eps
from .group_norm_silu import group_norm_silu, in_their_dtypes, modulation_fits
from .recompute_group_norm_silu import Statistics, input_bias_rows
from .transforms import by_reference_backward

__all__ = ["Normalised", "add_and_normalise", "add_group_norm_silu", "fuses"]


class AddGroupNormSiluArguments(NamedTuple):
    """The strict op's arguments. C1 are the channels of x, C2 those of skip, and C = C1 + C2 those of h."""

    x: Tensor  # (N, C1, ...), channels-last
    input_bias: Tensor | None  # (C1,) or (N, C1), in which rows may be apart; x's dtype or float32
    residual: Tensor | None  # like x
    skip: Tensor | None  # (N, C2, ...), channels-last, x's dtype
    weight: Tensor
    bias: Tensor
    scale: Tensor | None
    shift: Tensor | None
    groups: int
    eps: float
    silu: bool
    keep: bool  # whether h is a result; it is where there is a residual or a skip


class AddGroupNormSiluBackwardArguments(NamedTuple):
    """The strict op's arguments."""

    grad: Tensor  # by y
    grad_sum: Tensor | None  # by h, beside what comes through y
    x: Tensor  # h if `kept`
    input_bias: Tensor | None
    mean: Tensor
    rstd: Tensor
    weight: Tensor
    bias: Tensor
    scale: Tensor | None
    shift: Tensor | None
    groups: int
    silu: bool
    kept: bool
    channels: int  # C1


class Normalised(NamedTuple):
    """What a norm returns.

    Attributes:
        y: its output.
        h: the sum that was normalised.
        statistics: for `recompute_group_norm_silu`, of norms without scale and shift; None where no kernel adds and
            normalises at once.
    """

    y: Tensor
    h: Tensor
    statistics: Statistics | None


def _same_but_channels(x: Tensor, y: Tensor | None) -> bool:
    return y is None or (
        y.dim() == x.dim()
        and (y.shape[0], *y.shape[2:]) == (x.shape[0], *x.shape[2:])
        and y.is_floating_point()
        and y.device == x.device
    )


_RULES = Rules(
    "add_group_norm_silu",
    ("x", "weight", "bias", "groups", "scale", "shift", "input_bias", "residual", "skip"),
    Rule("x (N, C1, ...) floating", lambda x, *_: x.dtype in FLOATING and x.dim() >= 2),
    Rule(
        "input_bias (C1,) or (N, C1) floating, on the device of x",
        lambda x, weight, bias, groups, scale, shift, input_bias, *_: (
            input_bias is None
            or (
                input_bias.shape in (x.shape[1:2], x.shape[:2])
                and input_bias.is_floating_point()
                and input_bias.device == x.device
            )
        ),
    ),
    Rule(
        "residual of the shape of x, floating, on its device",
        lambda x, weight, bias, groups, scale, shift, input_bias, residual, skip: (
            _same_but_channels(x, residual) and (residual is None or residual.shape == x.shape)
        ),
    ),
    Rule(
        "skip (N, C2, ...) floating, of the same N and axes as x, on its device",
        lambda x, *rest: _same_but_channels(x, rest[-1]),
    ),
    Rule(
        "C1 + C2 a multiple of groups = {groups}",
        lambda x, weight, bias, groups, *rest: groups > 0 and _channels(x, rest[-1]) % groups == 0,
    ),
    Rule(
        "weight and bias (C1 + C2,) floating, on the device of x",
        lambda x, weight, bias, groups, *rest: (
            weight.shape == bias.shape == (_channels(x, rest[-1]),)
            and weight.is_floating_point()
            and bias.is_floating_point()
            and weight.device == x.device == bias.device
        ),
    ),
    Rule(
        "scale and shift (N, C1 + C2) floating, both or neither, on the device of x",
        lambda x, weight, bias, groups, scale, shift, input_bias, residual, skip: modulation_fits(
            x, _channels(x, skip), scale, shift
        ),
    ),
)


def _channels(x: Tensor, skip: Tensor | None) -> int:
    return x.shape[1] + (0 if skip is None else skip.shape[1])


def add_group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    input_bias: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, h): h = cat([x + input_bias + residual, skip]) and y = SiLU(GroupNorm(h) (1 + scale) + shift).

    Args:
        x: (N, C1, ...), floating.
        weight, bias: (C1 + C2,), floating: float32 parameters may go with half-precision x.
        groups: divides C1 + C2.
        eps: added to the variance.
        silu: False for the norm alone.
        scale, shift: (N, C1 + C2), floating; both or neither.
        input_bias: (C1,) or (N, C1), floating, added to every pixel: a convolution's bias, a time embedding.
        residual: added to x, of its shape.
        skip: (N, C2, ...), whose channels follow those of the sum.

    Returns:
        Both (N, C1 + C2, ...) in the dtype of x, and channels-last where x is. The sum is rounded once, and the
        statistics are those of the rounded sum. Where nothing is added, h is x.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    added = {"input_bias": input_bias, "residual": residual, "skip": skip}
    return add_and_normalise(x, weight, bias, groups, eps, silu=silu, scale=scale, shift=shift, **added)[:2]


def add_and_normalise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    silu: bool,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    input_bias: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    keep: bool = True,
) -> Normalised:
    """`add_group_norm_silu` for layers that recompute y in their backward pass.

    Args:
        keep: False if the sum is not needed where only input_bias is added; it is then not stored, and h is x.
    """
    _RULES.check(x, weight, bias, groups, scale, shift, input_bias, residual, skip)
    check_eps("add_group_norm_silu", eps)
    if not fuses(x) or _op.by_reference(x):
        h = reference.add_inputs(x, input_bias, residual, skip)
        return Normalised(group_norm_silu(h, weight, bias, groups, eps, silu=silu, scale=scale, shift=shift), h, None)
    form = layout.channels_last_format(x.ndim)
    weight, bias, scale, shift = in_their_dtypes(x, weight, bias, scale, shift)
    residual, skip = (layout.as_given(y, x.dtype, form) for y in (residual, skip))
    keep = residual is not None or skip is not None or (keep and input_bias is not None)
    given = (x, input_bias_rows(x, input_bias), residual, skip, weight, bias, scale, shift, groups, eps, silu, keep)
    backend = dispatch.chosen()
    y, h, mean, rstd = _op.kernel_of(backend)(*AddGroupNormSiluArguments(*given))
    return Normalised(y, h if keep else x, Statistics(mean, rstd, backend))


def fuses(x: Tensor) -> bool:
    """Whether there are kernels that add and normalise at once: on a GPU, for channels-last images.

    On a CPU the convolutions add biases and residuals.
    """
    on_a_gpu = x.device.type != "cpu" or dispatch.chosen() == "triton"
    return on_a_gpu and layout.memory_format(x) != torch.contiguous_format


def _reference(x, input_bias, residual, skip, weight, bias, scale, shift, groups, eps, silu, keep):
    form = layout.memory_format(x)
    h = reference.add_inputs(x, input_bias, residual, skip)
    y, mean, rstd = reference.group_norm_silu(h, weight, bias, scale, shift, groups, eps, silu)
    if h is x and keep:  # nothing is added, and an op returns none of its arguments
        h = x.clone(memory_format=form)
    h = h.contiguous(memory_format=form) if keep else x.new_empty(0)
    return y.contiguous(memory_format=form), h, mean, rstd


def _fake(x, input_bias, residual, skip, weight, bias, scale, shift, groups, eps, silu, keep):
    statistics = x.new_empty((x.shape[0], groups), dtype=torch.float32)
    y = layout.empty_with_channels(x, _channels(x, skip))
    return y, torch.empty_like(y) if keep else x.new_empty(0), statistics, torch.empty_like(statistics)


def _setup_context(ctx, inputs, output) -> None:
    x, input_bias, _, skip, weight, bias, scale, shift, ctx.groups, ctx.eps, ctx.silu, ctx.kept = inputs
    _, h, mean, rstd = output
    ctx.backend = dispatch.chosen()
    ctx.channels, ctx.has_skip = x.shape[1], skip is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    if not ctx.kept:
        ctx.mark_non_differentiable(h)
    ctx.save_for_backward(h if ctx.kept else x, input_bias, mean, rstd, weight, bias, scale, shift)


def _backward(ctx, grad: Tensor | None, grad_sum: Tensor | None, *_):
    x, input_bias, mean, rstd, weight, bias, scale, shift = ctx.saved_tensors
    need = ctx.needs_input_grad
    if not ctx.kept:
        grad_sum = None
    if grad is None or by_reference_backward(grad):
        return (*_reference_backward(ctx, grad, grad_sum), None, None, None, None)
    form = layout.memory_format(x)
    grad = grad.contiguous(memory_format=form)
    grad_sum = layout.as_given(grad_sum, x.dtype, form)
    given = (grad, grad_sum, x, input_bias if need[1] or not ctx.kept else None, mean, rstd, weight, bias, scale, shift)
    how = (ctx.groups, ctx.silu, ctx.kept, ctx.channels)
    kernel = _backward_op.kernel_of(ctx.backend)
    grad_x, grad_skip, grad_input_bias, *grads = kernel(*AddGroupNormSiluBackwardArguments(*given, *how))
    if scale is None:
        grads[2:] = None, None
    return (
        grad_x,
        grad_input_bias if need[1] else None,
        grad_x if need[2] else None,
        grad_skip if ctx.has_skip else None,
        *grads,
        None,
        None,
        None,
        None,
    )


def _reference_backward(ctx, grad: Tensor | None, grad_sum: Tensor | None) -> list[Tensor | None]:
    """The gradients of the tensors given, by operations that can be differentiated."""
    x, input_bias, _, _, weight, bias, scale, shift = ctx.saved_tensors
    h = x if ctx.kept else reference.add_inputs(x, input_bias, None, None)
    need = ctx.needs_input_grad
    grads: list[Tensor | None] = [None] * 4
    if grad is not None:

        def y(*tensors: Tensor | None) -> Tensor:
            return reference.group_norm_silu(*tensors, ctx.groups, ctx.eps, ctx.silu)[0]

        tensors, needed = (h, weight, bias, scale, shift), (True, *need[4:8])
        of_h, *grads = dispatch.reference_gradient(y, tensors, needed, grad)
        grad_sum = of_h if grad_sum is None else grad_sum + of_h
    if grad_sum is None:
        return [None] * 8
    grad_x, grad_skip = grad_sum, None
    if ctx.has_skip:  # batched gradients cannot be sliced where all is taken
        grad_x, grad_skip = grad_sum[:, : ctx.channels], grad_sum[:, ctx.channels :]
    grad_input_bias = reference.sum_to_bias(grad_x, input_bias) if need[1] else None
    return [grad_x, grad_input_bias, grad_x if need[2] else None, grad_skip, *grads]


def _backward_reference(
    grad, grad_sum, x, input_bias, mean, rstd, weight, bias, scale, shift, groups, silu, kept, channels
):
    form = layout.memory_format(x)
    h = x if kept else reference.add_inputs(x, input_bias, None, None)
    h = h.to(mean.dtype)  # its gradient is rounded after it was summed up for that of input_bias
    grad_h, *grads = reference.group_norm_silu_backward(
        grad, h, mean, rstd, weight, bias, scale, shift, groups, silu, grad_sum
    )
    grad_x, grad_skip = grad_h[:, :channels], grad_h[:, channels:]
    grad_input_bias = x.new_empty(0) if input_bias is None else reference.sum_to_bias(grad_x, input_bias)
    grad_x, grad_skip = (g.to(x.dtype).contiguous(memory_format=form) for g in (grad_x, grad_skip))
    return grad_x, grad_skip, grad_input_bias, *(x.new_empty(0) if g is None else g for g in grads)


def _backward_fake(grad, grad_sum, x, input_bias, mean, rstd, weight, bias, scale, shift, groups, silu, kept, channels):
    return (
        layout.empty_with_channels(x, channels),
        layout.empty_with_channels(x, x.shape[1] - channels),
        *(x.new_empty(0) if p is None else p.new_empty(p.shape) for p in (input_bias, weight, bias, scale, shift)),
    )


_op = dispatch.define(
    "add_group_norm_silu",
    "(Tensor x, Tensor? input_bias, Tensor? residual, Tensor? skip, Tensor weight, Tensor bias, Tensor? scale, "
    "Tensor? shift, int groups, float eps, bool silu, bool keep) -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)",
    arguments=AddGroupNormSiluArguments,
    kernel=_reference,
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_backward_op = dispatch.define(
    "add_group_norm_silu_backward",
    # the gradients of x (and of the residual), skip, input_bias, weight, bias, scale and shift; empty where absent
    "(Tensor grad, Tensor? grad_sum, Tensor x, Tensor? input_bias, Tensor mean, Tensor rstd, Tensor weight, "
    "Tensor bias, Tensor? scale, Tensor? shift, int groups, bool silu, bool kept, int channels) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    arguments=AddGroupNormSiluBackwardArguments,
    kernel=_backward_reference,
    reference=_backward_reference,
    fake=_backward_fake,
)
