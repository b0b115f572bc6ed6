"""The weighted error of what the network predicted, and its gradient in the same pass."""

import torch
from torch import Tensor

from . import dispatch, layout, reference
from .reference import LOSS_TYPES

__all__ = ["weighted_loss"]

REDUCTIONS = ("none", "mean")


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
        reduction: none, or mean over the samples.

    Returns:
        The loss of each sample, (N,), or their mean, (); float32 (float64 for float64 data). Sums are in float32 and in
        an order that depends on the sample's size alone.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown name, or no target at all.
        RuntimeError: a t on the CPU that is not in [0, T).
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"unknown loss_type {loss_type!r}; there are {', '.join(LOSS_TYPES)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}; there are {', '.join(REDUCTIONS)}")
    fits = (
        pred.dtype in layout.FLOATING
        and pred.dim() >= 1
        and t.shape == pred.shape[:1]
        and t.dtype == torch.int64
        and rows.dim() == 2
        and rows.shape[1] == 3
        and pred.device == t.device == rows.device
        and (x_start is None or (x_start.shape == pred.shape and x_start.device == pred.device))
        and layout.noise_fits(pred, noise, keys, pred.shape[:1])
        and not (noise is not None and keys is not None)
        and not (x_start is None and noise is None and keys is None)
    )
    if not fits:
        layout.refuse(
            "weighted_loss",
            "pred (N, ...) floating, t (N,) int64, rows (T, 3) float32, and at least one of x_start and noise, of the "
            "shape of pred, or keys (N, 2) int64 for noise, on one device",
            pred=pred,
            t=t,
            rows=rows,
            x_start=x_start,
            noise=noise,
            keys=keys,
        )
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

    function = _op(pred)
    if function is _op.reference or layout.needs_grad(x_start, noise):
        loss = reference.weighted_loss(pred, x_start, noise, keys, t, rows, loss_type)
        return loss if reduction == "none" else loss.sum() / max(len(pred), 1)
    scale = 1.0 if reduction == "none" else 1 / max(len(pred), 1)
    index = LOSS_TYPES.index(loss_type)
    loss, _ = function(pred, x_start, noise, keys, t, rows, None, index, scale, layout.needs_grad(pred))
    return loss if reduction == "none" else loss.sum()


def _kernel(pred, x_start, noise, keys, t, rows, upstream, loss_type, scale, with_grad):
    layout.check_index("weighted_loss", "t", t, len(rows))
    arguments = (pred, x_start, noise, keys, t, rows, LOSS_TYPES[loss_type])
    loss = scale * reference.weighted_loss(*arguments)
    if not with_grad:
        return loss, pred.new_empty(0)
    if upstream is not None:  # the factors first, since a small slope times a small scale could underflow
        scale = (scale * upstream).view(-1, *[1] * (pred.dim() - 1))
    grad = scale * reference.weighted_loss_gradient(*arguments)
    return loss, grad.to(pred.dtype).contiguous(memory_format=layout.memory_format(pred))


def _fake(pred, x_start, noise, keys, t, rows, upstream, loss_type, scale, with_grad):
    grad = torch.empty_like(pred, memory_format=layout.memory_format(pred)) if with_grad else pred.new_empty(0)
    return pred.new_empty(len(pred), dtype=torch.float32), grad


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _backward(ctx, grad_loss: Tensor | None, _):
    (grad,) = ctx.saved_tensors
    if grad_loss is None:
        return (None,) * 10
    # loss.backward() hands over ones: finding out is free on the CPU, and spares a pass. (Compilers' tensors, of other
    # types, cannot tell.)
    if type(grad_loss) is Tensor and grad_loss.device.type == "cpu" and bool((grad_loss == 1).all()):
        return grad, *[None] * 9
    return (grad * grad_loss.view(-1, *[1] * (grad.dim() - 1))).to(grad.dtype), *[None] * 9


_op = dispatch.define(
    "weighted_loss",
    # loss, grad: scale * the loss of each sample, and its gradient by pred times upstream (empty without with_grad)
    "(Tensor pred, Tensor? x_start, Tensor? noise, Tensor? keys, Tensor t, Tensor rows, Tensor? upstream, "
    "int loss_type, float scale, bool with_grad) -> (Tensor loss, Tensor grad)",
    kernel=_kernel,
    reference=reference.weighted_loss,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
