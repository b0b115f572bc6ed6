"""The gradients of group norm where a sample's groups are too large for one program, and in planar tensors.

From x and the statistics alone, in three launches: sums over the pixels for each channel, then what follows from them
for parameters and groups, then the gradient of x. The gradient of input_bias follows from sums too: of x_hat, and of
the gradient that the sum has beside the one through the norm.
"""

__all__ = ["plane_gradients"]

import torch
import triton
import triton.language as tl
from torch import Tensor

from .group_norm_parts import addresses, gradient_of_z, load_input_bias
from .group_norm_planes import load_channels, load_input, locate, power, tiles_of


def plane_gradients(
    planar: bool,
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
    plane: int,
    groups: int,
    silu: bool,
    kept: bool,
) -> None:
    channels, of_x = x.shape[1], grad_x.shape[1]
    width = channels // groups
    tiles = tiles_of(planar, channels, plane, groups)
    grid = (len(x), tiles.blocks, tiles.parts)
    kinds = 2 if input_bias is None else 3 if grad_sum is None else 4
    sums = x.new_empty((len(x), tiles.parts, kinds, channels), dtype=torch.float32)
    means = x.new_empty((len(x), groups, 2), dtype=torch.float32)
    added = None if kept else input_bias
    given = (grad, grad_sum, x, added, mean, rstd, weight, bias, scale, shift)
    sizes = (bias_stride, channels, plane)
    _sum_gradients[grid](*given, sums, *sizes, tiles.parts, SILU=silu, KINDS=kinds, **tiles.constants)
    results = (grad_weight, grad_bias, grad_scale, grad_shift, grad_input_bias)
    _spread_gradients[(groups,)](
        *(sums, weight, bias, scale, rstd),
        *results,
        *(means, len(x), tiles.parts, channels, of_x, float(plane), 1 / (width * plane)),
        KINDS=kinds,
        SHARED=grad_input_bias is not None and grad_input_bias.dim() == 1,
        WIDTH=width,
        SAMPLES=max(512 // power(width), 1),
    )
    _apply_gradients[grid](*given, means, grad_x, grad_skip, *sizes, of_x, SILU=silu, **tiles.constants)


@triton.jit(do_not_specialize=["parts"])
def _sum_gradients(
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
    sums,
    bias_stride,
    channels,
    plane,
    parts,
    PLANAR: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    KINDS: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """For each channel, over some pixels: the gradient of z, that times x_hat, x_hat, and grad_sum; KINDS of these."""
    sample = tl.program_id(0).to(tl.int64)
    channel, pixel, rest, _, start, offset = locate(sample, channels, plane, PLANAR, PART, ROWS, COLUMNS)
    inside, m, r, factor, addend = load_channels(
        sample, channel, channels, mean, rstd, weight, bias, scale, shift, WIDTH
    )
    of_bias = input_bias
    if input_bias is not None:
        of_bias = load_input_bias(input_bias, bias_stride, sample, channel, inside)
    sum_g, sum_gx = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    if KINDS > 2:
        sum_x, sum_grad = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, rest, COLUMNS if PLANAR else ROWS):
        mask = inside & (pixel < rest - first)
        at = start + (first if PLANAR else first.to(tl.int64) * channels)
        x_hat = (load_input(x, of_bias, at, offset, mask) - m) * r
        g = tl.load(grad + at + offset, mask=mask, other=0.0).to(tl.float32)
        g = tl.where(mask, gradient_of_z(g, x_hat, factor, addend, SILU), 0.0)
        x_hat = tl.where(mask, x_hat, 0.0)
        sum_g += g
        sum_gx += g * x_hat
        if KINDS > 2:
            sum_x += x_hat
        if KINDS > 3:
            sum_grad += tl.load(grad_sum + at + offset, mask=mask, other=0.0).to(tl.float32)
    AXIS: tl.constexpr = 1 if PLANAR else 0
    out = sums + (sample * parts + tl.program_id(2)) * KINDS * channels + channel
    tl.store(out, tl.sum(sum_g, AXIS, keep_dims=True), mask=inside)
    tl.store(out + channels, tl.sum(sum_gx, AXIS, keep_dims=True), mask=inside)
    if KINDS > 2:
        tl.store(out + 2 * channels, tl.sum(sum_x, AXIS, keep_dims=True), mask=inside)
    if KINDS > 3:
        tl.store(out + 3 * channels, tl.sum(sum_grad, AXIS, keep_dims=True), mask=inside)


@triton.jit(do_not_specialize=["samples", "parts"])
def _spread_gradients(
    sums,
    weight,
    bias,
    scale,
    rstd,
    grad_weight,
    grad_bias,
    grad_scale,
    grad_shift,
    grad_input_bias,
    means,
    samples,
    parts,
    channels,
    of_x,
    plane,
    inverse,  # of the size of a group
    KINDS: tl.constexpr,
    SHARED: tl.constexpr,  # by the samples: grad_input_bias is (C1,)
    WIDTH: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """Of one group, all that follows from the sums: the parameters' gradients, and means for that of x."""
    group = tl.program_id(0)
    member = tl.arange(0, triton.next_power_of_2(WIDTH))[None, :]
    channel, inside = group * WIDTH + member, member < WIDTH
    gamma = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    beta = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    total_w, total_b, total_i = tl.zeros_like(gamma), tl.zeros_like(gamma), tl.zeros_like(gamma)
    for first in range(0, samples, SAMPLES):
        sample = (first + tl.arange(0, SAMPLES)[:, None]).to(tl.int64)
        here = sample < samples
        mask = inside & here
        start = sums + sample * parts * KINDS * channels + channel
        sum_g = _over_parts(start, mask, parts, KINDS * channels)
        sum_gx = _over_parts(start + channels, mask, parts, KINDS * channels)
        factor = gamma
        if scale is not None:
            at = sample * channels + channel
            tl.store(grad_scale + at, (sum_gx * gamma + sum_g * beta).to(scale.dtype.element_ty), mask=mask)
            tl.store(grad_shift + at, sum_g.to(scale.dtype.element_ty), mask=mask)
            one_and_scale = 1 + tl.load(scale + at, mask=mask, other=0.0).to(tl.float32)
            factor = gamma * one_and_scale
            total_w += tl.sum(sum_gx * one_and_scale, 0, keep_dims=True)
            total_b += tl.sum(sum_g * one_and_scale, 0, keep_dims=True)
        else:
            total_w += tl.sum(sum_gx, 0, keep_dims=True)
            total_b += tl.sum(sum_g, 0, keep_dims=True)
        mean_g = tl.sum(factor * sum_g, 1, keep_dims=True) * inverse
        mean_gx = tl.sum(factor * sum_gx, 1, keep_dims=True) * inverse
        at_group = sample * (channels // WIDTH) + group
        tl.store(means + 2 * at_group, mean_g, mask=here)
        tl.store(means + 2 * at_group + 1, mean_gx, mask=here)
        if grad_input_bias is not None:  # the sum of the gradients of x over the pixels, as _apply_gradients has them
            sum_x = _over_parts(start + 2 * channels, mask, parts, KINDS * channels)
            r = tl.load(rstd + at_group, mask=here, other=0.0)
            total = r * (sum_g * factor - plane * mean_g - sum_x * mean_gx)
            if KINDS > 3:
                total += _over_parts(start + 3 * channels, mask, parts, KINDS * channels)
            if SHARED:
                total_i += tl.sum(tl.where(mask, total, 0.0), 0, keep_dims=True)
            else:
                to = grad_input_bias + sample * of_x + channel
                tl.store(to, total.to(grad_input_bias.dtype.element_ty), mask=mask & (channel < of_x))
    tl.store(grad_weight + channel, total_w.to(grad_weight.dtype.element_ty), mask=inside)
    tl.store(grad_bias + channel, total_b.to(grad_bias.dtype.element_ty), mask=inside)
    if SHARED:
        to = grad_input_bias + channel
        tl.store(to, total_i.to(grad_input_bias.dtype.element_ty), mask=inside & (channel < of_x))


@triton.jit
def _over_parts(start, mask, parts, stride):
    total = tl.zeros(mask.shape, tl.float32)
    for part in range(parts):
        total += tl.load(start + part * stride, mask=mask, other=0.0)
    return total


@triton.jit
def _apply_gradients(
    grad,
    grad_sum,
    x,
    input_bias,
    mean,
    rstd,
    weight,
    bias,
    scale,
    shift,
    means,
    grad_x,
    grad_skip,
    bias_stride,
    channels,
    plane,
    of_x,
    PLANAR: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    channel, pixel, rest, skipped, start, offset = locate(sample, channels, plane, PLANAR, PART, ROWS, COLUMNS)
    inside, m, r, factor, addend = load_channels(
        sample, channel, channels, mean, rstd, weight, bias, scale, shift, WIDTH
    )
    of_bias = input_bias
    if input_bias is not None:
        of_bias = load_input_bias(input_bias, bias_stride, sample, channel, inside)
    at_means = means + (sample * (channels // WIDTH) + channel // WIDTH) * 2
    mean_g, mean_gx = tl.load(at_means, mask=inside, other=0.0), tl.load(at_means + 1, mask=inside, other=0.0)
    for first in range(0, rest, COLUMNS if PLANAR else ROWS):
        mask = inside & (pixel < rest - first)
        at = start + (first if PLANAR else first.to(tl.int64) * channels)
        x_hat = (load_input(x, of_bias, at, offset, mask) - m) * r
        g = tl.load(grad + at + offset, mask=mask, other=0.0).to(tl.float32)
        g = gradient_of_z(g, x_hat, factor, addend, SILU)
        g = r * (g * factor - mean_g - x_hat * mean_gx)
        if grad_sum is not None:
            g += tl.load(grad_sum + at + offset, mask=mask, other=0.0).to(tl.float32)
        if PLANAR:
            to = grad_x + at + offset
        else:
            at = sample * plane + skipped + first
            to = addresses(grad_x, grad_skip, at, pixel, channel, of_x, channels - of_x, 1)
        tl.store(to, g.to(grad_x.dtype.element_ty), mask=mask)
