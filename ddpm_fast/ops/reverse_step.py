"""One step of any sampler, x_next = A x + B clip(x0_hat) + C x0_prev + sigma z, with x0_hat = u x + w pred."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, layout, reference

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
    out: ReverseStep | None = None,
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
        out: tensors to write the results to, of their shapes, dtypes and layouts, instead of new ones; with None for
            what is not wanted, whatever the two arguments above say. out.x may be x, and out.x_start x_start_prev: a
            run of steps in place. Not where a gradient is wanted.

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
        x.dtype in layout.FLOATING
        and x.dim() >= 1
        and all(y is None or (y.shape == x.shape and y.is_floating_point() and y.device == x.device) for y in alike)
        and step.shape in (torch.Size(()), x.shape[:1])
        and step.dtype == torch.int64
        and rows.dim() == 2
        and rows.shape[1] == columns
        and x.device == step.device == rows.device
        and layout.noise_fits(x, noise, keys, x.shape[:1] if keys is None or keys.dim() == 2 else (len(rows), len(x)))
        and not (noise is not None and keys is not None)
        and (bounds is None or (bounds.shape == (len(x), 2) and bounds.device == x.device))
    )
    if not fits:
        layout.refuse(
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
    memory_format = layout.memory_format(x)
    # A state in half precision goes with predictions of its own dtype, one in float32 with any.
    pred_dtype = pred.dtype
    inner = x.dtype if x.dtype in (torch.bfloat16, torch.float16) or pred.dtype == torch.float64 else pred.dtype
    if out is not None:
        _check_out(out, x, inner, memory_format)
        return_x_start, return_model_input = out.x_start is not None, out.model_input is not None
    x = x.contiguous(memory_format=memory_format)
    pred, variance = (layout.as_given(y, inner, memory_format) for y in (pred, variance))
    noise, x_start_prev = (layout.as_given(y, x.dtype, memory_format) for y in (noise, x_start_prev))
    if keys is not None and keys.dim() == 2:
        keys = keys[None]
    rows = layout.table(rows, x)
    if bounds is not None:
        bounds = bounds.to(rows.dtype)
    keys, step, bounds = layout.dense(keys, step, bounds)

    function = _op(x)
    arguments = (x, pred, noise, keys, x_start_prev, variance, bounds, step, rows, float(low), float(high))
    wants_grad = layout.needs_grad(x, pred, noise, x_start_prev, variance, *(out or ()))
    if wants_grad and out is not None:
        raise ValueError(
            "reverse_step writes to `out` only where no gradient is wanted: detach its inputs, or give none"
        )
    if wants_grad or function is _op.reference:
        x_next, x_start = reference.reverse_step(*arguments)
        model_input = x_next.to(pred_dtype) if return_model_input else None
        results = ReverseStep(x_next, x_start if return_x_start else None, model_input)
        if out is None:
            return results
        for to, result in zip(out, results, strict=True):
            if to is not None:
                to.copy_(result)
        return out

    def new(dtype: torch.dtype) -> Tensor:
        return torch.empty_like(x, dtype=dtype, memory_format=memory_format)

    results = out
    if results is None:
        model_input = new(inner) if return_model_input and inner != x.dtype else None
        results = ReverseStep(new(x.dtype), new(x.dtype) if return_x_start else None, model_input)
    function(*arguments, *results)
    if out is not None and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([y for y in out if y is not None])
    if return_model_input and results.model_input is None:
        return results._replace(model_input=results.x.to(pred_dtype))
    return results


def _check_out(out: ReverseStep, x: Tensor, model_dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    for name, result, dtype in zip(out._fields, out, (x.dtype, x.dtype, model_dtype), strict=True):
        fits = (
            result is not None
            and result.shape == x.shape
            and result.dtype == dtype
            and result.device == x.device
            and result.is_contiguous(memory_format=memory_format)
        )
        if not fits and (result is not None or name == "x"):
            needs = f"out.{name} in {str(dtype).removeprefix('torch.')}, in the shape and layout of x"
            layout.refuse("reverse_step", needs, x=x, **{f"out.{name}": result})


def _kernel(*arguments):
    *arguments, x_next, x_start_out, model_input = arguments
    *_, step, rows, _, _ = arguments
    layout.check_index("reverse_step", "step", step, len(rows))
    result, x_start = reference.reverse_step(*arguments)
    x_next.copy_(result)
    if x_start_out is not None:
        x_start_out.copy_(x_start)
    if model_input is not None:
        model_input.copy_(result)


def _fake(*arguments):
    pass


_op = dispatch.define(
    "reverse_step",
    "(Tensor x, Tensor pred, Tensor? noise, Tensor? keys, Tensor? x_start_prev, Tensor? variance, Tensor? bounds, "
    "Tensor step, Tensor rows, float low, float high, Tensor(a!) x_next, Tensor(b!)? x_start, "
    "Tensor(c!)? model_input) -> ()",
    kernel=_kernel,
    reference=reference.reverse_step,
    fake=_fake,
)
