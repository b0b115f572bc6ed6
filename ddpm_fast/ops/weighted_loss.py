"""The weighted error of what the network predicted, and its gradient in the same pass."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, layout, reference
from .arguments import FLOATING, Rule, Rules, check_index, is_data, is_index, is_table, keys_fit, needs_grad, noise_fits
from .noise import given_noise
from .reference import LOSS_TYPES
from .transforms import by_reference_backward

__all__ = ["weighted_loss"]

REDUCTIONS = ("none", "mean", "share")


class WeightedLossArguments(NamedTuple):
    """The strict op's arguments, as csrc/common/arguments.h has them in struct WeightedLoss."""

    pred: Tensor
    x_start: Tensor | None
    noise: Tensor | None
    keys: Tensor | None
    t: Tensor
    rows: Tensor
    upstream: Tensor | None  # (N,) float32, multiplies the gradient of each sample before it is rounded; None is 1
    loss_type: int  # an index of LOSS_TYPES
    scale: float
    with_grad: bool


_RULES = Rules(
    "weighted_loss",
    ("pred", "x_start", "noise", "keys", "t", "rows"),
    Rule("pred (N, ...) floating", lambda pred, *_: pred.dtype in FLOATING and pred.dim() >= 1),
    Rule("t (N,) int64 on the device of pred", lambda pred, x_start, noise, keys, t, _: is_index(t, pred)),
    Rule(
        "rows (T, 3) floating on the device of pred",
        lambda pred, x_start, noise, keys, t, rows: is_table(rows, 3, pred),
    ),
    Rule(
        "at least one of x_start, noise and keys, and not both noise and keys",
        lambda pred, x_start, noise, keys, *_: (
            (noise is None or keys is None) and not (x_start is None and noise is None and keys is None)
        ),
    ),
    Rule(
        "x_start floating or uint8, in the shape and on the device of pred",
        lambda pred, x_start, *_: is_data(x_start, pred),
    ),
    Rule(
        "noise floating, in the shape and on the device of pred",
        lambda pred, x_start, noise, *_: noise_fits(pred, noise),
    ),
    Rule(
        "keys (N, 2) int64 on the device of pred",
        lambda pred, x_start, noise, keys, *_: keys_fit(pred, keys, pred.shape[0]),
    ),
)


def weighted_loss(
    pred: Tensor,
    t: Tensor,
    rows: Tensor,
    *,
    x_start: Tensor | None = None,
    noise: Tensor | None = None,
    keys: Tensor | None = None,
    loss_type: str = "l2",
    reduction: str = "none",
) -> Tensor:
    """weight * mean over a sample of |pred - (p x_0 + q eps)|^2. Ho et al. (2020), eq. 14 with weights.

    Args:
        pred: what the network predicted, (N, ...), floating. The only input with a gradient.
        t: timesteps, (N,) int64, in [0, T).
        rows: (p, q, weight) of each timestep, (T, 3) float32 (float64 for float64 data).
        x_start: x_0, the shape of pred, floating or uint8 (mapped to [-1, 1]); None where p is 0, to spare reading it.
        noise: eps, the shape of pred, floating; or
        keys: a key for each sample, (N, 2) int64, from which eps is made again; neither where q is 0.
        loss_type: `l2`: e^2; `l1`: |e|; `huber`: e^2 / 2 up to |e| = 1, |e| - 1/2 above.
        reduction: none; mean over the samples; or share, what each sample adds to the mean: the sum of the shares and
            its gradient are those of the mean, bit for bit.

    Returns:
        The loss of each sample or its share, (N,), or their mean, (); float32 (float64 for float64 data). Sums are in
        float32 and in an order that depends on the sample's size alone.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown name, or no target at all.
        RuntimeError: a t on the CPU that is not in [0, T).
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"unknown loss_type {loss_type!r}; there are {', '.join(LOSS_TYPES)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}; there are {', '.join(REDUCTIONS)}")
    _RULES.check(pred, x_start, noise, keys, t, rows)
    memory_format = layout.memory_format(pred)
    # x_start and noise share a dtype, that of pred or float32; bytes go with float32.
    given = {x.dtype for x in (x_start, noise) if x is not None}
    data = pred.dtype if given == {pred.dtype} else torch.promote_types(pred.dtype, torch.float32)
    bytes_ = x_start is not None and x_start.dtype == torch.uint8
    pred = pred.contiguous(memory_format=memory_format)
    x_start = layout.as_given(x_start, torch.uint8 if bytes_ else data, memory_format)
    noise = layout.as_given(noise, data, memory_format)
    keys, t = layout.dense(keys, t)
    rows = layout.table(rows, pred)

    function = _op(pred, differentiated=needs_grad(x_start, noise))
    scale = 1.0 if reduction == "none" else 1 / max(pred.shape[0], 1)
    # A gradient in float16 waits for the backward pass: rounded before it is multiplied by a GradScaler's factor, most
    # of it would be zero.
    with_grad = pred.dtype != torch.float16 and needs_grad(pred)
    index = LOSS_TYPES.index(loss_type)
    loss, _ = function(*WeightedLossArguments(pred, x_start, noise, keys, t, rows, None, index, scale, with_grad))
    return loss.sum() if reduction == "mean" else loss


def _reference(pred, x_start, noise, keys, t, rows, upstream, loss_type, scale, with_grad):
    """The loss, and no gradient: that is for autograd to find."""
    check_index("weighted_loss", "t", t, rows.shape[0])
    noise = given_noise(noise, keys, pred.shape)
    return scale * reference.weighted_loss(pred, x_start, noise, t, rows, LOSS_TYPES[loss_type]), pred.new_empty(0)


def _kernel(*arguments):
    loss, no_grad = _reference(*arguments)
    pred, x_start, noise, keys, t, rows, upstream, loss_type, scale, with_grad = arguments
    if not with_grad:
        return loss, no_grad
    noise = given_noise(noise, keys, pred.shape)
    if upstream is not None:  # the factors first, since a small slope times a small scale could underflow
        scale = (scale * upstream).view(-1, *[1] * (pred.dim() - 1))
    grad = scale * reference.weighted_loss_gradient(pred, x_start, noise, t, rows, LOSS_TYPES[loss_type])
    return loss, grad.to(pred.dtype).contiguous(memory_format=layout.memory_format(pred))


def _fake(pred, x_start, noise, keys, t, rows, upstream, loss_type, scale, with_grad):
    grad = torch.empty_like(pred, memory_format=layout.memory_format(pred)) if with_grad else pred.new_empty(0)
    return pred.new_empty(pred.shape[0], dtype=torch.float32), grad


def _setup_context(ctx, inputs, output) -> None:
    *tensors, _, ctx.loss_type, ctx.scale, ctx.with_grad = inputs
    ctx.backend = dispatch.chosen()
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, grad_loss: Tensor | None, _):
    if grad_loss is None:
        return (None,) * 10
    return _gradient(ctx, grad_loss), *[None] * 9


def _gradient(ctx, grad_loss: Tensor) -> Tensor:
    """The gradient by pred for a gradient of the losses, (N,)."""
    *tensors, grad = ctx.saved_tensors
    if by_reference_backward(grad_loss):
        pred, *others = tensors

        def loss(pred: Tensor) -> Tensor:
            return _reference(pred, *others, None, ctx.loss_type, ctx.scale, False)[0]

        return dispatch.reference_gradient(loss, [pred], [True], grad_loss)[0]
    if not ctx.with_grad:
        upstream = grad_loss.contiguous()
        arguments = WeightedLossArguments(*tensors, upstream, ctx.loss_type, ctx.scale, True)
        return _op.kernel_of(ctx.backend)(*arguments)[1]
    # loss.backward() hands over ones: finding out is free on the CPU, and spares a pass. (Compilers' tensors, of other
    # types, cannot tell.) In bfloat16 another factor rounds a second time; its exponents are float32's, so that the
    # result is still within two roundings, 2^-7 of itself.
    if type(grad_loss) is Tensor and grad_loss.device.type == "cpu" and bool((grad_loss == 1).all()):
        return grad
    return (grad * grad_loss.view(-1, *[1] * (grad.dim() - 1))).to(grad.dtype)


_op = dispatch.define(
    "weighted_loss",
    # loss, grad: scale * the loss of each sample, and its gradient by pred times upstream (empty without with_grad)
    "(Tensor pred, Tensor? x_start, Tensor? noise, Tensor? keys, Tensor t, Tensor rows, Tensor? upstream, "
    "int loss_type, float scale, bool with_grad) -> (Tensor loss, Tensor grad)",
    arguments=WeightedLossArguments,
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
