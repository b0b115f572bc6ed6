"""Philox keys and normals as tensors: derived keys, and the normals of the stream of each key."""

__all__ = ["fold_in", "normal"]

import torch
import triton
import triton.language as tl
from torch import Tensor

from .noise import philox, tile_noise
from .tiles import grid, load_key, locate, part_of_program, tiling


def fold_in(keys: Tensor, data: Tensor) -> Tensor:
    out = torch.empty_like(keys)
    if len(keys):
        _fold_in[(triton.cdiv(len(keys), 128),)](keys, data, out, len(keys), BLOCK=128, num_warps=4)
    return out


@triton.jit(do_not_specialize=["count"])
def _fold_in(keys, data, out, count, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < count
    seed, offset = load_key(keys, row, mask)
    w0, w1, w2, w3 = philox(seed, offset + tl.load(data + row, mask=mask, other=0))
    tl.store(out + 2 * row, w0.to(tl.int64) | w1.to(tl.int64) << 32, mask=mask)
    tl.store(out + 2 * row + 1, w2.to(tl.int64) | w3.to(tl.int64) << 32, mask=mask)


def normal(keys: Tensor, size: int) -> Tensor:
    out = keys.new_empty((len(keys), size), dtype=torch.float32)
    if out.numel():
        extent, channels, tiles, constants = tiling(out, keys, per_thread=16)
        _normal[grid(len(out), tiles)](keys, out, extent, channels, **constants)
    return out


@triton.jit
def _normal(
    keys,
    out,
    extent,
    channels,
    LAYOUT: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    sample = tl.program_id(0)
    tile, start, element, mask = locate(sample, part_of_program(), extent, channels, LAYOUT, LANES, BLOCK, VECTOR)
    (z,) = tile_noise(load_key(keys, sample, True), tile, channels, LAYOUT, LANES, BLOCK, VECTOR)
    tl.store(out + start + element, z, mask=mask)
