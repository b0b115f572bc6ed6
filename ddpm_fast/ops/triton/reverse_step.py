"""x_next = A x + B clip(u x + w pred) + C x_start_prev + sigma noise: reads each input and writes each output once."""

__all__ = ["reverse_step"]

import math

import triton
import triton.language as tl
from torch import Tensor

from .noise import tile_noise
from .tiles import grid, load_key, load_tile, locate, part_of_program, store, table_row, tiling


def reverse_step(
    x: Tensor,
    pred: Tensor,
    noise: Tensor | None,
    keys: Tensor | None,
    x_start_prev: Tensor | None,
    variance: Tensor | None,
    bounds: Tensor | None,
    step: Tensor,
    rows: Tensor,
    low: float,
    high: float,
    x_next: Tensor,
    x_start: Tensor | None,
    model_input: Tensor | None,
) -> None:
    if x.numel():
        extent, channels, tiles, constants = tiling(x, keys, pred, per_thread=16)
        _reverse_step[grid(len(x), tiles)](
            x,
            pred,
            noise,
            keys,
            x_start_prev,
            variance,
            bounds,
            step,
            rows,
            x_next,
            x_start,
            model_input,
            low,
            high,
            len(rows),
            extent,
            channels,
            CLIP=bounds is not None or low > -math.inf or high < math.inf,
            STEP_IS_SHARED=step.dim() == 0,
            KEYS_OF_STEPS=keys is not None and len(keys) > 1,
            **constants,
        )


@triton.jit(do_not_specialize=["steps"])
def _reverse_step(
    x,
    pred,
    noise,
    keys,
    x_start_prev,
    variance,
    bounds,
    step,
    rows,
    x_next,
    x_start_out,
    model_input,
    low,
    high,
    steps,
    extent,
    channels,
    CLIP: tl.constexpr,
    STEP_IS_SHARED: tl.constexpr,
    KEYS_OF_STEPS: tl.constexpr,
    LAYOUT: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    sample = tl.program_id(0)
    tile, start, element, mask = locate(sample, part_of_program(), extent, channels, LAYOUT, LANES, BLOCK, VECTOR)
    state = load_tile(x, start, extent, element, mask, LANES)
    predicted = load_tile(pred, start, extent, element, mask, LANES)
    if x_start_prev is not None:
        previous = load_tile(x_start_prev, start, extent, element, mask, LANES)
    if variance is not None:
        v = load_tile(variance, start, extent, element, mask, LANES)
    if noise is not None:
        z = load_tile(noise, start, extent, element, mask, LANES)

    index = tl.load(step) if STEP_IS_SHARED else tl.load(step + sample)
    row, valid = table_row(rows, index, steps, 6 if variance is None else 8)
    u = tl.load(row, mask=valid, other=float("nan"))
    w = tl.load(row + 1, mask=valid, other=float("nan"))
    A = tl.load(row + 2, mask=valid, other=float("nan"))
    B = tl.load(row + 3, mask=valid, other=float("nan"))
    C = tl.load(row + 4, mask=valid, other=float("nan"))
    sigma = tl.load(row + 5, mask=valid, other=float("nan"))
    if variance is not None:
        lower = tl.load(row + 6, mask=valid, other=float("nan"))
        upper = tl.load(row + 7, mask=valid, other=float("nan"))
    if bounds is not None:
        low, high = tl.load(bounds + 2 * sample), tl.load(bounds + 2 * sample + 1)
    if keys is not None:
        of_step = index * tl.num_programs(0) if KEYS_OF_STEPS else 0
        z = tile_noise(load_key(keys, of_step + sample, valid), tile, channels, LAYOUT, LANES, BLOCK, VECTOR)

    for lane in tl.static_range(LANES):
        at = start + lane * extent
        x_start = u * state[lane] + w * predicted[lane]
        if CLIP:  # NaN stays NaN, as in torch.clamp
            x_start = tl.maximum(x_start, low, propagate_nan=tl.PropagateNan.ALL)
            x_start = tl.minimum(x_start, high, propagate_nan=tl.PropagateNan.ALL)
        result = A * state[lane] + B * x_start
        if x_start_prev is not None:
            result += C * previous[lane]
        if noise is not None or keys is not None:
            deviation = sigma
            if variance is not None:
                learned = tl.exp(0.5 * (lower + (v[lane] + 1) * 0.5 * (upper - lower)))
                deviation = tl.where(sigma > 0, learned, 0.0)
            result += deviation * z[lane]
        store(x_next, at, element, mask, result)
        if x_start_out is not None:
            store(x_start_out, at, element, mask, x_start)
        if model_input is not None:
            store(model_input, at, element, mask, result)
