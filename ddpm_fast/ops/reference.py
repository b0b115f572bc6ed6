"""The equations of the ops in plain PyTorch: the definition of the right result, for every device and dtype.

`rows` are tables of coefficients, indexed by the timestep or the step of each sample. Arithmetic and sums are in
float32, or in float64 for float64 data. The noise is a tensor: `noise.py` makes it from keys before these functions are
called. Every function can be differentiated, any number of times and in both modes, and mapped by `torch.vmap`.
"""

__all__ = [
    "LOSS_TYPES",
    "add_inputs",
    "by_sample",
    "fold_in",
    "group_norm_silu",
    "group_norm_silu_backward",
    "normal",
    "normalise",
    "q_sample",
    "reverse_step",
    "sum_to_bias",
    "vlb_terms",
    "weighted_loss",
    "weighted_loss_gradient",
]

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LOSS_TYPES = ("l2", "l1", "huber")

_LOW = 0xFFFFFFFF


# Noise


def philox(seed: Tensor, counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of philox4x32 on the counter (64 bits, the upper 64 being 0); four words in int64, each < 2^32."""
    seed, counter = torch.broadcast_tensors(seed, counter)
    k0, k1 = seed & _LOW, seed >> 32 & _LOW
    c0, c1 = counter & _LOW, counter >> 32 & _LOW
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        # int64 products wrap mod 2^64, which leaves all bits of a 32 x 32 product right.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = (p1 >> 32 & _LOW) ^ c1 ^ k0, (p0 >> 32 & _LOW) ^ c3 ^ k1
        c1, c3 = p1 & _LOW, p0 & _LOW
        k0, k1 = k0 + 0x9E3779B9 & _LOW, k1 + 0xBB67AE85 & _LOW
    return c0, c1, c2, c3


def fold_in(keys: Tensor, data: Tensor) -> Tensor:
    w0, w1, w2, w3 = philox(keys[:, 0], keys[:, 1] + data)
    return torch.stack([w0 | w1 << 32, w2 | w3 << 32], dim=-1)


def normal(keys: Tensor, size: int) -> Tensor:
    blocks = torch.arange((size + 3) // 4, device=keys.device)
    words = philox(keys[:, :1], keys[:, 1:] + blocks)
    # The roundings are part of the contract: near u = 1 one more or less moves sqrt(-2 ln u) by 3e-4.
    u0, u1, u2, u3 = (w.float() * 2.0**-32 + 2.0**-33 for w in words)
    out = torch.stack([*_box_muller(u0, u1), *_box_muller(u2, u3)], dim=-1)
    return out.flatten(-2)[:, :size]


def _box_muller(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    r = (u.log() * -2).sqrt()
    phi = v * (2 * math.pi)
    return r * phi.cos(), r * phi.sin()


# What several ops share


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _columns(rows: Tensor, index: Tensor, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The columns of each sample's row, shaped to broadcast against x: (N, 1, ..., 1), or () for one index."""
    # index_select raises for a negative index, which indexing by brackets would count from the end
    picked = rows.index_select(0, index.reshape(-1)).to(dtype)  # (N, columns) or (1, columns)
    if not index.ndim:
        return picked[0].unbind(0)
    return picked.view(*picked.shape, *[1] * (x.ndim - 1)).unbind(1)


def _data(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the arithmetic's dtype, bytes mapped from [0, 255] to [-1, 1]."""
    return x.to(dtype) * (2 / 255) - 1 if x.dtype == torch.uint8 else x.to(dtype)


def by_sample(x: Tensor) -> Tensor:
    """(N, ...) as (N, D)."""
    return x.flatten(1) if x.ndim > 1 else x[:, None]


def _add(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term


# The ops


def q_sample(x_start: Tensor, noise: Tensor, t: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """a x_start + s noise, with (a, s) = rows[t]."""
    acc = _accumulator(x_start)
    a, s = _columns(rows, t, x_start, acc)
    return (a * _data(x_start, acc) + s * noise.to(acc)).to(dtype)


def weighted_loss(
    pred: Tensor,
    x_start: Tensor | None,
    noise: Tensor | None,
    t: Tensor,
    rows: Tensor,
    loss_type: str,
) -> Tensor:
    """The loss of each sample, (N,)."""
    error, weight = _weighted_error(pred, x_start, noise, t, rows)
    if loss_type == "l2":
        loss = error.square()
    elif loss_type == "l1":
        loss = error.abs()
    else:
        loss = F.huber_loss(error, torch.zeros_like(error), reduction="none")
    return by_sample(loss).sum(1) * (weight.flatten() / max(math.prod(pred.shape[1:]), 1))


def weighted_loss_gradient(
    pred: Tensor,
    x_start: Tensor | None,
    noise: Tensor | None,
    t: Tensor,
    rows: Tensor,
    loss_type: str,
) -> Tensor:
    """The gradient by pred of the loss of each sample, in the arithmetic's dtype."""
    error, weight = _weighted_error(pred, x_start, noise, t, rows)
    slope = {"l2": 2 * error, "l1": error.sign(), "huber": error.clamp(-1, 1)}[loss_type]
    return slope * (weight / max(math.prod(pred.shape[1:]), 1))


def _weighted_error(
    pred: Tensor, x_start: Tensor | None, noise: Tensor | None, t: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    acc = _accumulator(pred)
    p, q, weight = _columns(rows, t, pred, acc)
    target = None
    if x_start is not None:
        target = p * _data(x_start, acc)
    if noise is not None:
        target = _add(target, q * noise.to(acc))
    return pred.to(acc) - target, weight


def reverse_step(
    x: Tensor,
    pred: Tensor,
    noise: Tensor | None,
    x_start_prev: Tensor | None,
    variance: Tensor | None,
    bounds: Tensor | None,
    step: Tensor,
    rows: Tensor,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    """(x_next, clipped x0_hat), both in x's dtype."""
    acc = _accumulator(x)
    u, w, A, B, C, sigma, *logs = _columns(rows, step, x, acc)
    state = x.to(acc)
    x_start = u * state + w * pred.to(acc)
    if bounds is not None:
        low, high = bounds.to(acc).view(-1, 2, *[1] * (x.ndim - 1)).unbind(1)
        x_start = torch.minimum(torch.maximum(x_start, low), high)
    elif low > -math.inf or high < math.inf:
        x_start = x_start.clamp(low, high)
    x_next = A * state + B * x_start
    if x_start_prev is not None:
        x_next = x_next + C * x_start_prev.to(acc)
    if noise is not None:
        if variance is not None:
            fraction = (variance.to(acc) + 1) / 2
            learned = (0.5 * (logs[0] + fraction * (logs[1] - logs[0]))).exp()
            sigma = torch.where(sigma > 0, learned, 0)
        x_next = x_next + sigma * noise.to(acc)
    return x_next.to(x.dtype), x_start.to(x.dtype)


def vlb_terms(
    x_start: Tensor,
    x_t: Tensor,
    pred: Tensor,
    variance: Tensor | None,
    t: Tensor,
    rows: Tensor,
    low: float,
    high: float,
) -> Tensor:
    acc = _accumulator(x_t)
    u, w, c0, cx, log_q, log_p, *logs = _columns(rows, t, x_t, acc)
    x_start, x_t = _data(x_start, acc), x_t.to(acc)
    x_hat = u * x_t + w * pred.to(acc)
    if low > -math.inf or high < math.inf:
        x_hat = x_hat.clamp(low, high)
    if variance is not None:
        log_p = logs[0] + (variance.to(acc) + 1) / 2 * (logs[1] - logs[0])
    kl = 0.5 * (log_p - log_q + torch.expm1(log_q - log_p) + (c0 * (x_start - x_hat)).square() * (-log_p).exp())
    decoder = -_log_bin(x_start, c0 * x_hat + cx * x_t, 0.5 * log_p)
    at_zero = (t == 0).view(-1, *[1] * (x_t.ndim - 1))
    return by_sample(torch.where(at_zero, decoder, kl)).sum(1)


def _log_bin(x: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    """ln of the normal's mass in the bin of width 2 / 255 around x, the outer bins reaching to infinity.

    Ho et al. (2020), eq. 13. Masses are at least 1e-12, as in their code.
    """
    inverse = (-log_sigma).exp() * math.sqrt(0.5)
    upper, lower = ((x - mean + half) * inverse for half in (1 / 255, -1 / 255))  # in units of sqrt(2) sigma
    # erfc keeps its relative precision in the right tail alone: take the mass where it is not a difference of ones.
    flip = upper + lower < 0
    lower, upper = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    first, last = (x < -0.999), (x > 0.999)
    open_left, open_right = torch.where(flip, last, first), torch.where(flip, first, last)
    mass = torch.where(open_left, 2, torch.erfc(lower)) - torch.where(open_right, 0, torch.erfc(upper))
    return (0.5 * mass).clamp(min=1e-12).log()


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd): y in x's dtype, the statistics (N, groups) in the arithmetic's; those of nothing are NaN."""
    acc = _accumulator(x)
    grouped = x.to(acc).reshape(x.shape[0], groups, math.prod(x.shape[1:]) // groups)  # (N, G, C / G * H * W)
    var, mean = torch.var_mean(grouped, dim=2, correction=0)
    rstd = (var + eps).rsqrt()
    return normalise(x, mean, rstd, weight, bias, scale, shift, groups, silu), mean, rstd


def normalise(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    silu: bool,
) -> Tensor:
    """The y of group_norm_silu, in x's dtype, from the statistics."""
    y = _affine(_normalised(x, mean, rstd, groups), weight, bias, scale, shift)
    if silu:
        y = F.silu(y)
    return y.to(x.dtype)


def group_norm_silu_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    silu: bool,
    grad_x: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, weight, bias, scale and shift, from x and the statistics alone.

    Args:
        grad_x: what x has of a gradient already; it is added.
    """
    acc = _accumulator(x)
    n, c = x.shape[:2]
    ones = (1, c, *[1] * (x.ndim - 2))
    x_hat = _normalised(x, mean, rstd, groups)
    g = grad.to(acc)
    if silu:
        z = _affine(x_hat, weight, bias, scale, shift)
        sigmoid = z.sigmoid()
        g = g * sigmoid * (1 + z * (1 - sigmoid))
    sum_g, sum_gx = (y.reshape(n, c, -1).sum(2) for y in (g, g * x_hat))  # (N, C) each

    gamma, beta = weight.to(acc), bias.to(acc)
    factor = gamma.expand(n, c) if scale is None else gamma * (1 + scale.to(acc))  # of x_hat in y
    grad_scale = grad_shift = None
    if scale is not None:
        grad_scale = (sum_gx * gamma + sum_g * beta).to(scale.dtype)
        grad_shift = sum_g.to(shift.dtype)
        sum_weight, sum_bias = ((s * (1 + scale.to(acc))).sum(0) for s in (sum_gx, sum_g))
    else:
        sum_weight, sum_bias = sum_gx.sum(0), sum_g.sum(0)

    count = math.prod(x.shape[1:]) // groups
    by_group = (n, groups, c // groups)
    mean_g, mean_gx = ((factor * s).view(by_group).sum(2) / count for s in (sum_g, sum_gx))  # (N, G)
    spread = [m.repeat_interleave(c // groups, 1).view(n, *ones[1:]) for m in (mean_g, mean_gx, rstd)]
    of_x = spread[2] * (g * factor.reshape(n, *ones[1:]) - spread[0] - x_hat * spread[1])
    if grad_x is not None:
        of_x = of_x + grad_x.to(acc)
    return of_x.to(x.dtype), sum_weight.to(weight.dtype), sum_bias.to(bias.dtype), grad_scale, grad_shift


def add_inputs(x: Tensor, input_bias: Tensor | None, residual: Tensor | None, skip: Tensor | None) -> Tensor:
    """cat([x + input_bias + residual, skip]) in the dtype of x; the sum is rounded once."""
    if input_bias is not None or residual is not None:
        total = x.to(_accumulator(x))
        if input_bias is not None:
            total = total + input_bias.to(total.dtype).view(-1, x.shape[1], *[1] * (x.ndim - 2))
        if residual is not None:
            total = total + residual.to(total.dtype)
        x = total.to(x.dtype)
    return x if skip is None else torch.cat([x, skip.to(x.dtype)], dim=1)


def sum_to_bias(grad: Tensor, bias: Tensor) -> Tensor:
    """The gradient of a bias, (C,) or (N, C), that was added to a tensor with this gradient."""
    axes = [d for d in range(grad.ndim) if d != 1 and (d > 0 or bias.ndim == 1)]
    return grad.to(_accumulator(grad)).sum(axes).to(bias.dtype) if axes else grad.to(bias.dtype)


def _normalised(x: Tensor, mean: Tensor, rstd: Tensor, groups: int) -> Tensor:
    n, c = x.shape[:2]
    shape = (n, c, *[1] * (x.ndim - 2))
    mean, rstd = (m.repeat_interleave(c // groups, 1).view(shape) for m in (mean, rstd))
    return (x.to(mean.dtype) - mean) * rstd


def _affine(x_hat: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    acc = x_hat.dtype
    shape = (-1, x_hat.shape[1], *[1] * (x_hat.ndim - 2))
    y = x_hat * weight.to(acc).view(shape) + bias.to(acc).view(shape)
    if scale is not None:
        y = y * (1 + scale.to(acc).view(shape)) + shift.to(acc).view(shape)
    return y
