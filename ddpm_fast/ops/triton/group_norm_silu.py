"""Group norm, a scale and a shift, and SiLU.

Forward: a program adds x and x^2 of some groups over a part of the pixels, with x less a value near its mean, so that
nothing cancels where the mean is far larger than the spread; where a sample has several parts, a second kernel merges
them; the last one reads x again and writes y. Backward, from x and the statistics alone: sums over the pixels for each
channel, then what follows from them for parameters and groups, then the gradient of x.

A tile is ROWS x COLUMNS, and memory runs along the columns: pixels x channels in channels-last tensors, channels x
pixels in planar ones (for the statistics, all elements of a group, which are one run).
"""

__all__ = ["group_norm_silu", "group_norm_silu_backward"]

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import memory_format

_TILE = 2048  # elements
_PART = 32768  # elements of a program that sums
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


class _Tiles(NamedTuple):
    rows: int
    columns: int
    part: int  # rows of a program that sums, a multiple of `rows`
    parts: int
    blocks: int  # of columns (planar: of channels)


def _power(n: int) -> int:
    return triton.next_power_of_2(max(n, 1))


@lru_cache(maxsize=1024)
def _statistics_tiles(planar: bool, channels: int, plane: int, groups: int) -> tuple[_Tiles, int]:
    """The tiles, and how many groups one is across."""
    width = channels // groups
    if planar:
        size = width * plane
        columns, together = min(_power(size), 1024), 1
        length = triton.cdiv(size, columns)
    else:  # whole groups, 32 channels or more side by side; more where there are few pixels
        together = max(32 // width, _TILE // (_power(plane) * width), 1)
        together = min(1 << together.bit_length() - 1, _power(groups))
        columns, length = _power(together * width), plane
    rows = max(min(_power(length), _TILE // columns), 1)
    part = max(rows, _PART // columns)
    return _Tiles(rows, columns, part, triton.cdiv(length, part), triton.cdiv(groups, together)), together


@lru_cache(maxsize=1024)
def _tiles(planar: bool, channels: int, plane: int) -> _Tiles:
    if planar:
        columns = min(_power(plane), 1024)
        rows = min(_power(channels), _TILE // columns)
        part = max(columns, _PART // rows)
        return _Tiles(rows, columns, part, triton.cdiv(plane, part), triton.cdiv(channels, rows))
    columns = min(_power(channels), max(64, _TILE // _power(plane)))
    rows = min(_power(plane), _TILE // columns)
    part = max(rows, _PART // columns)
    return _Tiles(rows, columns, part, triton.cdiv(plane, part), triton.cdiv(channels, columns))


def _geometry(x: Tensor) -> tuple[bool, int, int]:
    """(planar, channels, plane) of a tensor with elements."""
    channels = x.shape[1]
    return channels == 1 or x.stride(1) != 1, channels, x.numel() // (len(x) * channels)


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
    y = torch.empty_like(x, memory_format=memory_format(x))
    mean = x.new_empty((len(x), groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return y, mean.fill_(float("nan")), rstd.fill_(float("nan"))
    planar, channels, plane = geometry = _geometry(x)
    width = channels // groups
    tiles, together = _statistics_tiles(*geometry, groups)
    # Parts leave their mean and the sum of squares around it, the last step takes them for mean and rstd.
    several = tiles.parts > 1
    sums = x.new_empty((2, mean.numel(), tiles.parts), dtype=torch.float32) if several else None
    _statistics[(len(x), tiles.blocks, tiles.parts)](
        x,
        sums[0] if several else mean,
        sums[1] if several else rstd,
        plane,
        eps,
        tiles.parts,
        PLANAR=planar,
        GROUPS=groups,
        WIDTH=width,
        TOGETHER=together,
        PART=tiles.part,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        FINAL=not several,
        **_OPTIONS,
    )
    if several:
        count = tiles.part * (tiles.columns if planar else width)  # elements of a part
        _merge[(triton.cdiv(mean.numel(), 16),)](
            sums, mean, rstd, mean.numel(), tiles.parts, float(count), float(width * plane), eps, ROWS=16, PARTS=32
        )
    tiles = _tiles(*geometry)
    _apply[(len(x), tiles.blocks, tiles.parts)](
        x,
        mean,
        rstd,
        weight,
        bias,
        scale,
        shift,
        y,
        channels,
        plane,
        PLANAR=planar,
        WIDTH=width,
        SILU=silu,
        PART=tiles.part,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        **_OPTIONS,
    )
    return y, mean, rstd


@triton.jit(do_not_specialize=["parts"])
def _statistics(
    x,
    mean,
    rstd,
    plane,
    eps,
    parts,
    PLANAR: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,  # channels of a group
    TOGETHER: tl.constexpr,  # groups of a program
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FINAL: tl.constexpr,
):
    sample, block, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    first = part.to(tl.int64) * PART
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    if PLANAR:
        size = WIDTH * plane
        stride, length = COLUMNS, tl.cdiv(size, COLUMNS)
        start = (sample * GROUPS + block) * size + first * COLUMNS
        rest = tl.minimum(size - first * COLUMNS, PART * COLUMNS).to(tl.int32)  # elements of this part
        count = rest
    else:
        stride, length = GROUPS * WIDTH, plane
        start = (sample * plane + first) * (GROUPS * WIDTH) + block * (TOGETHER * WIDTH)
        rest = TOGETHER * WIDTH  # channels of this block
        if GROUPS % TOGETHER != 0:
            rest = tl.minimum(GROUPS - block * TOGETHER, TOGETHER) * WIDTH
        count = tl.minimum(plane - first, PART).to(tl.int32) * WIDTH
    rows = tl.minimum(length - first, PART).to(tl.int32)
    offset = row * stride + column

    mask = (offset < rest) if PLANAR else (column < rest) & (row < rows)
    values = tl.load(x + start + offset, mask=mask, other=0.0).to(tl.float32)
    here = tl.minimum(count, ROWS * (COLUMNS if PLANAR else WIDTH))
    near = sum_of_groups(values, TOGETHER, WIDTH) / here.to(tl.float32)  # the mean of the first tile
    spread = spread_to_columns(near, COLUMNS, TOGETHER, WIDTH)
    values = tl.where(mask, values - spread, 0.0)
    total, squares = values, values * values
    for top in range(ROWS, rows, ROWS):
        mask = (offset < rest - top * stride) if PLANAR else (column < rest) & (row < rows - top)
        values = tl.load(x + (start + top.to(tl.int64) * stride) + offset, mask=mask, other=0.0).to(tl.float32)
        values = tl.where(mask, values - spread, 0.0)
        total += values
        squares += values * values
    total, squares = sum_of_groups(total, TOGETHER, WIDTH), sum_of_groups(squares, TOGETHER, WIDTH)

    n = count.to(tl.float32)
    around = tl.maximum(squares - total * total / n, 0.0, propagate_nan=tl.PropagateNan.ALL)
    group = block * TOGETHER + tl.arange(0, TOGETHER)
    at = (sample * GROUPS + group) * parts + part
    tl.store(mean + at, near + total / n, mask=group < GROUPS)
    tl.store(rstd + at, rsqrt(around / n + eps) if FINAL else around, mask=group < GROUPS)


@triton.jit
def rsqrt(x):
    return 1 / tl.sqrt_rn(x)


@triton.jit
def sum_of_groups(x, TOGETHER: tl.constexpr, WIDTH: tl.constexpr):
    """(ROWS, COLUMNS) to (TOGETHER,); a group has WIDTH columns, or all of them."""
    x = tl.sum(x, 0)
    if TOGETHER == 1 or x.shape[0] == TOGETHER * WIDTH:
        x = tl.sum(x.reshape(TOGETHER, x.shape[0] // TOGETHER), 1)
    else:
        x = tl.sum(tl.where(members(TOGETHER, x.shape[0], WIDTH), x[None, :], 0.0), 1)
    return x


@triton.jit
def spread_to_columns(x, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr, WIDTH: tl.constexpr):
    """(TOGETHER,) to (1, COLUMNS)."""
    if TOGETHER == 1 or TOGETHER * WIDTH == COLUMNS:
        x = x[:, None].broadcast_to(TOGETHER, COLUMNS // TOGETHER).reshape(COLUMNS)
    else:
        x = tl.sum(tl.where(members(TOGETHER, COLUMNS, WIDTH), x[:, None], 0.0), 0)
    return x[None, :]


@triton.jit
def members(TOGETHER: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.arange(0, COLUMNS)[None, :] // WIDTH == tl.arange(0, TOGETHER)[:, None]


@triton.jit(do_not_specialize=["parts", "groups"])
def _merge(sums, mean, rstd, groups, parts, count, size, eps, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """Chan, Golub & LeVeque (1979). Every part has `count` elements, but for the last one."""
    group = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = group < groups
    start = sums + group.to(tl.int64) * parts
    n = 0.0
    total, around = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)[None, :]
        mask = inside[:, None] & (part < parts)
        number = tl.where(part < parts, tl.minimum(count, size - part.to(tl.float32) * count), 0.0)  # (1, PARTS)
        here = tl.sum(number)
        near = tl.load(start + first, mask=inside)
        means = tl.load(start[:, None] + part, mask=mask, other=0.0)
        squares = tl.load(start[:, None] + part + groups.to(tl.int64) * parts, mask=mask, other=0.0)
        offset = tl.sum(tl.where(mask, number * (means - near[:, None]), 0.0), 1) / here
        center = near + offset
        apart = tl.where(mask, means - center[:, None], 0.0)
        squares = tl.sum(squares + number * apart * apart, 1)
        apart = center - total
        total += apart * (here / (n + here))
        around += squares + apart * apart * (n * here / (n + here))
        n += here
    tl.store(mean + group, total, mask=inside)
    tl.store(rstd + group, rsqrt(around / size + eps), mask=inside)


@triton.jit
def locate(
    sample, channels, plane, PLANAR: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Of a program: channels and pixels of its first tile, shaped to broadcast; the pixel after its last; strides."""
    block, part = tl.program_id(1), tl.program_id(2)
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    first = part.to(tl.int64) * PART
    rest = tl.minimum(plane - first, PART).to(tl.int32)
    if PLANAR:
        channel, pixel = block * ROWS + row, column
        start = (sample.to(tl.int64) * channels + block * ROWS) * plane + first
        offset = row * plane + column
    else:
        channel, pixel = block * COLUMNS + column, row
        start = (sample.to(tl.int64) * plane + first) * channels + block * COLUMNS
        offset = row * channels + column
    return channel, pixel, rest, start, offset


@triton.jit
def per_channel(sample, channel, channels, mean, rstd, weight, bias, scale, shift, WIDTH: tl.constexpr):
    """mean, rstd, and the z = x_hat factor + addend of y = silu(z)."""
    inside = channel < channels
    group = sample.to(tl.int64) * (channels // WIDTH) + channel // WIDTH
    at = sample.to(tl.int64) * channels + channel
    factor = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    addend = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        one_and_scale = 1 + tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
        factor *= one_and_scale
        addend = addend * one_and_scale + tl.load(shift + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(mean + group, mask=inside, other=0.0)
    return m, tl.load(rstd + group, mask=inside, other=0.0), factor, addend


@triton.jit
def _apply(
    x,
    mean,
    rstd,
    weight,
    bias,
    scale,
    shift,
    y,
    channels,
    plane,
    PLANAR: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    sample = tl.program_id(0)
    channel, pixel, rest, start, offset = locate(sample, channels, plane, PLANAR, PART, ROWS, COLUMNS)
    m, r, factor, addend = per_channel(sample, channel, channels, mean, rstd, weight, bias, scale, shift, WIDTH)
    for first in range(0, rest, COLUMNS if PLANAR else ROWS):
        mask = (channel < channels) & (pixel < rest - first)
        at = start + (first if PLANAR else first.to(tl.int64) * channels)
        z = (tl.load(x + at + offset, mask=mask).to(tl.float32) - m) * r * factor + addend
        if SILU:
            z = z / (1 + tl.exp(-z))
        tl.store(y + at + offset, z.to(y.dtype.element_ty), mask=mask)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=memory_format(x))
    grads = [None if p is None else torch.empty_like(p) for p in (weight, bias, scale, shift)]
    if x.numel() == 0:
        for p in grads:
            if p is not None:
                p.zero_()
    else:
        planar, channels, plane = geometry = _geometry(x)
        width = channels // groups
        tiles = _tiles(*geometry)
        constants = {
            "PLANAR": planar,
            "WIDTH": width,
            "SILU": silu,
            "PART": tiles.part,
            "ROWS": tiles.rows,
            "COLUMNS": tiles.columns,
            **_OPTIONS,
        }
        grid = (len(x), tiles.blocks, tiles.parts)
        sums = x.new_empty((len(x), tiles.parts, 2, channels), dtype=torch.float32)
        means = x.new_empty((len(x), groups, 2), dtype=torch.float32)
        given = (grad, x, mean, rstd, weight, bias, scale, shift)
        _sum_gradients[grid](*given, sums, channels, plane, tiles.parts, **constants)
        _spread_gradients[(groups,)](
            sums,
            weight,
            bias,
            scale,
            *grads,
            means,
            len(x),
            tiles.parts,
            channels,
            1 / (width * plane),
            WIDTH=width,
            SAMPLES=max(2048 // _power(width), 1),
        )
        _apply_gradients[grid](*given, means, grad_x, channels, plane, **constants)
    return grad_x, *(x.new_empty(0) if p is None else p for p in grads)


@triton.jit
def gradient_of_z(grad, x_hat, factor, addend, SILU: tl.constexpr):
    if SILU:
        z = x_hat * factor + addend
        sigmoid = 1 / (1 + tl.exp(-z))
        grad = grad * sigmoid * (1 + z * (1 - sigmoid))
    return grad


@triton.jit(do_not_specialize=["parts"])
def _sum_gradients(
    grad,
    x,
    mean,
    rstd,
    weight,
    bias,
    scale,
    shift,
    sums,
    channels,
    plane,
    parts,
    PLANAR: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """For each channel, over some pixels, the sums of the gradient of z and of that times x_hat."""
    sample = tl.program_id(0)
    channel, pixel, rest, start, offset = locate(sample, channels, plane, PLANAR, PART, ROWS, COLUMNS)
    m, r, factor, addend = per_channel(sample, channel, channels, mean, rstd, weight, bias, scale, shift, WIDTH)
    sum_g, sum_gx = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, rest, COLUMNS if PLANAR else ROWS):
        mask = (channel < channels) & (pixel < rest - first)
        at = start + (first if PLANAR else first.to(tl.int64) * channels)
        x_hat = (tl.load(x + at + offset, mask=mask, other=0.0).to(tl.float32) - m) * r
        g = tl.load(grad + at + offset, mask=mask, other=0.0).to(tl.float32)
        g = tl.where(mask, gradient_of_z(g, x_hat, factor, addend, SILU), 0.0)
        sum_g += g
        sum_gx += g * x_hat
    AXIS: tl.constexpr = 1 if PLANAR else 0
    out = sums + (sample.to(tl.int64) * parts + tl.program_id(2)) * 2 * channels + channel
    tl.store(out, tl.sum(sum_g, AXIS, keep_dims=True), mask=channel < channels)
    tl.store(out + channels, tl.sum(sum_gx, AXIS, keep_dims=True), mask=channel < channels)


@triton.jit(do_not_specialize=["samples", "parts"])
def _spread_gradients(
    sums,
    weight,
    bias,
    scale,
    grad_weight,
    grad_bias,
    grad_scale,
    grad_shift,
    means,
    samples,
    parts,
    channels,
    inverse,  # of the size of a group
    WIDTH: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """Of one group, all that follows from the sums: the parameters' gradients, and means for that of x."""
    group = tl.program_id(0)
    member = tl.arange(0, triton.next_power_of_2(WIDTH))[None, :]
    channel, inside = group * WIDTH + member, member < WIDTH
    gamma = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    beta = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    total_w, total_b = tl.zeros_like(gamma), tl.zeros_like(gamma)
    for first in range(0, samples, SAMPLES):
        sample = first + tl.arange(0, SAMPLES)[:, None]
        mask = inside & (sample < samples)
        start = sums + sample.to(tl.int64) * parts * 2 * channels + channel
        sum_g = tl.zeros((SAMPLES, member.shape[1]), tl.float32)
        sum_gx = tl.zeros_like(sum_g)
        for part in range(parts):
            sum_g += tl.load(start + part * 2 * channels, mask=mask, other=0.0)
            sum_gx += tl.load(start + part * 2 * channels + channels, mask=mask, other=0.0)
        factor = gamma
        if scale is not None:
            at = sample.to(tl.int64) * channels + channel
            tl.store(grad_scale + at, (sum_gx * gamma + sum_g * beta).to(scale.dtype.element_ty), mask=mask)
            tl.store(grad_shift + at, sum_g.to(scale.dtype.element_ty), mask=mask)
            one_and_scale = 1 + tl.load(scale + at, mask=mask, other=0.0).to(tl.float32)
            factor = gamma * one_and_scale
            total_w += tl.sum(sum_gx * one_and_scale, 0, keep_dims=True)
            total_b += tl.sum(sum_g * one_and_scale, 0, keep_dims=True)
        else:
            total_w += tl.sum(sum_gx, 0, keep_dims=True)
            total_b += tl.sum(sum_g, 0, keep_dims=True)
        out = means + (sample.to(tl.int64) * (channels // WIDTH) + group) * 2
        here = sample < samples
        tl.store(out, tl.sum(factor * sum_g, 1, keep_dims=True) * inverse, mask=here)
        tl.store(out + 1, tl.sum(factor * sum_gx, 1, keep_dims=True) * inverse, mask=here)
    tl.store(grad_weight + channel, total_w.to(grad_weight.dtype.element_ty), mask=inside)
    tl.store(grad_bias + channel, total_b.to(grad_bias.dtype.element_ty), mask=inside)


@triton.jit
def _apply_gradients(
    grad,
    x,
    mean,
    rstd,
    weight,
    bias,
    scale,
    shift,
    means,
    grad_x,
    channels,
    plane,
    PLANAR: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    sample = tl.program_id(0)
    channel, pixel, rest, start, offset = locate(sample, channels, plane, PLANAR, PART, ROWS, COLUMNS)
    m, r, factor, addend = per_channel(sample, channel, channels, mean, rstd, weight, bias, scale, shift, WIDTH)
    at_means = means + (sample.to(tl.int64) * (channels // WIDTH) + channel // WIDTH) * 2
    mean_g = tl.load(at_means, mask=channel < channels, other=0.0)
    mean_gx = tl.load(at_means + 1, mask=channel < channels, other=0.0)
    for first in range(0, rest, COLUMNS if PLANAR else ROWS):
        mask = (channel < channels) & (pixel < rest - first)
        at = start + (first if PLANAR else first.to(tl.int64) * channels)
        x_hat = (tl.load(x + at + offset, mask=mask).to(tl.float32) - m) * r
        g = gradient_of_z(tl.load(grad + at + offset, mask=mask).to(tl.float32), x_hat, factor, addend, SILU)
        g = r * (g * factor - mean_g - x_hat * mean_gx)
        tl.store(grad_x + at + offset, g.to(grad_x.dtype.element_ty), mask=mask)
