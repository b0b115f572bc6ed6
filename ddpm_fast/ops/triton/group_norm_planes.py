"""Group norm where a sample's groups are too large for one program, and in planar tensors.

A program adds x and x^2 of some groups over a part of the pixels, with x less a value near its mean, so that nothing
cancels where the mean is far larger than the spread; where a sample has several parts, a second kernel merges them; the
last one reads x again and writes y. What is added to x first is added by the first kernel, which stores the sum.

Memory runs along the columns of a tile: pixels x channels in channels-last tensors, channels x pixels in planar ones
(for the statistics, all elements of a group, which are one run).
"""

__all__ = [
    "Tiles",
    "apply_statistics",
    "load_channels",
    "load_input",
    "locate",
    "normalise_planes",
    "power",
    "tiles_of",
]

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .group_norm_parts import (
    activate,
    load_affine,
    load_input_bias,
    load_sum,
    not_negative,
    rsqrt,
    spread_to_columns,
    sum_of_groups,
    sum_rows,
)

_TILE = 2048  # elements
_PART = 32768  # elements of a program that sums
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


class Tiles(NamedTuple):
    blocks: int  # of columns (planar: of channels)
    parts: int
    constants: dict[str, object]  # for the kernels


def power(n: int) -> int:
    return triton.next_power_of_2(max(n, 1))


@lru_cache(maxsize=1024)
def _statistics_tiles(planar: bool, channels: int, plane: int, groups: int) -> Tiles:
    width = channels // groups
    if planar:
        size = width * plane
        columns, together = min(power(size), 1024), 1
        length = triton.cdiv(size, columns)
    else:  # whole groups, 32 channels or more side by side; more where there are few pixels
        together = max(32 // width, _TILE // (power(plane) * width), 1)
        together = min(1 << together.bit_length() - 1, power(groups))
        columns, length = power(together * width), plane
    rows = max(min(power(length), _TILE // columns), 1)
    part = max(rows, _PART // columns)  # rows of a program, a multiple of its tile's
    constants = {"PLANAR": planar, "GROUPS": groups, "WIDTH": width, "TOGETHER": together}
    constants |= {"PART": part, "ROWS": rows, "COLUMNS": columns, **_OPTIONS}
    return Tiles(triton.cdiv(groups, together), triton.cdiv(length, part), constants)


@lru_cache(maxsize=1024)
def tiles_of(planar: bool, channels: int, plane: int, groups: int) -> Tiles:
    if planar:
        columns = min(power(plane), 1024)
        rows = min(power(channels), _TILE // columns)
        part = max(columns, _PART // rows)
        blocks = triton.cdiv(channels, rows)
    else:
        columns = min(power(channels), max(64, _TILE // power(plane)))
        rows = min(power(plane), _TILE // columns)
        part = max(rows, _PART // columns)
        blocks = triton.cdiv(channels, columns)
    constants = {"PLANAR": planar, "WIDTH": channels // groups, "PART": part, "ROWS": rows, "COLUMNS": columns}
    return Tiles(blocks, triton.cdiv(plane, part), constants | _OPTIONS)


def normalise_planes(
    planar: bool,
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
    plane: int,
    groups: int,
    eps: float,
    silu: bool,
) -> None:
    channels, of_x, of_skip = y.shape[1], x.shape[1], y.shape[1] - x.shape[1]
    tiles = _statistics_tiles(planar, channels, plane, groups)
    # Parts leave a value near their mean, the mean less that, which spares it the rounding at its own size, and the sum
    # of squares around the mean.
    several = tiles.parts > 1
    sums = x.new_empty((3, mean.numel(), tiles.parts), dtype=torch.float32) if several else None
    to = (sums[0], sums[1], sums[2]) if several else (mean, None, rstd)
    sizes = (bias_stride, of_x, of_skip, plane)
    _statistics[(len(x), tiles.blocks, tiles.parts)](
        x, input_bias, residual, skip, h, *to, *sizes, eps, tiles.parts, FINAL=not several, **tiles.constants
    )
    if several:
        size = channels // groups * plane
        in_row = tiles.constants["COLUMNS"] if planar else channels // groups
        count = tiles.constants["PART"] * in_row  # elements of a part
        _merge[(triton.cdiv(mean.numel(), 16),)](
            sums, mean, rstd, mean.numel(), tiles.parts, float(count), float(size), eps, ROWS=16, PARTS=32
        )
    if h is not None:
        x, input_bias = h, None
    apply_statistics(planar, x, input_bias, mean, rstd, weight, bias, scale, shift, y, bias_stride, plane, groups, silu)


def apply_statistics(
    planar: bool,
    x: Tensor,
    input_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    y: Tensor,
    bias_stride: int,
    plane: int,
    groups: int,
    silu: bool,
) -> None:
    channels = x.shape[1]
    tiles = tiles_of(planar, channels, plane, groups)
    given = (x, input_bias, mean, rstd, weight, bias, scale, shift)
    _apply[(len(x), tiles.blocks, tiles.parts)](*given, y, bias_stride, channels, plane, SILU=silu, **tiles.constants)


@triton.jit(do_not_specialize=["parts"])
def _statistics(
    x,
    input_bias,
    residual,
    skip,
    h,
    mean,
    offset_of_mean,  # where there are several parts
    rstd,
    bias_stride,
    of_x,  # channels of x
    of_skip,
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
    of_bias = input_bias
    if PLANAR:
        size = WIDTH * plane
        length = tl.cdiv(size, COLUMNS)
        start = (sample * GROUPS + block) * size + first * COLUMNS
        rest = tl.minimum(size - first * COLUMNS, PART * COLUMNS).to(tl.int32)  # elements of this part
        count = rest
        offset = row * COLUMNS + column
    else:
        channels = GROUPS * WIDTH
        channel = block * (TOGETHER * WIDTH) + column
        length = plane
        rest = TOGETHER * WIDTH  # channels of this block
        if GROUPS % TOGETHER != 0:
            rest = tl.minimum(GROUPS - block * TOGETHER, TOGETHER) * WIDTH
        count = tl.minimum(plane - first, PART).to(tl.int32) * WIDTH
        offset = row * channels + channel
        if input_bias is not None:
            inside = (column < rest) & (channel < of_x)
            of_bias = load_input_bias(input_bias, bias_stride, sample, channel, inside)
    rows = tl.minimum(length - first, PART).to(tl.int32)

    near = tl.zeros((TOGETHER,), tl.float32)
    spread = tl.zeros((1, COLUMNS), tl.float32)
    total, squares = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    for top in range(0, rows, ROWS):
        if PLANAR:
            mask = offset < rest - top * COLUMNS
            values = tl.load(x + (start + top.to(tl.int64) * COLUMNS) + offset, mask=mask, other=0.0)
        else:
            mask = (column < rest) & (row < rows - top)
            pixel = sample * plane + first + top
            values = load_sum(x, of_bias, residual, skip, pixel, row, channel, mask, of_x, of_skip, 1)
            if h is not None:
                tl.store(h + pixel * channels + offset, values, mask=mask)
        values = tl.where(mask, values.to(tl.float32), 0.0)
        if top == 0:
            here = tl.minimum(count, ROWS * (COLUMNS if PLANAR else WIDTH))
            near = sum_of_groups(tl.sum(values, 0), TOGETHER, WIDTH) / here.to(tl.float32)  # the mean of the first tile
            spread = spread_to_columns(near, COLUMNS, TOGETHER, WIDTH)[None, :]
        values = tl.where(mask, values - spread, 0.0)
        total += values
        squares += values * values
    total, squares = sum_rows(total, squares)
    total, squares = sum_of_groups(total, TOGETHER, WIDTH), sum_of_groups(squares, TOGETHER, WIDTH)

    n = count.to(tl.float32)
    around = not_negative(squares - total * total / n)
    group = block * TOGETHER + tl.arange(0, TOGETHER)
    at = (sample * GROUPS + group) * parts + part
    valid = group < GROUPS
    if FINAL:
        tl.store(mean + at, near + total / n, mask=valid)
        tl.store(rstd + at, rsqrt(around / n + eps), mask=valid)
    else:
        tl.store(mean + at, near, mask=valid)
        tl.store(offset_of_mean + at, total / n, mask=valid)
        tl.store(rstd + at, around, mask=valid)


@triton.jit(do_not_specialize=["parts", "groups"])
def _merge(sums, mean, rstd, groups, parts, count, size, eps, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """Chan, Golub & LeVeque (1979). Every part has `count` elements, but for the last one."""
    group = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = group < groups
    start = sums + group.to(tl.int64) * parts
    distance = groups.to(tl.int64) * parts  # from one kind of sum to the next
    origin = tl.load(start, mask=inside)  # means are differences from it
    n = 0.0
    total, around = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)[None, :]
        mask = inside[:, None] & (part < parts)
        number = tl.where(part < parts, tl.minimum(count, size - part.to(tl.float32) * count), 0.0)  # (1, PARTS)
        here = tl.sum(number)
        at = start[:, None] + part
        means = tl.load(at, mask=mask, other=0.0) - origin[:, None]
        means += tl.load(at + distance, mask=mask, other=0.0)
        squares = tl.load(at + 2 * distance, mask=mask, other=0.0)
        center = tl.sum(tl.where(mask, number * means, 0.0), 1) / here
        apart = tl.where(mask, means - center[:, None], 0.0)
        squares = tl.sum(squares + number * apart * apart, 1)
        apart = center - total
        total += apart * (here / (n + here))
        around += squares + apart * apart * (n * here / (n + here))
        n += here
    tl.store(mean + group, origin + total, mask=inside)
    tl.store(rstd + group, rsqrt(around / size + eps), mask=inside)


@triton.jit
def locate(
    sample, channels, plane, PLANAR: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Of a program: channels and pixels of its first tile; its pixels, and the first one; its start, and offsets."""
    block, part = tl.program_id(1), tl.program_id(2)
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    first = part.to(tl.int64) * PART
    rest = tl.minimum(plane - first, PART).to(tl.int32)
    if PLANAR:
        channel, pixel = block * ROWS + row, column
        start = (sample * channels + block * ROWS) * plane + first
        offset = row * plane + column
    else:
        channel, pixel = block * COLUMNS + column, row
        start = (sample * plane + first) * channels
        offset = row * channels + channel
    return channel, pixel, rest, first, start, offset


@triton.jit
def load_channels(sample, channel, channels, mean, rstd, weight, bias, scale, shift, WIDTH: tl.constexpr):
    """Of a tile's channels: which there are; mean and rstd; factor and addend."""
    inside = channel < channels
    group = sample * (channels // WIDTH) + channel // WIDTH
    m, r = tl.load(mean + group, mask=inside, other=0.0), tl.load(rstd + group, mask=inside, other=0.0)
    factor, addend, _ = load_affine(sample, channel, inside, channels, weight, bias, scale, shift)
    return inside, m, r, factor, addend


@triton.jit
def load_input(x, of_bias, start, offset, mask):
    """Of h, in float32, where it was kept or is x + input_bias."""
    h = tl.load(x + start + offset, mask=mask, other=0.0)
    if of_bias is not None:
        h = (h.to(tl.float32) + of_bias).to(h.dtype)
    return h.to(tl.float32)


@triton.jit
def _apply(
    x,
    input_bias,
    mean,
    rstd,
    weight,
    bias,
    scale,
    shift,
    y,
    bias_stride,
    channels,
    plane,
    PLANAR: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    channel, pixel, rest, _, start, offset = locate(sample, channels, plane, PLANAR, PART, ROWS, COLUMNS)
    inside, m, r, factor, addend = load_channels(
        sample, channel, channels, mean, rstd, weight, bias, scale, shift, WIDTH
    )
    of_bias = input_bias
    if input_bias is not None:
        of_bias = load_input_bias(input_bias, bias_stride, sample, channel, inside)
    factor *= r
    for first in range(0, rest, COLUMNS if PLANAR else ROWS):
        mask = inside & (pixel < rest - first)
        at = start + (first if PLANAR else first.to(tl.int64) * channels)
        z = activate(tl.fma(load_input(x, of_bias, at, offset, mask) - m, factor, addend), SILU)
        tl.store(y + at + offset, z.to(y.dtype.element_ty), mask=mask)
