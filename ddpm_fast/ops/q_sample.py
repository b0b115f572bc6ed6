"""The forward process, x_t = a_t x_0 + s_t eps with a_t = sqrt(abar_t) and s_t = sqrt(1 - abar_t)."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, layout, reference
from .arguments import FLOATING, Rule, Rules, check_index, is_index, is_table, keys_fit, noise_fits
from .noise import given_noise

__all__ = ["q_sample"]


class QSampleArguments(NamedTuple):
    """The strict op's arguments, as csrc/common/arguments.h has them in struct QSample."""

    x_start: Tensor
    noise: Tensor | None
    keys: Tensor | None
    t: Tensor
    rows: Tensor
    dtype: torch.dtype


_RULES = Rules(
    "q_sample",
    ("x_start", "noise", "keys", "t", "rows"),
    Rule(
        "x_start (N, ...) floating or uint8",
        lambda x, *_: (x.dtype in FLOATING or x.dtype == torch.uint8) and x.dim() >= 1,
    ),
    Rule("t (N,) int64 on the device of x_start", lambda x, noise, keys, t, _: is_index(t, x)),
    Rule("rows (T, 2) floating on the device of x_start", lambda x, noise, keys, t, rows: is_table(rows, 2, x)),
    Rule("either noise or keys", lambda x, noise, keys, *_: (noise is None) != (keys is None)),
    Rule("noise floating, in the shape and on the device of x_start", lambda x, noise, *_: noise_fits(x, noise)),
    Rule(
        "keys (N, 2) int64 on the device of x_start",
        lambda x, noise, keys, *_: keys_fit(x, keys, x.shape[0]),
    ),
)


def q_sample(
    x_start: Tensor,
    t: Tensor,
    rows: Tensor,
    *,
    noise: Tensor | None = None,
    keys: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draws x_t from q(x_t | x_0): a_t x_0 + s_t eps (Ho et al. 2020, eq. 4).

    Args:
        x_start: x_0, (N, ...); float32, bfloat16, float16 or float64 of any range, or uint8, which is mapped from
            [0, 255] to [-1, 1].
        t: a timestep for each sample, in [0, T); (N,) int64.
        rows: the schedule as rows (a_t, s_t); (T, 2) float32, or float64 for float64 data.
        noise: eps ~ N(0, 1), the shape of x_start, floating.
        keys: instead of noise, a key for each sample, (N, 2) int64: eps is made where it is needed, as
            `noise.gaussian` makes it, and never stored.
        dtype: of x_t; by default that of x_start, float32 for uint8.

    Returns:
        x_t, with the shape of x_start; channels-last where x_start is, contiguous otherwise. It is computed in
        float32 (float64 for float64 data) and rounded once. Gradients flow to x_start and noise.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or not exactly one of noise and keys.
        RuntimeError: a t on the CPU that is not in [0, T). On a GPU it is a device-side assertion, which fails
            after the call has returned; Triton's kernels give NaN instead.
    """
    _RULES.check(x_start, noise, keys, t, rows)
    if dtype is None:
        dtype = torch.float32 if x_start.dtype == torch.uint8 else x_start.dtype
    data = x_start.dtype
    if data not in (torch.uint8, dtype):
        data = torch.promote_types(data, torch.float64 if dtype == torch.float64 else torch.float32)
    memory_format = layout.memory_format(x_start)
    x_start = layout.as_given(x_start, data, memory_format)
    noise = layout.as_given(noise, torch.float32 if data == torch.uint8 else data, memory_format)
    keys, t = layout.dense(keys, t)
    function = _op(x_start, differentiated=dtype == torch.float64)
    return function(*QSampleArguments(x_start, noise, keys, t, layout.table(rows, x_start), dtype))


def _reference(*arguments):
    x_start, noise, keys, t, rows, dtype = arguments
    check_index("q_sample", "t", t, rows.shape[0])
    x_t = reference.q_sample(x_start, given_noise(noise, keys, x_start.shape), t, rows, dtype)
    return x_t.contiguous(memory_format=layout.memory_format(x_start))


def _fake(x_start, noise, keys, t, rows, dtype):
    return torch.empty_like(x_start, dtype=dtype, memory_format=layout.memory_format(x_start))


def _setup_context(ctx, inputs, output) -> None:
    x_start, noise, _, t, rows, _ = inputs
    ctx.dtypes = x_start.dtype, None if noise is None else noise.dtype
    ctx.save_for_backward(t, rows)


def _backward(ctx, grad: Tensor):
    t, rows = ctx.saved_tensors
    a, s = rows[t].reshape(-1, 2, *[1] * (grad.dim() - 1)).unbind(1)  # (N, 1, ...) each
    needs_x_start, needs_noise, *_ = ctx.needs_input_grad
    return (
        (a * grad).to(ctx.dtypes[0]) if needs_x_start else None,
        (s * grad).to(ctx.dtypes[1]) if needs_noise else None,
        *[None] * 4,
    )


_op = dispatch.define(
    "q_sample",
    "(Tensor x_start, Tensor? noise, Tensor? keys, Tensor t, Tensor rows, ScalarType dtype) -> Tensor",
    arguments=QSampleArguments,
    kernel=_reference,
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
