"""scale weight / size sum loss(pred - (p x_start + q noise)), and its gradient by pred in the same pass over memory."""

__all__ = ["weighted_loss"]

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import memory_format
from .noise import tile_noise
from .sums import SPAN, add_parts, parts_of
from .tiles import grid, load_key, load_tile, locate, part_of_program, store, table_row, tiling


def weighted_loss(
    pred: Tensor,
    x_start: Tensor | None,
    noise: Tensor | None,
    keys: Tensor | None,
    t: Tensor,
    rows: Tensor,
    upstream: Tensor | None,
    loss_type: int,
    scale: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    loss = pred.new_empty(len(pred), dtype=torch.float32)
    grad = torch.empty_like(pred, memory_format=memory_format(pred)) if with_grad else None
    if pred.numel():
        extent, channels, tiles, constants = tiling(pred, keys, x_start, noise, per_thread=8)
        parts = parts_of(loss, tiles)
        _weighted_loss[grid(len(pred), triton.cdiv(tiles, SPAN))](
            pred,
            x_start,
            noise,
            keys,
            t,
            rows,
            upstream,
            parts,
            grad,
            scale * len(pred) / pred.numel(),
            len(rows),
            tiles,
            extent,
            channels,
            LOSS_TYPE=loss_type,
            SPAN=SPAN,
            **constants,
        )
        add_parts(parts, loss)
    else:
        loss.zero_()
    return loss, pred.new_empty(0) if grad is None else grad


@triton.jit(do_not_specialize=["timesteps", "tiles"])
def _weighted_loss(
    pred,
    x_start,
    noise,
    keys,
    t,
    rows,
    upstream,
    parts,
    grad,
    scale,
    timesteps,
    tiles,
    extent,
    channels,
    LOSS_TYPE: tl.constexpr,
    SPAN: tl.constexpr,
    LAYOUT: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    sample, part = tl.program_id(0), part_of_program()
    row, valid = table_row(rows, tl.load(t + sample), timesteps, 3)
    p = tl.load(row, mask=valid, other=float("nan"))
    q = tl.load(row + 1, mask=valid, other=float("nan"))
    weight = tl.load(row + 2, mask=valid, other=float("nan"))
    factor = weight * scale
    steepness = factor  # of the gradient
    if upstream is not None:
        steepness = weight * (scale * tl.load(upstream + sample))
    if keys is not None:
        key = load_key(keys, sample, True)

    total = tl.zeros((BLOCK,), tl.float32)
    for index in range(part * SPAN, min(part * SPAN + SPAN, tiles)):
        tile, start, element, mask = locate(sample, index, extent, channels, LAYOUT, LANES, BLOCK, VECTOR)
        predicted = load_tile(pred, start, extent, element, mask, LANES)
        if x_start is not None:
            x = load_tile(x_start, start, extent, element, mask, LANES)
        if noise is not None:
            z = load_tile(noise, start, extent, element, mask, LANES)
        elif keys is not None:
            z = tile_noise(key, tile, channels, LAYOUT, LANES, BLOCK, VECTOR)
        for lane in tl.static_range(LANES):
            if x_start is None:
                target = q * z[lane]
            elif noise is None and keys is None:
                target = p * x[lane]
            else:
                target = p * x[lane] + q * z[lane]
            error = predicted[lane] - target
            size = tl.abs(error)
            sign = tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, 0.0))
            if LOSS_TYPE == 0:
                value, slope = error * error, 2 * error
            elif LOSS_TYPE == 1:
                value, slope = size, sign
            else:
                value = tl.where(size <= 1, 0.5 * error * error, size - 0.5)
                slope = tl.where(size <= 1, error, sign)
            total += tl.where(mask, value, 0.0)
            if grad is not None:
                store(grad, start + lane * extent, element, mask, slope * steepness)
    tl.store(parts + sample.to(tl.int64) * tl.cdiv(tiles, SPAN) + part, tl.sum(total) * factor)
