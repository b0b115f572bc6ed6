"""One step of any sampler, x_next = A x + B clip(x0_hat) + C x0_prev + sigma z, with x0_hat = u x + w pred."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, door, reference

__all__ = ["ReverseStep", "reverse_step"]


class ReverseStep(NamedTuple):
    """What a step gives; None for what was not asked for."""

    x: Tensor
    x_start: Tensor | None
    model_input: Tensor | None


def reverse_step(
    x: Tensor,
    pred: Tensor,
    step: Tensor,
    rows: Tensor,
    *,
    noise: Tensor | None = None,
    keys: Tensor | None = None,
    x_start_prev: Tensor | None = None,
    variance: Tensor | None = None,
    clip: tuple[float, float] | Tensor | None = None,
    return_x_start: bool = False,
    return_model_input: bool = False,
) -> ReverseStep:
    """One step of any sampler: x_next = A x + B clip(x0_hat) + C x0_prev + sigma z, with x0_hat = u x + w pred.

    Args:
        x: the state x_t, (N, ...), floating; float32 for all but the shortest runs.
        pred: what the network predicted from it, the shape of x, floating.
        step: which row: () for all samples, or (N,); int64, in [0, K).
        rows: (u, w, A, B, C, sigma) of each step, (K, 6) float32 (float64 for float64 data); with `variance` (K, 8),
            the log of the lower and of the upper variance at the end.
        noise: z, the shape of x, floating; or
        keys: keys from which z is made where it is needed, int64: (K, N, 2), of each step and sample, or (N, 2), of
            each sample for this step alone. Neither leaves the term out.
        x_start_prev: x0_hat of the step before, the shape of x; None leaves the term out.
        variance: v in [-1, 1] that the network predicted, the shape of x: sigma^2 lies between the two variances of the
            row, (v + 1) / 2 of the way from the log of the lower to that of the upper (Nichol & Dhariwal 2021,
            eq. 15). A row with sigma = 0 still has no noise.
        clip: (low, high), bounds of x0_hat, or a tensor (N, 2) of them for each sample; None leaves it as it is.
        return_x_start: give clip(x0_hat) too, for a multistep sampler, self-conditioning or a preview.
        return_model_input: give x_next in the dtype of pred too, for the network's next call.

    Returns:
        x_next and clip(x0_hat) in the shape and dtype of x, x_next in the dtype of pred; channels-last where x is,
        contiguous otherwise. They are computed in float32 (float64 for float64 data) and rounded once.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or both noise and keys.
        RuntimeError: a step on the CPU that is not in [0, K).
    """
    bounds = clip if isinstance(clip, Tensor) else None
    low, high = (-math.inf, math.inf) if clip is None or bounds is not None else clip
    columns = 6 if variance is None else 8
    alike = (pred, x_start_prev, variance)
    fits = (
        x.dtype in door.FLOATING
        and x.dim() >= 1
        and all(y is None or (y.shape == x.shape and y.is_floating_point() and y.device == x.device) for y in alike)
        and step.shape in (torch.Size(()), x.shape[:1])
        and step.dtype == torch.int64
        and rows.dim() == 2
        and rows.shape[1] == columns
        and x.device == step.device == rows.device
        and door.noise_fits(x, noise, keys, x.shape[:1] if keys is None or keys.dim() == 2 else (len(rows), len(x)))
        and not (noise is not None and keys is not None)
        and (bounds is None or (bounds.shape == (len(x), 2) and bounds.device == x.device))
    )
    if not fits:
        door.refuse(
            "reverse_step",
            f"x (N, ...) floating, pred (and x_start_prev, variance) of its shape, step () or (N,) int64, rows "
            f"(K, {columns}) float32, at most one of noise of the shape of x and keys (N, 2) or (K, N, 2) int64, and "
            "clip (low, high) or (N, 2), on one device",
            x=x,
            pred=pred,
            step=step,
            rows=rows,
            noise=noise,
            keys=keys,
            x_start_prev=x_start_prev,
            variance=variance,
            clip=bounds,
        )
    layout = door.memory_format(x)
    # A state in half precision goes with predictions of its own dtype, one in float32 with any.
    pred_dtype = pred.dtype
    inner = x.dtype if x.dtype in (torch.bfloat16, torch.float16) or pred.dtype == torch.float64 else pred.dtype
    x = x.contiguous(memory_format=layout)
    pred, variance = (door.as_given(y, inner, layout) for y in (pred, variance))
    noise, x_start_prev = (door.as_given(y, x.dtype, layout) for y in (noise, x_start_prev))
    if keys is not None and keys.dim() == 2:
        keys = keys[None]
    rows = door.table(rows, x)
    if bounds is not None:
        bounds = bounds.to(rows.dtype)
    keys, step, bounds = door.dense(keys, step, bounds)

    function = _op(x)
    arguments = (x, pred, noise, keys, x_start_prev, variance, bounds, step, rows, float(low), float(high))
    if function is _op.reference or door.needs_grad(x, pred, noise, x_start_prev, variance):
        x_next, x_start = reference.reverse_step(*arguments)
        model_input = None
    else:
        emit = return_model_input and pred.dtype != x.dtype
        x_next, x_start, model_input = function(*arguments, return_x_start, emit)
        model_input = model_input if emit else None
    if return_model_input and model_input is None:
        model_input = x_next.to(pred_dtype)
    return ReverseStep(x_next, x_start if return_x_start else None, model_input)


def _kernel(*arguments):
    *arguments, return_x_start, return_model_input = arguments
    x, pred, *_, step, rows, _, _ = arguments
    door.check_index("reverse_step", "step", step, len(rows))
    layout = door.memory_format(x)
    x_next, x_start = (y.contiguous(memory_format=layout) for y in reference.reverse_step(*arguments))
    nothing = x.new_empty(0)
    return (
        x_next,
        x_start if return_x_start else nothing,
        x_next.to(pred.dtype) if return_model_input else nothing.to(pred.dtype, copy=True),
    )


def _fake(x, pred, noise, keys, x_prev, variance, bounds, step, rows, low, high, return_x_start, return_model_input):
    def like(wanted: bool, dtype: torch.dtype) -> Tensor:
        if not wanted:
            return x.new_empty(0, dtype=dtype)
        return torch.empty_like(x, dtype=dtype, memory_format=door.memory_format(x))

    return like(True, x.dtype), like(return_x_start, x.dtype), like(return_model_input, pred.dtype)


_op = backends.define(
    "reverse_step",
    "(Tensor x, Tensor pred, Tensor? noise, Tensor? keys, Tensor? x_start_prev, Tensor? variance, Tensor? bounds, "
    "Tensor step, Tensor rows, float low, float high, bool return_x_start, bool return_model_input) "
    "-> (Tensor x_next, Tensor x_start, Tensor model_input)",
    kernel=_kernel,
    reference=reference.reverse_step,
    fake=_fake,
)
