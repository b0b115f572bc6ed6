"""The terms of the variational bound, L_{T-1} ... L_0 (Ho et al. 2020, eq. 5)."""

import math

import torch
from torch import Tensor

from . import dispatch, layout, reference

__all__ = ["vlb_terms"]


def vlb_terms(
    x_start: Tensor,
    x_t: Tensor,
    pred: Tensor,
    t: Tensor,
    rows: Tensor,
    *,
    variance: Tensor | None = None,
    clip: tuple[float, float] | None = None,
) -> Tensor:
    """A term of the variational bound for each sample, in nats, summed over the sample.

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) where t > 0, with means c0 x_0 + cx x_t and c0 x0_hat + cx x_t,
    x0_hat = clip(u x_t + w pred) (Ho et al. 2020, eq. 5). Where t = 0, -ln p(x_0 | x_1): the mass of p in the bin of
    width 2 / 255 around x_0, the outer bins reaching to infinity, at least 1e-12 (eq. 13).

    Args:
        x_start: x_0 in [-1, 1], on 256 levels for t = 0; (N, ...), floating or uint8 (mapped to [-1, 1]).
        x_t: (N, ...), floating.
        pred: what the network predicted from it, the shape of x_t, floating.
        t: timesteps, (N,) int64, in [0, T).
        rows: (u, w, c0, cx, log q's variance, log p's variance), (T, 6) float32 (float64 for float64 data); with
            `variance` (T, 8), the log of the lower and of the upper variance at the end.
        variance: v in [-1, 1] that the network predicted: p's variance lies (v + 1) / 2 of the way from the log of the
            lower to that of the upper (Nichol & Dhariwal 2021, eq. 15).
        clip: (low, high), bounds of x0_hat.

    Returns:
        (N,), float32 (float64 for float64 data). Gradients flow to pred, x_t, x_start and variance, by the reference.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        RuntimeError: a t on the CPU that is not in [0, T).
    """
    columns = 6 if variance is None else 8
    alike = [y for y in (pred, variance) if y is not None]
    fits = (
        x_t.dtype in layout.FLOATING
        and x_t.dim() >= 1
        and x_start.shape == x_t.shape
        and all(y.shape == x_t.shape and y.is_floating_point() and y.device == x_t.device for y in alike)
        and t.shape == x_t.shape[:1]
        and t.dtype == torch.int64
        and rows.dim() == 2
        and rows.shape[1] == columns
        and x_start.device == x_t.device == t.device == rows.device
    )
    if not fits:
        layout.refuse(
            "vlb_terms",
            f"x_t (N, ...) floating, x_start, pred (and variance) of its shape, t (N,) int64 and rows (T, {columns}) "
            "float32, on one device",
            x_start=x_start,
            x_t=x_t,
            pred=pred,
            t=t,
            rows=rows,
            variance=variance,
        )
    memory_format = layout.memory_format(x_t)
    x_t = layout.as_given(x_t, torch.promote_types(x_t.dtype, torch.float32), memory_format)
    x_start = layout.as_given(x_start, torch.uint8 if x_start.dtype == torch.uint8 else x_t.dtype, memory_format)
    inner = x_t.dtype if torch.float64 in (x_t.dtype, pred.dtype) else pred.dtype
    pred, variance = (layout.as_given(y, inner, memory_format) for y in (pred, variance))
    low, high = (-math.inf, math.inf) if clip is None else clip
    (t,) = layout.dense(t)
    arguments = (x_start, x_t, pred, variance, t, layout.table(rows, x_t), float(low), float(high))
    return _op(x_t)(*arguments)


def _kernel(x_start, x_t, pred, variance, t, rows, low, high):
    layout.check_index("vlb_terms", "t", t, len(rows))
    return reference.vlb_terms(x_start, x_t, pred, variance, t, rows, low, high)


def _fake(x_start, x_t, pred, variance, t, rows, low, high):
    return x_t.new_empty(len(x_t))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.low, ctx.high = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor):
    # Its only use is training by the bound, a few numbers an image beside the network's cost.
    with torch.enable_grad():
        inputs = [
            x.detach().requires_grad_() if needed else x
            for x, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        ]
        leaves = [x for x, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
        grads = iter(torch.autograd.grad(reference.vlb_terms(*inputs, ctx.low, ctx.high), leaves, grad))
    return tuple(next(grads) if needed else None for needed in ctx.needs_input_grad)


_op = dispatch.define(
    "vlb_terms",
    "(Tensor x_start, Tensor x_t, Tensor pred, Tensor? variance, Tensor t, Tensor rows, float low, float high) "
    "-> Tensor",
    kernel=_kernel,
    reference=reference.vlb_terms,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
