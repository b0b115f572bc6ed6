"""x_t = a x_start + s noise: reads x_start (and noise, where it is given), writes x_t."""

__all__ = ["q_sample"]

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import memory_format
from .noise import tile_noise
from .tiles import grid, load_key, load_tile, locate, part_of_program, store, table_row, tiling


def q_sample(
    x_start: Tensor, noise: Tensor | None, keys: Tensor | None, t: Tensor, rows: Tensor, dtype: torch.dtype
) -> Tensor:
    out = torch.empty_like(x_start, dtype=dtype, memory_format=memory_format(x_start))
    if out.numel() == 0:
        return out
    extent, channels, tiles, constants = tiling(out, keys, x_start, noise, per_thread=16)
    _q_sample[grid(len(out), tiles)](x_start, noise, keys, t, rows, out, len(rows), extent, channels, **constants)
    return out


@triton.jit(do_not_specialize=["timesteps"])
def _q_sample(
    x_start,
    noise,
    keys,
    t,
    rows,
    out,
    timesteps,
    extent,
    channels,
    LAYOUT: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    sample = tl.program_id(0)
    tile, start, element, mask = locate(sample, part_of_program(), extent, channels, LAYOUT, LANES, BLOCK, VECTOR)
    x = load_tile(x_start, start, extent, element, mask, LANES)
    if noise is not None:
        z = load_tile(noise, start, extent, element, mask, LANES)
    row, valid = table_row(rows, tl.load(t + sample), timesteps, 2)
    a = tl.load(row, mask=valid, other=float("nan"))
    s = tl.load(row + 1, mask=valid, other=float("nan"))
    if noise is None:
        z = tile_noise(load_key(keys, sample, True), tile, channels, LAYOUT, LANES, BLOCK, VECTOR)
    for lane in tl.static_range(LANES):
        store(out, start + lane * extent, element, mask, a * x[lane] + s * z[lane])
