"""Group norm in one launch: a program has some whole groups of a sample with all their pixels, a slab, in registers.

Memory is read once and written once. The sums over a group are of values that are held already: first for the mean,
then about it, with what the differences add up to as a correction. That is safe where the mean is far larger than the
spread. The backward pass holds the normalised input and the gradient; a small second launch adds up the samples.
"""

__all__ = ["Slab", "normalise_slabs", "slab_gradients", "slab_of"]

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .group_norm_parts import (
    activate,
    addresses,
    gradient_of_z,
    load_affine,
    load_input_bias,
    load_sum,
    not_negative,
    rsqrt,
    spread_to_columns,
    sum_of_groups,
    sum_rows,
)

_ELEMENTS = 16384  # of a tile, at most: 32 of a thread. With 64, the registers do not suffice.
_FEW_BYTES = 32768  # of a tile of each tensor; the backward pass holds two and has no registers for more
_ELEMENTS_OF_THREAD = 16  # where no more are needed
_MOST_WARPS = 16
_LEAST_BYTES, _IDEAL_BYTES = 24, 64  # of a pixel; memory is read in sectors of 32, of which neighbours share some


class Slab(NamedTuple):
    count: int  # of a sample
    constants: dict[str, int]  # for the kernels, so that masks that are always true vanish


def slab_of(of_x: int, groups: int, backward: bool, h: Tensor, *others: Tensor | None) -> Slab | None:
    """How samples are cut, or None where whole groups are too large or memory is not aligned.

    Args:
        of_x: channels of x; those of skip follow.
        h: a channels-last tensor of the shape of the sum, with elements.
        others: that are read or written in vectors.
    """
    if any(t is not None and t.data_ptr() % 16 for t in (h, *others)):
        return None
    return _slab_of(h.shape[1], of_x, h[0, 0].numel(), groups, h.itemsize, backward)


@lru_cache(maxsize=1024)
def _slab_of(channels: int, of_x: int, plane: int, groups: int, itemsize: int, backward: bool) -> Slab | None:
    width = channels // groups
    rows = triton.next_power_of_2(plane)
    found = []
    for together in (n for n in range(1, groups + 1) if groups % n == 0):
        block = together * width
        vector = math.gcd(block, of_x, channels, 16 // itemsize)
        elements = rows * triton.next_power_of_2(block)
        large = elements * itemsize > _FEW_BYTES
        fits = elements <= _ELEMENTS and not (large and backward) and channels * plane < 2**31
        if fits and vector * itemsize >= 8 and (block * itemsize >= _LEAST_BYTES or together == groups):
            found.append((large, -vector, abs(block * itemsize - _IDEAL_BYTES), together, vector))
    if not found:
        return None
    *_, together, vector = min(found)
    columns = triton.next_power_of_2(together * width)
    warps = rows * columns // (32 * _ELEMENTS_OF_THREAD)
    constants = {
        "VECTOR": vector,
        "PLANE": plane,
        "CHANNELS": channels,
        "OF_X": of_x,
        "WIDTH": width,
        "BLOCK": together * width,
        "TOGETHER": triton.next_power_of_2(together),
        "ROWS": rows,
        "COLUMNS": columns,
        "num_warps": min(max(warps, 1), _MOST_WARPS),
        "enable_fp_fusion": False,
    }
    return Slab(groups // together, constants)


@triton.jit
def _locate(CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of a program: its sample, its slab, pixels and channels, and which channels it has."""
    # The slabs of a sample run side by side: together they read whole cache lines.
    SLABS: tl.constexpr = CHANNELS // BLOCK
    program = tl.program_id(0)
    slab = program % SLABS
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    return (program // SLABS).to(tl.int64), slab, row, slab * BLOCK + column, column < BLOCK


def normalise_slabs(
    slab: Slab,
    x: Tensor,
    input_bias: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    y: Tensor,
    h: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    bias_stride: int,
    eps: float,
    silu: bool,
) -> None:
    tensors = (x, input_bias, residual, skip, weight, bias, scale, shift, y, h, mean, rstd)
    _norm_of_slab[(len(x) * slab.count,)](*tensors, bias_stride, eps, SILU=silu, **slab.constants)


@triton.jit
def _norm_of_slab(
    x,
    input_bias,
    residual,
    skip,
    weight,
    bias,
    scale,
    shift,
    y,
    h,
    mean,
    rstd,
    bias_stride,
    eps,
    SILU: tl.constexpr,
    VECTOR: tl.constexpr,  # channels, next to one another, that are loaded together
    PLANE: tl.constexpr,
    CHANNELS: tl.constexpr,
    OF_X: tl.constexpr,  # channels of x
    WIDTH: tl.constexpr,  # channels of a group
    BLOCK: tl.constexpr,  # channels of a program
    TOGETHER: tl.constexpr,  # groups of a program, rounded up to a power of 2
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    sample, slab, row, channel, inside = _locate(CHANNELS, BLOCK, ROWS, COLUMNS)
    mask = inside & (row < PLANE)
    of_bias = input_bias
    if input_bias is not None:
        of_bias = load_input_bias(input_bias, bias_stride, sample, channel, inside & (channel < OF_X))
    held = load_sum(x, of_bias, residual, skip, sample * PLANE, row, channel, mask, OF_X, CHANNELS - OF_X, VECTOR)
    offset = row * CHANNELS + channel
    start = sample * PLANE * CHANNELS
    if h is not None:
        tl.store(h + start + offset, held, mask=mask)

    values = held.to(tl.float32)
    COUNT: tl.constexpr = PLANE * WIDTH
    total = tl.sum(tl.where(mask, values, 0.0), 0)
    center = sum_of_groups(total, TOGETHER, WIDTH) / COUNT
    apart = tl.where(mask, values - spread_to_columns(center, COLUMNS, TOGETHER, WIDTH)[None, :], 0.0)
    total, squares = sum_rows(apart, apart * apart)
    total, squares = sum_of_groups(total, TOGETHER, WIDTH), sum_of_groups(squares, TOGETHER, WIDTH)
    # The first mean has the rounding errors of a sum of values: what the differences from it add up to corrects it.
    correction = total / COUNT
    center += correction
    inverse = rsqrt(not_negative(squares - correction * total) / COUNT + eps)
    group = tl.arange(0, TOGETHER)
    at = sample * (CHANNELS // WIDTH) + slab * (BLOCK // WIDTH) + group
    tl.store(mean + at, center, mask=group < BLOCK // WIDTH)
    tl.store(rstd + at, inverse, mask=group < BLOCK // WIDTH)

    factor, addend, _ = load_affine(sample, channel, inside, CHANNELS, weight, bias, scale, shift)
    factor *= spread_to_columns(inverse, COLUMNS, TOGETHER, WIDTH)[None, :]
    apart = values - spread_to_columns(center, COLUMNS, TOGETHER, WIDTH)[None, :]
    z = activate(tl.fma(apart, factor, addend), SILU)
    tl.store(y + start + offset, z.to(y.dtype.element_ty), mask=mask)


def slab_gradients(
    slab: Slab,
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
    grad_x: Tensor,
    grad_skip: Tensor | None,
    grad_input_bias: Tensor | None,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_scale: Tensor | None,
    grad_shift: Tensor | None,
    bias_stride: int,
    silu: bool,
    kept: bool,
) -> None:
    channels = x.shape[1]
    shared = grad_input_bias is not None and grad_input_bias.dim() == 1
    kinds = 3 if shared else 2
    sums = x.new_empty((len(x), kinds, channels), dtype=torch.float32)
    given = (grad, grad_sum, x, None if kept else input_bias, mean, rstd, weight, bias, scale, shift)
    results = (grad_x, grad_skip, None if shared else grad_input_bias, grad_scale, grad_shift, sums)
    _gradients_of_slab[(len(x) * slab.count,)](*given, *results, bias_stride, SILU=silu, KINDS=kinds, **slab.constants)
    of_samples = (grad_weight, grad_bias, grad_input_bias if shared else None)
    _add_samples[(triton.cdiv(channels, 32), kinds)](
        sums, *of_samples, len(x), channels, grad_x.shape[1], KINDS=kinds, ROWS=32, COLUMNS=32
    )


@triton.jit
def _gradients_of_slab(
    grad,
    grad_sum,
    x,
    input_bias,  # where x is not the sum already
    mean,
    rstd,
    weight,
    bias,
    scale,
    shift,
    grad_x,
    grad_skip,
    grad_input_bias,  # (N, C1), or None
    grad_scale,
    grad_shift,
    sums,  # (N, KINDS, C): the gradients of weight, bias and perhaps input_bias, of each sample
    bias_stride,
    SILU: tl.constexpr,
    KINDS: tl.constexpr,
    VECTOR: tl.constexpr,
    PLANE: tl.constexpr,
    CHANNELS: tl.constexpr,
    OF_X: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    sample, _, row, channel, inside = _locate(CHANNELS, BLOCK, ROWS, COLUMNS)
    mask = inside & (row < PLANE)
    start, offset = sample * PLANE * CHANNELS, row * CHANNELS + channel
    g = tl.load(grad + start + offset, mask=mask, other=0.0).to(tl.float32)
    of_bias = input_bias
    if input_bias is not None:
        of_bias = load_input_bias(input_bias, bias_stride, sample, channel, inside)
    h = load_sum(x, of_bias, None, None, sample * PLANE, row, channel, mask, CHANNELS, 0, VECTOR).to(tl.float32)
    group = sample * (CHANNELS // WIDTH) + channel // WIDTH
    m, r = tl.load(mean + group, mask=inside, other=0.0), tl.load(rstd + group, mask=inside, other=0.0)
    factor, addend, one_and_scale = load_affine(sample, channel, inside, CHANNELS, weight, bias, scale, shift)

    x_hat = tl.where(mask, (h - m) * r, 0.0)
    g = tl.where(mask, gradient_of_z(g, x_hat, factor, addend, SILU), 0.0)
    sum_g, sum_gx = sum_rows(g, g * x_hat)
    sum_g, sum_gx = sum_g[None, :], sum_gx[None, :]
    at = sample * CHANNELS + channel
    if scale is not None:
        gamma = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        beta = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_scale + at, (sum_gx * gamma + sum_g * beta).to(scale.dtype.element_ty), mask=inside)
        tl.store(grad_shift + at, sum_g.to(scale.dtype.element_ty), mask=inside)
    out = sums + sample * (KINDS * CHANNELS) + channel
    tl.store(out, sum_gx * one_and_scale, mask=inside)
    tl.store(out + CHANNELS, sum_g * one_and_scale, mask=inside)

    COUNT: tl.constexpr = PLANE * WIDTH
    mean_g = _mean_of_groups(sum_g * factor, COUNT, COLUMNS, TOGETHER, WIDTH)
    mean_gx = _mean_of_groups(sum_gx * factor, COUNT, COLUMNS, TOGETHER, WIDTH)
    g = r * (g * factor - mean_g - x_hat * mean_gx)
    if grad_sum is not None:
        g += tl.load(grad_sum + start + offset, mask=mask, other=0.0).to(tl.float32)
    to = addresses(grad_x, grad_skip, sample * PLANE, row, channel, OF_X, CHANNELS - OF_X, VECTOR)
    tl.store(to, g.to(grad_x.dtype.element_ty), mask=mask)
    if grad_input_bias is not None or KINDS == 3:  # before the gradient is rounded
        total = tl.sum(tl.where(mask, g, 0.0), 0)[None, :]
        if grad_input_bias is not None:
            to = grad_input_bias + sample * OF_X + channel
            tl.store(to, total.to(grad_input_bias.dtype.element_ty), mask=inside & (channel < OF_X))
        else:
            tl.store(out + 2 * CHANNELS, total, mask=inside)


@triton.jit
def _mean_of_groups(x, COUNT: tl.constexpr, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr, WIDTH: tl.constexpr):
    """Of (1, COLUMNS) over the groups of a slab, for each column."""
    means = sum_of_groups(x.reshape(COLUMNS), TOGETHER, WIDTH) / COUNT
    return spread_to_columns(means, COLUMNS, TOGETHER, WIDTH)[None, :]


@triton.jit(do_not_specialize=["samples"])
def _add_samples(
    sums,
    grad_weight,
    grad_bias,
    grad_input_bias,
    samples,
    channels,
    of_x,
    KINDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    kind = tl.program_id(1)
    row, channel = tl.arange(0, ROWS)[:, None], tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = channel < channels
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, samples, ROWS):
        at = sums + ((first + row).to(tl.int64) * KINDS + kind) * channels + channel[None, :]
        total += tl.load(at, mask=inside[None, :] & (first + row < samples), other=0.0)
    total = tl.sum(total, 0)
    if kind == 0:
        tl.store(grad_weight + channel, total.to(grad_weight.dtype.element_ty), mask=inside)
    elif kind == 1:
        tl.store(grad_bias + channel, total.to(grad_bias.dtype.element_ty), mask=inside)
    elif KINDS == 3:
        tl.store(grad_input_bias + channel, total.to(grad_input_bias.dtype.element_ty), mask=channel < of_x)
