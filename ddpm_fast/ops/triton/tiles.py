"""How the samples of a call are divided among programs.

A program works on tiles of one sample: BLOCK neighbouring elements, of which a thread takes VECTOR at a time. Where
noise is made for planar tensors, it is counted across the channels and memory runs along them: then a tile is BLOCK
pixels of one or several channels, its LANES.

    linear      any tensor, 1 lane: noise is counted as memory runs, or not made here
    group       2 or 3 channels, so many lanes; or a multiple of 4 channels, 4 lanes
    scattered   any other number of channels, 1 lane; each block of four normals is made by up to four threads

A sample lies as `channels` runs of `extent` elements: its planes, or where the layout is linear one run, all of it.
"""

__all__ = ["Tiling", "grid", "load_key", "load_tile", "locate", "part_of_program", "store", "table_row", "tiling"]

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

_MAX_AXIS = 65535  # of the grid's second and third axis


class Tiling(NamedTuple):
    extent: int
    channels: int
    tiles: int  # of a sample
    constants: dict[str, object]  # for the kernel


def tiling(like: Tensor, keys: Tensor | None, *tensors: Tensor | None, per_thread: int) -> Tiling:
    """The tiles of samples like one given, which has elements.

    Args:
        keys: of the noise, if it is made in the kernel.
        tensors: all others that are read or written.
        per_thread: elements, at most. What a thread does once it does for all of them.
    """
    size = like.numel() // len(like)
    channels = 1
    if keys is not None and like.dim() >= 4 and like.stride(1) > 1:  # dense, and not channels-last
        channels = like.shape[1]
    return _tiling(size, channels, max(x.dtype.itemsize for x in (like, *tensors) if x is not None), per_thread)


@lru_cache(maxsize=1024)
def _tiling(size: int, channels: int, itemsize: int, per_thread: int) -> Tiling:
    layout, lanes = "linear", 1
    if channels in (2, 3) or (channels > 1 and channels % 4 == 0):
        layout, lanes = "group", min(channels, 4)
    elif channels > 1:
        layout, per_thread = "scattered", 8
    extent = size // channels
    # 16 bytes of the widest type: all tensors then lie alike in the threads, narrower ones in less than 16 bytes.
    vector = 4 if itemsize == 4 else 8
    if lanes > 1:
        block = (128 if extent > 128 else 32) * vector
        warps = block // vector // 32
    else:
        block = 1024 if extent > 256 else 256
        warps = max(block // per_thread // 32, 1)
    constants = {
        "LAYOUT": layout,
        "LANES": lanes,
        "BLOCK": block,
        "VECTOR": vector,
        "num_warps": warps,
        # Products and sums are fused where the code says so and nowhere else: all backends then round alike.
        "enable_fp_fusion": False,
    }
    return Tiling(extent, channels, -(-extent // block) * (channels // lanes), constants)


def grid(samples: int, parts: int) -> tuple[int, int, int]:
    """Samples on the axis that has room for them, the parts of a sample on the other two."""
    return samples, min(parts, _MAX_AXIS), -(-parts // _MAX_AXIS)


@triton.jit
def part_of_program():
    return tl.program_id(1) + tl.num_programs(1) * tl.program_id(2)


@triton.jit
def locate(
    sample,
    index,
    extent,
    channels,
    LAYOUT: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Of a sample's tile: (its first channel, its first element there), its start in memory, its elements and mask."""
    if LAYOUT == "linear":
        channel = 0
    else:
        channel = index % (channels // LANES) * LANES
        index = index // (channels // LANES)
    first = index.to(tl.int64) * BLOCK
    start = (sample.to(tl.int64) * channels + channel) * extent + first
    element = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    return (channel, first), start, element, element < tl.minimum(extent - first, BLOCK).to(tl.int32)


@triton.jit
def table_row(rows, index, count, COLUMNS: tl.constexpr):
    """The address of a row, and whether the index is valid; where it is not, kernels load NaN instead."""
    return rows + COLUMNS * index, (index >= 0) & (index < count)


@triton.jit
def load_key(keys, row, valid):
    """(seed, offset) from a row of a table of keys."""
    return tl.load(keys + 2 * row, mask=valid, other=0), tl.load(keys + 2 * row + 1, mask=valid, other=0)


@triton.jit
def load_tile(x, start, extent, element, mask, LANES: tl.constexpr):
    """A tensor (BLOCK,) for each lane, in float32, bytes mapped from [0, 255] to [-1, 1].

    Call it before the noise is computed, so that the computation overlaps with the loads.
    """
    values = ()
    for lane in tl.static_range(LANES):
        value = tl.load(x + (start + lane * extent) + element, mask=mask)
        if x.dtype.element_ty == tl.uint8:
            values += (value.to(tl.float32) * (2 / 255) - 1,)
        else:
            values += (value.to(tl.float32),)
    return values


@triton.jit
def store(x, at, element, mask, value):
    tl.store(x + at + element, value.to(x.dtype.element_ty), mask=mask)
