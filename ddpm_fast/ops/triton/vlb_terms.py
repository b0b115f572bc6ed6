"""A term of the variational bound for each sample: reads x_start, x_t and pred (and the variance) once."""

__all__ = ["vlb_terms"]

import math

import triton
import triton.language as tl
from torch import Tensor

from .noise import natural_log
from .sums import SPAN, add_parts, parts_of
from .tiles import grid, load_tile, locate, part_of_program, table_row, tiling


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
    out = x_t.new_empty(len(x_t))
    if x_t.numel() == 0:
        out.zero_()
    else:
        extent, channels, tiles, constants = tiling(x_t, None, per_thread=8)
        parts = parts_of(out, tiles)
        _vlb_terms[grid(len(x_t), triton.cdiv(tiles, SPAN))](
            x_start,
            x_t,
            pred,
            variance,
            t,
            rows,
            parts,
            low,
            high,
            len(rows),
            tiles,
            extent,
            channels,
            CLIP=low > -math.inf or high < math.inf,
            SPAN=SPAN,
            **constants,
        )
        add_parts(parts, out)
    return out


@triton.jit(do_not_specialize=["timesteps", "tiles"])
def _vlb_terms(
    x_start,
    x_t,
    pred,
    variance,
    t,
    rows,
    parts,
    low,
    high,
    timesteps,
    tiles,
    extent,
    channels,
    CLIP: tl.constexpr,
    SPAN: tl.constexpr,
    LAYOUT: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    sample, part = tl.program_id(0), part_of_program()
    index = tl.load(t + sample)
    row, valid = table_row(rows, index, timesteps, 6 if variance is None else 8)
    u = tl.load(row, mask=valid, other=float("nan"))
    w = tl.load(row + 1, mask=valid, other=float("nan"))
    c0 = tl.load(row + 2, mask=valid, other=float("nan"))
    cx = tl.load(row + 3, mask=valid, other=float("nan"))
    log_q = tl.load(row + 4, mask=valid, other=float("nan"))
    log_p = tl.load(row + 5, mask=valid, other=float("nan"))
    if variance is not None:
        lower = tl.load(row + 6, mask=valid, other=float("nan"))
        upper = tl.load(row + 7, mask=valid, other=float("nan"))

    total = tl.zeros((BLOCK,), tl.float32)
    for tile in range(part * SPAN, min(part * SPAN + SPAN, tiles)):
        _, start, element, mask = locate(sample, tile, extent, channels, LAYOUT, LANES, BLOCK, VECTOR)
        (x,) = load_tile(x_start, start, extent, element, mask, LANES)
        (state,) = load_tile(x_t, start, extent, element, mask, LANES)
        (predicted,) = load_tile(pred, start, extent, element, mask, LANES)
        if variance is not None:
            (v,) = load_tile(variance, start, extent, element, mask, LANES)
            log_variance = lower + (v + 1) * 0.5 * (upper - lower)
        else:
            log_variance = log_p
        x_hat = u * state + w * predicted
        if CLIP:  # NaN stays NaN, as in torch.clamp
            x_hat = tl.maximum(x_hat, low, propagate_nan=tl.PropagateNan.ALL)
            x_hat = tl.minimum(x_hat, high, propagate_nan=tl.PropagateNan.ALL)
        if index == 0:
            value = -log_bin(x, c0 * x_hat + cx * state, 0.5 * log_variance)
        else:
            error = c0 * (x - x_hat)
            value = 0.5 * (expm1_minus(log_q - log_variance) + error * error * tl.exp(-log_variance))
        total += tl.where(mask, value, 0.0)
    tl.store(parts + sample.to(tl.int64) * tl.cdiv(tiles, SPAN) + part, tl.sum(total))


@triton.jit
def expm1_minus(d):
    """exp(d) - 1 - d, whose terms cancel for small d."""
    p = tl.fma(d, 1 / 40320, 1 / 5040)
    p = tl.fma(p, d, 1 / 720)
    p = tl.fma(p, d, 1 / 120)
    p = tl.fma(p, d, 1 / 24)
    p = tl.fma(p, d, 1 / 6)
    p = tl.fma(p, d, 0.5)
    return tl.where(tl.abs(d) < 0.5, p * d * d, tl.exp(d) - 1 - d)


@triton.jit
def erfc(x):
    """To 2e-6 of its value, where that is above 1e-12: exp(-x^2) times a polynomial (minimax on [0, 6], 1.3e-8)."""
    z = tl.minimum(tl.abs(x), 12.0, propagate_nan=tl.PropagateNan.ALL)  # beyond, it is 0 in float32
    q = (z - 2) / (z + 2)
    p = tl.fma(q, 7.942042429931462e-05, 1.1267215995758306e-05)
    p = tl.fma(p, q, -0.0009328536689281464)
    p = tl.fma(p, q, -0.0008232188993133605)
    p = tl.fma(p, q, 0.006987354252487421)
    p = tl.fma(p, q, 0.0037282193079590797)
    p = tl.fma(p, q, -0.07897762209177017)
    p = tl.fma(p, q, 0.24165846407413483)
    p = tl.fma(p, q, -0.42718589305877686)
    p = tl.fma(p, q, 0.25539568066596985)
    square = z * z
    p *= tl.exp(-square) * (1 - tl.fma(z, z, -square))  # the square's rounding counts, as it stands in an exponent
    return tl.where(x < 0, 2 - p, p)


@triton.jit
def log_bin(x, mean, log_sigma):
    """ln of the normal's mass in the bin of width 2 / 255 around x; see the reference."""
    inverse = tl.exp(-log_sigma) * 0.7071067811865476
    upper = (x - mean + 1 / 255) * inverse
    lower = (x - mean - 1 / 255) * inverse
    flip = upper + lower < 0
    from_, to = tl.where(flip, -upper, lower), tl.where(flip, -lower, upper)
    first, last = x < -0.999, x > 0.999
    left, right = tl.where(flip, last, first), tl.where(flip, first, last)
    mass = 0.5 * (tl.where(left, 2.0, erfc(from_)) - tl.where(right, 0.0, erfc(to)))
    return tl.where(mass == mass, natural_log(tl.maximum(mass, 1e-12)), mass)  # NaN stays NaN
