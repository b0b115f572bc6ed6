"""The terms of the variational bound, L_{T-1} ... L_0 (Ho et al. 2020, eq. 5)."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, layout, reference
from .arguments import FLOATING, Rule, Rules, bounds, check_index, is_data, is_index, is_table, noise_fits

__all__ = ["vlb_terms"]


class VlbTermsArguments(NamedTuple):
    """The strict op's arguments, as csrc/common/arguments.h has them in struct VlbTerms."""

    x_start: Tensor
    x_t: Tensor
    pred: Tensor
    variance: Tensor | None
    t: Tensor
    rows: Tensor
    low: float
    high: float


_RULES = Rules(
    "vlb_terms",
    ("x_start", "x_t", "pred", "variance", "t", "rows"),
    Rule("x_t (N, ...) floating", lambda x_start, x_t, *_: x_t.dtype in FLOATING and x_t.dim() >= 1),
    Rule(
        "x_start floating or uint8, in the shape and on the device of x_t",
        lambda x_start, x_t, *_: is_data(x_start, x_t),
    ),
    Rule(
        "pred floating, in the shape and on the device of x_t",
        lambda x_start, x_t, pred, *_: noise_fits(x_t, pred),
    ),
    Rule(
        "variance floating, in the shape and on the device of x_t",
        lambda x_start, x_t, pred, variance, *_: noise_fits(x_t, variance),
    ),
    Rule(
        "t (N,) int64 on the device of x_t",
        lambda x_start, x_t, pred, variance, t, _: is_index(t, x_t),
    ),
    Rule(
        "rows (T, 6), or (T, 8) with a variance, floating on the device of x_t",
        lambda x_start, x_t, pred, variance, t, rows: is_table(rows, 6 if variance is None else 8, x_t),
    ),
)


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
    _RULES.check(x_start, x_t, pred, variance, t, rows)
    memory_format = layout.memory_format(x_t)
    x_t = layout.as_given(x_t, torch.promote_types(x_t.dtype, torch.float32), memory_format)
    x_start = layout.as_given(x_start, torch.uint8 if x_start.dtype == torch.uint8 else x_t.dtype, memory_format)
    inner = x_t.dtype if torch.float64 in (x_t.dtype, pred.dtype) else pred.dtype
    pred, variance = (layout.as_given(y, inner, memory_format) for y in (pred, variance))
    low, high = bounds("vlb_terms", clip)
    (t,) = layout.dense(t)
    rows = layout.table(rows, x_t)
    return _op(x_t)(*VlbTermsArguments(x_start, x_t, pred, variance, t, rows, low, high))


def _reference(*arguments):
    *_, t, rows, _, _ = arguments
    check_index("vlb_terms", "t", t, rows.shape[0])
    return reference.vlb_terms(*arguments)


def _fake(x_start, x_t, pred, variance, t, rows, low, high):
    return x_t.new_empty(x_t.shape[0])


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.low, ctx.high = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor):
    # It is used for training by the bound alone, where it costs little beside the network.
    function = partial(reference.vlb_terms, low=ctx.low, high=ctx.high)
    return *dispatch.reference_gradient(function, ctx.saved_tensors, ctx.needs_input_grad[:6], grad), None, None


_op = dispatch.define(
    "vlb_terms",
    "(Tensor x_start, Tensor x_t, Tensor pred, Tensor? variance, Tensor t, Tensor rows, float low, float high) "
    "-> Tensor",
    arguments=VlbTermsArguments,
    kernel=_reference,
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
